"""The kit to test one's own rules and models: is what was inferred true, and is anything missed?

=====================  ==================================================================
:func:`check_rule`     hold one rule against its operator: false claims, missed symmetries
:func:`check_model`    certify a whole model, and make sure that something was permuted
=====================  ==================================================================
"""

from fxfusion.testing.model_check import check_model
from fxfusion.testing.rule_check import Free, RuleReport, check_rule

__all__ = ["Free", "RuleReport", "check_model", "check_rule"]
