"""Proofs that speculation leaves the law of the output as it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

import torch
from scipy.stats import chi2

from nextoken.decode.generate import derived_seed
from nextoken.decode.loop import Loop
from nextoken.decode.request import Request
from nextoken.decode.scaling import Greedy
from nextoken.decode.transform import Context, Transform, normalise
from nextoken.decode.truncation import TopK
from nextoken.model.base import LanguageModel
from nextoken.speculate import Follow, Speculation
from nextoken.testing._proof import Proof

Tokens = tuple[int, ...]

_LONG = 24
_STRING = 3


def check_speculation(
    target: LanguageModel,
    speculation: Callable[[], Speculation],
    *,
    seed: int = 0,
    prompts: int = 4,
    draws: int = 600,
    false_alarm: float = 1e-4,
    on_proof: Callable[[Proof], None] | None = None,
) -> list[Proof]:
    """Prove on random prompts that a target says with speculation what it says without.

    Proved: greedy decoding gives the same tokens; so does sampling with the same seeds where guesses are followed
    (`Follow`); and under the speculation's own rule the frequencies of strings of three tokens, drawn from the three
    best of each distribution, pass a chi-square test against their probabilities, which are enumerated.

    Args:
        target: any language model that gives whole distributions.
        speculation: makes a new speculation each time.
        seed: of prompts and draws.
        prompts: how many random prompts.
        draws: strings drawn for each.
        false_alarm: chance with which the law of a right speculation is called wrong, over all prompts together.
        on_proof: called with each proof as it is done.

    Returns:
        One `Proof` per statement; its `error` is the share of texts that differ, or how far the worst chi-square
        statistic is above its bound, in relation to it.

    Raises:
        AssertionError: at least one statement does not hold; the message names each.
        ValueError: an argument is out of range.
    """
    if prompts < 1 or draws < 100 or not 0 < false_alarm < 1:
        raise ValueError(
            f"prompts must be at least 1, draws at least 100 and false_alarm between 0 and 1; got {prompts}, {draws} "
            f"and {false_alarm}"
        )
    made = _prompts(target, prompts, seed)

    def followed() -> Speculation:
        return Speculation(speculation().drafter, Follow())

    def law() -> float:
        return max(_excess(target, prompt, speculation, seed, draws, false_alarm / prompts) for prompt in made)

    checks: list[tuple[str, str, Callable[[], float]]] = [
        (
            "greedy",
            "greedy tokens are those of plain decoding",
            partial(_apart, target, made, Greedy(), followed, seed),
        ),
        (
            "followed",
            "sampled tokens are those of plain decoding",
            partial(_apart, target, made, TopK(50), followed, seed),
        ),
        ("law", f"strings have their probabilities (chi-square, false alarm {false_alarm:g})", law),
    ]
    proofs: list[Proof] = []
    for name, statement, check in checks:
        proofs.append(Proof(name, statement, check()))
        if on_proof is not None:
            on_proof(proofs[-1])
    broken = [str(proof) for proof in proofs if not proof.holds]
    if broken:
        raise AssertionError(f"{target.name} says otherwise with this speculation:\n" + "\n".join(broken))
    return proofs


def _prompts(target: LanguageModel, count: int, seed: int) -> list[Tokens]:
    generator = torch.Generator().manual_seed(seed)
    ordinary = [i for i in range(target.vocab.size) if i not in target.vocab.specials]
    begin = () if target.vocab.bos_id is None else (target.vocab.bos_id,)
    draws = torch.randint(len(ordinary), (count, 6), generator=generator).tolist()
    return [(*begin, *(ordinary[i] for i in row)) for row in draws]


def _outputs(loop: Loop, requests: list[Request]) -> list[Tokens]:
    tickets = [loop.submit(request) for request in requests]
    found: dict[int, list[int]] = {ticket: [] for ticket in tickets}
    for piece in loop.run():
        found[piece.ticket].append(piece.token)
    return [tuple(found[ticket]) for ticket in tickets]


def _apart(
    target: LanguageModel, prompts: list[Tokens], rule: Transform, made: Callable[[], Speculation], seed: int
) -> float:
    """Share of texts that differ from those of plain decoding."""
    limit = target.context_length
    length = _LONG if limit is None else min(_LONG, limit - len(prompts[0]))
    requests = [Request(prompt, rule, length, seed=seed + number) for number, prompt in enumerate(prompts)]
    plain, fast = _outputs(Loop(target), requests), _outputs(made().loop(target), requests)
    return sum(a != b for a, b in zip(plain, fast, strict=True)) / len(prompts)


def _excess(
    target: LanguageModel,
    prompt: Tokens,
    made: Callable[[], Speculation],
    seed: int,
    draws: int,
    false_alarm: float,
) -> float:
    """How far chi-square of the strings drawn is above its bound, in relation to it; 0 if it is not."""
    rule = TopK(3)
    law = _law(target, prompt, rule)
    requests = [Request(prompt, rule, _STRING, seed=derived_seed(seed, number + 1)) for number in range(draws)]
    counts = Counter(_outputs(made().loop(target), requests))
    if not set(counts) <= set(law):
        return float("inf")
    statistic, degrees, rare, seen = 0.0, -1, 0.0, 0
    for string, p in law.items():
        if p * draws < 5:
            rare, seen = rare + p * draws, seen + counts[string]
            continue
        statistic += (counts[string] - p * draws) ** 2 / (p * draws)
        degrees += 1
    if rare >= 5:
        statistic, degrees = statistic + (seen - rare) ** 2 / rare, degrees + 1
    if degrees < 1:
        return 0.0
    bound = float(chi2.isf(false_alarm, degrees))
    return max(0.0, statistic / bound - 1)


@torch.no_grad()
def _law(target: LanguageModel, prompt: Tokens, rule: Transform) -> Mapping[Tokens, float]:
    """Probability of every string of at most three tokens under the transform."""
    law: dict[Tokens, float] = {}
    live: dict[Tokens, float] = {(): 1.0}
    for _ in range(_STRING):
        logits = target.predict([[*prompt, *output] for output in live]).logits()[:, -1]
        log_probs = normalise(rule(logits, Context(prompts=[prompt] * len(live), outputs=list(live))))
        grown: dict[Tokens, float] = {}
        for (output, mass), row in zip(live.items(), log_probs.double().exp(), strict=True):
            for token in row.nonzero()[:, 0].tolist():
                into = law if token in target.vocab.eos_ids else grown
                into[(*output, token)] = mass * float(row[token])
        live = grown
        if not live:
            break
    return law | live
