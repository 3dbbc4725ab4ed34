"""Mixtures of experts: experts may be permuted where only their numbers change, and never otherwise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

# Registers an operator. Imported while a model is exported, transformers would not register its outputs.
import transformers.integrations.moe  # noqa: F401
from torch import nn
from torch.nn.functional import one_hot

import fxfusion
from fxfusion.certify import certify_plan
from fxfusion.groups import enlarge
from fxfusion.plan import Plan
from fxfusion.state import state_of

INPUTS, WIDTH, HIDDEN, EXPERTS, CHOSEN, TOKENS = 3, 5, 7, 4, 2, 12

Routing = tuple[torch.Tensor, torch.Tensor]  # weights and numbers of the chosen experts


class Mixture(nn.Module):
    """A layer of experts between two linear maps; how it is computed is given."""

    def __init__(
        self, compute: Callable[[Mixture, torch.Tensor], torch.Tensor], experts: int = EXPERTS
    ) -> None:
        super().__init__()
        self.compute = compute
        self.experts = experts
        self.embed = nn.Linear(INPUTS, WIDTH)
        self.router = nn.Linear(WIDTH, experts)
        self.up = nn.Parameter(torch.randn(experts, WIDTH, HIDDEN))
        self.bias = nn.Parameter(torch.randn(experts, HIDDEN))
        self.down = nn.Parameter(torch.randn(experts, HIDDEN, WIDTH))
        self.scale = nn.Parameter(torch.randn(TOKENS * CHOSEN))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        return self.head(x + self.compute(self, x))


def route(layer: Mixture, x: torch.Tensor) -> Routing:
    """Return weights and numbers of the best experts, ``[tokens, chosen]`` each."""
    weights, index = torch.topk(layer.router(x).softmax(-1), CHOSEN)
    return weights / weights.sum(-1, keepdim=True), index


def grouped(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Multiply each group of rows by a matrix of its own."""
    product: torch.Tensor = torch.ops.transformers.grouped_mm_fallback(x, weight, ends)
    return product


def ends_of(layer: Mixture, numbers: torch.Tensor) -> torch.Tensor:
    """Return where the groups of sorted tokens end."""
    counts = torch.histc(numbers.float(), layer.experts, 0, layer.experts - 1)
    return counts.cumsum(0, dtype=torch.int32)


# -- ways to compute the same layer -----------------------------------------------------------------


def masked(layer: Mixture, x: torch.Tensor) -> torch.Tensor:
    weights, index = route(layer, x)
    mask = (one_hot(index, layer.experts) * weights.unsqueeze(-1)).sum(1)
    hidden = (torch.einsum("td,edh->teh", x, layer.up) + layer.bias).relu()
    return torch.einsum("teh,ehd,te->td", hidden, layer.down, mask)


def scattered(layer: Mixture, x: torch.Tensor) -> torch.Tensor:
    scores, index = torch.topk(layer.router(x), CHOSEN)
    mask = torch.full_like(layer.router(x), float("-inf")).scatter(1, index, scores).sigmoid()
    inputs = x.repeat(layer.experts, 1) * mask.T.reshape(-1, 1)
    hidden = torch.bmm(inputs.view(layer.experts, -1, WIDTH), layer.up).relu()
    return torch.bmm(hidden, layer.down).sum(0)


def picked(layer: Mixture, x: torch.Tensor) -> torch.Tensor:
    weights, index = route(layer, x)
    hidden = (torch.einsum("td,tkdh->tkh", x, layer.up[index]) + layer.bias[index]).relu()
    return torch.einsum("tkh,tkhd,tk->td", hidden, layer.down[index], weights)


def gathered(layer: Mixture, x: torch.Tensor) -> torch.Tensor:
    weights, index = route(layer, x)
    outputs = torch.einsum("td,edh->teh", x, layer.up).relu()
    outputs = torch.einsum("teh,ehd->ted", outputs, layer.down)
    chosen = outputs.gather(1, index.unsqueeze(-1).expand(-1, -1, WIDTH))
    return (chosen * weights.unsqueeze(-1)).sum(1)


def batched(layer: Mixture, x: torch.Tensor) -> torch.Tensor:
    weights, index = route(layer, x)
    numbers = index.reshape(-1)
    inputs = x.repeat_interleave(CHOSEN, 0).unsqueeze(1)
    hidden = (torch.bmm(inputs, layer.up[numbers]).squeeze(1) + layer.bias[numbers]).relu()
    outputs = torch.bmm(hidden.unsqueeze(1), layer.down[numbers]).squeeze(1) * weights.reshape(-1, 1)
    return outputs.view(-1, CHOSEN, WIDTH).sum(1)


