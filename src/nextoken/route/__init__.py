"""Routing between models: whole answers deferred from a small to a large one, and switching at every token."""

from nextoken.route.cascade import Cascade, Cascaded
from nextoken.route.confidence import Answer, ChowAverage, ChowQuantile, ChowSum, DeferralRule, quantiles
from nextoken.route.cost import Cost, Spent, activated_parameters
from nextoken.route.deferral import DeferralCurve, deferral_curve, threshold_for
from nextoken.route.depth_schedule import depth_schedule
from nextoken.route.divergence import Difference, Divergences, LargeAnswer, find_divergences, sentence_ends
from nextoken.route.duo import DuoLLM
from nextoken.route.duo_fit import DuoRecipe, RouterRecipe, activated_share, fit_duo, fit_routers
from nextoken.route.duo_oracle import RouteTable, every_route, route_losses, some_routes
from nextoken.route.duo_route import FixedRoute, RandomRoute, RouteRule, Width
from nextoken.route.duo_routers import DuoRouters
from nextoken.route.entropy_switching import EntropyRule, EntropySwitching
from nextoken.route.expert_usage import ExpertUsage, expert_usage
from nextoken.route.experts import DynaMoE, ExpertRouting, ThresholdRouting, TokenQuantileRouting
from nextoken.route.experts_fit import ExpertsRecipe, balance_loss, calibrate_experts, fit_experts
from nextoken.route.neural_router import NeuralRouter, RouterSizes
from nextoken.route.post_hoc import DeferralNetwork, Features, PostHoc
from nextoken.route.post_hoc_fit import fit_post_hoc
from nextoken.route.r2r import R2R
from nextoken.route.random_switching import RandomRule, RandomSwitching
from nextoken.route.skip_decode import SkipDecode
from nextoken.route.skip_fit import SkipRecipe, fit_skips
from nextoken.route.skip_schedule import LayerSchedule, SkipSchedule, TruncationSchedule
from nextoken.route.switch_rule import LARGE, SMALL, Standing, SwitchRule
from nextoken.route.switched_next import SwitchedNext
from nextoken.route.switching import Switching
from nextoken.route.think_at_hard import ThinkAtHard, ThoughtNext
from nextoken.route.think_decider import (
    AlwaysThink,
    Decider,
    DeciderNetwork,
    LearnedDecider,
    NeverThink,
    RandomThink,
    Seen,
    passes_needed,
)
from nextoken.route.think_fit import DeciderRecipe, FittedThinking, ThinkRecipe, fit_decider, fit_thinking
from nextoken.route.token_router import EntropyRouter, Sight, TokenRouter
from nextoken.route.token_router_fit import FittedTokenRouter, TokenRouterRecipe, fit_token_router, recall_threshold
from nextoken.route.verifier import AskedVerifier, Fork, SameAnswer, SameRest, Verifier

__all__ = [
    "LARGE",
    "R2R",
    "SMALL",
    "AlwaysThink",
    "Answer",
    "AskedVerifier",
    "Cascade",
    "Cascaded",
    "ChowAverage",
    "ChowQuantile",
    "ChowSum",
    "Cost",
    "Decider",
    "DeciderNetwork",
    "DeciderRecipe",
    "DeferralCurve",
    "DeferralNetwork",
    "DeferralRule",
    "Difference",
    "Divergences",
    "DuoLLM",
    "DuoRecipe",
    "DuoRouters",
    "DynaMoE",
    "EntropyRouter",
    "EntropyRule",
    "EntropySwitching",
    "ExpertRouting",
    "ExpertUsage",
    "ExpertsRecipe",
    "Features",
    "FittedThinking",
    "FittedTokenRouter",
    "FixedRoute",
    "Fork",
    "LargeAnswer",
    "LayerSchedule",
    "LearnedDecider",
    "NeuralRouter",
    "NeverThink",
    "PostHoc",
    "RandomRoute",
    "RandomRule",
    "RandomSwitching",
    "RandomThink",
    "RouteRule",
    "RouteTable",
    "RouterRecipe",
    "RouterSizes",
    "SameAnswer",
    "SameRest",
    "Seen",
    "Sight",
    "SkipDecode",
    "SkipRecipe",
    "SkipSchedule",
    "Spent",
    "Standing",
    "SwitchRule",
    "SwitchedNext",
    "Switching",
    "ThinkAtHard",
    "ThinkRecipe",
    "ThoughtNext",
    "ThresholdRouting",
    "TokenQuantileRouting",
    "TokenRouter",
    "TokenRouterRecipe",
    "TruncationSchedule",
    "Verifier",
    "Width",
    "activated_parameters",
    "activated_share",
    "balance_loss",
    "calibrate_experts",
    "deferral_curve",
    "depth_schedule",
    "every_route",
    "expert_usage",
    "find_divergences",
    "fit_decider",
    "fit_duo",
    "fit_experts",
    "fit_post_hoc",
    "fit_routers",
    "fit_skips",
    "fit_thinking",
    "fit_token_router",
    "passes_needed",
    "quantiles",
    "recall_threshold",
    "route_losses",
    "sentence_ends",
    "some_routes",
    "threshold_for",
]
