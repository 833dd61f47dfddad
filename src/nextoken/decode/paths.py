"""Path nucleus sampling: the nucleus and the draws are over the next tokens of several paths at once."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from nextoken.decode.generate import Prompt, derived_seed
from nextoken.decode.generation import Generation
from nextoken.decode.scaling import Temperature
from nextoken.decode.search import Hypothesis, _Search
from nextoken.decode.transform import Context, normalise
from nextoken.decode.truncation import TopP
from nextoken.methods import method
from nextoken.model.base import LanguageModel
from nextoken.model.next import invert_cdf


@dataclass(frozen=True)
class PathNucleus:
    """The paths that survived, best first, and how many parents took part at each step.

    Args:
        generations: those that ended before those that were cut off.
        log_probs: S of each, in nats: of the tempered model, not of the draw.
        effective_parents: exp H(W) at each step; 1 where one path holds all of the weight.
        surviving_parents: paths of which a continuation was drawn, at each step.
    """

    generations: tuple[Generation, ...]
    log_probs: tuple[float, ...]
    effective_parents: tuple[float, ...]
    surviving_parents: tuple[int, ...]

    @property
    def weights(self) -> tuple[float, ...]:
        """softmax(S): for a choice in proportion to exp(S) among the paths."""
        return tuple(torch.tensor(self.log_probs, dtype=torch.float64).softmax(0).tolist())


class _Group:
    """Paths that compete for the same slots, and the random numbers of their draws."""

    def __init__(self, slots: int, seed: int) -> None:
        self.slots = slots
        self.live = [Hypothesis()]
        self.random = random.Random(seed)


@method(
    name="Path nucleus sampling",
    arxiv="2409.19790",
    access="gray",
    summary="top-p over the continuations of k paths by accumulated probability (reconstructed from an idea in words)",
)
@torch.no_grad()
def path_nucleus(
    model: LanguageModel,
    prompt: Prompt,
    *,
    k: int = 4,
    top_p: float = 0.9,
    temperature: float = 1.0,
    decay: float = 1.0,
    accumulate: bool = True,
    length_exponent: float = 0.0,
    max_tokens: int = 128,
    seed: int = 0,
) -> PathNucleus:
    """k paths, drawn at each step without replacement from the nucleus of P(i, v) = W_i p(v | y_i), W = softmax(S).

    The nucleus is the smallest set of (path, token) pairs whose mass under P reaches `top_p`; if it has fewer than k,
    all of it is taken and then the next best. S_i = sum_t log p(y_it), or S_t = decay S_{t-1} + log p. A path that ends
    keeps its slot. One path, the prompt, is where it begins, so paths always differ.

    With k = 1 it is top-p sampling, with the random numbers of `nextoken.generate`; with top_p = 0 it is beam search in
    which a path that ends closes its slot. The survivors are no samples of the model: drawing from joint scores favours
    likely strings, and though several parents take part at each step (`effective_parents`), the paths soon have all but
    their last tokens in common. For estimates use `stochastic_beam_search`.

    Args:
        model, prompt, max_tokens: as of `nextoken.generate`.
        k: paths.
        top_p: mass of the nucleus.
        temperature: of p.
        decay: of the past, in (0, 1].
        accumulate: False for the control, in which every path is a group of its own: k chains of top-p sampling, token
            for token those of `generate(..., n=k)`. The same string may then come twice.
        length_exponent: a; the order of the result is by S / length^a.
        seed: equal seeds give equal paths.

    Raises:
        ValueError: an argument is out of range, or the prompt does not fit.

    Source: a reconstruction. arXiv:2409.19790 says in words that the next token should depend on the accumulated
    probabilities of the k best chains, combining top-p sampling with a beam; it gives no formula and no measurement.
    All of the definition above is ours.
    """
    if k < 1 or not 0 < decay <= 1 or temperature <= 0:
        raise ValueError(
            f"k must be at least 1, decay in (0, 1] and temperature above 0; got {k}, {decay}, {temperature}"
        )
    search = _Search(model, prompt, Temperature(temperature), max_tokens, seed)
    nucleus = TopP(top_p)
    groups = [_Group(k, seed)] if accumulate else [_Group(1, derived_seed(seed, i)) for i in range(k)]
    done: list[Hypothesis] = []
    effective: list[float] = []
    surviving: list[int] = []
    for step in range(1, search.most + 1):
        rows = [h for group in groups for h in group.live] if step > 1 else [Hypothesis()]
        log_probs = search.log_probs(rows).cpu()
        effective.append(0.0)
        surviving.append(0)
        for group in groups:
            if not group.live:
                continue
            past = decay * torch.tensor([_discounted(h.steps, decay) for h in group.live], dtype=torch.float64)
            said = log_probs[[h.row for h in group.live]]
            drawn = _draw(past[:, None] + said, group.slots, nucleus, group.random)
            effective[-1] += math.exp(float(torch.special.entr(past.softmax(0)).sum()))
            surviving[-1] += len({place for place, _ in drawn})
            grown = [
                Hypothesis((*parent.tokens, token), (*parent.steps, float(said[place, token])), parent.row)
                for place, token in drawn
                for parent in (group.live[place],)
            ]
            ended = [h for h in grown if search.ended(h)]
            done += ended
            group.slots -= len(ended)
            group.live = [h for h in grown if not search.ended(h)]
        live = [h for group in groups for h in group.live]
        if not live or step == search.most:
            break
        moved = iter(search.follow(live))
        for group in groups:
            group.live = [next(moved) for _ in group.live]
    found = [*done, *(h for group in groups for h in group.live)]
    assert not accumulate or len({h.tokens for h in found}) == len(found), "parents differ, so children do"
    found.sort(key=lambda h: (search.ended(h), h.log_prob / len(h.tokens) ** length_exponent), reverse=True)
    return PathNucleus(
        generations=tuple(search.generation(h) for h in found),
        log_probs=tuple(h.log_prob for h in found),
        effective_parents=tuple(effective),
        surviving_parents=tuple(surviving),
    )


def _discounted(steps: tuple[float, ...], decay: float) -> float:
    """sum_t decay^(T - t) log p_t."""
    return math.fsum(step * decay**back for back, step in enumerate(reversed(steps)))


def _draw(joint: Tensor, count: int, nucleus: TopP, source: random.Random) -> list[tuple[int, int]]:
    """(path, token) of `count` candidates of joint scores [R, V]: from the nucleus, then the best beyond it."""
    flat = joint.flatten()
    kept = nucleus(flat[None], Context())[0]
    inside = torch.isfinite(kept)
    chosen: list[int] = []
    for _ in range(min(count, int(inside.sum()))):
        # Drawing one after the other from what is left has the law of Gumbel-top-k, and spends one number for each.
        uniform = torch.tensor(source.random(), dtype=torch.float64)
        chosen.append(int(invert_cdf(normalise(kept), uniform)))
        kept[chosen[-1]] = float("-inf")
    beyond = flat.masked_fill(inside, float("-inf"))
    missing = min(count - len(chosen), int(torch.isfinite(beyond).sum()))
    chosen += beyond.topk(missing).indices.tolist()
    return [divmod(index, joint.shape[1]) for index in chosen]
