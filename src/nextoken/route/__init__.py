"""Routing between models: whole answers deferred from a small to a large one, and switching at every token."""

from nextoken.route.cascade import Cascade, Cascaded
from nextoken.route.confidence import Answer, ChowAverage, ChowQuantile, ChowSum, DeferralRule, quantiles
from nextoken.route.cost import Cost, Spent, activated_parameters
from nextoken.route.deferral import DeferralCurve, deferral_curve, threshold_for
from nextoken.route.entropy_switching import EntropyRule, EntropySwitching
from nextoken.route.post_hoc import DeferralNetwork, Features, PostHoc
from nextoken.route.post_hoc_fit import fit_post_hoc
from nextoken.route.random_switching import RandomRule, RandomSwitching
from nextoken.route.switch_rule import LARGE, SMALL, Standing, SwitchRule
from nextoken.route.switched_next import SwitchedNext
from nextoken.route.switching import Switching

__all__ = [
    "LARGE",
    "SMALL",
    "Answer",
    "Cascade",
    "Cascaded",
    "ChowAverage",
    "ChowQuantile",
    "ChowSum",
    "Cost",
    "DeferralCurve",
    "DeferralNetwork",
    "DeferralRule",
    "EntropyRule",
    "EntropySwitching",
    "Features",
    "PostHoc",
    "RandomRule",
    "RandomSwitching",
    "Spent",
    "Standing",
    "SwitchRule",
    "SwitchedNext",
    "Switching",
    "activated_parameters",
    "deferral_curve",
    "fit_post_hoc",
    "quantiles",
    "threshold_for",
]
