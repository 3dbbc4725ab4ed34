"""Checks of parents and options, all of them before any long work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.export import ExportedProgram

from fxfusion.capture import Capture, Model, tied_groups
from fxfusion.certify import first_samples
from fxfusion.errors import (
    ArchitectureMismatchError,
    CaptureError,
    InvalidWeightError,
    OptionError,
    TieMismatchError,
    TooFewModelsError,
)
from fxfusion.execution import Program, flat_outputs
from fxfusion.pairing import widths_differ
from fxfusion.processes import current
from fxfusion.state import prepared

SAMPLES = 2  # of the example, on which parents are compared with the captured graph
FUNCTION_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}  # relative to the largest output element

_SHOWN = 5  # names listed in a message
_INERT = ("Dropout", "DropPath", "Identity")  # modules that do nothing in evaluation
_PROVENANCE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures")


def model_name(model: Model, index: int) -> str:
    """Return how messages name a parent: ``model 0 (VisionTransformer)``."""
    return f"model {index} ({type(model).__name__})"


def state_dict_of(model: Model) -> dict[str, torch.Tensor]:
    """Return a parent's state dict, its tensors themselves."""
    state = model.state_dict if isinstance(model, ExportedProgram) else model.state_dict()
    known = prepared(model)
    lifted = known.lifted if known is not None else frozenset()
    return {name: tensor for name, tensor in state.items() if name not in lifted}


def check_parents(models: Sequence[Model], target: int, equal: bool = True) -> list[dict[str, torch.Tensor]]:
    """Check that models are parents of one architecture with sound weights.

    Parameters
    ----------
    models : sequence
    target : int
        Position of the parent with which the others are compared.
    equal : bool
        Whether their configurations must give equal depths.

    Returns
    -------
    list of dict
        Their state dicts.

    Raises
    ------
    TooFewModelsError, OptionError, ArchitectureMismatchError, WidthMismatchError, TieMismatchError, \
InvalidWeightError
    """
    target = check_alike(models, target, equal)
    states = [state_dict_of(model) for model in models]
    bounds = _bounds(models[target], states)
    for index, (model, state) in enumerate(zip(models, states, strict=True)):
        check_finite(model_name(model, index), {name: state[name] for name in state if name not in bounds})
    return states


def check_alike(models: Sequence[Model], target: int, equal: bool = True) -> int:
    """Check that models are of one architecture, whatever their weights; return the target's position.

    Raises
    ------
    TooFewModelsError, OptionError, ArchitectureMismatchError, WidthMismatchError, TieMismatchError
    """
    check_models(models, target)
    target = range(len(models))[target]
    states = [state_dict_of(model) for model in models]
    _check_devices(models, states)
    for index, model in enumerate(models):
        if index != target:
            _check_pair(
                model_name(models[target], target), model_name(model, index), states[target], states[index]
            )
            same = equal and not widths_differ([states[target], states[index]])
            _check_structure(models[target], model, target, index, same)
            _check_ties(models[target], model, target, index)
    return target


