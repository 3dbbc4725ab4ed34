"""The table of operator rules, and the decorator that fills it.

A rule is one pure function ``rule(context, *args, **kwargs)`` that gets the operator's arguments as they
stand in the graph, tensors as :class:`~fxfusion.rules.context.Typed`, and returns the type of the output:
a ``Typed``, or a list of them for an operator with several. An operator without a rule is never guessed
at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fxfusion.rules.context import Typed

Rule = Callable[..., Typed | Sequence[Typed]]
_RuleT = TypeVar("_RuleT", bound=Rule)

RULES: dict[str, Rule] = {}


def rule(*operators: str) -> Callable[[_RuleT], _RuleT]:
    """Register a function as the rule of operators.

    Parameters
    ----------
    *operators : str
        Names without overload for operators of ``aten`` (``"linear"``), else with their namespace
        (``"mylib::scale"``). All overloads share the rule.

    Examples
    --------
    >>> @rule("mylib::scale")
    ... def scale(context, x, factor):
    ...     return x
    >>> RULES.pop("mylib::scale") is scale
    True
    """

    def register(function: _RuleT) -> _RuleT:
        for operator in operators:
            RULES[operator] = function
        return function

    return register


def operator_name(target: Any) -> str:
    """Return the name under which a graph node's target is registered: ``linear``, ``mylib::scale``.

    Examples
    --------
    >>> import torch
    >>> operator_name(torch.ops.aten.add.Tensor)
    'add'
    """
    schema = getattr(target, "_schema", None)
    if schema is None:
        return str(getattr(target, "__name__", target))
    name = str(schema.name)
    return name.removeprefix("aten::")


def find_rule(target: Any) -> Rule | None:
    """Return the rule of a graph node's target, or None."""
    return RULES.get(operator_name(target))
