"""Which calibration activations count, and couplings that differ from space to space."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxfusion
from fxfusion.capture import capture
from fxfusion.errors import OptionError
from fxfusion.pairing import Parent
from fxfusion.planning import make_plan
from fxfusion.statistics import collect, observations
from fxfusion.transport.carry import Solve, carry
from fxfusion.transport.hierarchy import Coupling
from fxfusion.transport.map import HardMap, SoftMap
from fxfusion.transport.options import Flow, Observe

TOKENS = torch.randn(6, 10, 4, generator=torch.Generator().manual_seed(0))  # a class token and 3 x 3 patches


class PerToken(nn.Module):
    """Two layers that see every token by itself."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.middle, self.down = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.middle(self.up(x).relu()).relu())


def moments_of(positions: list[int], samples: list[int] | None = None) -> torch.Tensor:
    """Return the cross-moments of the first layer at some positions."""
    left, right = PerToken(0), PerToken(1)
    x = TOKENS if samples is None else TOKENS[samples]
    seen = [model.up(x[:, positions]).detach().flatten(0, 1).double() for model in (left, right)]
    centred = [item - item.mean(0) for item in seen]
    return centred[0].T @ centred[1]


@pytest.mark.parametrize(
    ("observe", "positions"),
    [
        (Observe(), list(range(10))),
        (Observe(positions="first"), [0]),
        (Observe(positions="centre"), [1]),
    ],
)
def test_moments_are_those_of_the_chosen_positions(observe: Observe, positions: list[int]) -> None:
    found = collected(observe)
    torch.testing.assert_close(found, moments_of(positions), rtol=1e-5, atol=1e-6)


def collected(observe: Observe) -> torch.Tensor:
    models = [PerToken(0), PerToken(1)]
    captured = capture(models[0], (TOKENS,))
    plan = make_plan(captured, frozenset([0]))
    parents = [
        Parent(captured, plan, {name: item.detach() for name, item in model.named_parameters()})
        for model in models
    ]
    places = observations(plan, captured.module.graph)["up.weight[0]"]
    number = next(index for index, place in enumerate(places) if "linear" in place.node)
    moments = collect(parents, 0, [((TOKENS,), {})], observed=observe)
    return moments[1]["up.weight[0]"][number].cross[0]


def test_random_positions_are_a_share_of_them() -> None:
    generator = torch.Generator().manual_seed(10)
    positions = torch.randperm(10, generator=generator)[:4].sort().values.tolist()
    found = collected(Observe(positions="random", share=0.4))
    torch.testing.assert_close(found, moments_of(positions), rtol=1e-5, atol=1e-6)


def test_confident_samples_are_those_of_least_entropy() -> None:
    logits = PerToken(0)(TOKENS).log_softmax(-1)
    entropy = -(logits.exp() * logits).sum(-1).mean(-1)
    samples = entropy.argsort()[:3].tolist()
    found = collected(Observe(confident=0.5))
    torch.testing.assert_close(found, moments_of(list(range(10)), samples), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fields", [{"positions": "last"}, {"share": 0.0}, {"confident": 1.5}])
def test_observations_that_cannot_be_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=next(iter(fields))):
        Observe(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["positions", "place=first", "share=many"])
def test_texts_that_name_no_observation_are_refused(text: str) -> None:
    with pytest.raises(OptionError):
        Observe.parse(text)


def test_observing_needs_calibration() -> None:
    with pytest.raises(OptionError, match="observe"):
        fxfusion.fuse([PerToken(0), PerToken(1)], (TOKENS,), observe=Observe())


@pytest.mark.parametrize(("where", "operator"), [("before", "linear"), ("after", "relu")])
def test_layers_are_observed_before_or_after_their_nonlinearity(where: str, operator: str) -> None:
    captured = capture(PerToken(), (TOKENS,))
    plan = make_plan(captured, frozenset([0]))
    carried = carry(captured, plan, Flow(nonlinearity=where))
    nodes = {
        writer.node for item in carried.transports() if isinstance(item, Solve) for writer in item.writers
    }
    assert len(nodes) == 2
    assert all(operator in node for node in nodes)


# -- couplings by space -------------------------------------------------------------------------------


