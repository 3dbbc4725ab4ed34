"""What :func:`fxfusion.fuse` is asked to do, checked before anything is captured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from fxfusion.errors import CalibrationRequiredError, OptionError
from fxfusion.methods import METHODS, Method
from fxfusion.progress import Progress, logged
from fxfusion.transport.hierarchy import Coupling
from fxfusion.transport.learned import Refinement
from fxfusion.transport.options import Flow, Observe, check_data
from fxfusion.validation import check_choice

FEATURES = ("activations", "weights")
COUPLINGS = ("hard", "soft", "widening")
LAYERS = ("keep", "drop")
MATCHINGS = ("outputs", "representations")
SYMMETRIES = ("none", "permutation", "largest")
REPAIRS = ("norms", "units", "layers", "none")
AUTO = "auto"
SOFT_REGULARISATION = 0.005


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of one fusion.

    Attributes
    ----------
    features : {"activations", "weights"}
    coupling : Coupling
    name : str
        The coupling as it was asked for.
    flow : Flow or None
    rounds : int
    layers : {"keep", "drop"}
    layer_matching : {"outputs", "representations"}
    observed : Observe
    symmetry : {"none", "permutation", "largest"}
    repair : {"norms", "units", "layers", "none"}
    refinement : Refinement or None
    auto : bool
        Whether symmetry and repair are chosen by calibration data.
    fallback : Method or None
        Where the symmetry was left to the default: what goes for parents of any widths.
    template : bool
        Whether the target is a network of a third width, whose weights do not count.
    seed : int
    outputs : sequence of str or None
    progress : callable
    """

    features: str
    coupling: Coupling
    name: str
    flow: Flow | None
    rounds: int
    layers: str
    layer_matching: str
    observed: Observe
    symmetry: str
    repair: str
    refinement: Refinement | None
    auto: bool
    fallback: Method | None
    template: bool
    seed: int
    outputs: Sequence[str] | None
    progress: Progress

    @classmethod
    def checked(
        cls,
        *,
        calibrated: bool,
        features: str | None,
        coupling: str | Coupling,
        regularisation: float | None,
        flow: Flow | None,
        rounds: int,
        layers: str,
        layer_matching: str,
        observed: Observe | None,
        symmetry: str | None,
        repair: str | None,
        refinement: Refinement | int | None,
        method: str | None,
        template: bool,
        target: int,
        seed: int,
        outputs: Sequence[str] | None,
        progress: Progress | None,
    ) -> Settings:
        """Return settings, from arguments as :func:`fxfusion.fuse` gets them.

        Raises
        ------
        OptionError
            If one is out of range, or two exclude each other.
        CalibrationRequiredError
            If activations are asked for without calibration data.
        """
        features = features or ("activations" if calibrated else "weights")
        check_choice("features", features, FEATURES)
        if not isinstance(coupling, Coupling):
            check_choice("coupling", coupling, COUPLINGS)
        elif regularisation is not None:
            raise OptionError("regularisation is given twice, to fuse and in its coupling: give one of them")
        check_choice("layers", layers, LAYERS)
        check_choice("layer_matching", layer_matching, MATCHINGS)
        plain = _default(features, coupling, flow, template)
        chosen = _method(method, symmetry, repair, refinement, plain)
        defaulted = method is None and symmetry is None
        fallback = Method("permutation", repair or "norms", chosen.refinement) if defaulted else None
        if chosen.repair in ("units", "layers") and not calibrated:
            raise CalibrationRequiredError(
                f'repair="{chosen.repair}" measures activations: give calibration data, or repair="none"'
            )
        if chosen.refinement is not None and not calibrated:
            raise CalibrationRequiredError("transports are learned from calibration data: give some")
        if method == AUTO and not calibrated:
            raise CalibrationRequiredError('method="auto" chooses by calibration data: give some')
        if (chosen.symmetry != "permutation" or method == AUTO) and (flow is not None or template):
            raise OptionError(f"symmetry={chosen.symmetry!r} and methods go without flow and into")
        if features == "activations" and not calibrated:
            raise CalibrationRequiredError(
                'features="activations" needs calibration data: give calibration=batches, or '
                'features="weights"'
            )
        if regularisation is not None and not 0 < regularisation < math.inf:
            raise OptionError(f"regularisation={regularisation!r}: give a positive number")
        if rounds < 0 or (rounds and flow is not None):
            raise OptionError(f"rounds={rounds}: give 0 or more, and 0 with flow")
        if flow is not None:
            check_data(flow, calibrated, features == "activations")
            _check_flow(flow, coupling, regularisation)
        if template and (rounds or target != -1):
            raise OptionError("into takes the place of target, and goes without rounds")
        weighed = flow is not None and flow.weighted
        if observed is not None and features != "activations" and not weighed:
            raise OptionError("observe says which activations count: give calibration data, or leave it out")
        return cls(
            features=features,
            coupling=_coupling(coupling, regularisation, flow),
            name=coupling if isinstance(coupling, str) else repr(coupling),
            flow=flow,
            rounds=rounds,
            layers=layers,
            layer_matching=layer_matching,
            observed=observed or Observe(),
            symmetry=chosen.symmetry,
            repair=chosen.repair,
            refinement=chosen.refinement,
            auto=method == AUTO,
            fallback=fallback,
            template=template,
            seed=seed,
            outputs=outputs,
            progress=logged(progress),
        )

    @property
    def method(self) -> Method:
        """The symmetry, repair and refinement."""
        return Method(self.symmetry, self.repair, self.refinement)

    def by(self, method: Method) -> Settings:
        """Return the settings with another symmetry, repair and refinement."""
        return dataclasses.replace(
            self, symmetry=method.symmetry, repair=method.repair, refinement=method.refinement
        )

    def facts(self, target: int) -> dict[str, str]:
        """Return the settings as the report shows them."""
        found = {
            "features": self.features,
            "coupling": self.name,
            "target": str(target),
            "seed": str(self.seed),
        }
        found["symmetry"] = self.symmetry
        found["repair"] = self.repair
        if self.refinement is not None:
            found["refine"] = repr(self.refinement)
        if self.flow is not None:
            found["flow"] = repr(self.flow)
        if self.coupling.regularisation is not None:
            found["regularisation"] = repr(self.coupling.regularisation)
        if self.observed != Observe():
            found["observe"] = repr(self.observed)
        return found


