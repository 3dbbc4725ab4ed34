"""Parents of other widths: paired by name, widened exactly, narrowed by groups."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import fxfusion
from fxfusion import regression
from fxfusion.errors import ArchitectureMismatchError, WidthMismatchError
from fxfusion.pairing import pair
from fxfusion.state import state_of
from fxfusion.transport.assignment import assign_groups
from fxfusion.transport.cost import resample
from fxfusion.transport.map import in_order

Sizes = tuple[int, int, int]  # width, heads, hidden units

GENERATOR = torch.Generator().manual_seed(5)
IMAGES = torch.randn(6, 1, 8, 8, generator=GENERATOR)
TOKENS = torch.randint(0, 30, (6, 7), generator=GENERATOR)


def disturbed(model: nn.Module, seed: int) -> nn.Module:
    """Return a model whose norms and biases are no longer what they are initialised to."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
        if name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model.eval()


class Convolutions(nn.Module):
    """A residual block with batch and group norm, a depthwise convolution, and a gate over channels."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, _, hidden = sizes
        self.stem, self.norm = nn.Conv2d(1, width, 3, 2, 1), nn.BatchNorm2d(width)
        self.up, self.depthwise = (
            nn.Conv2d(width, hidden, 1),
            nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden),
        )
        self.gate, self.down = nn.Conv2d(hidden, hidden, 1), nn.Conv2d(hidden, width, 1)
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        y = self.depthwise(self.up(x)).relu()
        y = y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid()
        return self.head((x + self.down(y)).mean((2, 3)))


class PackedAttention(nn.Module):
    """Packed queries, keys and values, whose scale is written out, and normed queries."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, self.heads, hidden = sizes
        self.size = width // self.heads
        self.embed, self.packed = nn.Linear(8, width), nn.Linear(width, 3 * width)
        self.norm = nn.LayerNorm(self.size)
        self.out = nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x.flatten(1, 2))
        batch, length, width = x.shape
        packed = self.packed(x).reshape(batch, length, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        query, key, value = packed[0], packed[1], packed[2]
        scores = (self.norm(query) * self.size**-0.5) @ key.transpose(-2, -1)
        x = x + self.out((scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, length, width))
        return self.head((x + self.ffn(x)).mean(1))


def vit(sizes: Sizes) -> nn.Module:
    width, heads, hidden = sizes
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=width,
            num_hidden_layers=1,
            num_attention_heads=heads,
            intermediate_size=hidden,
            image_size=8,
            patch_size=4,
            num_channels=1,
            num_labels=3,
        )
    )


def bert(sizes: Sizes) -> nn.Module:
    width, heads, hidden = sizes
    return BertForMaskedLM(
        BertConfig(
            vocab_size=30,
            hidden_size=width,
            num_hidden_layers=1,
            num_attention_heads=heads,
            intermediate_size=hidden,
            max_position_embeddings=16,
        )
    )


def gpt2(sizes: Sizes) -> nn.Module:
    width, heads, hidden = sizes
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=30,
            n_embd=width,
            n_layer=1,
            n_head=heads,
            n_inner=hidden,
            n_positions=16,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def llama(sizes: Sizes) -> nn.Module:
    width, heads, hidden = sizes
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=30,
            hidden_size=width,
            num_hidden_layers=1,
            num_attention_heads=2 * heads,
            num_key_value_heads=heads,
            head_dim=4,
            intermediate_size=hidden,
            max_position_embeddings=16,
        )
    )


def t5(sizes: Sizes) -> nn.Module:
    width, heads, hidden = sizes
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=30,
            d_model=width,
            num_layers=1,
            num_heads=heads,
            d_kv=4,
            d_ff=hidden,
            tie_word_embeddings=True,
            decoder_start_token_id=0,
        )
    )


CAUSAL = {"input_ids": TOKENS, "use_cache": False}
MODELS: dict[str, tuple[Callable[[Sizes], nn.Module], dict[str, Any]]] = {
    "convolutions": (Convolutions, {"x": IMAGES}),
    "packed attention": (PackedAttention, {"x": IMAGES}),
    "vit": (vit, {"pixel_values": IMAGES}),
    "bert, tied": (bert, {"input_ids": TOKENS}),
    "gpt2, tied": (gpt2, CAUSAL),
    "llama, grouped queries": (llama, CAUSAL),
    "t5, tied and scaled": (t5, {**CAUSAL, "decoder_input_ids": TOKENS}),
}


