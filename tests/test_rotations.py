"""Groups beyond permutations: which, after which folding, and that planted elements are found again."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxfusion
from fxfusion.certify import certify_plan
from fxfusion.errors import OptionError
from fxfusion.folding import fold_norms
from fxfusion.groups import enlarge, groups
from fxfusion.plan import Plan, Scaling, Symmetry
from fxfusion.state import state_of
from fxfusion.symmetry import complete, random_element
from fxfusion.transport.rotation import complement, procrustes, random_rotation
from tests import zoo


def largest(model: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Plan]:
    """Return a model's capture and its plan with the largest groups."""
    prepared = fxfusion.prepare(model, args, kwargs)
    capture = state_of(prepared).capture
    return capture, enlarge(capture, fxfusion.plan(prepared))


# -- maths --------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(2, 7), centred=st.booleans())
def test_procrustes_finds_what_turned(seed: int, size: int, centred: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    turned = random_rotation(size, generator, centred)[0]
    features = torch.randn(size, 20, generator=generator, dtype=torch.float64)
    found, value = procrustes((turned @ features) @ features.T, centred)
    torch.testing.assert_close(found, turned, rtol=0, atol=1e-9)
    assert float(value) == pytest.approx(float(features.square().sum()))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(2, 6), centred=st.booleans())
def test_no_other_rotation_comes_closer(seed: int, size: int, centred: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    cross = torch.randn(3, size, size, generator=generator, dtype=torch.float64)
    found, best = procrustes(cross, centred)
    eye = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(found @ found.mT, eye.expand_as(found), rtol=0, atol=1e-9)
    if centred:
        torch.testing.assert_close(found.sum(-1), torch.ones(3, size, dtype=torch.float64))
    for other in random_rotation(size, generator, centred, 20):
        assert ((other * cross).sum((-2, -1)) <= best + 1e-9).all()


def test_what_has_no_mean_is_turned_without_one() -> None:
    """Along the ones vector the moments vanish: in the whole space, rounding would decide where it goes."""
    generator = torch.Generator().manual_seed(0)
    features = complement(5) @ torch.randn(4, 30, generator=generator, dtype=torch.float64)
    turned = random_rotation(5, generator, centred=True)[0]
    torch.testing.assert_close(
        procrustes(turned @ features @ features.T, centred=True)[0], turned, rtol=0, atol=1e-9
    )


# -- which spaces may turn ----------------------------------------------------------------------------

SCALED = "permutation, positive scale"
# Number of spaces with rotations, of those with invertible maps, of those with factors of their units, number
# of norms folded, and the group of the residual stream.
KNOWN: dict[str, tuple[int, int, int, int, str]] = {
    "hf_vit": (5, 4, 0, 5, "orthogonal, mean fixed"),
    # Rotary dimensions turn by pairs. What is gated has factors of any sign.
    "llama": (5, 2, 2, 5, "orthogonal"),
    # After every sum a norm, whose weight is in the stream; and GELU in its head, before which is a factor.
    "bert": (4, 4, 1, 0, SCALED),
    # The head is the embedding, into which the last norm cannot go. Others have a factor after them.
    "gpt2": (4, 4, 1, 0, SCALED),
    "opt": (4, 4, 3, 0, SCALED),
    "t5": (12, 12, 5, 0, SCALED),
    "resnet18": (0, 0, 12, 0, SCALED),
    # Queries, keys and values lie in one tensor, which a view with an axis of three takes apart.
    "vit_tiny_patch16_224": (25, 24, 0, 25, "orthogonal, mean fixed"),
}


@pytest.mark.parametrize("name", list(KNOWN))
def test_spaces_that_may_turn(name: str) -> None:
    capture, plan = largest(zoo.build(name), *zoo.inputs(name))
    stream = max((space for space in plan if not space.scope), key=lambda space: len(space.incidences))
    groups = [space.symmetry for space in plan]
    scaled = sum(group.scales for group in groups)
    counts = sum(group.rotates for group in groups), groups.count(Symmetry.LINEAR), scaled
    assert (*counts, len(plan.folds), stream.symmetry.value) == KNOWN[name]
    weights = capture.canonical(zoo.build(name).state_dict())
    certificate = certify_plan(capture, plan, weights, capture.select_outputs(None))
    assert certificate.ok, certificate


def test_untied_heads_let_the_stream_turn() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, tie_word_embeddings=False
    )
    model = GPT2LMHeadModel(config).eval()
    inputs = {"input_ids": torch.randint(64, (2, 9)), "use_cache": False}
    capture, plan = largest(model, (), inputs)
    assert plan["transformer.wte.weight[1]"].symmetry is Symmetry.CENTRED
    assert certify_plan(capture, plan, capture.canonical(model.state_dict()), frozenset({0})).ok


