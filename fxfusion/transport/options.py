"""What can be chosen when transports are solved along the flow of a network, as in the paper.

Every choice is an enumeration; :class:`Flow` and :class:`Costs` collect them. Defaults are what keeps a
network's function where that is possible; :func:`fxfusion.reference` gives the published code's.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Any

from fxfusion.errors import CalibrationRequiredError, OptionError


class Residual(enum.Enum):
    """How the transports of skip and branch combine where they are added (section 4.2.1 of the paper)."""

    MEAN = "mean"
    """The average of both."""
    WEIGHTED_SCALAR = "weighted_scalar"
    """Weighted by the mean magnitude of both activations."""
    WEIGHTED_MATRIX = "weighted_matrix"
    """Weighted unit by unit by the mean magnitude of both activations."""
    SKIP = "skip"
    """The skip's."""
    BRANCH = "branch"
    """The branch's."""
    IDENTITY = "identity"
    """None: units stay in their places."""


class Magnitudes(enum.Enum):
    """What is measured where a residual policy weighs."""

    STREAMS = "streams"
    """Skip and branch, as they are when they are added."""
    LAYERS = "layers"
    """The outputs of layers, each scaled as activations are for the costs, as in the published code: of
    patches without the class token before them, and where a skip is no layer's output, of the sum of the
    scaled outputs that it was made from."""


class QueryKey(enum.Enum):
    """The transports of queries and keys, whose product is taken unit by unit."""

    SHARED = "shared"
    """One transport from both: the only choice that keeps a network's function."""
    SEPARATE = "separate"
    """One each (the published code's default); needs ``Heads.IGNORED``."""
    JOINT = "joint"
    """One over the units of both at once, which may make a query of a key; needs ``Heads.IGNORED``. Where one
    parameter packs both, or theirs do not correspond, it is shared."""


class Heads(enum.Enum):
    """Units that lie below others: head dimensions below heads, channels below groups."""

    MATCHED = "matched"
    """Heads are matched with heads, and dimensions within them."""
    IGNORED = "ignored"
    """All dimensions of all heads are units of one layer, as in the published code."""


class Tables(enum.Enum):
    """The transports of what is added to or put before a stream as it is: positions, class tokens."""

    CARRIED = "carried"
    """The transport of the stream that they meet."""
    OWN = "own"
    """One of their own from their own numbers; that of an added table is then the skip of a join."""


class Nonlinearity(enum.Enum):
    """Where the units of a layer are observed whose output goes through a nonlinearity."""

    BEFORE = "before"
    AFTER = "after"


class Positions(enum.Enum):
    """At which tokens or pixels units are observed."""

    ALL = "all"
    FIRST = "first"
    """The class token."""
    CENTRE = "centre"
    """The middle half in each direction, and no class token."""
    RANDOM = "random"
    """A share of them, the same for every sample."""


class Metric(enum.Enum):
    """Distance between the features of two units."""

    SQUARED_EUCLIDEAN = "squared_euclidean"
    EUCLIDEAN = "euclidean"
    COSINE = "cosine"
    """One minus the cosine; of centred features, one minus the correlation."""


class Scaling(enum.Enum):
    """What is done to the features of each unit before they are compared."""

    RAW = "raw"
    CENTRED = "centred"
    STANDARDISED = "standardised"
    """Centred, at unit variance."""
    UNIT = "unit"
    """At unit length."""


class Normalisation(enum.Enum):
    """What the ground costs are divided by, so that one regularisation fits all layers."""

    NONE = "none"
    MAX = "max"
    MEAN = "mean"
    MEDIAN = "median"
    LOG = "log"
    """Not divided: ``log(1 + cost)``."""


def _choose(options: object, field: str, choices: type[enum.Enum]) -> None:
    """Turn a field's text into the choice that it names."""
    value = getattr(options, field)
    try:
        object.__setattr__(options, field, choices(value))
    except ValueError as error:
        known = ", ".join(repr(choice.value) for choice in choices)
        raise OptionError(f"{field}={value!r}: give one of {known}") from error