def make(name: str, sizes: Sizes, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return disturbed(MODELS[name][0](sizes), seed)


@torch.no_grad()
def output(model: nn.Module, kwargs: dict[str, Any]) -> torch.Tensor:
    """Return a model's first output."""
    found = model(**kwargs)
    return found if isinstance(found, torch.Tensor) else next(iter(found.values())).detach()


@pytest.mark.parametrize("sizes", [(16, 4, 24), (16, 2, 18)], ids=["more heads", "wider heads"])
@pytest.mark.parametrize("name", MODELS)
def test_a_narrow_parent_keeps_its_function_in_a_wide_network(name: str, sizes: Sizes) -> None:
    narrow, wide = make(name, (8, 2, 12), 0), make(name, sizes, 1)
    kwargs = MODELS[name][1]
    result = fxfusion.fuse([narrow, wide], kwargs=kwargs, weights=[1, 0])
    expected, unrelated = output(narrow, kwargs), output(wide, kwargs)
    wide.load_state_dict(result.state_dict())
    scale = expected.abs().max()
    assert (output(wide, kwargs) - expected).abs().max() < 1e-5 * scale
    assert (unrelated - expected).abs().max() > 0.1 * scale


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("convolutions", {}, id="convolutions, joint"),
        pytest.param("convolutions", {"flow": fxfusion.Flow()}, id="convolutions, flow"),
        pytest.param("vit", {}, id="vit, joint"),
        pytest.param("vit", {"flow": fxfusion.Flow()}, id="vit, flow", marks=pytest.mark.nightly),
        pytest.param("gpt2, tied", {}, id="gpt2, joint", marks=pytest.mark.nightly),
        pytest.param("gpt2, tied", {"flow": fxfusion.Flow()}, id="gpt2, flow"),
    ],
)
def test_a_network_of_copies_is_narrowed_to_what_was_copied(name: str, options: dict[str, Any]) -> None:
    """Widened exactly, its units come in groups of equal ones: narrowing finds them."""
    narrow, kwargs = make(name, (8, 2, 12), 0), MODELS[name][1]
    wide = make(name, (16, 4, 24), 1)
    wide.load_state_dict(fxfusion.fuse([narrow, wide], kwargs=kwargs, weights=[1, 0]).state_dict())
    wide.load_state_dict(fxfusion.scramble(wide, kwargs=kwargs))
    fused = fxfusion.fuse([wide, narrow], kwargs=kwargs, calibration=[kwargs], **options)
    for key, tensor in narrow.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[key], tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("coupling", "calibrated", "flow"),
    [
        ("hard", True, None),
        ("soft", False, None),
        ("soft", True, "residual=mean"),
        ("hard", False, "residual=identity"),
        ("hard", True, "heads=ignored, tables=own"),
        ("soft", False, "heads=ignored, query_key=separate, marginals=magnitude"),
    ],
)
def test_every_way_to_align_takes_unequal_widths(coupling: str, calibrated: bool, flow: str | None) -> None:
    sizes = [(12, 2, 20), (8, 4, 12), (16, 2, 12)]
    parents = [make("vit", size, seed) for seed, size in enumerate(sizes)]
    kwargs = MODELS["vit"][1]
    result = fxfusion.fuse(
        parents,
        kwargs=kwargs,
        calibration=[kwargs] if calibrated else None,
        coupling=coupling,
        flow=None if flow is None else fxfusion.Flow.parse(flow),
        target=1,
    )
    parents[1].load_state_dict(result.state_dict())
    assert torch.allclose(output(parents[1], kwargs), output(result.module, kwargs), atol=1e-5)
    assert sum("other widths" in note for note in result.report.notes) == 2
    assert "12 to 8" in result.report.notes[0]


@pytest.mark.parametrize("name", ["vit", "gpt2, tied", "bert, tied"])
@pytest.mark.parametrize("heads", [(4, 2), (2, 4)], ids=["into fewer", "into more"])
def test_equal_weights_in_other_heads(name: str, heads: tuple[int, int]) -> None:
    """Nothing but the configurations tells the parents apart: weights have equal shapes."""
    parents = [make(name, (16, count, 24), seed) for seed, count in enumerate(heads)]
    kwargs = MODELS[name][1]
    expected = output(parents[1], kwargs)
    result = fxfusion.fuse(parents, kwargs=kwargs, calibration=[kwargs], weights=[0, 1])
    assert any(f"{heads[0]} to {heads[1]}" in note for note in result.report.notes), result.report.notes
    parents[1].load_state_dict(result.state_dict())
    torch.testing.assert_close(output(parents[1], kwargs), expected, rtol=1e-4, atol=1e-5)
    fused = fxfusion.fuse(parents, kwargs=kwargs, calibration=[kwargs]).state_dict()
    parents[1].load_state_dict(fused)
    assert all(torch.isfinite(tensor).all() for tensor in fused.values())
    assert not torch.allclose(output(parents[1], kwargs), expected, atol=1e-3)


