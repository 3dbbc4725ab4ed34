"""Flow solving: transports layer by layer, their residual policies, and the costs they are solved from."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import FalconConfig, FalconForCausalLM, GPTJConfig, GPTJForCausalLM

import fxfusion
from fxfusion import Costs, Flow
from fxfusion.errors import CalibrationRequiredError, OptionError
from fxfusion.state import state_of
from fxfusion.statistics import CrossMoments
from fxfusion.transport.carry import Carried, Join, Solve, carry, settled
from fxfusion.transport.compare import Comparison, compare, ground_cost
from fxfusion.transport.hierarchy import Coupling
from fxfusion.transport.options import Metric, Scaling
from tests import zoo

PAPER = Costs(metric="euclidean", normalisation="max")
DEFAULT = Flow()


def follow(model: nn.Module, args: Any, kwargs: Any, flow: Flow = DEFAULT) -> Carried:
    prepared = fxfusion.prepare(model, args, kwargs)
    return carry(state_of(prepared).capture, fxfusion.plan(prepared), flow)


# -- which transport reaches which parameter --------------------------------------------------------


@pytest.mark.parametrize(("tables", "joins"), [("carried", 4), ("own", 5)])
def test_a_vit_joins_at_every_addition_of_its_residual_stream(tables: str, joins: int) -> None:
    carried = follow(zoo.build("hf_vit"), *zoo.inputs("hf_vit"), Flow(tables=tables))
    found = carried.transports()
    assert sum(isinstance(item, Join) for item in found) == joins
    first = next(item for item in found if isinstance(item, Join))
    assert isinstance(first.skip, Solve)
    skips = {writer.parameter for writer in first.skip.writers}
    assert skips == {"vit.embeddings.position_embeddings"} if tables == "own" else len(skips) > 1


def test_the_skip_is_what_the_branch_goes_around() -> None:
    carried = follow(Residuals(), (torch.randn(2, 6),), {})
    (join,) = (item for item in carried.transports() if isinstance(item, Join))
    skip, branch = settled(join.skip), settled(join.branch)
    assert isinstance(skip, Solve)
    assert isinstance(branch, Solve)
    assert skip.writers[0].parameter == "embed.weight"
    assert branch.writers[0].parameter == "up.weight"


@pytest.mark.parametrize(
    ("flow", "together"),
    [
        (Flow(heads="matched"), [{"q", "k", "v"}]),
        (Flow(heads="ignored"), [{"q", "k"}, {"v"}]),
        (Flow(heads="ignored", query_key="separate"), [{"q"}, {"k"}, {"v"}]),
        (Flow(heads="ignored", query_key="joint"), [{"q"}, {"k"}, {"v"}]),
    ],
    ids=["matched", "ignored", "separate", "joint"],
)
def test_queries_keys_and_values(flow: Flow, together: list[set[str]]) -> None:
    carried = follow(zoo.build("hf_vit"), *zoo.inputs("hf_vit"), flow)
    found = [
        {writer.parameter.split(".")[-2][0] for writer in item.writers}
        for item in carried.transports()
        if isinstance(item, Solve)
        and any("layers.0.attention" in writer.parameter for writer in item.writers)
    ]
    assert [group for group in found if group != {"o"}] == together


def test_a_gate_shares_the_transport_of_its_signal() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.signal, self.gate, self.after = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.after(self.signal(x) * self.gate(x).sigmoid())

    (transport,) = follow(Gated(), (torch.randn(2, 6),), {}).transports()
    assert isinstance(transport, Solve)
    assert {item.parameter for item in transport.writers} >= {"signal.weight", "gate.weight"}


# -- planted twins ----------------------------------------------------------------------------------

TWINS = ["hf_vit", "bert", "gpt2", "llama", "t5", "opt"]
WITHOUT_HEADS = ["resnet18", "regnetx_002", "mobilenetv3_small_050"]


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        *((name, heads) for name in TWINS for heads in ("matched", "ignored")),
        *((name, "matched") for name in WITHOUT_HEADS),
    ],
)
def test_twins_are_recovered(name: str, heads: str) -> None:
    args, kwargs = zoo.inputs(name)
    check_recovered(fxfusion.prepare(zoo.build(name), args, kwargs), heads)


@pytest.mark.parametrize("name", ["hf_vit", "bert", "t5"])
def test_twins_are_recovered_by_joint_queries_and_keys(name: str) -> None:
    args, kwargs = zoo.inputs(name)
    check_recovered(fxfusion.prepare(zoo.build(name), args, kwargs), "ignored", "joint")


def check_recovered(prepared: nn.Module, heads: str, query_key: str = "shared") -> None:
    """Fuse a network and a permuted copy of it, and ask for the network itself."""
    twin = copy.deepcopy(prepared)
    twin.load_state_dict(fxfusion.scramble(prepared, seed=2), strict=False)
    flow = Flow(heads=heads, query_key=query_key, tables="own")
    state = fxfusion.fuse([twin, prepared], features="weights", flow=flow).state_dict()
    for key, tensor in prepared.state_dict().items():
        assert torch.equal(state[key], tensor), key


PARALLEL: dict[str, Callable[[], nn.Module]] = {
    "gptj": lambda: GPTJForCausalLM(
        GPTJConfig(
            vocab_size=99,
            n_positions=32,
            n_embd=64,
            n_layer=2,
            n_head=4,
            rotary_dim=8,
            bos_token_id=0,
            eos_token_id=1,
        )
    ),
    "falcon": lambda: FalconForCausalLM(
        FalconConfig(vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    ),
}


@pytest.mark.parametrize("heads", ["matched", "ignored"])
@pytest.mark.parametrize("name", list(PARALLEL))
def test_twins_are_recovered_whose_attention_and_feed_forward_are_parallel(name: str, heads: str) -> None:
    torch.manual_seed(0)
    model = PARALLEL[name]().eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter)
    inputs = {"input_ids": torch.randint(0, 99, (2, 8)), "use_cache": False}
    prepared = fxfusion.prepare(model, (), inputs)
    carried = carry(state_of(prepared).capture, fxfusion.plan(prepared), Flow(heads=heads))
    joins = [item for item in carried.transports() if isinstance(item, Join)]
    assert len(joins) == 4  # per layer: attention with feed-forward, and both with the stream
    check_recovered(prepared, heads)


@pytest.mark.parametrize("residual", ["mean", "weighted_scalar", "weighted_matrix", "skip", "branch"])
def test_twins_are_recovered_from_activations_whatever_the_policy(residual: str) -> None:
    args, kwargs = zoo.inputs("hf_vit")
    prepared = fxfusion.prepare(zoo.build("hf_vit"), args, kwargs)
    twin = copy.deepcopy(prepared)
    twin.load_state_dict(fxfusion.scramble(prepared, seed=2))
    batches = [{"pixel_values": torch.randn(16, *kwargs["pixel_values"].shape[1:])} for _ in range(4)]
    result = fxfusion.fuse([twin, prepared], calibration=batches, flow=Flow(residual=residual))
    for key, tensor in prepared.state_dict().items():
        torch.testing.assert_close(result.state_dict()[key], tensor, rtol=0, atol=1e-5)


# -- against formulas written out -------------------------------------------------------------------


class Residuals(nn.Module):
    """``head(norm(embed(x) + up(relu(down(embed(x))))))``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.down, self.up = nn.Linear(6, 5), nn.Linear(5, 7), nn.Linear(7, 5)
        self.norm, self.head = nn.LayerNorm(5), nn.Linear(5, 3)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        return self.head(self.norm(x + self.up(self.down(x).relu())))