def _check_devices(models: Sequence[Model], states: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Check that all weights are on one device, and on the CPU where several processes share the work."""
    found: dict[torch.device, str] = {}
    for index, (model, state) in enumerate(zip(models, states, strict=True)):
        for device in {tensor.device: None for tensor in state.values() if not tensor.is_meta}:
            found.setdefault(device, model_name(model, index))
    if len(found) > 1:
        (first, one), (second, other) = list(found.items())[:2]
        raise OptionError(f"{one} is on {first}, {other} on {second}: move all to one device")
    if current().count > 1 and any(device.type != "cpu" for device in found):
        raise OptionError(
            "several processes work on the CPU alone: move the models there, or use one process"
        )


def _bounds(model: Model, states: Sequence[Mapping[str, torch.Tensor]]) -> set[str]:
    """Return the buffers with infinite values that all parents have alike: limits that do not bind."""
    if isinstance(model, ExportedProgram):
        buffers = set(model.graph_signature.buffers)
    else:
        buffers = {name for name, _ in model.named_buffers()}
    return {
        name
        for name, tensor in states[0].items()
        if name in buffers
        and not tensor.is_meta
        and tensor.is_floating_point()
        and bool(tensor.isinf().any())
        and all(torch.equal(tensor, state[name]) for state in states)
    }


def check_models(models: Sequence[Model], target: int) -> None:
    """Check that there are at least two models, all of one class, and that ``target`` is one of them.

    Raises
    ------
    TooFewModelsError, OptionError, ArchitectureMismatchError
    """
    if isinstance(models, torch.nn.Module):
        raise OptionError(f"models is one {type(models).__name__}: give a sequence of two or more models")
    if len(models) < 2:
        raise TooFewModelsError(f"fusion needs at least two models, {len(models)} given")
    for index, model in enumerate(models):
        if not isinstance(model, (torch.nn.Module, ExportedProgram)):
            raise OptionError(
                f"model {index} is a {type(model).__name__}: give nn.Modules or ExportedPrograms"
            )
    if not isinstance(target, int) or not -len(models) <= target < len(models):
        raise OptionError(f"target={target!r}: give the position of one of the {len(models)} models")
    for index, model in enumerate(models):
        _check_class(models[target], model, range(len(models))[target], index)


def _check_pair(
    reference_name: str, name: str, reference: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]
) -> None:
    missing = [key for key in reference if key not in state]
    extra = [key for key in state if key not in reference]
    if missing or extra:
        differences = [f"{name} lacks {_some(missing)}"] * bool(missing)
        differences += [f"{name} has {_some(extra)} in addition"] * bool(extra)
        raise ArchitectureMismatchError(
            f"{name} and {reference_name} are not of one architecture: {'; '.join(differences)}. Fuse models "
            "of the same class and configuration."
        )
    unequal = [key for key in reference if reference[key].shape != state[key].shape]
    if not unequal:
        return
    listed = ", ".join(
        f"{key} {tuple(state[key].shape)} against {tuple(reference[key].shape)}" for key in unequal[:_SHOWN]
    )
    if all(reference[key].ndim == state[key].ndim for key in unequal):
        return  # other widths, to be paired once both are planned
    raise ArchitectureMismatchError(f"{name} and {reference_name} are not of one architecture: {listed}")


def _check_class(reference: Model, model: Model, target: int, index: int) -> None:
    generic = (fx.GraphModule, ExportedProgram)
    if isinstance(reference, generic) or isinstance(model, generic) or type(reference) is type(model):
        return
    raise ArchitectureMismatchError(
        f"{model_name(model, index)} and {model_name(reference, target)} are of different classes: fuse "
        "models of one class"
    )


def _check_structure(reference: Model, model: Model, target: int, index: int, same: bool) -> None:
    """Compare classes, module trees and configurations: equal names do not make an equal function."""
    generic = (fx.GraphModule, ExportedProgram)
    if isinstance(reference, generic) or isinstance(model, generic):
        return
    names = f"{model_name(model, index)} and {model_name(reference, target)}"
    for (path, left), (_, right) in zip(reference.named_modules(), model.named_modules(), strict=False):
        if isinstance(left, fx.GraphModule) and isinstance(right, fx.GraphModule):
            continue  # each has a class of its own
        if type(left) is not type(right) and not {type(left).__name__, type(right).__name__} & set(_INERT):
            raise ArchitectureMismatchError(
                f"{names} differ at module '{path}': {type(right).__name__} against {type(left).__name__}"
            )
    left_config, right_config = (_configuration(item) for item in (reference, model))
    for key in left_config:
        left_value, right_value = left_config[key], right_config.get(key)
        if (not same or _counts_heads(key)) and _may_differ(left_value, right_value):
            continue
        if key not in _PROVENANCE and left_value != right_value:
            raise ArchitectureMismatchError(
                f"{names} are configured differently: {key} is {right_value!r} in one, "
                f"{left_value!r} in the other"
            )


def heads_differ(reference: Model, model: Model) -> bool:
    """Return whether two models divide weights of equal shapes into other numbers of heads.

    Only their configurations can say so: each then has a graph of its own.
    """
    left, right = (
        _configuration(item) if isinstance(item, torch.nn.Module) else {} for item in (reference, model)
    )
    return any(_counts_heads(key) and key in right and left[key] != right[key] for key in left)


def _counts_heads(key: str) -> bool:
    return "head" in key.split("_") or "heads" in key.split("_")


def _may_differ(left: object, right: object) -> bool:
    """Whether two values of a configuration may be widths or depths, or hold an entry for every layer."""
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) != len(right) or all(map(_may_differ, left, right))
    return all(isinstance(value, int) and not isinstance(value, bool) for value in (left, right))


def _configuration(model: torch.nn.Module) -> dict[str, object]:
    config = getattr(model, "config", None)
    as_dict = getattr(config, "to_dict", None)
    return dict(as_dict()) if callable(as_dict) else {}


def _check_ties(reference: Model, model: Model, target: int, index: int) -> None:
    left, right = ({frozenset(group) for group in tied_groups(item)} for item in (reference, model))
    if left != right:
        group = sorted(next(iter(left ^ right)))
        raise TieMismatchError(
            f"{model_name(model, index)} and {model_name(reference, target)} tie different weights: "
            f"{' = '.join(group)} in one of them only. Tie or untie them alike first."
        )


def check_finite(name: str, state: Mapping[str, torch.Tensor]) -> None:
    """Check that a model has weights, and finite ones.

    Raises
    ------
    InvalidWeightError
    """
    for key, tensor in state.items():
        if tensor.is_meta:
            raise InvalidWeightError(
                f"{name} has no weights: {key} is on the meta device. Load weights first."
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            kind = "NaN" if bool(tensor.isnan().any()) else "infinite"
            raise InvalidWeightError(f"{name} has {kind} values in {key}: repair or retrain that parent")


def check_shares(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Return the parents' shares, summing to one.

    Raises
    ------
    OptionError
        If their number is wrong, one is negative or not finite, or all are zero.

    Examples
    --------
    >>> check_shares([1, 3], 2)
    (0.25, 0.75)
    """
    if weights is None:
        return (1.0 / count,) * count
    try:
        shares = [float(weight) for weight in weights]
    except (TypeError, ValueError):
        raise OptionError(f"weights={weights!r}: give one number per model") from None
    if len(shares) != count:
        raise OptionError(f"{len(shares)} weights for {count} models: give one per model")
    total = sum(shares)
    if not all(0 <= share < float("inf") for share in shares) or total <= 0:
        raise OptionError(f"weights {shares}: give numbers of at least 0, not all 0")
    return tuple(share / total for share in shares)


def check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    """Raise unless an option has one of its values.

    Raises
    ------
    OptionError
    """
    if value not in choices:
        raise OptionError(f"{option}={value!r}: choose {' or '.join(map(repr, choices))}")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def check_function(
    capture: Capture,
    models: Sequence[Model],
    states: Sequence[Mapping[str, torch.Tensor]],
    alike: Sequence[int],
    target: int,
) -> None:
    """Check that every parent computes what the captured graph computes with its weights.

    Equal names and shapes do not make an equal function: another activation, number of heads or constant
    shows only when the parent runs.

    Parameters
    ----------
    capture : Capture
        Of the target.
    models, states : sequence
        The parents and their state dicts.
    alike : sequence of int
        Positions of the parents to check: those of the target's widths.
    target : int

    Raises
    ------
    ArchitectureMismatchError
        If a parent computes something else.
    CaptureError
        If the target itself does: the graph does not represent it.
    """
    program = Program(capture)
    args, kwargs = first_samples(capture, SAMPLES)
    precision = _precision(states[target])
    for index in sorted(alike, key=lambda item: item != target):
        own = _precision(states[index])
        inputs = _cast((args, kwargs), precision, own)
        weights = _cast(capture.canonical(states[index]), own, precision)
        expected = flat_outputs(models[index], *inputs)
        actual = program.run([weights], args, kwargs)[0]
        tolerance = FUNCTION_TOLERANCE.get(precision if own == precision else torch.float16, 1e-2)
        if len(expected) == len(actual) and all(
            _close(left, right, tolerance) for left, right in zip(expected, actual, strict=True)
        ):
            continue
        name = model_name(models[index], index)
        if index == target:
            raise CaptureError(
                f"the graph captured from {name} computes something else than the model itself: was it run "
                "in another mode before, or does it depend on random numbers or hidden state?"
            )
        raise ArchitectureMismatchError(
            f"{name} computes another function of its weights than {model_name(models[target], target)}: "
            "fuse models with the same configuration (activation, heads, constants)"
        )


def _precision(state: Mapping[str, torch.Tensor]) -> torch.dtype:
    return next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), torch.float32)


def _cast(tree: Any, old: torch.dtype, new: torch.dtype) -> Any:
    """Return a tree of tensors with those of one precision in another."""
    return pytree.tree_map_only(
        torch.Tensor, lambda tensor: tensor.detach().to(new) if tensor.dtype == old else tensor, tree
    )


def _close(left: object, right: object, tolerance: float) -> bool:
    if not isinstance(left, torch.Tensor) or not isinstance(right, torch.Tensor):
        return True
    if left.shape != right.shape:
        return False
    left, right = left.double(), right.double()
    scale = left[left.isfinite()].abs().max() if bool(left.isfinite().any()) else torch.ones(())
    return torch.allclose(left, right, rtol=0.0, atol=tolerance * float(scale), equal_nan=True)