def _default(features: str, coupling: str | Coupling, flow: Flow | None, template: bool) -> Method:
    """Return the symmetry and the repair where neither is asked for.

    With activations to go by, rotations and repaired units measured better on every task but networks with
    tied heads, which cannot turn. What goes without them keeps permutations.
    """
    hard = coupling == "hard" or (isinstance(coupling, Coupling) and coupling == Coupling(gap=coupling.gap))
    plain = features == "activations" and hard and flow is None and not template
    return Method("largest", "units") if plain else Method("permutation")


def _method(
    method: str | None,
    symmetry: str | None,
    repair: str | None,
    refinement: Refinement | int | None,
    default: Method,
) -> Method:
    """Return symmetry, repair and refinement, by one name or one by one."""
    learning = Refinement(steps=refinement) if isinstance(refinement, int) else refinement
    if method is None:
        if symmetry is None and repair is None and learning is None:
            return default
        symmetry, repair = symmetry or default.symmetry, repair or "norms"
        check_choice("symmetry", symmetry, SYMMETRIES)
        check_choice("repair", repair, REPAIRS)
        return Method(symmetry, repair, learning)
    check_choice("method", method, (*METHODS, AUTO))
    if symmetry is not None or (repair is not None and method == AUTO):
        raise OptionError(f"method={method!r} says what symmetry and repair are: leave one of them out")
    if learning is not None and method not in ("learned", AUTO):
        raise OptionError(f'method={method!r} learns nothing: give method="learned", or leave refine out')
    found = METHODS.get(method, Method("permutation"))
    if repair is not None:
        check_choice("repair", repair, REPAIRS)
        found = dataclasses.replace(found, repair=repair)
    return found if learning is None else dataclasses.replace(found, refinement=learning)


def _check_flow(flow: Flow, coupling: str | Coupling, regularisation: float | None) -> None:
    """Refuse settings of a flow that do not go with the other options."""
    if flow.relaxation is not None and coupling not in ("soft", "widening"):
        raise OptionError('relaxation is of soft couplings: give coupling="soft"')
    if isinstance(coupling, Coupling) and any(
        item.share < 1 for item in (coupling, *coupling.overrides.values())
    ):
        raise OptionError("share is not for flow: leave one of them out")
    if flow.regularisation is not None and isinstance(coupling, Coupling):
        raise OptionError("regularisation is given twice, in the flow and the coupling: give one of them")
    if flow.regularisation is not None and regularisation is not None:
        raise OptionError("regularisation is given twice, to fuse and to its flow: give one of them")


def _coupling(coupling: str | Coupling, regularisation: float | None, flow: Flow | None) -> Coupling:
    if isinstance(coupling, Coupling):
        return coupling
    if coupling == "hard":
        return Coupling()
    softness = SOFT_REGULARISATION if regularisation is None else regularisation
    widening = coupling == "widening"
    if flow is None:
        return Coupling(softness, widening=widening)
    absolute = flow.regularisation is not None
    if flow.regularisation is not None:
        softness = flow.regularisation
    return Coupling(softness, absolute, flow.relaxation, widening)