def coupling_of(target: torch.Tensor, source: torch.Tensor, regularisation: float | None) -> torch.Tensor:
    """Return the transport matrix ``[source, target]`` of two layers' rows, columns summing to one."""
    cost = torch.cdist(source.double(), target.double()).numpy()
    cost /= cost.max()
    masses = np.full(len(source), 1 / len(source)), np.full(len(target), 1 / len(target))
    if regularisation is None:
        plan = ot.emd(*masses, cost)
    else:
        plan = ot.sinkhorn(*masses, cost, regularisation, numItermax=100_000)
    return torch.from_numpy(plan * len(source))


def by_hand(
    target: dict[str, torch.Tensor],
    source: dict[str, torch.Tensor],
    combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    regularisation: float | None,
) -> dict[str, torch.Tensor]:
    """Fuse two ``Residuals`` as equations 4 and 5 and section 4.2.1 of the paper say."""
    a = {name: tensor.double() for name, tensor in source.items()}
    b = {name: tensor.double() for name, tensor in target.items()}
    embed = coupling_of(b["embed.weight"], a["embed.weight"], regularisation)
    down_in = a["down.weight"] @ embed
    down = coupling_of(b["down.weight"], down_in, regularisation)
    up_in = a["up.weight"] @ down
    up = coupling_of(b["up.weight"], up_in, regularisation)
    joined = combine(embed, up)
    aligned = {
        "embed.weight": embed.T @ a["embed.weight"],
        "embed.bias": embed.T @ a["embed.bias"],
        "down.weight": down.T @ down_in,
        "down.bias": down.T @ a["down.bias"],
        "up.weight": up.T @ up_in,
        "up.bias": up.T @ a["up.bias"],
        "norm.weight": joined.T @ a["norm.weight"],
        "norm.bias": joined.T @ a["norm.bias"],
        "head.weight": a["head.weight"] @ joined,
        "head.bias": a["head.bias"],
    }
    return {name: (tensor + b[name]) / 2 for name, tensor in aligned.items()}


