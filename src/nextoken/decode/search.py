"""Beam searches: the likeliest strings, varied ones, and exact samples without replacement."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nextoken.decode.generate import Prompt, prompt_tokens
from nextoken.decode.generation import Generation
from nextoken.decode.parsing import transform as parsed
from nextoken.decode.request import Finish, Request
from nextoken.decode.text_stream import TextStream
from nextoken.decode.transform import Chain, Context, Transform, normalise
from nextoken.methods import method
from nextoken.model.base import LanguageModel, State


@dataclass(frozen=True)
class Hypothesis:
    """A string under way: its tokens, the log-probability of each step, and which row of the state it is."""

    tokens: tuple[int, ...] = ()
    steps: tuple[float, ...] = ()
    row: int = 0

    @property
    def log_prob(self) -> float:
        return math.fsum(self.steps)


class _Search:
    """What all searches share: the prompt's state, and one step of it for many hypotheses."""

    def __init__(
        self, model: LanguageModel, prompt: Prompt, rule: Transform | str | None, max_tokens: int, seed: int = 0
    ) -> None:
        change = parsed(rule) if isinstance(rule, str) else rule or Chain()
        if change.is_random:
            raise ValueError("a search follows one law, and this transform flips coins: leave it out")
        self.model = model
        self.request = Request(prompt_tokens(model, prompt), change, max_tokens, seed=seed)
        limit = model.context_length
        room = max_tokens if limit is None else limit - len(self.request.prompt) + 1
        if room < 1:
            raise ValueError(f"the prompt has {len(self.request.prompt)} tokens and the context holds {limit}")
        self.most = min(max_tokens, room)
        self._state: State = model.start()
        self._logits = model.extend(self._state, [self.request.prompt])[0, -1].logits()[:, 0]

    def log_probs(self, hypotheses: Sequence[Hypothesis]) -> Tensor:
        """log p [R, V] of the next token of each hypothesis, in its row's order, after the transform."""
        context = Context(
            prompts=[self.request.prompt] * len(hypotheses),
            outputs=[h.tokens for h in hypotheses],
            surprisals=[[-step for step in h.steps] for h in hypotheses],
            vocab=self.model.vocab,
        )
        return normalise(self.request.transform(self._logits, context)).double()

    def follow(self, hypotheses: Sequence[Hypothesis]) -> list[Hypothesis]:
        """Feed the last token of each; they become the rows."""
        self._state = self._state.fork([h.row for h in hypotheses])
        fed = torch.tensor([h.tokens[-1:] for h in hypotheses])
        self._logits = self.model.extend(self._state, fed).logits()[:, -1]
        return [replace(h, row=row) for row, h in enumerate(hypotheses)]

    def ended(self, hypothesis: Hypothesis) -> bool:
        return bool(hypothesis.tokens) and hypothesis.tokens[-1] in self.model.vocab.eos_ids

    def generation(self, hypothesis: Hypothesis) -> Generation:
        limit = self.model.context_length
        full = limit is not None and len(self.request.prompt) + len(hypothesis.tokens) > limit
        finish: Finish = "eos" if self.ended(hypothesis) else "context" if full else "length"
        stream = TextStream()
        for token in hypothesis.tokens:
            stream.push(self.model.vocab.token_bytes[token])
        stream.finish()
        surprisals = tuple(-step for step in hypothesis.steps)
        return Generation(stream.text, hypothesis.tokens, finish, surprisals, self.request, self.model)


