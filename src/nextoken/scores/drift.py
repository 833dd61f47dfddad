"""Drift: how far a model's turns in a conversation are from what another model, or another prompt, would say."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from nextoken.methods import method

if TYPE_CHECKING:
    import torch

    from nextoken.model.base import LanguageModel
    from nextoken.model.next import Next


@dataclass(frozen=True)
class Turn:
    """One utterance of the model and what was new before it.

    Args:
        heard: text that stands between the model's utterance before and this one.
        said: the utterance.
    """

    heard: str
    said: str


Conversation = Sequence[Turn]


@dataclass(frozen=True)
class Drift:
    """KL divergences of a conversation's turns.

    Args:
        kl: D_t, the mean over the tokens of a turn [T], nats per token; NaN for a turn without tokens.
        tokens: L_t, how many these are [T].
        per_token: the divergences themselves, one array [L_t] per turn.
    """

    kl: np.ndarray
    tokens: np.ndarray
    per_token: tuple[np.ndarray, ...]


@method(
    name="Context drift",
    arxiv="2510.07777",
    access="gray",
    summary="KL of a dialogue model's turns from a reference's, and the equilibrium of the series",
)
def drift(
    model: LanguageModel,
    reference: LanguageModel,
    conversation: Conversation,
    *,
    restated: Conversation | None = None,
) -> Drift:
    """D_t = (1/L_t) sum_l KL( q(. | c_t, y_<l) || p(. | c_t, y_<l) ) over the tokens y_1 ... y_L of turn t, in nats.

    q is the model, p the reference, c_t all that stands before the turn.

    Both are given the same utterances, and read the same dialogue before them: then D is how much the two models
    disagree. To measure how far a goal is lost, let the reference read a conversation of the same utterances in which
    the goal stands again (`restated`), and take the model itself as the reference.

    D depends on what was said: utterances sampled from q make the sum over a turn an unbiased estimate of the KL of its
    turns from p's, greedy ones do not. Of short turns D_t is noisy; `tokens` says which they are.

    Args:
        model: q, whose utterances these are.
        reference: p, over the same vocabulary.
        conversation: its turns; texts are put together as they are, after the begin token.
        restated: what the reference reads instead: as many turns, with the same `said`.

    Raises:
        ValueError: the vocabularies differ, one of the two gives no whole distributions, a conversation is longer than
            the context, or `restated` has other utterances.

    Source: arXiv:2510.07777. Whether the paper sums or averages over tokens is not told; this averages.
    """
    if model.vocab.digest != reference.vocab.digest:
        raise ValueError(
            f"{model.name} and {reference.name} have different vocabularies, so a divergence per token is not defined"
        )
    if model.is_partial or reference.is_partial:
        raise ValueError("a divergence needs whole distributions, and one of the models tells only its top tokens")
    other = conversation if restated is None else restated
    if [turn.said for turn in other] != [turn.said for turn in conversation]:
        raise ValueError("the restated conversation must have the same utterances, turn by turn")
    readings = [_read(one, turns) for one, turns in ((model, conversation), (reference, other))]
    per_token = []
    for q, p in zip(*readings, strict=True):
        per_token.append(np.zeros(0) if q is None or p is None else _divergence(q, p).double().cpu().numpy())
    tokens = np.array([len(values) for values in per_token], dtype=np.int64)
    kl = np.array([values.mean() if len(values) else np.nan for values in per_token])
    return Drift(kl, tokens, tuple(per_token))


def remind(conversation: Conversation, text: str, *, at: Collection[int]) -> list[Turn]:
    """The conversation with a text put before the turns of these numbers (from 0), after what is heard there.

    Compare it with a neutral text of like length: tokens alone move a model too.
    """
    outside = [number for number in at if not 0 <= number < len(conversation)]
    if outside:
        raise ValueError(f"there is no turn {outside[0]} in a conversation of {len(conversation)}")
    return [
        replace(turn, heard=turn.heard + text) if number in at else turn for number, turn in enumerate(conversation)
    ]


def converse(heard: Sequence[str], *, speak: Callable[[str, int], str]) -> list[Turn]:
    """Let a model answer turn by turn.

    Args:
        heard: what stands before each of its turns.
        speak: (all text so far, number of the turn) -> the utterance.
    """
    turns: list[Turn] = []
    text = ""
    for number, before in enumerate(heard):
        text += before
        turns.append(Turn(before, speak(text, number)))
        text += turns[-1].said
    return turns


def _read(model: LanguageModel, conversation: Conversation) -> list[Next | None]:
    """What the model predicts for the tokens of each utterance, of shape [1, L_t]; None for one without tokens."""
    import torch

    begin = [] if model.vocab.bos_id is None else [model.vocab.bos_id]
    row, spans = list(begin), []
    for turn in conversation:
        row += model.vocab.encode(turn.heard).ids
        said = model.vocab.encode(turn.said).ids
        spans.append((len(row), len(row) + len(said)))
        row += said
    if spans and spans[0][0] == 0 and spans[0][1] > 0:
        raise ValueError(f"{model.name} has no begin token: something must be heard before the first utterance")
    if model.context_length is not None and len(row) > model.context_length:
        raise ValueError(
            f"the conversation has {len(row)} tokens and the context of {model.name} holds {model.context_length}: "
            "leave out its beginning"
        )
    if len(row) < 2:
        return [None] * len(spans)
    following = model.predict(torch.tensor([row[:-1]]))
    return [following[:, start - 1 : end - 1] if end > start else None for start, end in spans]


def _divergence(q: Next, p: Next) -> torch.Tensor:
    """KL(q || p) of each position [L]."""
    from nextoken.head import compare, compare_logits
    from nextoken.model.next import HeadNext

    if isinstance(q, HeadNext) and isinstance(p, HeadNext):
        return compare(q.hidden[0], q.head, p.hidden[0], p.head).kl
    return compare_logits(q.log_probs()[0], p.log_probs()[0]).kl
