"""The idea of fxfusion in 300 lines: PyTorch, SciPy, scikit-learn's digits, and nothing of fxfusion.

    python examples/from_scratch.py [--steps 150]

Two residual networks are trained from different initialisations. Their averaged weights compute nothing of
use, because units that do the same lie in different places. The graph says which units may be rearranged.
"""

from __future__ import annotations

import argparse
import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_digits
from torch import Tensor, fx, nn
from torch.nn.functional import cross_entropy, relu

State = dict[str, Tensor]  # a state dict: parameters and buffers


# -- 1. capture: a graph of pure functions --------------------------------------------------------
class Program:
    """A functional ATen graph: parameters and buffers are inputs like the images. No tied weights."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        # No decompositions: in-place operators go, but a convolution stays whole, for which one rule will do.
        exported = torch.export.export(model, (images,)).run_decompositions({})
        signature = exported.graph_signature
        self.module = exported.graph_module
        self.keys = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}  # by placeholder

    @torch.no_grad()
    def run(self, state: State, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the output, and the value of every node, under the parameters in ``state``."""
        names = [node.name for node in self.module.graph.find_nodes(op="placeholder")]
        interpreter = fx.Interpreter(self.module, garbage_collect_values=False)
        (output,) = interpreter.run(*(state[self.keys[n]] if n in self.keys else images for n in names))
        return output, {node.name: value for node, value in interpreter.env.items()}


# -- 2. propagate: what every axis enumerates -----------------------------------------------------
@dataclasses.dataclass(eq=False)
class Space:
    """The label of an axis, a node of a union-find: axes of one space are permuted together."""

    size: int
    fixed: str = ""  # why only the identity may act; empty while the space is free
    bound: Space | None = None  # the space that this one was unified with

    def root(self) -> Space:
        """Return the space that stands for this one now."""
        return self if self.bound is None else self.bound.root()

    def fix(self, reason: str) -> None:
        """Let only the identity act; the first reason is kept."""
        self.root().fixed = self.root().fixed or reason

    def unify(self, other: Space) -> Space:
        """Say that both enumerate the same units."""
        left, right = self.root(), other.root()
        if left is not right:
            left.fix(right.fixed)
            right.bound = left
        return left


Axes = tuple[Space, ...]  # of a tensor: one space per axis
# A rule gets the output's shape and the operator's arguments, axes in the place of tensors, and returns the
# output's axes. Where it returns None, what the operator touches is fixed: a guess would be silently wrong.


def linear_rule(shape: torch.Size, x: Axes, weight: Axes, bias: Axes | None = None) -> Axes:
    """Contract the last axis of ``x`` with ``weight [out, in]``: a sum is the same in any order."""
    x[-1].unify(weight[1])
    if bias is not None:
        bias[0].unify(weight[0])
    return (*x[:-1], weight[0])


def conv_rule(shape: torch.Size, x: Axes, weight: Axes, bias: Axes | None = None, *_: Any) -> Axes | None:
    """Contract the channels of ``x [batch, in, rows, columns]``; positions and kernel taps have an order."""
    if x[1].size != weight[1].size:  # grouped: an axis would be a product, groups times channels of each
        return None
    positions = tuple(map(Space, shape[2:]))
    for space in (*x[2:], *weight[2:], *positions):
        space.fix("convolutions look at neighbours")
    return (x[0], *linear_rule(shape, x[1:2], weight, bias), *positions)


def norm_rule(shape: torch.Size, x: Axes, *arguments: Any) -> Axes:
    """Channel by channel: weight, bias, running mean and variance move with the channels of ``x``."""
    for vector in filter(None, arguments[:4]):
        x[1].unify(vector[0])
    return x


def add_rule(shape: torch.Size, x: Axes, y: Axes | float) -> Axes | None:
    """Join unit by unit: skip and branch of a residual block become one space."""
    alike = isinstance(y, tuple) and [space.size for space in x] == [space.size for space in y]
    return tuple(map(Space.unify, x, y)) if alike else None  # broadcasting is left out


def mean_rule(shape: torch.Size, x: Axes, dimensions: Sequence[int], keepdim: bool = False) -> Axes | None:
    """Average axes away; the others stay what they are."""
    gone = {dimension % len(x) for dimension in dimensions}
    return None if keepdim else tuple(space for axis, space in enumerate(x) if axis not in gone)