@method(name="Beam search", access="gray", summary="the likeliest strings, by keeping the best prefixes")
@torch.no_grad()
def beam_search(
    model: LanguageModel,
    prompt: Prompt,
    *,
    width: int = 4,
    max_tokens: int = 128,
    length_penalty: float = 1.0,
    groups: int = 1,
    diversity: float = 0.0,
    transform: Transform | str | None = None,
) -> list[Generation]:
    """The strings of highest sum log p / length^length_penalty that keeping `width` prefixes per step finds.

    With `groups` > 1 it is diverse beam search (arXiv:1610.02424): groups of width / groups prefixes; to choose, one
    takes diversity * (number of times earlier groups just chose v) off the score of token v. Scores are of
    transform(p), normalised, and the length counts an end token, as transformers counts it.

    Args:
        model: that gives whole distributions.
        prompt: a text or a conversation.
        width: prefixes kept, in all groups together; as many strings are returned, fewer if there are no more.
        max_tokens: most tokens of a string.
        length_penalty: exponent a; 0 compares sums, which favours short strings.
        groups, diversity: of the diverse search.
        transform: changes of the distribution; not a random one.

    Returns:
        Generations, best first.

    Raises:
        ValueError: an argument is out of range, or the prompt does not fit.
    """
    if width < 1 or groups < 1 or width % groups:
        raise ValueError(f"width must be a multiple of groups, both at least 1; got {width} and {groups}")
    search = _Search(model, prompt, transform, max_tokens)
    size = width // groups

    def score(h: Hypothesis) -> float:
        return h.log_prob / math.pow(len(h.tokens), length_penalty)

    live: list[list[Hypothesis]] = [[Hypothesis()] for _ in range(groups)]
    done: list[list[Hypothesis]] = [[] for _ in range(groups)]
    for step in range(1, search.most + 1):
        rows = [h for group in live for h in group] if step > 1 else [Hypothesis()]
        log_probs = search.log_probs(rows)
        chosen = torch.zeros(log_probs.shape[-1], dtype=torch.float64)
        for number, group in enumerate(live):
            if not group:
                continue
            said = log_probs[[h.row for h in group]].cpu()
            total = torch.tensor([h.log_prob for h in group], dtype=torch.float64)[:, None] + said
            best = (total - diversity * chosen).flatten().topk(min(2 * size, total.numel()))
            following: list[Hypothesis] = []
            for rank, (value, flat) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
                parent, token = group[flat // total.shape[1]], flat % total.shape[1]
                if value == -math.inf or len(following) == size:
                    break
                grown = Hypothesis((*parent.tokens, token), (*parent.steps, float(said[flat // total.shape[1], token])))
                grown = replace(grown, row=parent.row)
                if search.ended(grown):
                    # An end that is not among the best `size` candidates would not have been kept as a prefix either.
                    done[number] += [grown] if rank < size else []
                else:
                    following.append(grown)
            for grown in following:
                chosen[grown.tokens[-1]] += 1
            done[number] = sorted(done[number], key=score, reverse=True)[:size]
            full = len(done[number]) == size
            hopeless = full and following and score(following[0]) <= score(done[number][-1])
            live[number] = [] if hopeless else following
        flat_live = [h for group in live for h in group]
        if not flat_live or step == search.most:
            break
        moved = iter(search.follow(flat_live))
        live = [[next(moved) for _ in group] for group in live]
    found = [h for number in range(groups) for h in sorted([*done[number], *live[number]], key=score)[-size:]]
    return [search.generation(h) for h in sorted(found, key=score, reverse=True)]


@dataclass(frozen=True)
class WithoutReplacement:
    """Strings drawn without replacement, with what is needed to estimate with them.

    Args:
        generations: in the order drawn.
        log_probs: log p of each.
        gumbels: the perturbed log-probabilities G, descending.
        threshold: kappa, the (k+1)-th largest G; -inf if there is no other string.
    """

    generations: tuple[Generation, ...]
    log_probs: tuple[float, ...]
    gumbels: tuple[float, ...]
    threshold: float

    @property
    def weights(self) -> tuple[float, ...]:
        """p / q with q = P(G > kappa) = 1 - exp(-exp(log p - kappa)): sum of weight * f is an unbiased E_p[f]."""
        return tuple(
            math.exp(phi) / -math.expm1(-math.exp(phi - self.threshold))
            if self.threshold > -math.inf
            else math.exp(phi)
            for phi in self.log_probs
        )


@method(
    name="Stochastic beam search",
    arxiv="1903.06059",
    access="gray",
    summary="exact samples of strings without replacement, by Gumbel-top-k",
)
@torch.no_grad()
def stochastic_beam_search(
    model: LanguageModel,
    prompt: Prompt,
    *,
    k: int = 4,
    max_tokens: int = 128,
    transform: Transform | str | None = None,
    seed: int = 0,
) -> WithoutReplacement:
    """k different strings drawn without replacement from the law of sampling at most `max_tokens` tokens.

    Each string's log-probability phi is perturbed by an independent Gumbel; the k + 1 largest are found top-down: of a
    prefix with perturbed value G, the children's Gumbels of location phi_c are conditioned on their maximum being G.

    Args:
        model, prompt, max_tokens, transform: as of `beam_search`.
        k: strings; fewer are returned if there are no more.
        seed: equal seeds give equal strings.

    Returns:
        The strings with log-probabilities and weights for unbiased estimates.

    Source: Kool et al., arXiv:1903.06059, appendix B for the conditioning.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    search = _Search(model, prompt, transform, max_tokens, seed)
    generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(62))
    kept: list[tuple[float, Hypothesis]] = [(_gumbel(generator), Hypothesis())]
    for step in range(1, search.most + 1):
        growing = [(g, h) for g, h in kept if not search.ended(h)]
        if not growing:
            break
        candidates = [(g, h) for g, h in kept if search.ended(h)]
        log_probs = search.log_probs([h for _, h in growing]).cpu()
        for row, (g, h) in enumerate(growing):
            phi = h.log_prob + log_probs[row]
            perturbed = conditioned(phi + gumbels(phi.shape, generator), g)
            best = perturbed.topk(min(k + 1, int(torch.isfinite(phi).sum())))
            candidates += [
                (value, Hypothesis((*h.tokens, token), (*h.steps, float(log_probs[row, token])), row))
                for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
        kept = sorted(candidates, key=lambda pair: pair[0], reverse=True)[: k + 1]
        rows = [h for _, h in kept if not search.ended(h)]
        if rows and step < search.most:
            moved = iter(search.follow(rows))
            kept = [(g, h if search.ended(h) else next(moved)) for g, h in kept]
    drawn = kept[:k]
    return WithoutReplacement(
        generations=tuple(search.generation(h) for _, h in drawn),
        log_probs=tuple(h.log_prob for _, h in drawn),
        gumbels=tuple(g for g, _ in drawn),
        threshold=kept[k][0] if len(kept) > k else -math.inf,
    )


def _gumbel(generator: torch.Generator) -> float:
    return float(gumbels((), generator))


def gumbels(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise, -log(-log u), in float64."""
    uniform = torch.rand(tuple(shape), dtype=torch.float64, generator=generator).clamp(min=1e-300)
    return -(-uniform.log()).log()


def conditioned(free: Tensor, largest: float) -> Tensor:
    """Gumbels [V] of any locations, given that their maximum is `largest`; -inf stays."""
    # v = G - g + log(1 - exp(g - Z)), then G - max(0, v) - log(1 + exp(-|v|)): stable where g is near its maximum.
    v = largest - free + torch.log1p(-(free - free.max()).exp())
    shifted = largest - v.clamp(min=0.0) - torch.log1p((-v.abs()).exp())
    return torch.where(torch.isfinite(free), shifted, free)
