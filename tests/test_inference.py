"""Inference finds the spaces that are there: gold counts, hand-checked incidences, no weights needed."""

from __future__ import annotations

import copy
import resource
import time

import pytest
import torch
from torch import nn

import fxfusion
from fxfusion import inference
from fxfusion.plan import Plan, Role
from tests import zoo


def plan_of(name: str) -> Plan:
    found = zoo.planned(name).plan
    assert found is not None
    return found


def incidences(plan: Plan, space: str) -> dict[str, Role]:
    return {str(incidence): incidence.role for incidence in plan[space].incidences}


def sizes(plan: Plan) -> list[tuple[int, int]]:
    """Return size and nesting depth of every space, sorted."""
    return sorted((space.size, len(space.scope)) for space in plan.spaces)


# -- gold counts: soundness and coverage do not notice two independent spaces that were merged --------


@pytest.mark.parametrize("name", list(zoo.MODELS))
def test_gold_counts(name: str) -> None:
    gold, plan = zoo.GOLD[name], plan_of(name)
    found = (len(plan.spaces), len(plan.wreath), sum(space.size for space in plan.spaces))
    assert found == (gold.spaces, gold.wreath, gold.hidden)
    assert plan.covered >= max(0.97, gold.covered - 1e-3)
    assert not plan.limits


@pytest.mark.parametrize("name", list(zoo.MODELS))
def test_all_of_timm_and_transformers_keeps_its_batch_symbolic(name: str) -> None:
    assert zoo.planned(name).capture.dynamic


# Sizes and nesting depths, derived by hand.
ATTENTION = [(3, 0), (4, 1), (4, 1), (12, 0)]
HAND: dict[str, list[tuple[int, int]]] = {
    "packed_chunks": ATTENTION,
    "packed_outer": ATTENTION,
    "packed_inner": ATTENTION,
    "masked": ATTENTION,
    # heads of q and k, heads between the two mixes, heads of v
    "talking_heads": [(3, 0), (3, 0), (3, 0), (4, 1), (4, 1), (12, 0)],
    "head_norm": [(3, 0), (4, 0), (4, 1), (12, 0)],
    "shared_over_heads": [(3, 0), (4, 0), (4, 1), (12, 0)],
    "rotary": [(3, 0), (4, 1), (12, 0)],
    # a softmax for each of the four inner units: the mixed units may differ from one to the next
    "softmax_over_heads": [(3, 1), (4, 0)],
    "glu": [(8, 0)],
    "tied_autoencoder": [(5, 0), (8, 0)],
    "shared_module": [(8, 0)],
    "dense_block": [(4, 0), (5, 0), (6, 0)],
    # groups and channels per group, before and after the shuffle
    "channel_shuffle": [(2, 1), (2, 1), (3, 0), (4, 0)],
    "grouped_convolution": [(2, 1), (3, 1), (4, 0), (5, 0)],
    "squeeze_excite": [(4, 0), (8, 0)],
    "cumsum": [(7, 0)],
    "positions_and_padding": [(4, 0), (8, 0)],
    "perceptron": [(7, 0), (8, 0)],
    "perceptron_showing": [(8, 0)],
    "convolution1d": [(7, 0), (8, 0)],
    "group_norm": [(2, 1), (4, 0)],
}


@pytest.mark.parametrize("name", list(zoo.ADVERSARIAL))
def test_adversarial_modules_have_the_spaces_derived_by_hand(name: str) -> None:
    assert sizes(plan_of(name)) == HAND[name]


# -- which spaces there are -------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layers"), [("hf_vit", 2), ("vit_tiny_patch16_224", 12)])
def test_a_vit_has_a_residual_and_four_spaces_per_layer(name: str, layers: int) -> None:
    plan = plan_of(name)
    assert len(plan.spaces) == 1 + 4 * layers
    heads = [space for space in plan.spaces if any(space.name in other.scope for other in plan.spaces)]
    assert len(heads) == layers
    for space in heads:
        below = [other for other in plan.spaces if other.scope == (space.name,)]
        assert [other.size for other in below] == [16, 16] if name == "hf_vit" else [64, 64]
        assert not space.scope


def test_head_dimensions_of_queries_and_keys_are_one_space_and_values_another() -> None:
    plan = plan_of("bert")
    prefix = "bert.encoder.layer.0.attention"
    query, value = f"{prefix}.self.query", f"{prefix}.self.value"
    by_parameter = {
        str(incidence): space for space in plan.spaces for incidence in space.incidences if space.scope
    }
    shared = by_parameter[f"{query}.weight[0].0.1"]
    assert {incidence.parameter for incidence in shared.incidences} == {
        f"{prefix}.self.{kind}.{part}" for kind in ("query", "key") for part in ("weight", "bias")
    }
    own = by_parameter[f"{value}.weight[0].0.1"]
    assert {incidence.parameter for incidence in own.incidences} == {
        f"{value}.weight",
        f"{value}.bias",
        f"{prefix}.output.dense.weight",
    }
    assert shared.scope == own.scope
    heads = plan[shared.scope[0]]
    assert heads.size == 4
    assert {incidence.parameter for incidence in heads.incidences} == {
        *(incidence.parameter for incidence in (*shared.incidences, *own.incidences))
    }


