"""The kit to test one's own rules and models: is what was inferred true, and is anything missed?

=======================  ================================================================================
:func:`check_rule`       hold one rule against its operator: false claims, missed symmetries
:func:`check_model`      certify a whole model, and make sure that something was permuted
:func:`check_network`    certify a drawn network, and make sure that no free space was lost
:func:`networks`         hypothesis strategy of random networks of real layers
:func:`operator_calls`   hypothesis strategy of calls of an operator: shapes, axes, flags, optional arguments
=======================  ================================================================================

The two strategies need hypothesis, which ``pip install 'fxfusion[test]'`` brings; the rest does not.
"""

from fxfusion.testing.model_check import check_model
from fxfusion.testing.random_calls import OperatorCall, Values, operator_calls
from fxfusion.testing.random_networks import Network, NetworkCheck, check_network, networks
from fxfusion.testing.rule_check import Free, RuleReport, check_rule

__all__ = [
    "Free",
    "Network",
    "NetworkCheck",
    "OperatorCall",
    "RuleReport",
    "Values",
    "check_model",
    "check_network",
    "check_rule",
    "networks",
    "operator_calls",
]