RULES: dict[Any, Callable[..., Axes | None]] = {
    torch.ops.aten.linear.default: linear_rule,
    torch.ops.aten.conv2d.default: conv_rule,
    torch.ops.aten._native_batch_norm_legit_no_training.default: norm_rule,
    torch.ops.aten.add.Tensor: add_rule,
    torch.ops.aten.mean.dim: mean_rule,
    torch.ops.aten.relu.default: lambda shape, x: x,  # acts on every number alike
    operator.getitem: lambda shape, first, index: first if index == 0 else None,  # of several outputs
}
Plan = dict[str, Axes]  # by key in the state dict or name of a node: the axes of its tensor


def propagate(program: Program) -> tuple[Plan, Plan]:
    """Label all axes in one pass over the graph; return those of parameters and those of activations."""
    axes: dict[fx.Node, Axes] = {}
    *nodes, output = program.module.graph.nodes
    for node in nodes:
        value = node.meta["val"][0] if isinstance(node.meta["val"], tuple | list) else node.meta["val"]
        known, fresh = None, tuple(map(Space, value.shape))
        if node.name in program.keys:  # a parameter is free until something fixes it
            known = fresh
        elif node.target in RULES and not node.kwargs:  # options given by name: no rule knows any
            known = RULES[node.target](value.shape, *fx.map_arg(node.args, axes.get))
        if known is None:
            for space in (*fresh, *(space for source in node.all_input_nodes for space in axes[source])):
                space.fix("no rule" if node.op == "call_function" else "input")
        axes[node] = fresh if known is None else known
    for space in (space for node in output.all_input_nodes for space in axes[node]):
        space.fix("output")
    plan = {node.name: tuple(space.root() for space in axes[node]) for node in axes}
    single = [node.name for node in axes if isinstance(node.meta["val"], Tensor)]
    return {key: plan[name] for name, key in program.keys.items()}, {name: plan[name] for name in single}


def places(plan: Plan) -> dict[Space, list[tuple[str, int]]]:
    """Return for every free space which tensors hold it, and at which axis."""
    found: dict[Space, list[tuple[str, int]]] = {}
    for name, axes in plan.items():
        for axis, space in enumerate(axes):
            if not space.fixed and space.size > 1:
                found.setdefault(space, []).append((name, axis))
    return found


# -- 3. certify: a random element of the inferred group -------------------------------------------
Maps = dict[Space, Tensor]  # unit i of the result is unit map[i] of the tensor that is carried


def carry(tensor: Tensor, axes: Axes, maps: Maps, but: int = -1) -> Tensor:
    """Permute a tensor along all of its axes (but one) by the maps of their spaces."""
    for axis, space in enumerate(axes):
        if space in maps and axis != but:
            tensor = tensor.index_select(axis, maps[space])
    return tensor


def certify(program: Program, plan: Plan, state: State, images: Tensor) -> list[float]:
    """Return the relative change of outputs under random permutations; under half of them, as a control."""
    maps = {space: torch.randperm(space.size) for space in places(plan)}
    exact = {key: value.double() for key, value in state.items()}  # float64: rounding hides no error
    twin = {key: carry(value, plan[key], maps) for key, value in exact.items()}
    half = {key: (exact, twin)[i % 2][key] for i, key in enumerate(exact)}
    expected, *found = (program.run(tried, images.double())[0] for tried in (exact, twin, half))
    return [float((outputs - expected).abs().max() / expected.abs().max()) for outputs in found]


# -- 4. align: one permutation per space ----------------------------------------------------------
def rows(tensor: Tensor, axis: int) -> Tensor:
    """Return a matrix with a row for every unit of one axis: images and positions alike are samples."""
    return tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1).double()


def assign(profit: Tensor) -> Tensor:
    """Return for every column, a unit of the second network, its partner among the rows."""
    return torch.as_tensor(linear_sum_assignment(profit.T.numpy(), maximize=True)[1])