POLICIES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mean": lambda skip, branch: (skip + branch) / 2,
    "skip": lambda skip, branch: skip,
    "branch": lambda skip, branch: branch,
    "identity": lambda skip, branch: torch.eye(len(skip), dtype=skip.dtype),
}


@pytest.mark.parametrize("regularisation", [None, 0.06], ids=["hard", "soft"])
@pytest.mark.parametrize("policy", list(POLICIES))
def test_policies_do_what_the_paper_writes(policy: str, regularisation: float | None) -> None:
    torch.manual_seed(3)
    source, target = Residuals().double(), Residuals().double()
    result = fxfusion.fuse(
        [source, target],
        (torch.randn(4, 6, dtype=torch.float64),),
        features="weights",
        coupling="hard" if regularisation is None else "soft",
        flow=Flow(residual=policy, costs=PAPER, regularisation=regularisation),
    )
    expected = by_hand(target.state_dict(), source.state_dict(), POLICIES[policy], regularisation)
    for name, tensor in result.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("policy", ["weighted_scalar", "weighted_matrix"])
def test_weighted_policies_weigh_by_magnitude(policy: str) -> None:
    torch.manual_seed(3)
    source, target = Residuals().double(), Residuals().double()
    x = torch.randn(64, 6, dtype=torch.float64)
    result = fxfusion.fuse([source, target], (x,), calibration=[x], flow=Flow(residual=policy, costs=PAPER))

    def layers(model: Residuals) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            embedded = model.embed(x)
            return embedded, model.up(model.down(embedded).relu())

    def standardised(values: torch.Tensor) -> torch.Tensor:
        return ((values - values.mean(0)) / values.std(0)).T

    seen = list(zip(layers(target), layers(source), strict=True))
    transports = [coupling_of(standardised(a), standardised(b), None) for a, b in seen]
    skip, branch = (side.abs().mean(0) for side in layers(target))
    if policy == "weighted_scalar":
        skip, branch = skip.mean(), branch.mean()
    share = skip / (skip + branch)
    joined = share * transports[0] + (1 - share) * transports[1]
    expected = (joined.T @ source.norm.weight + target.norm.weight) / 2
    torch.testing.assert_close(result.state_dict()["norm.weight"], expected, rtol=1e-4, atol=1e-5)


# -- queries and keys as one set --------------------------------------------------------------------