def test_query_heads_nest_below_key_heads_in_grouped_query_attention() -> None:
    plan = plan_of("llama")
    key_heads = next(
        space
        for space in plan.spaces
        if any(item.parameter.endswith("0.self_attn.k_proj.weight") for item in space.incidences)
        and space.size == 2
    )
    group = [space for space in plan.spaces if space.scope == (key_heads.name,)]
    assert sorted(space.size for space in group) == [2, 16]
    queries = next(space for space in group if space.size == 2)
    assert {item.parameter.split(".")[-2] for item in queries.incidences} == {"q_proj", "o_proj"}
    values = next(space for space in group if space.size == 16)
    assert {item.parameter.split(".")[-2] for item in values.incidences} == {"v_proj", "o_proj"}


def test_rotary_dimensions_are_fixed() -> None:
    for name in ("llama", "rotary"):
        plan = plan_of(name)
        for space in plan.spaces:
            for incidence in space.incidences:
                if incidence.parameter.endswith("k_proj.weight") and incidence.axis == 0:
                    assert incidence.factor == 0  # the heads; head_dim is a table's axis


def test_cumsum_fixes_what_it_scans() -> None:
    plan = plan_of("cumsum")
    held = {incidence.parameter for space in plan.spaces for incidence in space.incidences}
    assert held == {"second.weight", "second.bias", "head.weight"}


def test_softmax_over_heads_must_not_let_units_differ_from_head_to_head() -> None:
    plan = plan_of("softmax_over_heads")
    inner = next(space for space in plan.spaces if space.size == 4)
    assert inner.scope == ()


def test_a_parameter_that_all_heads_share_moves_all_heads_alike() -> None:
    for name, parameter in (("shared_over_heads", "offset"), ("head_norm", "q_norm.weight")):
        plan = plan_of(name)
        space = next(
            space for space in plan.spaces if any(item.parameter == parameter for item in space.incidences)
        )
        assert space.scope == ()


# -- incidences and roles, by hand ------------------------------------------------------------------


def test_incidences_of_a_perceptron() -> None:
    plan = plan_of("perceptron")
    assert incidences(plan, "first.weight[0]") == {
        "first.weight[0]": Role.WRITES,
        "first.bias[0]": Role.WRITES,
        "norm.weight[0]": Role.WRITES,
        "norm.bias[0]": Role.WRITES,
        "norm.running_mean[0]": Role.WRITES,
        "norm.running_var[0]": Role.WRITES,
        "second.weight[1]": Role.READS,
    }
    assert incidences(plan, "second.weight[0]") == {
        "second.weight[0]": Role.WRITES,
        "second.bias[0]": Role.WRITES,
        "head.weight[1]": Role.READS,
    }


def test_incidences_of_an_attention_block() -> None:
    plan = plan_of("packed_outer")
    assert incidences(plan, "embed.weight[0]") == {
        "embed.weight[0]": Role.WRITES,
        "embed.bias[0]": Role.WRITES,
        "norm.weight[0]": Role.WRITES,
        "norm.bias[0]": Role.WRITES,
        "qkv.weight[1]": Role.READS,
        "proj.weight[0]": Role.WRITES,
        "proj.bias[0]": Role.WRITES,
        "head.weight[1]": Role.READS,
    }
    heads = incidences(plan, "qkv.weight[0]")
    assert heads["proj.weight[1]"] is Role.READS
    assert {place for place in heads if place.startswith("qkv.weight")} == {
        "qkv.weight[0]",
        "qkv.weight[0].1.0",
        "qkv.weight[0].2.0",
    }
    assert incidences(plan, "qkv.weight[0].2.1") == {
        "qkv.weight[0].2.1": Role.WRITES,
        "qkv.bias[0].2.1": Role.WRITES,
        "proj.weight[1].0.1": Role.READS,
    }
    assert set(incidences(plan, "qkv.weight[0].0.1")) == {
        "qkv.weight[0].0.1",
        "qkv.weight[0].1.1",
        "qkv.bias[0].0.1",
        "qkv.bias[0].1.1",
    }


def test_a_tied_weight_both_writes_and_reads() -> None:
    plan = plan_of("tied_autoencoder")
    roles = {str(incidence): incidence.role for space in plan.spaces for incidence in space.incidences}
    assert roles["squeeze.weight[0]"] is roles["squeeze.weight[1]"] is Role.BOTH