def sorted_tokens(layer: Mixture, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weighted outputs of tokens sorted by expert, and where they come from."""
    weights, index = route(layer, x)
    numbers, order = torch.sort(index.reshape(-1))
    ends = ends_of(layer, numbers)
    hidden = (grouped(x[order // CHOSEN], layer.up, ends) + layer.bias[numbers]).relu()
    return grouped(hidden, layer.down, ends) * weights.reshape(-1)[order].unsqueeze(-1), order


def unsorted_by_inverse(layer: Mixture, x: torch.Tensor) -> torch.Tensor:
    outputs, order = sorted_tokens(layer, x)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0])
    return outputs[inverse].view(-1, CHOSEN, WIDTH).sum(1)


def unsorted_by_sorting(layer: Mixture, x: torch.Tensor) -> torch.Tensor:
    outputs, order = sorted_tokens(layer, x)
    return outputs[order.argsort()].view(-1, CHOSEN, WIDTH).sum(1)


def unsorted_by_scattering(layer: Mixture, x: torch.Tensor) -> torch.Tensor:
    outputs, order = sorted_tokens(layer, x)
    inverse = torch.zeros_like(order).scatter(0, order, torch.arange(order.shape[0]))
    return outputs[inverse].view(-1, CHOSEN, WIDTH).sum(1)


def unsorted_by_adding(layer: Mixture, x: torch.Tensor) -> torch.Tensor:
    outputs, order = sorted_tokens(layer, x)
    return torch.zeros_like(x).index_add(0, order // CHOSEN, outputs)


def sorted_by_argsort(layer: Mixture, x: torch.Tensor) -> torch.Tensor:
    weights, index = route(layer, x)
    flat = index.reshape(-1)
    order = flat.argsort()
    ends = ends_of(layer, flat)
    hidden = (grouped(x[order // CHOSEN], layer.up, ends) + layer.bias[flat[order]]).relu()
    outputs = grouped(hidden, layer.down, ends) * weights.reshape(-1)[order].unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, order // CHOSEN, outputs)


def best_then_second(layer: Mixture, x: torch.Tensor) -> torch.Tensor:
    """Choose two experts one after the other, as PhiMoE does."""
    logits = layer.router(x)
    first = logits.max(-1, keepdim=True)
    rest = logits.scatter(-1, first.indices, float("-inf"))
    second = rest.argmax(-1, keepdim=True)
    index = torch.cat([first.indices, second], -1)
    weights = logits.softmax(-1).gather(-1, index)
    hidden = torch.einsum("td,tkdh->tkh", x, layer.up[index]).relu()
    return torch.einsum("tkh,tkhd,tk->td", hidden, layer.down[index], weights)


FREE = [(EXPERTS, 0), (WIDTH, 0), (HIDDEN, 1)]
EQUAL = [
    masked,
    scattered,
    picked,
    gathered,
    batched,
    unsorted_by_inverse,
    unsorted_by_sorting,
    unsorted_by_scattering,
    unsorted_by_adding,
    sorted_by_argsort,
    best_then_second,
]


def planned(compute: Callable[..., torch.Tensor], experts: int = EXPERTS) -> tuple[Plan, bool]:
    torch.manual_seed(0)
    layer = Mixture(compute, experts).eval()
    prepared = fxfusion.prepare(layer, (torch.randn(TOKENS, INPUTS),))
    return fxfusion.plan(prepared), fxfusion.certify(prepared).ok


def sizes(plan: Plan) -> list[tuple[int, int]]:
    """Return size and nesting depth of every space, sorted by size."""
    return sorted((space.size, len(space.scope)) for space in plan.spaces)


@pytest.mark.parametrize("compute", EQUAL, ids=lambda function: function.__name__)
def test_experts_and_the_units_of_each_are_free(compute: Callable[..., torch.Tensor]) -> None:
    plan, certified = planned(compute)
    assert sizes(plan) == FREE
    assert certified


@pytest.mark.parametrize("compute", EQUAL, ids=lambda function: function.__name__)
def test_larger_groups_are_certified(compute: Callable[..., torch.Tensor]) -> None:
    """Units picked by data cannot be followed through the graph: what they meet might tell them apart."""
    torch.manual_seed(0)
    prepared = fxfusion.prepare(Mixture(compute).eval(), (torch.randn(TOKENS, INPUTS),))
    capture = state_of(prepared).capture
    plan = enlarge(capture, fxfusion.plan(prepared))
    outputs = capture.select_outputs(None)
    assert certify_plan(capture, plan, capture.canonical(dict(prepared.state_dict())), outputs).ok
    assert not any(space.symmetry.rotates for space in plan if space.scope)


@pytest.mark.parametrize("compute", [batched, unsorted_by_inverse], ids=lambda function: function.__name__)
def test_a_twin_with_other_experts_is_recovered(compute: Callable[..., torch.Tensor]) -> None:
    torch.manual_seed(0)
    layer = fxfusion.prepare(Mixture(compute).eval(), (torch.randn(TOKENS, INPUTS),))
    twin = fxfusion.prepare(Mixture(compute).eval(), (torch.randn(TOKENS, INPUTS),))
    twin.load_state_dict(fxfusion.scramble(layer, seed=1))
    batches = [(torch.randn(TOKENS, INPUTS),) for _ in range(4)]
    for features in ("weights", "activations"):
        fused = fxfusion.fuse([twin, layer], features=features, calibration=batches, coupling="hard")
        for name, tensor in layer.state_dict().items():
            torch.testing.assert_close(fused.state_dict()[name], tensor)


class InBfloat16(nn.Module):
    """Experts computed by PyTorch's own kernel, which knows no float64."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(INPUTS, 8)
        self.router = nn.Linear(8, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, 8, 16))
        self.down = nn.Parameter(torch.randn(EXPERTS, 16, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        numbers, order = torch.sort(self.router(x).argmax(-1))
        ends = torch.histc(numbers.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)
        hidden = torch._grouped_mm(x[order], self.up, ends).relu()
        outputs = torch._grouped_mm(hidden, self.down, ends)
        return torch.zeros_like(x).index_add(0, order, outputs).sum(-1)


def test_the_kernel_for_bfloat16_is_certified_in_float64() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(TOKENS, INPUTS, dtype=torch.bfloat16)
    prepared = fxfusion.prepare(InBfloat16().bfloat16(), (inputs,))
    certificate = fxfusion.certify(prepared)
    assert certificate.ok
    assert certificate.max_relative_error < 1e-12
    assert sizes(fxfusion.plan(prepared)) == [(EXPERTS, 0), (8, 0), (8, 0), (16, 1)]


# -- experts in groups ------------------------------------------------------------------------------


def group_limited(layer: Mixture, x: torch.Tensor) -> torch.Tensor:
    """Choose among the experts of the two best of three groups of two, as DeepSeek-V3 does."""
    scores = layer.router(x).sigmoid()
    best = scores.view(-1, 3, 2).topk(2)[0].sum(-1)
    groups = torch.topk(best, 2, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(best).scatter(1, groups, 1.0)
    mask = mask.unsqueeze(-1).expand(-1, 3, 2).reshape(-1, 6)
    index = torch.topk(scores.masked_fill(~mask.bool(), 0.0), CHOSEN, dim=-1, sorted=False)[1]
    weights = scores.gather(1, index)
    numbers, order = torch.sort(index.reshape(-1))
    ends = ends_of(layer, numbers)
    hidden = grouped(x[order // CHOSEN], layer.up, ends).relu()
    outputs = grouped(hidden, layer.down, ends) * weights.reshape(-1)[order].unsqueeze(-1)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0])
    return outputs[inverse].view(-1, CHOSEN, WIDTH).sum(1)


def group_of_the_best(layer: Mixture, x: torch.Tensor) -> torch.Tensor:
    """Mix all experts in the group of the best one."""
    scores = layer.router(x).sigmoid()
    mask = one_hot(scores.argmax(-1) // 2, 3).unsqueeze(-1) * scores.view(-1, 3, 2)
    hidden = torch.einsum("td,edh->teh", x, layer.up).relu()
    return torch.einsum("teh,ehd,te->td", hidden, layer.down, mask.reshape(-1, 6))


@pytest.mark.parametrize(
    "compute", [group_limited, group_of_the_best], ids=lambda function: function.__name__
)
def test_groups_and_the_experts_of_each_are_free(compute: Callable[..., torch.Tensor]) -> None:
    plan, certified = planned(compute, experts=6)
    assert sizes(plan) == [(2, 1), (3, 0), (WIDTH, 0), (HIDDEN, 2)]
    assert certified


# -- what depends on the numbers of experts ---------------------------------------------------------


def ranked(layer: Mixture, x: torch.Tensor) -> torch.Tensor:
    logits = layer.router(x) + torch.arange(layer.experts)
    index = logits.argmax(-1)
    return torch.einsum("td,tdh,thc->tc", x, layer.up[index], layer.down[index])


def compared(layer: Mixture, x: torch.Tensor) -> torch.Tensor:
    weights, index = route(layer, x)
    weights = torch.where(index == 1, 0.5 * weights, weights)
    hidden = torch.einsum("td,tkdh->tkh", x, layer.up[index]).relu()
    return torch.einsum("tkh,tkhd,tk->td", hidden, layer.down[index], weights)


def shown(layer: Mixture, x: torch.Tensor) -> torch.Tensor:
    _, index = route(layer, x)
    return picked(layer, x) * index.sum(-1, keepdim=True)


def stays_sorted(layer: Mixture, x: torch.Tensor) -> torch.Tensor:
    outputs, _ = sorted_tokens(layer, x)
    return outputs.view(-1, CHOSEN, WIDTH).sum(1)


def weighted_in_sorted_order(layer: Mixture, x: torch.Tensor) -> torch.Tensor:
    outputs, order = sorted_tokens(layer, x)
    return torch.zeros_like(x).index_add(0, order // CHOSEN, outputs * layer.scale.unsqueeze(-1))


def summed_in_sorted_order(layer: Mixture, x: torch.Tensor) -> torch.Tensor:
    outputs, order = sorted_tokens(layer, x)
    return torch.zeros_like(x).index_add(0, order // CHOSEN, outputs.cumsum(0))


def neighbours_in_groups(layer: Mixture, x: torch.Tensor) -> torch.Tensor:
    """Choose the best expert and the one after it."""
    index = layer.router(x).argmax(-1)
    index = torch.stack([index, (index + 1) % layer.experts], -1)
    hidden = torch.einsum("td,tkdh->tkh", x, layer.up[index]).relu()
    return torch.einsum("tkh,tkhd->td", hidden, layer.down[index])


def weighted_by_place(layer: Mixture, x: torch.Tensor) -> torch.Tensor:
    """Weigh the chosen experts by their place, although they come in no order."""
    index = torch.topk(layer.router(x), CHOSEN, sorted=False)[1]
    hidden = torch.einsum("td,tkdh->tkh", x, layer.up[index]).relu()
    return torch.einsum("tkh,tkhd,k->td", hidden, layer.down[index], layer.scale[:CHOSEN])


def looped(layer: Mixture, x: torch.Tensor) -> torch.Tensor:
    weights = layer.router(x).softmax(-1)
    outputs = torch.zeros_like(x)
    for expert in range(layer.experts):
        hidden = (x @ layer.up[expert] + layer.bias[expert]).relu()
        outputs = outputs + hidden @ layer.down[expert] * weights[:, expert : expert + 1] * (expert + 1)
    return outputs


@pytest.mark.parametrize(
    "compute",
    [
        ranked,
        compared,
        shown,
        stays_sorted,
        weighted_in_sorted_order,
        summed_in_sorted_order,
        neighbours_in_groups,
        weighted_by_place,
        looped,
    ],
    ids=lambda function: function.__name__,
)
def test_experts_stay_where_their_order_matters(compute: Callable[..., torch.Tensor]) -> None:
    plan, certified = planned(compute)
    assert certified
    found = [size for size, _ in sizes(plan)]
    assert EXPERTS not in found
    assert WIDTH in found
    assert HIDDEN in found


def test_units_of_each_expert_are_free_where_experts_are_not() -> None:
    plan, certified = planned(compared)
    assert certified
    assert sizes(plan) == [(WIDTH, 0), (HIDDEN, 1)]


class Showing(nn.Module):
    """A router that returns the numbers of the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(INPUTS, EXPERTS)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, index = self.router(x).topk(CHOSEN)
        return values, index


def test_experts_stay_where_their_numbers_are_an_output() -> None:
    prepared = fxfusion.prepare(Showing(), (torch.randn(TOKENS, INPUTS),))
    assert not fxfusion.plan(prepared).spaces
    weights_alone = fxfusion.plan(prepared, outputs=[prepared.meta["fxfusion"].capture.outputs[0]])
    assert [space.size for space in weights_alone.spaces] in ([EXPERTS], [])


# -- two indices must not be confused ---------------------------------------------------------------


def offsets_of_another_index(layer: Mixture, x: torch.Tensor) -> torch.Tensor:
    """Sort by the best experts, but take group sizes of the worst."""
    best, worst = layer.router(x).argmax(-1), layer.router(x).argmin(-1)
    _, order = torch.sort(best)
    ends = ends_of(layer, worst)
    outputs = grouped(grouped(x[order], layer.up, ends).relu(), layer.down, ends)
    return torch.zeros_like(x).index_add(0, order, outputs)


def hidden_units_of_two_indices(layer: Mixture, x: torch.Tensor) -> torch.Tensor:
    """Add hidden units of the best and the worst expert: all experts share one order of units."""
    best, worst = layer.router(x).argmax(-1), layer.router(x).argmin(-1)
    hidden = torch.einsum("td,tdh->th", x, layer.up[best]) + torch.einsum("td,tdh->th", x, layer.up[worst])
    return torch.einsum("th,thd->td", hidden.relu(), layer.down[best])


def written_and_read_by_two_indices(layer: Mixture, x: torch.Tensor) -> torch.Tensor:
    best, worst = layer.router(x).argmax(-1), layer.router(x).argmin(-1)
    hidden = torch.einsum("td,tdh->th", x, layer.up[best]).relu()
    return torch.einsum("th,thd->td", hidden, layer.down[worst])


def sorted_and_picked_by_two_indices(layer: Mixture, x: torch.Tensor) -> torch.Tensor:
    """Sort by the best expert, but add the bias of the worst."""
    best, worst = layer.router(x).argmax(-1), layer.router(x).argmin(-1)
    numbers, order = torch.sort(best)
    ends = ends_of(layer, numbers)
    hidden = grouped(x[order], layer.up, ends) + layer.bias[worst[order]]
    return torch.zeros_like(x).index_add(0, order, grouped(hidden.relu(), layer.down, ends))


def averaged_over_tokens(layer: Mixture, x: torch.Tensor) -> torch.Tensor:
    index = layer.router(x).argmax(-1)
    hidden = torch.einsum("td,tdh->th", x, layer.up[index])
    hidden = (hidden - hidden.mean(0)).relu()
    return torch.einsum("th,thd->td", hidden, layer.down[index])


def shifted_to_the_next_token(layer: Mixture, x: torch.Tensor) -> torch.Tensor:
    index = layer.router(x).argmax(-1)
    hidden = torch.einsum("td,tdh->th", x, layer.up[index]).relu()
    return torch.einsum("th,thd->td", hidden.roll(1, 0), layer.down[index])


def test_group_sizes_must_be_those_of_the_sorted_index() -> None:
    plan, certified = planned(offsets_of_another_index)
    assert certified
    assert sizes(plan) == [(WIDTH, 0), (HIDDEN, 0)]


@pytest.mark.parametrize(
    "compute",
    [
        hidden_units_of_two_indices,
        written_and_read_by_two_indices,
        sorted_and_picked_by_two_indices,
        averaged_over_tokens,
        shifted_to_the_next_token,
    ],
    ids=lambda function: function.__name__,
)
def test_experts_whose_units_meet_share_one_order(compute: Callable[..., torch.Tensor]) -> None:
    plan, certified = planned(compute)
    assert certified
    assert sizes(plan) == [(EXPERTS, 0), (WIDTH, 0), (HIDDEN, 0)]


# -- scores that tie --------------------------------------------------------------------------------


def chosen_by_counts(layer: Mixture, x: torch.Tensor) -> torch.Tensor:
    """Integers tie: among equal ones the first expert wins."""
    logits = layer.router(x)
    counts = one_hot(logits.argmax(-1), layer.experts).sum(0)
    index = counts.argmax(-1, keepdim=True).expand(x.shape[0])
    return torch.einsum("td,tdh,thc->tc", x, layer.up[index], layer.down[index])


def test_experts_stay_where_equal_scores_are_to_be_expected() -> None:
    plan, certified = planned(chosen_by_counts)
    assert certified
    assert (EXPERTS, 0) not in sizes(plan)
