"""A fusion as the command line describes it: which models, how, and where to.

Options of ``fxfusion fuse`` and a TOML file of ``fxfusion run`` both come to a :class:`Recipe`, which is
checked before any model is loaded.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxfusion.errors import CalibrationRequiredError, OptionError, RecipeError, TooFewModelsError
from fxfusion.presets import reference
from fxfusion.transport.hierarchy import Coupling
from fxfusion.transport.learned import Refinement
from fxfusion.transport.options import Flow, Observe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LOADED_ONLY = (
    "features",
    "coupling",
    "symmetry",
    "repair",
    "method",
    "refine",
    "flow",
    "observe",
    "regularisation",
)
_TEXTS = ("features", "symmetry", "repair", "method", "flow", "observe", "layers", "layer_matching", "device")
_COUNTS = {"refine": 1, "batch_size": 1, "rounds": 0, "seed": 0}  # and the least that each may be


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What to fuse, how, and where to.

    Attributes
    ----------
    models : tuple of str
        References as on the command line.
    output : Path
    features, coupling, symmetry, repair, method, refine, regularisation, rounds, layers, layer_matching
        As for :func:`fxfusion.fuse`; None for its default.
    target, weights, seed
        Likewise.
    labels : float
        As for :class:`fxfusion.Refinement`; the calibration data then hold an array ``labels``.
    gap : float
        As for :class:`fxfusion.Coupling`, of hard couplings.
    untie : bool
    calibration : Path or None
        A file of calibration data.
    batch_size : int
        Of it.
    flow, observe : str or None
        Choices as on the command line: ``residual=skip,metric=cosine``.
    stream : bool
        From file to file, see :func:`fxfusion.fuse_files`.
    shard_size : float
        Gigabytes of a file then.
    max_memory : float
        Gigabytes that calibration may take then, see :func:`fxfusion.fuse_files`.
    inputs : tuple of str
        Example inputs, ``name=2x3:float32``.
    outputs : tuple of str or None
        Those to keep.
    device : str
        Where to fuse: ``cpu``, ``cuda``, or ``auto``, a GPU if there is one.

    Raises
    ------
    TooFewModelsError, OptionError, CalibrationRequiredError
        If settings are out of range, or exclude each other.

    Examples
    --------
    >>> Recipe(("hf:a", "hf:b"), Path("merged"), method="auto", calibration=Path("text.npz")).options()
    {'method': 'auto'}
    """

    models: tuple[str, ...]
    output: Path
    features: str | None = None
    coupling: str | Coupling | None = None
    symmetry: str | None = None
    repair: str | None = None
    method: str | None = None
    refine: int | None = None
    labels: float = 0.0
    regularisation: float | None = None
    gap: float = 0.0
    rounds: int | None = None
    layers: str | None = None
    layer_matching: str | None = None
    untie: bool = False
    calibration: Path | None = None
    batch_size: int = 32
    weights: tuple[float, ...] | None = None
    flow: str | None = None
    observe: str | None = None
    target: int = -1
    stream: bool = False
    shard_size: float = 1.0
    max_memory: float = 4.0
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        count = len(self.models)
        if count < 2:
            given = f"but only {self.models[0]} is given" if self.models else "but none is given"
            raise TooFewModelsError(f"fusion needs at least two models, {given}")
        if self.features == "activations" and self.calibration is None:
            raise CalibrationRequiredError(
                "--features activations compares activations: give --calibration FILE"
            )
        if self.weights is not None and len(self.weights) != count:
            raise OptionError(f"--weights gives {len(self.weights)} numbers for {count} models")
        if not -count <= self.target < count:
            raise OptionError(
                f"--target {self.target} names none of the {count} models: choose -{count} to {count - 1}"
            )
        for name in ("shard_size", "max_memory"):
            if not 0.001 <= getattr(self, name) < math.inf:
                raise OptionError(f"{name}={getattr(self, name)!r}: give gigabytes, 0.001 or more")
        named = any(getattr(self, name) is not None for name in LOADED_ONLY)
        if self.stream and (self.untie or self.labels or named):
            raise OptionError(
                "--stream solves permutations, hard: leave out untie, labels, " + ", ".join(LOADED_ONLY)
            )
        if self.stream and self.device != "cpu":
            raise OptionError(f"--stream runs on the CPU: leave out --device {self.device}")
        if self.labels and self.refine is None and self.method != "learned":
            raise OptionError('labels are what transports are learned from: give refine, or method "learned"')
        if self.gap and (self.coupling not in (None, "hard") or self.flow == "reference"):
            raise OptionError("gap is of hard couplings: leave one of them out, or give it with the coupling")
        self.options()  # a flow or an observation that cannot be read is refused now

    @property
    def shares(self) -> list[float] | None:
        """The models' weights, None for equal ones."""
        return None if self.weights is None else list(self.weights)

    def options(self) -> dict[str, Any]:
        """Return arguments of :func:`fxfusion.fuse`; what is left out takes its default there."""
        names = ("features", "coupling", "symmetry", "repair", "method", "refine", "regularisation")
        given = {name: getattr(self, name) for name in (*names, "rounds", "layers", "layer_matching")}
        found = {name: value for name, value in given.items() if value is not None}
        if self.labels:
            learning = Refinement(labels=self.labels)
            steps = learning.steps if self.refine is None else self.refine
            found["refine"] = dataclasses.replace(learning, steps=steps)
        if self.gap:
            found["coupling"] = Coupling(gap=self.gap)
        if self.outputs is not None:
            found["outputs"] = list(self.outputs)
        if self.observe is not None:
            found["observe"] = Observe.parse(self.observe)
        if self.flow == "reference":
            compared = self.features or ("weights" if self.calibration is None else "activations")
            kind = self.coupling if isinstance(self.coupling, str) else "soft"
            return {**found, **reference(compared, kind)}
        if self.flow is not None:
            found["flow"] = Flow.parse(self.flow)
        return found

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a recipe from a TOML file; relative paths in it count from the working directory.

        Raises
        ------
        RecipeError
            If it cannot be read, or holds a setting that there is not, or one of another type.
        """
        path = Path(path)
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(f"{path} cannot be read: {error.strerror or error}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RecipeError(f"{path} is not valid TOML: {error}") from error
        return cls.from_table(table, str(path))

    @classmethod
    def from_table(cls, table: Mapping[str, Any], where: str = "the recipe") -> Recipe:
        """Return the recipe that a table of settings stands for.

        Examples
        --------
        >>> table = {"models": ["hf:a", "hf:b"], "output": "merged", "coupling": {"regularisation": 0.01}}
        >>> Recipe.from_table(table).coupling.regularisation
        0.01
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for name in table:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]}?" if close else f": choose from {', '.join(sorted(known))}"
                raise RecipeError(f"{where}: there is no setting {name!r}{hint}")
        for name in ("models", "output"):
            if name not in table:
                raise RecipeError(f"{where}: it does not say what {name} is: add {name} = ...")
        return cls(**{name: _setting(name, value, where) for name, value in table.items()})


