"""Values that guide: what is to be expected of a text begun so, learnt from the model's own outputs."""

from nextoken.values._descent import Schedule
from nextoken.values.adaptive_samples import Samples, adaptive_samples, annealed, constant, pruned_samples
from nextoken.values.length_control import LengthControlled
from nextoken.values.length_fit import Rollout, discount_for, fit_length_value, rollouts
from nextoken.values.length_rule import HardTarget, LengthRule, Scaled, SoftTarget, Tilt
from nextoken.values.length_value import ExactLengthValue, HFLengthValue, LengthValue
from nextoken.values.prefix_labels import PrefixLabels, Solution, outcome_labels, prefix_labels
from nextoken.values.responses import responses
from nextoken.values.restart import Question, Restart, RestartPredictor, TableRestart
from nextoken.values.restart_fit import RestartExample, fit_restart, restart_examples
from nextoken.values.robust import equalising_temperature, robust_loss
from nextoken.values.scalar_head import ScalarHead, ScalarValue
from nextoken.values.temperature_fit import fit_temperature, neutral_radius
from nextoken.values.temperature_network import LearnedTemperature, TemperatureNetwork
from nextoken.values.token_value import HFTokenValue, TableTokenValue, TokenValue, fit_token_value
from nextoken.values.value_ranking import WeightedVote, final_values, rank, weighted_vote
from nextoken.values.value_search import Found, Steps, reward_balanced_search, value_beam_search

__all__ = [
    "ExactLengthValue",
    "Found",
    "HFLengthValue",
    "HFTokenValue",
    "HardTarget",
    "LearnedTemperature",
    "LengthControlled",
    "LengthRule",
    "LengthValue",
    "PrefixLabels",
    "Question",
    "Restart",
    "RestartExample",
    "RestartPredictor",
    "Rollout",
    "Samples",
    "ScalarHead",
    "ScalarValue",
    "Scaled",
    "Schedule",
    "SoftTarget",
    "Solution",
    "Steps",
    "TableRestart",
    "TableTokenValue",
    "TemperatureNetwork",
    "Tilt",
    "TokenValue",
    "WeightedVote",
    "adaptive_samples",
    "annealed",
    "constant",
    "discount_for",
    "equalising_temperature",
    "final_values",
    "fit_length_value",
    "fit_restart",
    "fit_temperature",
    "fit_token_value",
    "neutral_radius",
    "outcome_labels",
    "prefix_labels",
    "pruned_samples",
    "rank",
    "responses",
    "restart_examples",
    "reward_balanced_search",
    "robust_loss",
    "rollouts",
    "value_beam_search",
    "weighted_vote",
]