def test_zero_padding_splits_the_wider_axis() -> None:
    plan = plan_of("positions_and_padding")
    narrow = next(space for space in plan.spaces if space.size == 8)
    wide = next(space for space in plan.spaces if space.size == 4)
    assert {"token", "positions", "wider.weight", "head.weight"} <= {
        incidence.parameter for incidence in narrow.incidences
    }
    assert {incidence.parameter for incidence in wide.incidences} == {
        "wider.weight",
        "wider.bias",
        "head.weight",
    }


# -- outputs ----------------------------------------------------------------------------------------


def test_an_exposed_hidden_state_fixes_its_space_unless_it_does_not_count() -> None:
    model, (args, kwargs) = zoo.build("perceptron_showing"), zoo.inputs("perceptron_showing")
    assert [space.size for space in fxfusion.plan(model, args, kwargs).spaces] == [8]
    both = fxfusion.plan(model, args, kwargs, outputs=["scores", "hidden"])
    assert [space.size for space in both.spaces] == [8]
    assert [space.size for space in fxfusion.plan(model, args, kwargs, outputs=["scores"]).spaces] == [8, 7]
    certificate = fxfusion.certify(model, args, kwargs, outputs=["scores"])
    assert certificate.ok


def test_logits_are_what_counts_where_there_are_logits() -> None:
    model, (args, kwargs) = zoo.build("hf_vit"), zoo.inputs("hf_vit")
    kwargs = {**kwargs, "output_hidden_states": True}
    assert len(fxfusion.plan(model, args, kwargs).spaces) == 9


# -- without weights --------------------------------------------------------------------------------


def test_a_large_model_is_planned_on_the_meta_device() -> None:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=12,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(5, 100, (2, 16))
    # What the processor did: other work beside it does not count.
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    plan = fxfusion.plan(model, (), {"input_ids": ids, "use_cache": False})
    seconds = time.process_time() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024**2  # GiB, from KiB
    assert len(plan.spaces) == 1 + 4 * 12
    assert plan.covered > 0.999
    assert all(parameter.is_meta for parameter in model.parameters())
    assert grown < 0.75, "its weights are over 10 GiB"
    assert seconds < 45


@pytest.mark.parametrize("name", ["gpt2", "packed_outer", "dense_block"])
def test_the_meta_device_gives_the_same_plan(name: str) -> None:
    with torch.device("meta"):
        model = {**zoo.MODELS, **zoo.ADVERSARIAL}[name].build().eval()
    args, kwargs = zoo.inputs(name)
    assert fxfusion.plan(model, args, kwargs).spaces == plan_of(name).spaces


def test_inference_that_does_not_settle_frees_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "MAXIMAL_SWEEPS", 1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    plan = fxfusion.plan(model, (torch.randn(2, 4),))
    assert plan.spaces == ()
    assert "did not settle" in plan.limits[0].reason


def test_units_that_nobody_reads_are_no_space() -> None:
    class Window(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(12, 5))
            self.second = torch.nn.Linear(5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(x @ self.table[3:7])

    plan = fxfusion.plan(Window(), (torch.randn(2, 4),))
    assert [space.size for space in plan.spaces] == [5]
    assert plan.covered > 0.9
    rows = plan.explain("table", 0)[0].parts
    assert [part.chain[-1].kind for part in rows] == ["unused", "input", "unused"]


def test_a_hidden_state_counts_where_nothing_else_reads_the_weights() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.after = nn.Linear(4, 8), nn.Linear(8, 6)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"last_hidden_state": self.after(self.hidden(x).relu()), "scale": x.std(1)}

    assert [space.size for space in fxfusion.plan(Encoder(), (torch.randn(3, 4),)).spaces] == [8]


def test_a_list_of_series_is_certified_uncut() -> None:
    class Forecast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.after = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, series: list[torch.Tensor], kinds: list[int]) -> torch.Tensor:
            recent = torch.stack([item[-6:] for item in series]) + torch.tensor(kinds)[:, None]
            return self.after(self.hidden(recent).relu())

    example = ([torch.randn(9), torch.randn(9)], [0, 3])
    prepared = fxfusion.prepare(Forecast(), example)
    assert fxfusion.certify(prepared).moved > 0.5
    twin = copy.deepcopy(prepared)
    twin.load_state_dict(fxfusion.scramble(prepared), strict=False)  # the copy holds constants as buffers
    fused = fxfusion.fuse([twin, prepared], features="weights").state_dict()
    assert fused.keys() == prepared.state_dict().keys()
    for name, tensor in prepared.state_dict().items():
        assert torch.equal(fused[name], tensor)
