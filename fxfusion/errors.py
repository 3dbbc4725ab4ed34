"""Every exception that fxfusion raises, one class per situation.

All derive from :class:`FusionError`, so ``except fxfusion.FusionError`` catches what a caller can act
on. A message names what is wrong (model, parameter, operator, source line where there is one) and what
to do about it; it is raised before any long work starts.
"""

from __future__ import annotations


class FusionError(Exception):
    """Base class of everything that fxfusion raises on purpose."""


class CaptureError(FusionError):
    """torch.export refused the model; the message carries its reason and the source line."""


class InputError(FusionError):
    """The example inputs cannot be made or do not fit the model."""


class ModelReferenceError(FusionError):
    """A model named on the command line (``timm:...``, ``hf:...``, ``module:factory``) cannot be found."""


class CheckpointError(FusionError):
    """A weight file is missing, truncated, not safetensors, or holds unexpected content."""


class ArchitectureMismatchError(FusionError):
    """The parents are not instances of one architecture; the first differing parameters are named."""


class WidthMismatchError(FusionError):
    """The parents differ in the size of something that no transport may act on."""


class TieMismatchError(FusionError):
    """Weights that are tied in one parent are separate in another."""


class InvalidWeightError(FusionError):
    """A weight is NaN or infinite."""


class TooFewModelsError(FusionError):
    """Fusion needs at least two models."""


class OptionError(FusionError):
    """An option has a value that is not one of its choices, or options contradict each other."""


class RecipeError(FusionError):
    """A recipe cannot be read, or holds a setting that there is not, or one of the wrong type."""


class CalibrationRequiredError(FusionError):
    """``features="activations"`` was asked for without calibration data."""


class CalibrationMismatchError(FusionError):
    """The calibration data do not fit the model's inputs."""


class UnknownParameterError(FusionError):
    """A parameter was asked for that the model does not have; close matches are named."""


class OutputSelectionError(FusionError):
    """``outputs=`` names an output that the model does not have."""


class CertificationError(FusionError):
    """A random element of the inferred symmetry group changed the function: the plan is unsound."""


class PassOrderError(FusionError):
    """A pass ran before the pass that makes what it needs."""


class RuleError(FusionError):
    """An operator rule returned axes that do not fit the operator's output."""


class NotationError(FusionError):
    """A contraction is not written in the notation that rules use."""


class MemoryLimitError(FusionError):
    """A memory limit is below what a single step takes; the message says how much that is."""


class MissingDependencyError(FusionError):
    """An optional package is not installed; the message says which extra brings it."""
