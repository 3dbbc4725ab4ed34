"""Solvers side by side: ours, SciPy's and POT's, on the same costs, in one run.

    python examples/solvers.py [--units 768,4096] [--costs alike,uneven,twin] [--repeats 1]
                               [--largest-peer 4096] [--largest-soft 768]

Costs are squared distances of random features: *alike* if all units have the same length on average,
*uneven* if their lengths differ by factors, as in trained networks, *twin* if the second set is the first one
shuffled, with noise. Seconds are of one thread, the best of the repeats. Soft couplings are solved for one
softness, to the precision that each solver has by default; some of their cost above the best is wanted.
*within* are auctions, which certify how far they are from the best.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Annotated

import numpy as np
import ot
import torch
import typer
from rich.console import Console
from rich.table import Table
from scipy.optimize import linear_sum_assignment

from fxfusion.transport.assignment import assign, auction
from fxfusion.transport.sinkhorn import sinkhorn

FEATURES = 256
SOFTNESS = 0.05
KINDS = ("alike", "uneven", "twin")


def costs(kind: str, units: int) -> torch.Tensor:
    """Return a ground cost ``[units, units]`` with mean one."""
    draw = torch.Generator().manual_seed(0)
    left = torch.randn(units, FEATURES, generator=draw, dtype=torch.float64)
    right = torch.randn(units, FEATURES, generator=draw, dtype=torch.float64)
    if kind == "uneven":
        left *= torch.randn(units, 1, generator=draw, dtype=torch.float64).exp()
        right *= torch.randn(units, 1, generator=draw, dtype=torch.float64).exp()
    elif kind == "twin":
        right = left[torch.randperm(units, generator=draw)] + 0.5 * right
    found = torch.cdist(left, right).square()
    return found / found.mean()


def timed(solve: Callable[[], float], repeats: int) -> tuple[float, float]:
    """Return the least seconds of several runs, and the cost."""
    seconds, value = [], 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        value = solve()
        seconds.append(time.perf_counter() - start)
    return min(seconds), value


def main(
    units: Annotated[str, typer.Option(help="Numbers of units, separated by commas.")] = "256,768",
    kinds: Annotated[str, typer.Option("--costs", help="Kinds, separated by commas.")] = ",".join(KINDS),
    repeats: Annotated[int, typer.Option(min=1)] = 1,
    largest_peer: Annotated[int, typer.Option(help="SciPy's and POT's solvers up to so many units.")] = 4096,
    largest_soft: Annotated[int, typer.Option(help="Soft couplings up to so many units.")] = 768,
) -> None:
    """Make the table."""
    if unknown := set(kinds.split(",")) - set(KINDS):
        raise typer.BadParameter(f"there are no costs {', '.join(sorted(unknown))}: name {', '.join(KINDS)}")
    torch.set_num_threads(1)
    table = Table(title="solvers, on one thread")
    for heading in ("units", "costs", "solver", "seconds", "cost above the best"):
        table.add_column(heading, justify="left" if heading in ("costs", "solver") else "right")
    for count in map(int, units.split(",")):
        for kind in kinds.split(","):
            matrix = costs(kind, count)
            uniform = np.full(count, 1.0 / count)

            def assigned(matrix: torch.Tensor = matrix) -> float:
                return float(assign(matrix[None])[1]) / len(matrix)

            def near(matrix: torch.Tensor = matrix, gap: float = 0.01) -> float:
                return float(auction(matrix[None], gap)[1]) / len(matrix)

            def scipy(matrix: torch.Tensor = matrix) -> float:
                rows, columns = linear_sum_assignment(matrix.numpy())
                return float(matrix[rows, columns].mean())

            def emd(matrix: torch.Tensor = matrix, uniform: np.ndarray = uniform) -> float:
                return float(ot.emd2(uniform, uniform, matrix.numpy(), numItermax=10_000_000))

            def soft(matrix: torch.Tensor = matrix) -> float:
                plan, _ = sinkhorn(matrix[None], SOFTNESS, absolute=True)
                return float((plan[0] * matrix).sum())

            def soft_by_pot(matrix: torch.Tensor = matrix, uniform: np.ndarray = uniform) -> float:
                plan = ot.sinkhorn(uniform, uniform, matrix.numpy(), SOFTNESS, method="sinkhorn_log")
                return float((plan * matrix.numpy()).sum())

            solvers: dict[str, Callable[[], float]] = {
                "assignment, ours": assigned,
                "assignment within 1 %, ours": near,
                "assignment within 5 %, ours": functools.partial(near, gap=0.05),
                "assignment, SciPy": scipy,
                "emd, POT": emd,
                "Sinkhorn, ours": soft,
                "Sinkhorn, POT": soft_by_pot,
            }
            for name in list(solvers):
                peer, is_soft = not name.endswith("ours"), name.startswith("Sinkhorn")
                if (peer and count > largest_peer) or (is_soft and count > largest_soft):
                    del solvers[name]
            found = {name: timed(solve, repeats) for name, solve in solvers.items()}
            best = min(value for name, (_, value) in found.items() if name.startswith("assignment"))
            for name, (seconds, value) in found.items():
                gap = max((value - best) / best, 0.0)
                table.add_row(str(count), kind, name, f"{seconds:.3f}", f"{100 * gap:.2g} %")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