class Stream(nn.Module):
    """A residual stream that something reads."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.embed, self.head = nn.Linear(3, 6), nn.Linear(6, 2)
        self.norm = nn.LayerNorm(6) if "layer" in what else nn.RMSNorm(6)
        nn.init.normal_(self.norm.weight)
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embed, do something, read."""
        x = self.embed(x)
        match self.what:
            case "relu":
                x = x.relu()
            case "scale":
                x = x + self.scale * x
            case "sigmoid":
                x = x.sigmoid()
            case "gate":
                x = x * x.sigmoid()
            case "shift":
                x = x + 1.0
            case "mean":
                return torch.cat([self.head(x), x.mean(-1, keepdim=True)], -1)
            case "square":
                return torch.cat([self.head(x), x.square().sum(-1, keepdim=True)], -1)
            case "squares":
                return self.head(x.square())
            case "layer norm" | "rms norm":
                x = self.norm(x)
            case "layer norm in stream" | "rms norm in stream":
                x = x + self.norm(x)
            case "layer norm twice":
                return self.head(self.norm(x)) + self.head(x)
        return self.head(x)


SIGNED = ("permutation, scale", "permutation, sign")
LARGER = {
    "permutation": (Symmetry.SCALED, Symmetry.CENTRED, Symmetry.ORTHOGONAL, Symmetry.LINEAR),
    SCALED: (Symmetry.CENTRED, Symmetry.ORTHOGONAL, Symmetry.LINEAR),
    "permutation, scale": (Symmetry.CENTRED, Symmetry.ORTHOGONAL, Symmetry.LINEAR),
    "permutation, sign": (Symmetry.SCALED, Symmetry.CENTRED, Symmetry.ORTHOGONAL, Symmetry.LINEAR),
    "orthogonal, mean fixed": (Symmetry.SCALED, Symmetry.ORTHOGONAL, Symmetry.LINEAR),
    "orthogonal": (Symmetry.SCALED, Symmetry.LINEAR),
    "general linear": (),
}
WRITTEN_AND_READ = {
    ("embed.weight", 0, 0): 1.0,
    ("embed.bias", 0, 0): 1.0,
    ("norm.bias", 0, 0): 1.0,
    ("head.weight", 1, 0): -1.0,
}


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("nothing", "general linear"),
        ("relu", SCALED),
        ("scale", "permutation, scale"),
        ("sigmoid", "permutation"),
        ("gate", "permutation"),
        ("shift", "orthogonal, mean fixed"),
        ("mean", "orthogonal, mean fixed"),
        ("square", "orthogonal"),
        ("squares", "permutation, scale"),
        ("layer norm", "orthogonal, mean fixed"),
        ("rms norm", "orthogonal"),
        ("layer norm in stream", "permutation"),
        ("rms norm in stream", "permutation, sign"),
        ("layer norm twice", "permutation"),
    ],
)
def test_what_lets_a_stream_turn(what: str, expected: str) -> None:
    torch.manual_seed(0)
    model = Stream(what)
    capture, plan = largest(model, (torch.randn(4, 3),), {})
    space, *signs = plan.spaces
    assert space.symmetry.value == expected
    assert [item.symmetry for item in signs] == [Symmetry.SIGN] * (expected in SIGNED)
    assert certify_plan(capture, plan, capture.canonical(model.state_dict()), frozenset({0})).ok
    for wrong in LARGER[expected]:
        exponents = {place: value for place, value in WRITTEN_AND_READ.items() if place[0] in plan.layouts}
        planted = dataclasses.replace(
            plan,
            spaces=(dataclasses.replace(space, symmetry=wrong), *signs),
            scalings=(Scaling(space.name, exponents),),
        )
        certificate = certify_plan(
            capture, planted, capture.canonical(model.state_dict()), frozenset({0}), diagnose=False
        )
        assert not certificate.ok, f"{wrong} keeps the function, too"


