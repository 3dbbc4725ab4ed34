"""Blocks tile a tensor, and a block's view is what plain indexing gives."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxfusion.axes import Axis, Constant, Leaf, case, concatenation, product, resolve
from fxfusion.layout import ActivationBlock, AxisBlock, Block, Factor, activation_blocks, lay_out
from fxfusion.unify import Unifier

FAST = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def size_of(leaf: Leaf) -> str:
    """Name a space after its size."""
    return f"s{leaf.size}"


def trees() -> st.SearchStrategy[Axis]:
    """Draw types without cases."""
    leaves = st.builds(
        lambda size, constant: Constant(size) if constant else Leaf(size), st.integers(1, 3), st.booleans()
    )
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=3).map(product),
            st.lists(inner, min_size=1, max_size=3).map(concatenation),
        ),
        max_leaves=4,
    )


def tiles(axes: list[Axis]) -> None:
    """Assert that blocks cover every element of a tensor exactly once, and have its volume."""
    shape = [axis.size for axis in axes]
    layout = lay_out("w", shape, axes, size_of)
    counts = torch.zeros(shape)
    for block in layout.blocks:
        view = block.view(counts)
        assert view.shape == tuple(factor.size for factor in block.factors)
        assert view.numel() == block.volume
        view += 1
    assert (counts == 1).all()


@FAST
@given(st.lists(trees(), min_size=1, max_size=2))
def test_blocks_tile_any_tensor(axes: list[Axis]) -> None:
    tiles(axes)


@FAST
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.lists(st.integers(0, 2), max_size=3),
    st.booleans(),
)
def test_blocks_tile_packed_tensors(
    parts: int, heads: int, size: int, selected: list[int], unpacked: bool
) -> None:
    unifier, axis, rows = Unifier(), Leaf(parts * heads * size), Leaf(4)
    view = unifier.regroup([axis], [parts, heads, size])
    for index in selected:
        unifier.narrow(view, 0, index % parts, index % parts + 1)
    tiles([rows, axis])
    if unpacked:
        tiles([view[0], rows, view[1], view[2]])


def test_cases_across_axes_are_matched() -> None:
    keys = [Leaf(2), Leaf(3)]
    alternatives = [Leaf(4), Leaf(4)]
    axes: list[Axis] = [concatenation(keys), case(keys, alternatives)]
    tiles(axes)
    names = {leaf: str(index) for index, leaf in enumerate([*keys, *alternatives])}
    layout = lay_out("w", (5, 4), axes, names.__getitem__)
    assert [[factor.space for factor in block.factors] for block in layout.blocks] == [["0", "2"], ["1", "3"]]


def test_view_agrees_with_indexing() -> None:
    tensor = torch.arange(5.0 * 26).reshape(5, 26)
    axis = concatenation([product([Leaf(3), Leaf(4)]), product([Leaf(2), Constant(7)])])
    first, second = lay_out("w", (5, 26), [Leaf(5), axis], size_of).blocks
    assert torch.equal(first.view(tensor), tensor[:, :12].reshape(5, 3, 4))
    assert torch.equal(second.view(tensor), tensor[:, 12:].reshape(5, 2, 7))
    assert [factor.space for factor in second.factors] == ["s5", "s2", ""]


def test_view_of_a_strided_tensor_and_of_a_slice() -> None:
    base = torch.arange(2.0 * 12 * 7).reshape(2, 12, 7)
    axes: list[Axis] = [Leaf(7), product([Leaf(3), Leaf(4)])]
    (block,) = lay_out("w", (7, 12), axes, size_of).blocks
    tensor = base[1].T
    assert torch.equal(block.view(tensor), tensor.reshape(7, 3, 4))
    block.view(tensor)[0, 1, 2] = -1.0
    assert base[1, 6, 0] == -1.0


def test_sum_inside_a_product_has_the_outer_stride() -> None:
    axis = product([concatenation([Leaf(1), Leaf(2)]), Leaf(5)])
    layout = lay_out("w", (15,), [axis], size_of)
    assert [block.axes[0].offset for block in layout.blocks] == [0, 5]
    assert layout.blocks[1].axes[0].factors == (Factor("s2", 2, 5), Factor("s5", 5, 1))
    tiles([axis])


def test_a_leaf_of_two_units() -> None:
    (block,) = lay_out("w", (2,), [Leaf(2)], size_of).blocks
    assert block.factors == (Factor("s2", 2, 1),)


def test_a_scalar_has_one_block_without_dimensions() -> None:
    (block,) = lay_out("w", (), [], size_of).blocks
    assert block.volume == 1
    assert block.view(torch.tensor(3.0)).item() == 3.0


def test_spaces_of_a_layout() -> None:
    layout = lay_out("w", (6, 3), [product([Leaf(2), Constant(3)]), Leaf(3)], size_of)
    assert layout.spaces() == {"s2", "s3"}


def test_activation_block_takes_any_number_of_samples() -> None:
    (found,) = activation_blocks([Constant(4), Leaf(6)], size_of)
    assert found.axes[0] is None
    tensor = torch.randn(9, 6)
    assert torch.equal(found.bind(tensor.shape).view(tensor), tensor)


def test_activation_block_with_a_batch_folded_into_an_axis() -> None:
    fixed, heads = Constant(4), Leaf(3)
    (found,) = activation_blocks([product([fixed, heads]), Leaf(5)], size_of)
    tensor = torch.randn(7 * 3, 5)
    assert found.bind(tensor.shape).view(tensor).shape == (7, 3, 5)


def test_activation_blocks_of_a_concatenation() -> None:
    found = activation_blocks([Constant(2), concatenation([Leaf(3), Leaf(4)])], size_of)
    tensor = torch.randn(2, 7)
    views = [block.bind(tensor.shape).view(tensor) for block in found]
    assert torch.equal(torch.cat(views, 1), tensor)


def test_activations_without_spaces_and_with_dependence_across_axes_are_not_observed() -> None:
    assert activation_blocks([Constant(2), Leaf(3)], lambda leaf: "") == []
    keys = [Leaf(2), Leaf(3)]
    axes: list[Axis] = [concatenation(keys), case(keys, [Leaf(4), Leaf(4)])]
    assert isinstance(resolve(axes[1]), Axis)
    assert activation_blocks(axes, size_of) == []


def test_bound_block_is_plain() -> None:
    block = ActivationBlock((None, AxisBlock(2, (Factor("s", 3, 1),))), (4, 5)).bind((6, 5))
    assert isinstance(block, Block)
    assert block.axes == (AxisBlock(0, (Factor("", 6, 1),)), AxisBlock(2, (Factor("s", 3, 1),)))
