"""smc(): evidence and posterior against enumeration on tables, its limits, and what it reports."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

import nextoken
from nextoken.constrain import (
    AWRS,
    Choice,
    Constraint,
    FullMask,
    Kernel,
    Place,
    Posterior,
    Proposal,
    Regex,
    Rejection,
    Stage,
    importance,
    smc,
)
from nextoken.decode.generate import generate
from nextoken.decode.parsing import transform as parsed
from nextoken.decode.transform import Context, normalise
from nextoken.model.table import TableModel
from nextoken.model.vocab import Vocab

MODEL = TableModel.random(["a", "b", "ab", "c"], order=2, eos=True, seed=3, concentration=0.8)

# "a" is likely and leads to the improbable "z" only; "b" is less likely and leads to the likely "y".
TRAP = TableModel.given(
    {
        (): (0.25, 0.25, 0.25, 0.25, 0.0),
        (4,): (0.9, 0.1, 0, 0, 0),
        (0,): (0, 0, 0.99, 0.01, 0),
        (1,): (0, 0, 0.9, 0.1, 0),
    }
    | {(2,): (0, 0, 0, 0, 1.0), (3,): (0, 0, 0, 0, 1.0)},
    ["a", "b", "y", "z"],
    eos=True,
    name="trap",
)
ESCAPE = Choice(["az", "by"])


def law(model: TableModel, constraint: Constraint, prompt: str = "", most: int = 4, rule: str = "") -> dict[str, float]:
    """target(y) of every text, by enumeration of all strings of tokens."""
    change = parsed(rule) if rule else None
    start, found = model.vocab.encode(prompt).ids, dict[str, float]()

    def walk(tokens: tuple[int, ...], mass: float) -> None:
        if tokens and tokens[-1] in model.vocab.eos_ids:
            text = model.vocab.decode_text(tokens)
            if constraint.complete(text):
                found[text] = found.get(text, 0.0) + mass
        elif len(tokens) < most:
            scores = model.row((*start, *tokens))[None]
            if change is not None:
                scores = normalise(change(scores, Context(prompts=[start], outputs=[tokens], vocab=model.vocab)))
            for token, p in enumerate(scores[0].exp().tolist()):
                if p > 0:
                    walk((*tokens, token), mass * p)

    walk((), 1.0)
    return found


def apart(shares: Any, target: dict[str, float]) -> float:
    """Total variation between shares and the target made a distribution."""
    total = sum(target.values())
    return sum(abs(shares.get(text, 0) - target.get(text, 0) / total) for text in {*shares, *target}) / 2


CONSTRAINTS: list[Constraint] = [
    Regex("(a|b)*c?"),
    Regex("ab.*"),
    Choice(["aba", "c", "bbc", "abab"]),
    Regex("[^c]*") & Regex("(..)*"),
]


@pytest.mark.paper("2504.05410")
@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=str)
@pytest.mark.parametrize("kernel", [AWRS(), AWRS("geometric", max_rejects=2), FullMask()], ids=str)
def test_evidence_is_unbiased_with_two_particles(constraint: Constraint, kernel: Kernel) -> None:
    """The mean of 400 runs with n = 2 within 4 standard errors: false alarms 12 * 6e-5."""
    exact = sum(law(MODEL, constraint).values())
    made = smc(MODEL, "", constraint, particles=2, kernel=kernel, max_tokens=4, runs=400, ess_threshold=1.0, seed=1)
    assert abs(made.evidence - exact) < 4 * made.standard_error + 1e-12
    assert made.standard_error < 0.25 * exact + 1e-9


@pytest.mark.paper("1711.03219")
@pytest.mark.parametrize("resampling", ["systematic", "stratified", "residual", "multinomial"])
def test_every_text_has_its_unnormalised_weight(resampling: Any) -> None:
    """E[sum w 1{y}] = target(y) of each text, over 500 runs, within 4.5 standard errors (false alarm 4 * 8 * 7e-6)."""
    constraint = CONSTRAINTS[0]
    target = law(MODEL, constraint, most=3)
    rows = []
    for seed in range(500):
        made = smc(
            MODEL, "", constraint, particles=3, max_tokens=3, seed=seed, resampling=resampling, ess_threshold=1.0
        )
        weights = dict.fromkeys(target, 0.0)
        for text, log_weight in zip(made.texts, made.log_weights.tolist(), strict=True):
            weights[text] += math.exp(log_weight)
        rows.append(list(weights.values()))
    found = np.array(rows)
    error = found.std(0, ddof=1) / math.sqrt(len(found))
    common = np.array(list(target.values())) > 0.01
    assert common.sum() >= 5
    assert (np.abs(found.mean(0) - list(target.values())) < 4.5 * error)[common].all()


@pytest.mark.slow
@pytest.mark.paper("2504.05410")
@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=str)
def test_posterior_tends_to_the_target(constraint: Constraint) -> None:
    target = law(MODEL, constraint)
    made = smc(MODEL, "", constraint, particles=4000, max_tokens=4, seed=5)
    assert apart(made.posterior, target) < 0.04
    assert set(made.texts) <= set(target)


@pytest.mark.paper("2504.05410")
def test_a_trap_misleads_masks_and_not_weights() -> None:
    target = law(TRAP, ESCAPE)
    assert target == pytest.approx({"az": 0.9 * 0.01, "by": 0.1 * 0.9})
    made = smc(TRAP, "", ESCAPE, particles=2000, max_tokens=4, seed=0)
    assert apart(made.posterior, target) < 0.02
    assert abs(made.evidence - sum(target.values())) < 4 * made.standard_error < 0.04
    # Locally constrained: the same texts without their weights.
    masked = importance(TRAP, "", ESCAPE, particles=2000, kernel=FullMask(), max_tokens=4, seed=0)
    counts = {text: masked.texts.count(text) / 2000 for text in target}
    assert apart(counts, target) > 0.7
    assert apart(masked.posterior, target) < 0.02


@pytest.mark.slow
@pytest.mark.paper("2504.05410")
def test_texts_picked_from_small_runs_follow_the_target() -> None:
    """Chi-square at 1e-4 of one text drawn from each of 400 runs with 60 particles, which is nearly the target."""
    target = law(MODEL, CONSTRAINTS[2])
    picked = [
        smc(MODEL, "", CONSTRAINTS[2], particles=60, max_tokens=4, seed=seed).sample(1, seed=seed)[0]
        for seed in range(400)
    ]
    expected = np.array([p / sum(target.values()) * 400 for p in target.values()])
    observed = np.array([picked.count(text) for text in target])
    common = expected >= 5
    assert observed.sum() == 400 and common.sum() >= 2
    merged = [np.append(x[common], x[~common].sum() + 1e-9) for x in (observed, expected)]
    merged[1] *= merged[0].sum() / merged[1].sum()
    assert chisquare(*merged).pvalue > 1e-4


@pytest.mark.slow
@pytest.mark.paper("1711.03219")
def test_variance_falls_as_one_over_particles() -> None:
    scatter = []
    for particles in (4, 16, 64):
        made = smc(TRAP, "", ESCAPE, particles=particles, max_tokens=4, runs=400, seed=2)
        scatter.append(np.var(np.exp(made.log_evidences)) * particles)
    # Each estimated to about 7 %, were the law normal.
    assert max(scatter) / min(scatter) < 2


def test_one_particle_is_locally_constrained_sampling_with_its_weight() -> None:
    constraint = CONSTRAINTS[0]
    for seed in range(20):
        made = smc(MODEL, "b", constraint, particles=1, kernel=FullMask(), max_tokens=5, seed=seed)
        (item,) = made.population.items
        weight, place, prefix = 0.0, constraint.start(), tuple(MODEL.vocab.encode("b").ids)
        for at, token in enumerate(item.tokens):
            p = MODEL.row(prefix).exp()
            c = place.allowed(MODEL.vocab) if at < 4 else torch.eye(6)[5] * place.is_complete
            assert c[token]
            weight += math.log(float((p * c).sum()))
            prefix, place = (*prefix, token), place.advance(MODEL.vocab.token_bytes[token]) or place
        assert made.log_evidence == pytest.approx(weight)
        assert math.isnan(made.standard_error) and made.ess == pytest.approx(1)


def test_without_a_constraint_it_is_sampling() -> None:
    """Weights differ from 1 only where the end was forced, and texts are those of generate in law."""
    free = Regex("(?s).*")
    made = smc(MODEL, "", free, particles=50, max_tokens=200, seed=0)
    assert made.log_weights == pytest.approx(np.full(50, -math.log(50)))
    assert made.evidence == pytest.approx(1) and made.resamplings == 0
    assert made.checks_per_token <= 2
    exact = sum(law(MODEL, free, most=3).values())
    ended = [generate(MODEL, "", max_tokens=3, seed=seed).finish == "eos" for seed in range(1500)]
    assert np.mean(ended) == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 1500))
    cut = smc(MODEL, "", free, particles=1500, max_tokens=3, seed=0)
    assert abs(cut.evidence - exact) < 4 * cut.standard_error


@given(st.integers(0, 10**6), st.sampled_from(CONSTRAINTS), st.integers(1, 6), st.integers(1, 5))
@settings(max_examples=40)
def test_whatever_comes_out_is_of_the_constraint_and_in_time(seed: int, rule: Constraint, k: int, most: int) -> None:
    made = smc(MODEL, "a", rule, particles=k, max_tokens=most, seed=seed)
    assert made.is_dead == (made.evidence == 0) == (not made.posterior)
    assert not np.isnan(made.log_weights).any()
    for item in made.population.items:
        assert rule.complete(item.text) and len(item.tokens) <= most and item.tokens[-1] in MODEL.vocab.eos_ids
    if not made.is_dead:
        assert sum(made.posterior.values()) == pytest.approx(1)
        assert set(made.sample(5, seed=seed)) <= set(made.texts)


def test_equal_seeds_give_equal_posteriors() -> None:
    def weights(seed: int) -> dict[str, float]:
        return dict(smc(MODEL, "", CONSTRAINTS[0], particles=8, max_tokens=5, seed=seed).posterior)

    assert weights(4) == weights(4) != weights(5)
    first = smc(MODEL, "", CONSTRAINTS[0], particles=8, max_tokens=5, seed=4, runs=3)
    alone = smc(MODEL, "", CONSTRAINTS[0], particles=8, max_tokens=5, seed=4)
    assert first.log_evidences[0] == alone.log_evidence and len(set(first.log_evidences)) == 3


@pytest.mark.parametrize("rule", ["temperature(0.5)", "top_p(0.6)", "repetition_penalty(1.5)"])
def test_the_transform_defines_the_target(rule: str) -> None:
    constraint = CONSTRAINTS[0]
    target = law(MODEL, constraint, prompt="ab", most=3, rule=rule)
    made = smc(MODEL, "ab", constraint, particles=600, max_tokens=3, transform=rule, seed=0)
    assert abs(made.evidence - sum(target.values())) < 4 * made.standard_error + 1e-9
    assert apart(made.posterior, target) < 0.1
    assert sum(target.values()) != pytest.approx(sum(law(MODEL, constraint, prompt="ab", most=3).values()), rel=0.01)


@pytest.mark.paper("1711.03219")
def test_a_potential_multiplies_the_target() -> None:
    constraint = CONSTRAINTS[0]

    def potential(text: str) -> float:
        return -math.inf if "bb" in text else 1.5 * text.count("a") - 0.5

    target = {text: p * math.exp(potential(text)) for text, p in law(MODEL, constraint).items()}
    runs = smc(MODEL, "", constraint, particles=10, max_tokens=4, potential=potential, runs=150, seed=0)
    assert abs(runs.evidence - sum(target.values())) < 4 * runs.standard_error
    assert apart(runs.posterior, target) < 0.1
    assert all("bb" not in text for text in runs.texts)
    barred = smc(MODEL, "", constraint, particles=10, max_tokens=4, potential=lambda text: -math.inf, seed=0)
    assert barred.is_dead


def test_foresight_keeps_the_particles_that_a_trap_would_lose() -> None:
    """A twist that knows the trap, and cancels at the end, gives the same evidence with less scatter."""
    ahead = {"a": math.log(0.01), "b": math.log(0.9)}
    plain = smc(TRAP, "", ESCAPE, particles=8, kernel=FullMask(), max_tokens=4, runs=200, seed=0)
    twisted = smc(
        TRAP, "", ESCAPE, particles=8, kernel=FullMask(), max_tokens=4, runs=200, seed=0,
        potential=lambda text: ahead.get(text, 0.0),
    )  # fmt: skip
    for made in (plain, twisted):
        assert abs(made.evidence - 0.099) < 4 * made.standard_error + 1e-9
    # Either sees the trap at the token after it; what the twist gains is one step at which particles are chosen anew.
    assert twisted.standard_error < 1.2 * plain.standard_error


@pytest.mark.parametrize("kernel", [Rejection(), Proposal(AWRS(), "temperature(1.5)"), AWRS("recursive")], ids=str)
def test_any_kernel_gives_the_same_evidence(kernel: Kernel) -> None:
    exact = sum(law(MODEL, CONSTRAINTS[1]).values())
    made = importance(MODEL, "", CONSTRAINTS[1], particles=3000, kernel=kernel, max_tokens=4, seed=3)
    assert abs(made.evidence - exact) < 4 * made.standard_error
    assert made.resamplings == 0


@pytest.mark.slow
@pytest.mark.paper("1711.03219")
def test_the_standard_error_of_one_run_is_that_of_many() -> None:
    """Within a factor 1.4 on average, with resampling and without."""
    for threshold in (0.0, 0.5):
        runs = [
            smc(
                TRAP,
                "",
                ESCAPE,
                particles=60,
                max_tokens=4,
                ess_threshold=threshold,
                seed=seed,
                resampling="multinomial",
            )
            for seed in range(150)
        ]
        told = math.sqrt(np.mean([made.standard_error**2 for made in runs]))
        assert 1 / 1.4 < told / np.std([made.evidence for made in runs], ddof=1) < 1.4


def test_a_dead_posterior_says_so() -> None:
    # Within three tokens nothing of at least ten characters can be said.
    made = smc(MODEL, "", Regex("a{10,}"), particles=5, max_tokens=3, seed=0)
    assert made.is_dead and made.evidence == 0 and made.log_evidence == -math.inf and made.ess == 0
    assert made.posterior == {} and made.texts == ()
    assert made.standard_error == 0
    with pytest.raises(ValueError, match=r"no text was found: all 5 particles died.*more particles"):
        made.sample(1)
    never = TableModel.given({(): (1.0, 0.0, 0.0)}, ["a", "b"], eos=True)
    impossible = smc(never, "", Choice(["b"]), particles=5, max_tokens=50, seed=0, runs=2)
    assert impossible.is_dead and len(impossible.stages) == 2


def test_the_last_token_is_the_end() -> None:
    """p(END) c(complete) exactly: with one token at most, only the empty text is left."""
    made = smc(MODEL, "", Regex("a*"), particles=3, max_tokens=1, seed=0)
    assert made.log_evidence == pytest.approx(float(MODEL.row(())[5])) and made.posterior == {"": 1.0}
    limited = TableModel.random(["a", "b"], order=1, eos=True, seed=0)
    limited.context_length = 4
    short = smc(limited, "ab", Regex(".*"), particles=20, max_tokens=50, seed=0)
    assert max(len(item.tokens) for item in short.population.items) <= 2 and not short.is_dead


class Counting(Constraint):
    """The texts of another one; counts what it is asked, and makes no masks."""

    def __init__(self, inner: Constraint) -> None:
        self.inner, self.asked = inner, 0

    def start(self) -> Place:
        return CountingPlace(self, self.inner.start())


class CountingPlace(Place):
    def __init__(self, owner: Counting, place: Place) -> None:
        self.owner, self.place = owner, place

    def advance(self, data: bytes) -> Place | None:
        self.owner.asked += 1
        moved = self.place.advance(data)
        return None if moved is None else CountingPlace(self.owner, moved)

    @property
    def is_complete(self) -> bool:
        self.owner.asked += 1
        return self.place.is_complete

    def allowed(self, vocab: Vocab) -> torch.Tensor:
        raise AssertionError("a whole mask was made")


@pytest.mark.paper("2504.05410")
def test_tests_are_counted_and_do_not_grow_with_the_vocabulary() -> None:
    spent = []
    for size in (8, 80, 800):
        symbols = [f"{i:03d}" for i in range(size)]
        flat = torch.full((size + 2,), 1 / (size + 1), dtype=torch.float64)
        flat[size] = 0
        constraint = Counting(Regex("(..[0246])*"))
        made = smc(TableModel(flat, symbols, eos=True), "", constraint, particles=20, max_tokens=12, seed=0)
        assert constraint.asked == sum(stage.checks for stage in made.stages)
        spent.append(made.checks_per_token)
    assert max(spent) < 5


def test_texts_in_common_are_read_once() -> None:
    fed: list[int] = []

    class Watched(TableModel):
        def _feed(self, state: Any, tokens: Any, parents: Any) -> Any:
            fed.append(tokens.shape[0])
            return super()._feed(state, tokens, parents)

    stages: list[Stage] = []
    model = Watched.random(["a", "b"], order=1, eos=True, seed=0)
    made = smc(model, "ab", Regex("[ab]{3,6}"), particles=64, max_tokens=8, seed=0, runs=2, on_stage=stages.append)
    assert made.stages == tuple(stages) and [stage.run for stage in stages] == sorted(stage.run for stage in stages)
    assert fed[0] == 1 and fed[1] <= 2 and fed[2] <= 4 and fed.count(1) == 1
    assert stages[0].rows == 1 and stages[0].live == 64 and stages[1].rows <= 2
    assert sum(stage.live for stage in stages) == made.tokens_drawn


@pytest.mark.slow
def test_a_network_gives_every_row_its_own_distribution() -> None:
    """Weights recomputed for each text by one reading of it, with forks, regroupings and resampling between."""
    model = nextoken.load("nano")
    rule = Regex("[A-Z][a-z]+( [a-z]+){1,3}[.]")
    made = importance(model, "It was late. ", rule, particles=6, kernel=FullMask(), max_tokens=16, seed=1)
    prompt = [model.vocab.bos_id, *model.vocab.encode("It was late. ").ids]
    assert len(made.population) > 1
    for item, log_weight in zip(made.population.items, made.log_weights.tolist(), strict=True):
        log_probs = model.predict([[*prompt, *item.tokens[:-1]]]).log_probs()[0, len(prompt) - 1 :].double()
        place, total = rule.start(), -math.log(6)
        for at, token in enumerate(item.tokens):
            c = place.allowed(model.vocab).clone()
            if at == 15:
                c &= torch.tensor([token in model.vocab.eos_ids for token in range(model.vocab.size)])
            total += math.log(float(log_probs[at].exp()[c].sum()))
            place = place.advance(model.vocab.token_bytes[token]) or place
        assert log_weight == pytest.approx(total, abs=1e-4)
    sequential = smc(model, "It was late. ", rule, particles=6, max_tokens=16, seed=1, ess_threshold=1.0)
    assert sequential.resamplings > 0 and all(rule.complete(text) for text in sequential.texts)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"particles": 0}, "at least 1"),
        ({"runs": 0}, "at least 1"),
        ({"max_tokens": 0}, "at least 1"),
        ({"ess_threshold": 1.5}, "between 0 and 1"),
        ({"resampling": "lottery"}, "systematic, stratified"),
        ({"transform": "xtc(0.5, 0.1)"}, "flips coins"),
    ],
)
def test_misuse_is_refused(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        smc(MODEL, "", Regex("a"), **settings_)


def test_models_that_cannot_end_or_tell_are_refused() -> None:
    with pytest.raises(ValueError, match="no end token"):
        smc(TableModel.random(3), "", Regex("a"))
    partial = TableModel.random(3, eos=True)
    partial.is_partial = True
    with pytest.raises(ValueError, match="most probable tokens"):
        smc(partial, "", Regex("a"))
    limited = TableModel.random(3, order=1, eos=True)
    limited.context_length = 2
    with pytest.raises(ValueError, match="shorten"):
        smc(limited, "abc", Regex("a"))


def test_it_says_what_it_found() -> None:
    made = smc(MODEL, "", CONSTRAINTS[2], particles=50, max_tokens=4, seed=0)
    assert isinstance(made, Posterior)
    assert str(made).startswith("evidence 0.") and "texts" in str(made)