def _settings(text: str, names: set[str], what: str) -> dict[str, str]:
    """Return the settings ``NAME=VALUE, ...`` of a text."""
    given = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = item.partition("=")
        if name not in names or not value:
            known = ", ".join(sorted(names))
            raise OptionError(f"{item!r} is no setting of {what}: give NAME=VALUE, NAME one of {known}")
        given[name] = value
    return given


class Marginals(enum.Enum):
    """How much mass each unit has that is transported."""

    UNIFORM = "uniform"
    """All alike."""
    MAGNITUDE = "magnitude"
    """As large as its features: the root mean square of its activations, or of its weights. A unit may then
    be coupled with several, also by a hard coupling."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """How ground costs are computed.

    Parameters
    ----------
    metric : Metric or str
    activations, weights : Scaling or str
        Applied to activations over samples, and to the weights that a unit is written with.
    normalisation : Normalisation or str
    clip : tuple of float, optional
        Smallest and largest cost, after normalisation.
    bias : bool
        Whether biases are features, too, where weights are compared.
    components : int, optional
        Compare activations by this many principal components only: those directions over the (centred)
        samples along which the target's units vary most.

    Raises
    ------
    OptionError
        If a value is none of the choices, or there are no components.

    Examples
    --------
    >>> Costs(metric="cosine").metric
    <Metric.COSINE: 'cosine'>
    """

    metric: Metric | str = Metric.SQUARED_EUCLIDEAN
    activations: Scaling | str = Scaling.STANDARDISED
    weights: Scaling | str = Scaling.RAW
    normalisation: Normalisation | str = Normalisation.MEAN
    clip: tuple[float, float] | None = None
    bias: bool = False
    components: int | None = None

    def __post_init__(self) -> None:
        _choose(self, "metric", Metric)
        _choose(self, "activations", Scaling)
        _choose(self, "weights", Scaling)
        _choose(self, "normalisation", Normalisation)
        if self.clip is not None and not self.clip[0] <= self.clip[1]:
            raise OptionError(f"clip={self.clip!r}: give the smallest and the largest cost")
        if self.components is not None and self.components < 1:
            raise OptionError(f"components={self.components!r}: give a number above 0")


@dataclasses.dataclass(frozen=True)
class Observe:
    """Which calibration activations count.

    Parameters
    ----------
    positions : Positions or str
        At which tokens or pixels.
    share : float
        Of random positions.
    confident : float
        Share of each batch that counts: the samples of whose classes the target is most certain (the entropy
        of its first output, as logits, is lowest). Labels are not needed.

    Raises
    ------
    OptionError
        If a value is none of the choices, or a share is not above 0 and at most 1.

    Examples
    --------
    >>> Observe(positions="first").positions
    <Positions.FIRST: 'first'>
    """

    positions: Positions | str = Positions.ALL
    share: float = 0.25
    confident: float = 1.0

    def __post_init__(self) -> None:
        _choose(self, "positions", Positions)
        for field in ("share", "confident"):
            value = getattr(self, field)
            if not 0 < value <= 1:
                raise OptionError(f"{field}={value!r}: give a number above 0 and at most 1")

    @classmethod
    def parse(cls, text: str) -> Observe:
        """Return the settings that a text names.

        Raises
        ------
        OptionError
            If the text names no such field, or gives one a value that it cannot have.

        Examples
        --------
        >>> Observe.parse("positions=random, share=0.5").share
        0.5
        """
        names = {field.name for field in dataclasses.fields(cls)}
        given: dict[str, Any] = _settings(text, names, "an observation")
        try:
            numbers = {name: float(value) for name, value in given.items() if name != "positions"}
        except ValueError as error:
            raise OptionError(f"share and confident take a number: {text!r}") from error
        return cls(**{**given, **numbers})


@dataclasses.dataclass(frozen=True)
class Flow:
    """Solve transports writer by writer along the network, each given what is carried into it.

    Parameters
    ----------
    residual : Residual or str
        What is carried on where a skip and a branch are added.
    magnitudes : Magnitudes or str
        What the policies that weigh go by.
    query_key : QueryKey or str
    heads : Heads or str
    tables : Tables or str
    nonlinearity : Nonlinearity or str
        Where activations are observed.
    costs : Costs
    marginals : Marginals or str
    regularisation : float, optional
        Of soft couplings in absolute units of the normalised cost, in place of ``fuse``'s relative one.
    relaxation : float, optional
        Of soft couplings: price of mass that is not transported (unbalanced transport), in units of the
        normalised cost; by default all of it is.

    Raises
    ------
    OptionError
        If a value is none of the choices, or choices exclude each other.

    References
    ----------
    Imfeld et al., Transformer Fusion with Optimal Transport, ICLR 2024, section 4.

    Examples
    --------
    >>> Flow(residual="weighted_scalar").residual
    <Residual.WEIGHTED_SCALAR: 'weighted_scalar'>
    """

    residual: Residual | str = Residual.MEAN
    magnitudes: Magnitudes | str = Magnitudes.STREAMS
    query_key: QueryKey | str = QueryKey.SHARED
    heads: Heads | str = Heads.MATCHED
    tables: Tables | str = Tables.CARRIED
    nonlinearity: Nonlinearity | str = Nonlinearity.BEFORE
    costs: Costs = Costs()
    marginals: Marginals | str = Marginals.UNIFORM
    regularisation: float | None = None
    relaxation: float | None = None

    @property
    def weighted(self) -> bool:
        """Whether activations weigh skip and branch."""
        return Residual(self.residual) in (Residual.WEIGHTED_SCALAR, Residual.WEIGHTED_MATRIX)

    def __post_init__(self) -> None:
        _choose(self, "residual", Residual)
        _choose(self, "magnitudes", Magnitudes)
        _choose(self, "query_key", QueryKey)
        _choose(self, "heads", Heads)
        _choose(self, "tables", Tables)
        _choose(self, "nonlinearity", Nonlinearity)
        _choose(self, "marginals", Marginals)
        if self.query_key is not QueryKey.SHARED and self.heads is Heads.MATCHED:
            raise OptionError(
                f'query_key="{QueryKey(self.query_key).value}" with heads="matched": queries and keys of one '
                'head must stay together; give heads="ignored"'
            )
        for field in ("regularisation", "relaxation"):
            value = getattr(self, field)
            if value is not None and not 0 < value < math.inf:
                raise OptionError(f"{field}={value!r}: give a positive number")

    @classmethod
    def parse(cls, text: str) -> Flow:
        """Return the settings that a text names; fields of :class:`Costs` stand beside the others.

        Raises
        ------
        OptionError
            If the text names no such field, or gives one a value that it cannot have.

        Examples
        --------
        >>> flow = Flow.parse("residual=skip, metric=cosine, regularisation=0.1")
        >>> flow.residual, flow.costs.metric, flow.regularisation
        (<Residual.SKIP: 'skip'>, <Metric.COSINE: 'cosine'>, 0.1)
        """
        own = {field.name for field in dataclasses.fields(cls)} - {"costs"}
        costs = {field.name for field in dataclasses.fields(Costs)} - {"clip"}
        given: dict[str, Any] = _settings(text, own | costs, "a flow")
        try:
            for name in ("regularisation", "relaxation"):
                if name in given:
                    given[name] = float(given[name])
            if "components" in given:
                given["components"] = int(given["components"])
            if "bias" in given:
                given["bias"] = {"true": True, "false": False}[given["bias"]]
        except (ValueError, KeyError) as error:
            raise OptionError(
                "regularisation and relaxation take a number, components a whole one, bias true or false: "
                f"{text!r}"
            ) from error
        return cls(
            costs=Costs(**{name: value for name, value in given.items() if name in costs}),
            **{name: value for name, value in given.items() if name in own},
        )


def check_data(options: Flow, calibrated: bool, compared: bool) -> None:
    """Refuse what needs activations where there are none.

    Parameters
    ----------
    options : Flow
    calibrated, compared : bool
        Whether there are calibration data, and whether it is activations that are compared.

    Raises
    ------
    CalibrationRequiredError
    """
    if options.weighted and not calibrated:
        policy = Residual(options.residual).value
        raise CalibrationRequiredError(
            f"residual={policy!r} weighs activations: give calibration data, or take another policy"
        )
    if options.costs.components is not None and not compared:
        raise CalibrationRequiredError(
            "components are of activations: give calibration data, or leave them out"
        )