def maps_of(coupling: Coupling | str) -> dict[str, object]:
    """Return the transports that a coupling gives, by space."""
    from torch.fx.passes.infra.pass_manager import PassManager

    from fxfusion.passes.align import Align
    from fxfusion.passes.normalize import Normalize
    from fxfusion.passes.pair import Pair
    from fxfusion.passes.propagate import Propagate
    from fxfusion.state import state_of

    assert isinstance(coupling, Coupling)
    module = fxfusion.prepare(PerToken(0), (TOKENS,))
    parents = [PerToken(seed).state_dict() for seed in range(2)]
    PassManager([Normalize(), Propagate(), Pair(parents), Align(coupling=coupling)])(module)
    alignment = state_of(module).alignments[0]
    assert alignment is not None
    return dict(alignment.maps)


def test_some_spaces_may_have_another_coupling() -> None:
    maps = maps_of(Coupling(overrides={"middle.*": Coupling(0.1)}))
    assert isinstance(maps["up.weight[0]"], HardMap)
    assert isinstance(maps["middle.weight[0]"], SoftMap)
    maps = maps_of(Coupling(0.1, overrides={"up.weight[0]": Coupling()}))
    assert isinstance(maps["up.weight[0]"], HardMap)
    assert isinstance(maps["middle.weight[0]"], SoftMap)


def test_soft_only_where_widths_grow() -> None:
    coupling = Coupling(0.1, widening=True)
    cost = torch.rand(1, 3, 6, generator=torch.Generator().manual_seed(0))
    narrowing, widening = coupling.solve(cost).plans, coupling.solve(cost.mT).plans
    index = coupling.solve(cost[..., :3]).index
    assert narrowing is not None
    assert widening is not None
    assert index is not None
    assert ((narrowing > 0).sum(-2) == 1).all()
    assert ((widening > 0).sum(-1) > 1).any()


def test_a_coupling_is_taken_as_it_is() -> None:
    models = [PerToken(0), PerToken(1)]
    named = fxfusion.fuse(models, (TOKENS,), coupling="soft", regularisation=0.02).state_dict()
    given = fxfusion.fuse(models, (TOKENS,), coupling=Coupling(0.02)).state_dict()
    assert all(torch.equal(tensor, given[name]) for name, tensor in named.items())
    with pytest.raises(OptionError, match="twice"):
        fxfusion.fuse(models, (TOKENS,), coupling=Coupling(0.02), regularisation=0.1)


# -- partial couplings --------------------------------------------------------------------------------


def planted(noise: float) -> tuple[PerToken, PerToken, torch.Tensor]:
    """Return a network, a twin whose last two hidden units are others, and the order that undoes it."""
    left, right = PerToken(0), PerToken(0)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    other = PerToken(9)
    with torch.no_grad():
        right.up.weight[4:] = other.up.weight[4:] * noise
        right.up.bias[4:] = other.up.bias[4:] * noise
        right.middle.weight[:, 4:] = other.middle.weight[:, 4:] * noise
        right.up.weight.copy_(right.up.weight[order])
        right.up.bias.copy_(right.up.bias[order])
        right.middle.weight.copy_(right.middle.weight[:, order])
    return left, right, order


def test_units_without_a_counterpart_stay_the_targets() -> None:
    left, right, _ = planted(3.0)
    coupling = Coupling(overrides={"up.*": Coupling(share=4 / 6)})
    fused = fxfusion.fuse([right, left], (TOKENS,), coupling=coupling).state_dict()
    for name, tensor in left.state_dict().items():
        torch.testing.assert_close(fused[name], tensor, rtol=1e-5, atol=1e-6)
    whole = fxfusion.fuse([right, left], (TOKENS,)).state_dict()
    assert (whole["up.weight"] - left.up.weight).abs().max() > 0.1


def test_all_of_the_mass_is_a_hard_coupling() -> None:
    left, right, _ = planted(1.0)
    hard = fxfusion.fuse([right, left], (TOKENS,)).state_dict()
    nearly = fxfusion.fuse([right, left], (TOKENS,), coupling=Coupling(share=1 - 1e-9)).state_dict()
    for name, tensor in hard.items():
        torch.testing.assert_close(nearly[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", [{"share": 0.0}, {"share": 1.5}, {"share": 0.5, "regularisation": 0.1}])
def test_shares_that_cannot_be_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(OptionError, match="share"):
        Coupling(**fields)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="flow"):
        fxfusion.fuse([PerToken(0), PerToken(1)], (TOKENS,), coupling=Coupling(share=0.5), flow=Flow())