def test_many_parents_of_other_widths_meet_in_the_middle() -> None:
    parents = [make("convolutions", (width, 1, 2 * width), seed) for seed, width in enumerate((8, 12, 8, 16))]
    kwargs = MODELS["convolutions"][1]
    result = fxfusion.fuse(parents, kwargs=kwargs, calibration=[kwargs], rounds=2, target=0)
    parents[0].load_state_dict(result.state_dict())


def test_statistics_are_the_targets_where_parents_differ_in_width() -> None:
    """With all weight on the target, its batch statistics stay, whatever the other parent's are."""
    target, other = make("convolutions", (8, 1, 12), 0), make("convolutions", (16, 1, 24), 1)
    kwargs = MODELS["convolutions"][1]
    fused = fxfusion.fuse([target, other], kwargs=kwargs, calibration=[kwargs], weights=[1, 0], target=0)
    for key, tensor in target.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[key], tensor, rtol=1e-3, atol=1e-4)


# -- layers fitted -----------------------------------------------------------------------------------


def carried_over(parent: nn.Module, target: nn.Module, kwargs: dict[str, Any], repair: str) -> torch.Tensor:
    """Give the target what a parent alone becomes in it, and return its output."""
    fused = fxfusion.fuse(
        [parent, target],
        kwargs=kwargs,
        calibration=[kwargs],
        weights=[1, 0],
        method="permutation",
        repair=repair,
    )
    target.load_state_dict(fused.state_dict())
    return output(target, kwargs)