def correlations(sums: Tensor) -> Tensor:
    """Return correlations across two networks from summed products of (its units, the other's, one)."""
    mean = sums[:-1, -1] / sums[-1, -1]
    covariance = sums[:-1, :-1] / sums[-1, -1] - mean.outer(mean)
    deviation = covariance.diagonal().clamp_min(1e-12).sqrt()
    return (covariance / deviation.outer(deviation))[: len(mean) // 2, len(mean) // 2 :]


def match_activations(program: Program, plan: Plan, a: State, b: State, batches: Sequence[Tensor]) -> Maps:
    """Pair units that correlate at all nodes that a space runs through; sums are kept, not activations."""
    found = places(plan)
    sums: dict[tuple[str, int], Tensor] = {}
    for images in batches:
        (_, of_a), (_, of_b) = program.run(a, images), program.run(b, images)
        for name, axis in {place for places_of_one in found.values() for place in places_of_one}:
            units = [rows(of_a[name], axis), rows(of_b[name], axis)]
            both = torch.cat([*units, torch.ones_like(units[0][:1])])  # products with one are sums
            sums[name, axis] = sums.get((name, axis), 0) + both @ both.T
    return {space: assign(sum(correlations(sums[place]) for place in found[space])) for space in found}


def match_weights(plan: Plan, a: State, b: State) -> Maps:
    """Pair units with similar weights: block-coordinate ascent, since a weight lies between two spaces."""
    found = places(plan)
    maps = {space: torch.arange(space.size) for space in found}
    for space in [*found] * 10:  # sweeps
        moved = [(carry(a[key], plan[key], maps, but=axis), b[key], axis) for key, axis in found[space]]
        maps[space] = assign(sum(rows(left, axis) @ rows(right, axis).T for left, right, axis in moved))
    return maps


# -- 5. merge -------------------------------------------------------------------------------------
def average(plan: Plan, a: State, b: State, maps: Maps) -> State:
    """Carry the first network into the second one's order of units, and average."""
    return {key: ((carry(a[key], plan[key], maps) + b[key]) / 2).to(b[key].dtype) for key in b}


@torch.no_grad()
def load(state: State, images: Tensor) -> nn.Module:
    """Load into the original class, and take BatchNorm's statistics anew: averaged units vary less."""
    model = ResidualNetwork()
    model.load_state_dict(state, strict=True)
    for _, norm in model.layers:
        norm.momentum = 1.0  # the statistics of the images at hand only
    model.train()(images)
    return model.eval()


# -- 6. two networks ------------------------------------------------------------------------------
class ResidualNetwork(nn.Module):
    """A stem, two residual blocks on one stream, and a classifier of its mean over positions."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(n, width, 3, stride, 1) for n, stride in [(1, 2), *[(width, 1)] * 4]]
        self.layers = nn.ModuleList(nn.Sequential(conv, nn.BatchNorm2d(width)) for conv in convolutions)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        stream = relu(self.layers[0](images))
        for inner, outer in (self.layers[1:3], self.layers[3:5]):
            stream = relu(stream + outer(relu(inner(stream))))
        return self.head(stream.mean((2, 3)))


def train(images: Tensor, labels: Tensor, steps: int, seed: int) -> nn.Module:
    """Train a network from an initialisation of its own."""
    torch.manual_seed(seed)
    model = ResidualNetwork()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    for picked in torch.randint(len(images), (steps, 64)):
        optimizer.zero_grad()
        cross_entropy(model(images[picked]), labels[picked]).backward()
        optimizer.step()
    return model.eval()


def main() -> None:
    """Print what is found, and accuracies of parents and averages, all of these with repaired statistics."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    torch.set_num_threads(1)
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images, test_images = (torch.tensor(digits.images)[order, None].float() / 8 - 1).split([1347, 450])
    labels, test_labels = torch.tensor(digits.target)[order].split([1347, 450])
    parents = [train(images, labels, parser.parse_args().steps, seed) for seed in range(2)]
    a, b = (parent.state_dict() for parent in parents)
    program = Program(parents[0], images[:2])
    plan, activations = propagate(program)
    for space, found in places(plan).items():
        print(f"free space of {space.size} units: {len(found)} axes of parameters, first {found[0][0]}")
    for same, control in (certify(program, plan, state, test_images) for state in (a, b)):
        print(f"outputs change by {same:.0e}, with half of the parameters permuted by {control:.0e}")
    methods: dict[str, Maps] = {
        "vanilla average": {},
        "fused by weights": match_weights(plan, a, b),
        "fused by activations": match_activations(program, activations, a, b, images.split(100)),
    }
    networks = {f"parent {seed}": parent for seed, parent in enumerate(parents)}
    networks |= {name: load(average(plan, a, b, maps), images) for name, maps in methods.items()}
    for name, network in networks.items():
        hits = network(test_images).argmax(-1) == test_labels
        print(f"{name:24} {100 * float(hits.double().mean()):5.1f} %")


# The library adds products and sums of axes (packed, grouped), units that move differently below every head,
# rotations and invertible maps beside permutations, soft couplings, and parents of other widths and depths.
if __name__ == "__main__":
    main()