class Attending(nn.Module):
    """One head: ``softmax(q(x) k(x)') x``."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(6, width), nn.Linear(6, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.q(x) @ self.k(x).mT).softmax(-1) @ x


JOINT = Flow(query_key="joint", heads="ignored", costs=PAPER)


def stacked(model: Attending, x: torch.Tensor | None) -> torch.Tensor:
    """Return features of queries and keys, one after the other: activations, or weights."""
    with torch.no_grad():
        if x is None:
            return torch.cat([model.q.weight, model.k.weight])
        rows = torch.cat([model.q(x), model.k(x)], -1).flatten(0, -2)
        return ((rows - rows.mean(0)) / rows.std(0)).T


@pytest.mark.parametrize("regularisation", [None, 0.06], ids=["hard", "soft"])
@pytest.mark.parametrize("features", ["weights", "activations"])
def test_queries_and_keys_may_be_one_set_of_units(features: str, regularisation: float | None) -> None:
    torch.manual_seed(4)
    source, target = Attending().double(), Attending().double()
    x = torch.randn(9, 7, 6, dtype=torch.float64)
    result = fxfusion.fuse(
        [source, target],
        (x,),
        calibration=[x[:4], x[4:]] if features == "activations" else None,
        features=features,
        coupling="hard" if regularisation is None else "soft",
        flow=dataclasses.replace(JOINT, regularisation=regularisation),
    )
    seen = None if features == "weights" else x
    transport = coupling_of(stacked(target, seen), stacked(source, seen), regularisation)
    assert (transport[:5, 5:] > 0).any()  # queries become keys
    for name in ("weight", "bias"):
        rows, own = (
            torch.cat([model.q.get_parameter(name), model.k.get_parameter(name)])
            for model in (source, target)
        )
        expected = (transport.T @ rows + own) / 2
        found = torch.cat([result.state_dict()[f"{layer}.{name}"] for layer in ("q", "k")])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_queries_move_as_they_were_compared_not_as_keys_were() -> None:
    """The published code compares activations of keys and queries, and moves weights of queries and keys."""
    torch.manual_seed(4)
    target, source = Attending().double(), Attending().double()
    x, order = torch.randn(9, 7, 6, dtype=torch.float64), torch.randperm(10)
    with torch.no_grad():
        for name in ("weight", "bias"):
            rows = torch.cat([target.q.get_parameter(name), target.k.get_parameter(name)])[order]
            source.q.get_parameter(name).copy_(rows[:5])
            source.k.get_parameter(name).copy_(rows[5:])
    result = fxfusion.fuse([source, target], (x,), calibration=[x], flow=JOINT).state_dict()
    for name, tensor in target.state_dict().items():
        torch.testing.assert_close(result[name], tensor)
    swapped = [torch.cat(stacked(model, x).split(5)[::-1]) for model in (target, source)]
    wrong = coupling_of(swapped[0], swapped[1], None).T @ stacked(source, None)
    assert float((wrong - stacked(target, None)).abs().max()) > 0.1


class AttendingTwice(nn.Module):
    """Queries meet keys twice; others may meet the same keys."""

    def __init__(self, others: bool) -> None:
        super().__init__()
        self.q, self.k, self.others = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(6, 5) if others else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keys = self.k(x).mT
        second = (self.q if self.others is None else self.others)(x)
        return (self.q(x) @ keys).softmax(-1) @ x + (second @ keys).softmax(-1) @ x


@pytest.mark.parametrize(("others", "joint", "count"), [(False, True, 2), (True, False, 1)])
def test_joint_transports_are_of_two(others: bool, joint: bool, count: int) -> None:
    carried = follow(AttendingTwice(others), (torch.randn(3, 7, 6),), {}, JOINT)
    found = [item for item in carried.transports() if isinstance(item, Solve)]
    assert len(found) == count
    assert all((item.joint is not None) == joint for item in found)


@pytest.mark.parametrize(("left", "right"), [(5, 3), (3, 5)])
def test_joint_transports_go_across_widths(left: int, right: int) -> None:
    torch.manual_seed(4)
    x = torch.randn(9, 7, 6)
    result = fxfusion.fuse([Attending(left), Attending(right)], (x,), coupling="soft", flow=JOINT)
    assert result.state_dict()["q.weight"].shape == (right, 6)
    assert result.module(x).isfinite().all()


# -- costs ------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    units=st.integers(2, 6),
    samples=st.integers(3, 30),
    scaling=st.sampled_from([Scaling.RAW, Scaling.CENTRED, Scaling.STANDARDISED, Scaling.UNIT]),
    metric=st.sampled_from(list(Metric)),
)
def test_moments_give_the_costs_of_the_samples_themselves(
    seed: int, units: int, samples: int, scaling: Scaling, metric: Metric
) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        3 + torch.randn(1, units, samples, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    moments = CrossMoments(1, units, units)
    moments.update(left[..., :2], right[..., :2])
    moments.update(left[..., 2:], right[..., 2:])
    options = Costs(metric=metric, normalisation="none")
    streamed = ground_cost(compare([Comparison.of_moments(moments, scaling)], scaling), options)
    stored = ground_cost(compare([Comparison.of_features(left, right, scaling)], scaling), options)
    torch.testing.assert_close(streamed, stored, rtol=1e-6, atol=1e-6 * samples)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    units=st.integers(2, 6),
    samples=st.integers(3, 30),
    components=st.integers(1, 8),
    standardised=st.booleans(),
)
def test_components_are_those_of_the_samples(
    seed: int, units: int, samples: int, components: int, standardised: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        3 + torch.randn(1, units, samples, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    moments = CrossMoments(1, units, units, own=True)
    moments.update(left[..., :2], right[..., :2])
    moments.update(left[..., 2:], right[..., 2:])
    scaling = Scaling.STANDARDISED if standardised else Scaling.CENTRED
    found = Comparison.of_moments(moments, scaling, components)
    sides = [side[0] - side[0].mean(-1, keepdim=True) for side in (left, right)]
    if standardised:
        sides = [side / side.std(-1, keepdim=True) for side in sides]
    directions = torch.linalg.svd(sides[0].T, full_matrices=False)[0]  # samples x components
    leading = directions[:, : min(components, units, samples - 1)]
    expected = Comparison.of_features(sides[0] @ leading, sides[1] @ leading, Scaling.RAW)
    for name in ("cross", "target", "source"):
        torch.testing.assert_close(getattr(found, name)[0], getattr(expected, name), rtol=1e-5, atol=1e-6)


def test_components_find_a_planted_permutation() -> None:
    args, kwargs = zoo.inputs("hf_vit")
    model = zoo.build("hf_vit")
    twin = copy.deepcopy(model)
    twin.load_state_dict(fxfusion.scramble(model, args, kwargs))
    flow = Flow(costs=Costs(components=8))
    result = fxfusion.fuse([twin, model], args, kwargs, calibration=[kwargs], flow=flow)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(result.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_components_need_activations() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(CalibrationRequiredError, match="components"):
        fxfusion.fuse([model, model], (torch.randn(2, 2),), flow=Flow(costs=Costs(components=3)))
    with pytest.raises(OptionError, match="components=0"):
        Costs(components=0)
    assert Flow.parse("components=3").costs.components == 3


def test_costs_are_those_of_their_names() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(1, 5, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    part = Comparison.of_features(left, right, "raw")

    def cost(**options: object) -> torch.Tensor:
        return ground_cost(part, Costs(**{"normalisation": "none", **options}))  # type: ignore[arg-type]

    distances = torch.cdist(left, right)
    torch.testing.assert_close(cost(metric="euclidean"), distances)
    torch.testing.assert_close(cost(), distances.square())
    cosines = torch.cosine_similarity(left[:, :, None], right[:, None], dim=-1)
    torch.testing.assert_close(cost(metric="cosine"), 1 - cosines)
    for name, scale in (("max", distances.max()), ("mean", distances.mean()), ("median", distances.median())):
        torch.testing.assert_close(cost(metric="euclidean", normalisation=name), distances / scale)
    torch.testing.assert_close(cost(metric="euclidean", normalisation="log"), distances.log1p())
    torch.testing.assert_close(cost(metric="euclidean", clip=(3.0, 4.0)), distances.clamp(3, 4))


# -- couplings --------------------------------------------------------------------------------------


def problem(seed: int) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(1, 6, 6, generator=generator, dtype=torch.float64)
    masses = [torch.rand(1, 6, generator=generator, dtype=torch.float64) + 0.1 for _ in range(2)]
    return cost, (masses[0] / masses[0].sum(), masses[1] / masses[1].sum())


@pytest.mark.parametrize("seed", range(3))
def test_couplings_with_masses_are_those_of_pot(seed: int) -> None:
    cost, masses = problem(seed)
    a, b, matrix = (item[0].numpy() for item in (*masses, cost))
    solved = Coupling().solve(cost, masses)
    exact = solved.plans
    assert float(solved.values) == pytest.approx(6 * ot.emd2(a, b, matrix))
    assert exact is not None
    torch.testing.assert_close(exact.sum(2), masses[0])
    torch.testing.assert_close(exact.sum(1), masses[1])
    soft = Coupling(0.1, absolute=True).solve(cost, masses).plans
    assert soft is not None
    expected = torch.from_numpy(ot.sinkhorn(a, b, matrix, 0.1, numItermax=100_000))
    torch.testing.assert_close(soft[0], expected, rtol=1e-3, atol=1e-6)
    loose = Coupling(0.1, absolute=True, relaxation=0.5).solve(cost, masses).plans
    assert loose is not None
    expected = torch.from_numpy(ot.unbalanced.sinkhorn_unbalanced(a, b, matrix, 0.1, 0.5))
    torch.testing.assert_close(loose[0], expected, rtol=1e-3, atol=1e-6)
    assert float(loose.sum()) < 0.99


def test_uniform_masses_are_an_assignment() -> None:
    cost, _ = problem(0)
    alike = torch.full((1, 6), 1 / 6, dtype=torch.float64)
    one, other = Coupling().solve(cost), Coupling().solve(cost, (alike, alike))
    index, value, plans, same = one.index, one.values, other.plans, other.values
    assert index is not None
    assert plans is not None
    torch.testing.assert_close(value, same)
    assert torch.equal(plans.argmax(-1), index)


@pytest.mark.parametrize("heads", ["matched", "ignored"])
def test_twins_are_recovered_whatever_their_units_weigh(heads: str) -> None:
    args, kwargs = zoo.inputs("hf_vit")
    prepared = fxfusion.prepare(zoo.build("hf_vit"), args, kwargs)
    twin = copy.deepcopy(prepared)
    twin.load_state_dict(fxfusion.scramble(prepared, seed=2))
    flow = Flow(marginals="magnitude", heads=heads)
    state = fxfusion.fuse([twin, prepared], features="weights", flow=flow).state_dict()
    for key, tensor in prepared.state_dict().items():
        torch.testing.assert_close(state[key], tensor, rtol=0, atol=1e-5)


def test_unbalanced_couplings_fuse() -> None:
    models = [Residuals(), Residuals()]
    x = (torch.randn(2, 6),)
    flow = Flow(regularisation=0.1, relaxation=0.5)
    fused = fxfusion.fuse(models, x, features="weights", coupling="soft", flow=flow)
    assert fused.module(*x).isfinite().all()
    with pytest.raises(OptionError, match="soft"):
        fxfusion.fuse(models, x, features="weights", flow=flow)


# -- the published code's settings, and refusals ----------------------------------------------------


@pytest.mark.parametrize("coupling", ["hard", "soft"])
@pytest.mark.parametrize("features", ["weights", "activations"])
def test_the_reference_preset_runs_on_a_vit(features: str, coupling: str) -> None:
    args, kwargs = zoo.inputs("hf_vit")
    models = [zoo.build("hf_vit", seed) for seed in (0, 1)]
    result = fxfusion.fuse(
        models,
        args,
        kwargs,
        calibration=[kwargs] if features == "activations" else None,
        **fxfusion.reference(features, coupling),
    )
    zoo.build("hf_vit").load_state_dict(result.state_dict())
    assert "heads" in result.report.options["flow"]


def test_separate_queries_and_keys_break_attention_and_matched_heads_do_not() -> None:
    """A defect of the published code: its map of the queries is not that of the keys."""

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(6, 8), nn.Linear(6, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k = (side(x).unflatten(-1, (2, 4)).transpose(1, 2) for side in (self.q, self.k))
            return (q @ k.mT).softmax(-1).mean(1)

    torch.manual_seed(0)
    source, target = Attend().double(), Attend().double()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    changed = {}
    for name, flow in (
        ("separate", Flow(heads="ignored", query_key="separate")),
        ("shared", Flow(heads="matched", query_key="shared")),
    ):
        fused = fxfusion.fuse([source, target], (x,), features="weights", flow=flow, weights=(1.0, 0.0))
        changed[name] = float((fused.module(x) - source(x)).detach().abs().max())
    assert changed["separate"] > 0.01
    assert changed["shared"] < 1e-12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Flow(residual="average"), "'weighted_matrix'"),
        (lambda: Flow(query_key="separate"), 'heads="ignored"'),
        (lambda: Flow(query_key="joint"), 'heads="ignored"'),
        (lambda: Flow(regularisation=0.0), "positive"),
        (lambda: Costs(metric="manhattan"), "'cosine'"),
        (lambda: Costs(clip=(2.0, 1.0)), "smallest"),
        (lambda: Flow.parse("residual"), "NAME=VALUE"),
        (lambda: Flow.parse("bias=perhaps"), "true or false"),
    ],
)
def test_options_are_refused_with_what_would_do(make: Callable[[], object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


def test_weighted_policies_need_activations() -> None:
    models = [Residuals(), Residuals()]
    with pytest.raises(CalibrationRequiredError, match="weighted_scalar"):
        fxfusion.fuse(models, (torch.randn(2, 6),), flow=Flow(residual="weighted_scalar"))


@pytest.mark.parametrize(
    ("flow", "options"),
    [
        (Flow(residual="weighted_matrix"), {}),
        (Flow(relaxation=0.5), {}),
        (Flow(regularisation=0.1), {"coupling": "soft", "regularisation": 0.2}),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_any_work(
    flow: Flow, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def capture(*_: object) -> None:
        raise AssertionError("captured first")

    monkeypatch.setattr("fxfusion.pipeline.capture", capture)
    with pytest.raises((CalibrationRequiredError, OptionError)):
        fxfusion.fuse([Residuals(), Residuals()], (torch.randn(2, 6),), flow=flow, **options)
