"""Recurrent networks, typed once for all time steps: unrolling them would only repeat the same equations.

The gates of a layer are packed in one axis, ``gates * units``. All gates of a unit meet in its state, and
the state is read back at the next step, so gates, recurrent inputs and states share the units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxfusion.axes import Axis
from fxfusion.rules.context import Context, Typed
from fxfusion.rules.contract import linear
from fxfusion.rules.registry import rule


def _step(
    context: Context, x: Typed, output: Typed, cell: Typed | None, weights: Sequence[Typed | None]
) -> tuple[Axis, Axis, Axis]:
    """Type one step of one layer in one direction.

    Returns the units of the new output, of the new cell, and of the output that is read. The first two are
    the same unless a third matrix, ``[outputs, cells]``, projects cells to outputs.
    """
    given = [weight for weight in weights if weight is not None]
    matrices = [weight for weight in given if weight.rank == 2]
    vectors: list[Typed | None] = [weight for weight in given if weight.rank == 1]
    biases = vectors or [None, None]
    # The state of the first step may be all zeros; from the second on it is the output.
    state = context.unify(output.axes[-1], matrices[1].axes[1])
    batch = output.axes[:-1]
    read = linear(context, x, matrices[0], biases[0]).axes[-1]
    packed = context.unify(read, linear(context, Typed((*batch, state)), matrices[1], biases[1]).axes[-1])
    size = packed.size if cell is None else cell.shape[-1]
    gates, units = context.regroup([packed], [packed.size // size, size])
    context.fix(gates, message="each gate has a role")
    context.collapse(units)
    units = units if cell is None else context.unify(units, cell.axes[-1])
    outputs = units
    if len(matrices) == 3:
        outputs = linear(context, Typed((*batch, units)), matrices[2]).axes[-1]
    return outputs, units, state


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(context: Context, x: Typed, *args: Any) -> Sequence[Typed]:
    """Recurrent layers over a padded batch, or over a packed one with ``batch_sizes``.

    Overload ``input``: ``(x, state, weights, biased, layers, dropout, train, bidirectional, batch_first)``;
    ``data``: ``(x, batch_sizes, state, weights, ...)``, with batch and time in one axis.
    """
    packed = context.operator.endswith(".data")
    args = args[1:] if packed else args
    state, weights, layers, directions = args[0], args[1], args[3], 2 if args[6] else 1
    states = [state] if isinstance(state, Typed) else list(state)  # outputs, and cells of an LSTM
    leading = _leading(context, x, states, packed, batch_first=bool(args[-1]) and not packed)
    batch = context.fixed(states[0].shape[1]) if packed else leading[0 if args[-1] else 1]
    share = len(weights) // (layers * directions)
    finals: list[tuple[Axis, ...]] = []
    for place in range(layers * directions):
        first = [Typed((batch, context.narrow(item, 0, place, place + 1)[2])) for item in states]
        chosen = weights[place * share : (place + 1) * share]
        outputs, cells, read = _step(context, x, first[0], first[-1], chosen)
        finals.append((context.unify(outputs, read), cells))
        if len(finals) % directions == 0:
            units = context.concat([final[0] for final in finals[-directions:]])
            x = Typed((*leading, units))
    last = [[Typed((batch, final[kind])) for final in finals] for kind in range(len(states))]
    return [x, *(context.stack_apart(tensors) for tensors in last)]


def _leading(
    context: Context, x: Typed, states: Sequence[Typed], packed: bool, batch_first: bool
) -> tuple[Axis, ...]:
    """Return the batch and time axes of the output; the time axis is a new one, for steps are mixed."""
    if packed:
        context.fix(x.axes[0], *(item.axes[1] for item in states), message="batch and time share it")
        return (context.fixed(x.shape[0]),)
    time, batch = (1, 0) if batch_first else (0, 1)
    context.fix(x.axes[time], message="time runs along it")
    leading = [x.axes[0], x.axes[1]]
    leading[time] = context.fixed(x.shape[time])
    for item in states:
        leading[batch] = context.unify(leading[batch], item.axes[1])
    return tuple(leading)


@rule("lstm_cell")
def lstm_cell(context: Context, x: Typed, state: Sequence[Typed], *weights: Typed | None) -> Sequence[Typed]:
    """One step of an LSTM: output and cell."""
    outputs, cells, _ = _step(context, x, state[0], state[1], weights)
    batch = _batch(context, x, *state)
    return [Typed((*batch, outputs)), Typed((*batch, cells))]


@rule("gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell(context: Context, x: Typed, state: Typed, *weights: Typed | None) -> Typed:
    """One step of a plain recurrence, or of a GRU, whose new state is the old one in part."""
    kept = state if ".gru" in context.operator else None
    outputs, _, _ = _step(context, x, state, kept, weights)
    return Typed((*_batch(context, x, state), outputs))


def _batch(context: Context, *tensors: Typed) -> tuple[Axis, ...]:
    return context.broadcast(*(Typed(tensor.axes[:-1]) for tensor in tensors)).axes