def test_why_a_space_may_not_turn() -> None:
    prepared = fxfusion.prepare(Stream("relu"), (torch.randn(4, 3),))
    (found,) = groups(state_of(prepared).capture, fxfusion.plan(prepared)).values()
    assert found.reason == "aten.relu.default at relu is not known to be linear"


# -- folding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hf_vit", "llama"])
def test_folding_keeps_the_function(name: str) -> None:
    model, (args, kwargs) = zoo.build(name).double(), zoo.inputs(name)
    kwargs = {
        key: item.double() if isinstance(item, torch.Tensor) and item.is_floating_point() else item
        for key, item in kwargs.items()
    }
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.5, 0.3) if parameter.ndim == 1 else None
    before = model(*args, **kwargs).logits
    capture, plan = largest(model, args, kwargs)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    folded = complete(capture, fold_norms(plan, capture.canonical(model.state_dict())), model.state_dict())
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key]), f"{key} was written"
    model.load_state_dict(folded)
    torch.testing.assert_close(model(*args, **kwargs).logits, before, rtol=1e-9, atol=1e-9)
    assert all(bool((folded[fold.weight] == 1).all()) for fold in plan.folds)


def test_a_bias_that_cannot_be_divided_leaves_permutations() -> None:
    parents = [Stream("layer norm") for _ in range(2)]
    nn.init.normal_(parents[0].norm.bias)  # type: ignore[arg-type]
    for weight, expected in ((0.5, "orthogonal, mean fixed"), (0.0, "permutation")):
        parents[0].norm.weight.data[2] = weight
        result = fxfusion.fuse(parents, (torch.randn(4, 3),), symmetry="largest")
        assert [space.symmetry.value for space in result.plan] == [expected]


# -- fusing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hf_vit", "llama", "bert", "gpt2", "opt"])
def test_planted_elements_are_found(name: str) -> None:
    """Rotations, invertible maps of heads and factors of units, all at once."""
    args, kwargs = zoo.inputs(name)
    model = zoo.build(name)
    prepared = fxfusion.prepare(model, args, kwargs)
    capture, plan = largest(model, args, kwargs)
    wide = {
        key: tensor.double() if tensor.is_floating_point() else tensor
        for key, tensor in capture.canonical(prepared.state_dict()).items()
    }
    turned = random_element(plan, fold_norms(plan, wide), torch.Generator().manual_seed(3))
    twin = copy.deepcopy(model)
    state = complete(capture, turned, model.state_dict())
    twin.load_state_dict({key: tensor.to(model.state_dict()[key].dtype) for key, tensor in state.items()})
    torch.manual_seed(1)
    batches = [{key: _other(key, item) for key, item in kwargs.items()} for _ in range(4)]
    reference, errors = model(*args, **kwargs).logits.detach(), {}
    for symmetry in ("permutation", "largest"):
        result = fxfusion.fuse([twin, model], args, kwargs, calibration=batches, symmetry=symmetry)
        fused = copy.deepcopy(model)
        fused.load_state_dict(result.state_dict())
        apart = fused(*args, **kwargs).logits.detach() - reference
        errors[symmetry] = float(apart.abs().max() / reference.abs().max())
    assert errors["largest"] < 1e-3
    assert errors["permutation"] > 10 * errors["largest"]


def _other(key: str, item: Any) -> Any:
    """Return other inputs of the same kind, 16 samples of them."""
    if not isinstance(item, torch.Tensor):
        return item
    shape = (16, *item.shape[1:])
    if item.is_floating_point():
        return torch.randn(shape)
    return torch.ones(shape, dtype=item.dtype) if "mask" in key else torch.randint(0, 60, shape)


def test_the_aligned_parent_keeps_its_function() -> None:
    args, kwargs = zoo.inputs("hf_vit")
    parents = [zoo.build("hf_vit") for _ in range(2)]
    for parameter in parents[0].parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    result = fxfusion.fuse(
        parents, args, kwargs, calibration=[kwargs], symmetry="largest", weights=[1.0, 0.0]
    )
    expected = parents[0](*args, **kwargs).logits
    torch.testing.assert_close(result.module(*args, **kwargs).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"flow": fxfusion.Flow()}, {"into": nn.Linear(3, 2)}])
def test_rotations_exclude(options: dict[str, Any]) -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(OptionError, match="symmetry"):
        fxfusion.fuse([model, model], (torch.randn(2, 3),), symmetry="largest", **options)