def _setting(name: str, value: Any, where: str) -> Any:
    """Return the value of a setting, of its type."""
    if name in ("models", "inputs", "outputs"):
        return _list(name, value, str, where)
    if name == "weights":
        return tuple(_number(name, item, where) for item in _list(name, value, (int, float), where))
    if name in ("output", "calibration"):
        text = _typed(name, value, str, "a path", where)
        if "\0" in text:
            raise RecipeError(f"{where}: {name} = {text!r} is no path")
        return Path(text)
    if name in ("untie", "stream"):
        return _typed(name, value, bool, "true or false", where)
    if name in ("shard_size", "max_memory", "regularisation", "gap", "labels"):
        return _number(name, value, where)
    if name == "coupling" and isinstance(value, Mapping):
        return _coupling(value, where)
    if name in (*_TEXTS, "coupling"):
        return _typed(name, value, str, "text", where)
    least = _COUNTS.get(name)
    if _typed(name, value, int, "a whole number", where) is True or value is False:
        raise RecipeError(f"{where}: {name} = {value!r}, but it must be a whole number")
    if least is not None and value < least:
        raise RecipeError(f"{where}: {name} = {value}: give {least} or more")
    return value


def _typed(name: str, value: Any, kind: type | tuple[type, ...], said: str, where: str) -> Any:
    if not isinstance(value, kind):
        raise RecipeError(f"{where}: {name} = {value!r}, but it must be {said}")
    return value


def _number(name: str, value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecipeError(f"{where}: {name} = {value!r}, but it must be a number")
    try:
        return float(value)
    except OverflowError:
        raise RecipeError(f"{where}: {name} is too large a number") from None


def _list(name: str, value: Any, kind: type | tuple[type, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise RecipeError(f"{where}: {name} = {value!r}, but it must be a list such as {name} = [...]")
    return tuple(value)


def _coupling(table: Mapping[str, Any], where: str) -> Coupling:
    """Return the coupling of a table, with overrides by pattern of spaces' names."""
    flags = {"absolute", "widening"}
    numbers = {"regularisation", "relaxation", "share", "gap"}
    found: dict[str, Any] = {}
    for name, value in table.items():
        said = f"coupling.{name}"
        if name in flags:
            found[name] = _typed(said, value, bool, "true or false", where)
        elif name in numbers:
            found[name] = _number(said, value, where)
        elif name == "overrides":
            overrides = _typed(said, value, Mapping, "a table by pattern of spaces", where)
            example = "a table such as {regularisation = 0.1}"
            found[name] = {
                pattern: _coupling(_typed(f"{said}.{pattern}", item, Mapping, example, where), where)
                for pattern, item in overrides.items()
            }
        else:
            choices = ", ".join(sorted(flags | numbers | {"overrides"}))
            raise RecipeError(f"{where}: there is no coupling.{name}: choose from {choices}")
    return Coupling(**found)