@pytest.mark.parametrize("name", MODELS)
def test_fitted_layers_of_a_wide_network_keep_a_narrow_parents_function(name: str) -> None:
    """Nothing is missing there: whatever is fitted is an output carried to the wrong place or scale."""
    narrow, wide = make(name, (8, 2, 12), 0), make(name, (16, 2, 18), 1)
    kwargs, expected = MODELS[name][1], output(narrow, MODELS[name][1])
    found = carried_over(narrow, wide, kwargs, "layers")
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_narrowed_layer_solves_the_wide_parents_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression, "RIDGE", 1e-12)
    torch.manual_seed(0)
    wide, narrow = (
        nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3)).double().eval()
        for width in (16, 6)
    )
    x = torch.randn(200, 5, dtype=torch.float64)
    carried, fitted = (
        fxfusion.fuse(
            [wide, narrow], (x[:4],), calibration=[(x,)], weights=[1, 0], method="permutation", repair=repair
        )
        for repair in ("none", "layers")
    )
    # Of groups of units the average is read: that can be had exactly.
    torch.testing.assert_close(fitted.state_dict()["0.weight"], carried.state_dict()["0.weight"])
    with torch.no_grad():
        narrow.load_state_dict(carried.state_dict())
        hidden = torch.cat([narrow[:2](x), torch.ones(200, 1, dtype=torch.float64)], 1)
        expected = torch.linalg.lstsq(hidden, wide(x)).solution
        missing = (narrow(x) - wide(x)).square().mean()
        narrow.load_state_dict(fitted.state_dict())
        left = (narrow(x) - wide(x)).square().mean()
    torch.testing.assert_close(narrow[2].weight.data, expected[:-1].T, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(narrow[2].bias.data, expected[-1], rtol=1e-6, atol=1e-8)
    assert left < 0.5 * missing


@pytest.mark.parametrize("name", ["convolutions", "packed attention", "vit"])
def test_fitted_layers_make_up_for_merged_units(name: str) -> None:
    wide, narrow = make(name, (16, 2, 24), 0), make(name, (8, 2, 12), 1)
    kwargs = MODELS[name][1]
    expected = output(wide, kwargs)
    merged, fitted = (
        float((carried_over(wide, copy.deepcopy(narrow), kwargs, repair) - expected).square().mean())
        for repair in ("norms", "layers")
    )
    assert fitted < 0.5 * merged


# -- what cannot be paired ---------------------------------------------------------------------------


class Normed(nn.Module):
    """Units brought to unit length, by sums that grow with their number, times a constant."""

    def __init__(self, width: int, factor: float, layers: int = 1) -> None:
        super().__init__()
        self.up, self.down, self.factor = nn.Linear(4, width), nn.Linear(width, 2), factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = self.up(x)
        return self.down((up * self.factor).relu() + up)


def test_what_is_scaled_by_width_and_used_twice_is_refused() -> None:
    with pytest.raises(ArchitectureMismatchError, match=r"scaled by 2, .*test_widths.py:\d+"):
        fxfusion.fuse([Normed(8, 1.0), Normed(4, 0.5)], (torch.randn(3, 4),))


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_what_is_scaled_by_width_is_made_up_for(factor: float) -> None:
    class Scaled(nn.Module):
        def __init__(self, width: int, factor: float) -> None:
            super().__init__()
            self.up, self.down, self.factor = nn.Linear(4, width), nn.Linear(width, 2), factor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down((self.up(x) * self.factor).tanh())

    narrow, x = Scaled(6, 1.0), torch.randn(3, 4)
    result = fxfusion.fuse([narrow, Scaled(12, factor)], (x,), weights=[1, 0])
    torch.testing.assert_close(result.module(x), narrow(x))


@pytest.mark.parametrize("how", ["sum", "norm", "softmax"])
def test_sums_over_more_units_are_refused(how: str) -> None:
    class Summing(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, width), nn.Linear(width, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.up(x)
            scale = {
                "sum": lambda: x.square().sum(-1, keepdim=True),
                "norm": lambda: x / x.norm(dim=-1, keepdim=True),
                "softmax": lambda: x.softmax(-1),
            }[how]()
            return self.down(x * scale)

    x = torch.randn(3, 4)
    fxfusion.fuse([Summing(6), Summing(6)], (x,))
    with pytest.raises(ArchitectureMismatchError, match=r"sums over units .*test_widths.py"):
        fxfusion.fuse([Summing(6), Summing(12)], (x,))


class Cosine(nn.Module):
    """Attention by cosine similarity: queries and keys at unit length."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, width) for _ in range(3))
        self.out = nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key = (nn.functional.normalize(part(x), dim=-1) for part in (self.query, self.key))
        return self.out((10 * query @ key.transpose(-2, -1)).softmax(-1) @ self.value(x))


def test_queries_and_keys_of_unit_length_may_be_wider() -> None:
    x = torch.randn(3, 5, 4)
    narrow = Cosine(6)
    result = fxfusion.fuse([narrow, Cosine(12)], (x,), weights=[1, 0])
    torch.testing.assert_close(result.module(x), narrow(x))


def test_one_head_cannot_be_paired_with_several() -> None:
    parents = [make("packed attention", (8, heads, 12), 0) for heads in (1, 2)]
    with pytest.raises(
        (WidthMismatchError, ArchitectureMismatchError), match=r"no counterpart|more than width"
    ):
        fxfusion.fuse(parents, kwargs=MODELS["packed attention"][1])


def test_longer_position_tables_are_refused_with_the_reason() -> None:
    def longer(count: int) -> nn.Module:
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=2, n_positions=count, bos_token_id=0)
        )

    with pytest.raises(WidthMismatchError, match=r"transformer.wpe.weight is \(12, 8\)"):
        fxfusion.fuse([longer(12).eval(), longer(16).eval()], kwargs=CAUSAL)


def test_other_numbers_of_classes_are_refused_with_the_reason() -> None:
    def classifier(classes: int) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, classes))

    with pytest.raises(
        WidthMismatchError, match=r"2.weight is \(4, 8\) .* axis 0 enumerates 4! against 3! units"
    ):
        fxfusion.fuse([classifier(4), classifier(3)], (torch.randn(2, 6),))


def test_pairing_a_network_with_itself_changes_nothing() -> None:
    module = fxfusion.prepare(make("vit", (8, 2, 12), 0), kwargs=MODELS["vit"][1])
    plan, capture = fxfusion.plan(module), state_of(module).capture
    paired = pair(capture, plan, capture, plan, ("a", "b"))
    assert paired.gains.spaces == paired.gains.parameters == {}
    assert paired.source is plan
    assert len(plan.products) == 1
    assert all("q_proj" in name and plan[name].scope for name in plan.products)


# -- solvers -----------------------------------------------------------------------------------------


@given(st.integers(1, 3), st.integers(1, 5), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_groups_are_optimal_and_even(few: int, many: int, seed: int) -> None:
    cost = torch.rand(1, few, many, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if few > many:
        cost = cost.mT
        few, many = many, few
    least, more = divmod(many, few)
    plans, values = assign_groups(cost)
    held = (plans[0] > 0).sum(1)
    assert ((plans[0] > 0).sum(0) == 1).all()
    assert sorted(held.tolist()) == [least] * (few - more) + [least + 1] * more
    best = min(
        sum(float(cost[0, row, column]) for column, row in enumerate(rows))
        for rows in itertools.product(range(few), repeat=many)
        if sorted(rows.count(row) for row in range(few)) == [least] * (few - more) + [least + 1] * more
    )
    assert float((cost[0] * (plans[0] > 0)).sum()) == pytest.approx(best)
    assert float(values) == pytest.approx(float((cost[0] * plans[0] / plans[0].sum(1, keepdim=True)).sum()))
    turned, _ = assign_groups(cost.mT)
    assert torch.equal(turned.mT, plans)


@given(st.integers(1, 9), st.integers(1, 9))
def test_in_order_couples_neighbours_with_uniform_mass(target: int, source: int) -> None:
    coupling = in_order(target, source)
    assert float(coupling.sum()) == pytest.approx(1.0)
    rows, columns = coupling.nonzero().T
    assert (rows.diff() >= 0).all()
    assert (columns.diff() >= 0).all()
    assert len(rows) == max(target, source)
    if target == source:
        assert torch.equal(coupling * target, torch.eye(target, dtype=torch.float64))


@given(st.integers(1, 6), st.integers(1, 4))
def test_resampled_quantiles_of_copies_are_the_values(count: int, copies: int) -> None:
    values = torch.rand(2, count, generator=torch.Generator().manual_seed(count)).sort(-1).values
    found = resample(values.repeat_interleave(copies, -1), count)
    torch.testing.assert_close(found.mean(-1), values.mean(-1))
    assert (found.diff() >= -1e-6).all()


# -- a third width ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "calibrated"), [("convolutions", True), ("vit", False)])
def test_parents_meet_in_a_third_width(name: str, calibrated: bool) -> None:
    kwargs = MODELS[name][1]
    parents = [make(name, (12, 2, 18), 0), make(name, (16, 4, 24), 1)]
    into = make(name, (8, 2, 12), 2)
    before = {key: tensor.clone() for key, tensor in into.state_dict().items()}
    result = fxfusion.fuse(parents, kwargs=kwargs, calibration=[kwargs] if calibrated else None, into=into)
    assert all(torch.equal(tensor, before[key]) for key, tensor in into.state_dict().items())
    into.load_state_dict(result.state_dict())
    assert output(into, kwargs).isfinite().all()
    other = fxfusion.fuse(
        parents,
        kwargs=kwargs,
        calibration=[kwargs] if calibrated else None,
        into=make(name, (8, 2, 12), 3),
    )
    for key, tensor in result.state_dict().items():  # the template's own weights do not count
        torch.testing.assert_close(other.state_dict()[key], tensor, rtol=1e-4, atol=1e-5)


def test_a_network_of_copies_is_found_again_without_a_narrow_parent() -> None:
    """Two scrambled copies of a widened network, fused into the narrow width, compute what it does."""
    narrow, kwargs = make("convolutions", (8, 1, 12), 0), MODELS["convolutions"][1]
    wide = make("convolutions", (16, 1, 24), 1)
    wide.load_state_dict(fxfusion.fuse([narrow, wide], kwargs=kwargs, weights=[1, 0]).state_dict())
    twin = make("convolutions", (16, 1, 24), 1)
    twin.load_state_dict(fxfusion.scramble(wide, kwargs=kwargs))
    into = make("convolutions", (8, 1, 12), 4)
    result = fxfusion.fuse([wide, twin], kwargs=kwargs, calibration=[kwargs], into=into)
    into.load_state_dict(result.state_dict())
    expected, fused = output(narrow, kwargs), output(into, kwargs)
    correlation = torch.corrcoef(torch.stack([expected.flatten(), fused.flatten()]))[0, 1]
    assert correlation > 0.9


def test_into_takes_the_place_of_a_target() -> None:
    parents = [make("convolutions", (8, 1, 12), seed) for seed in range(2)]
    with pytest.raises(fxfusion.FusionError, match="into"):
        fxfusion.fuse(parents, kwargs=MODELS["convolutions"][1], into=parents[0], target=0)
