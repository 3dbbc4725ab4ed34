"""fxfusion: fuse independently trained networks with optimal transport, for any traceable model.

============================  ===========================================================
:func:`plan`                  infer which units of a model may be permuted
:func:`certify`               check that on the model itself, in float64
:func:`scramble`              a random symmetric twin: other weights, the same function
:func:`fuse`                  align two or more parents and average them
:func:`fuse_files`            the same from file to file, no parent in memory
:func:`together`              several processes fuse as one, the same to the bit
:func:`hollow`                a network whose parameters are reserved and never written
:func:`align`                 only bring them into one basis, for averages of any weights
:func:`barrier`               loss and accuracy along the line between two parents
:class:`Flow`                 settings of ``fuse`` that solve layer by layer, as the paper does
:class:`Coupling`             hard or soft couplings, also different ones for some spaces
:class:`Observe`              which calibration activations count
:class:`Refinement`           how transports are learned on unlabelled data
:func:`reference`             the settings of the paper's published code
:func:`prepare`               capture a model, to run :mod:`fxfusion.passes` on it oneself
:func:`specialise`            trace a model whose control flow depends on data, as the example takes it
:func:`untied`                a copy whose output embedding is tied no longer
============================  ===========================================================
"""

from fxfusion.barrier import BarrierReport, Curve, barrier
from fxfusion.certify import Certificate
from fxfusion.errors import FusionError
from fxfusion.hollow import hollow
from fxfusion.pipeline import AlignedParents, FusionResult, align, certify, fuse, plan, prepare, scramble
from fxfusion.plan import Incidence, Limit, Plan, Role, Space, Symmetry
from fxfusion.presets import reference
from fxfusion.processes import together
from fxfusion.report import FusionReport
from fxfusion.specialise import specialise
from fxfusion.streaming import fuse_files
from fxfusion.transport.hierarchy import Coupling
from fxfusion.transport.learned import Refinement
from fxfusion.transport.options import (
    Costs,
    Flow,
    Heads,
    Magnitudes,
    Marginals,
    Metric,
    Nonlinearity,
    Normalisation,
    Observe,
    Positions,
    QueryKey,
    Residual,
    Scaling,
    Tables,
)
from fxfusion.untying import untied

__version__ = "0.1.0"

__all__ = [
    "AlignedParents",
    "BarrierReport",
    "Certificate",
    "Costs",
    "Coupling",
    "Curve",
    "Flow",
    "FusionError",
    "FusionReport",
    "FusionResult",
    "Heads",
    "Incidence",
    "Limit",
    "Magnitudes",
    "Marginals",
    "Metric",
    "Nonlinearity",
    "Normalisation",
    "Observe",
    "Plan",
    "Positions",
    "QueryKey",
    "Refinement",
    "Residual",
    "Role",
    "Scaling",
    "Space",
    "Symmetry",
    "Tables",
    "align",
    "barrier",
    "certify",
    "fuse",
    "fuse_files",
    "hollow",
    "plan",
    "prepare",
    "reference",
    "scramble",
    "specialise",
    "together",
    "untied",
]
