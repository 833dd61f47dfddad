"""The synonym watermark: words, bits, shares and tails by hand; rankings and candidates against their models."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
import unicodedata
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, chisquare, kstest
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from nextoken.errors import ModelError
from nextoken.model.table import TableModel
from nextoken.watermark import Key
from nextoken.watermark.fluency import Fluency
from nextoken.watermark.masked import MaskedCandidates
from nextoken.watermark.places import Place, cased_like, put_together, taken_apart
from nextoken.watermark.synonyms import SynonymWatermark
from nextoken.watermark.word_rules import SpelledApart, content_word, same_ending

KEY = Key(b"a key of the tests")
PAPER = pytest.mark.paper("2305.08883")


def anything(place: Place) -> bool:
    return True


def random_words(count: int, kinds: int = 4000, seed: int = 0) -> list[str]:
    return [f"w{number}" for number in np.random.default_rng(seed).integers(0, kinds, count)]


def numbered(j: int) -> Any:
    """j alternatives for every word."""
    return lambda place: [f"{place.word}x{i}" for i in range(j)]


def at(text: str, word: str) -> Place:
    words, gaps = taken_apart(text)
    return Place(words, gaps, words.index(word), word)


@given(st.text(max_size=60))
def test_texts_are_words_and_gaps(text: str) -> None:
    words, gaps = taken_apart(text)
    assert put_together(words, gaps) == text and len(gaps) == len(words) + 1
    assert not any(letter.isalnum() for gap in gaps for letter in gap)


def test_words_of_many_scripts() -> None:
    text = "Don\u2019t  stop, caf\u0065\u0301! हिन्दी; война_и\tмир 'tis rock'n'roll -- 42nd."
    words, gaps = taken_apart(text)
    assert words == ["Don\u2019t", "stop", "cafe\u0301", "हिन्दी", "война", "и", "мир", "tis", "rock'n'roll", "42nd"]
    assert gaps[1:3] == ["  ", ", "] and gaps[-1] == "."


@PAPER
def test_bits_are_fair() -> None:
    """Chi-square on 10^5 pairs at 1e-4, for the keyed and the public rule; the public one is SHA-256 modulo 2."""
    random = np.random.default_rng(4)
    numbers = random.integers(0, 10**6, (100_000, 2)).tolist()
    for mark in (SynonymWatermark(KEY), SynonymWatermark("public")):
        ones = sum(mark.bit(f"a{u}", f"b{w}") for u, w in numbers)
        assert chisquare([ones, len(numbers) - ones]).pvalue > 1e-4
    for before, word in (("the", "Cat"), ("", "naïve"), ("मैं", "हूँ")):
        expected = int(hashlib.sha256((before + word).encode("utf-8")).hexdigest(), 16) % 2
        assert SynonymWatermark("public").bit(before, word) == expected


@PAPER
def test_p_values_of_unmarked_texts_are_uniform() -> None:
    """A repetitive text under many keys, ties at random; Kolmogorov-Smirnov, false alarm 1e-4."""
    random, words = np.random.default_rng(3), random_words(40, 12)
    text, found = " ".join([*words, *words]), []
    for number in range(1000):
        verdict = SynonymWatermark(KEY.derive(number), eligible=anything).detect(text)
        n = verdict.scored
        ones = round(verdict.statistic * math.sqrt(n / 4) + n / 2)
        assert n == len(set(zip([*words, *words], [*words, *words][1:], strict=False)))
        assert verdict.p_value == pytest.approx(binom.sf(ones - 1, n, 0.5))
        found.append(binom.sf(ones, n, 0.5) + random.random() * binom.pmf(ones, n, 0.5))
    assert kstest(found, "uniform").pvalue > 1e-4


@PAPER
@pytest.mark.parametrize("key", [KEY, "public"])
@pytest.mark.parametrize("j", [0, 1, 2, 4])
def test_the_share_of_ones_is_as_expected(key: Any, j: int) -> None:
    """1 - 2^-(j+1) within 4 standard deviations: a false alarm of 6e-5."""
    text = " ".join(random_words(2500, 10**6))
    mark = SynonymWatermark(key, numbered(j), eligible=anything)
    made = mark.mark(text)
    verdict = mark.detect(made.text)
    n, share = verdict.scored, 1 - 2.0 ** -(j + 1)
    ones = verdict.statistic * math.sqrt(n / 4) + n / 2
    assert n > 2400 and abs(ones - n * share) < 4 * math.sqrt(n * share * (1 - share))
    assert len(made.replaced) == pytest.approx(n * (share - 0.5), abs=4 * math.sqrt(n / 4))


@PAPER
@given(st.lists(st.integers(0, 30), min_size=1, max_size=30), st.integers(1, 3))
@settings(max_examples=40)
def test_what_is_written_tells_the_next_bit(numbers: list[int], j: int) -> None:
    """In the marked text, bits as they are read there: 1 wherever a word was replaced, and 0 only without a choice."""
    text = " ".join(f"w{number}" for number in numbers)
    mark = SynonymWatermark(KEY, numbered(j), eligible=anything)
    made = mark.mark(text)
    words, before = taken_apart(made.text)[0], text.split()
    replaced = {one.index: one for one in made.replaced}
    for index in range(1, len(words)):
        if index in replaced:
            assert mark.bit(words[index - 1], words[index]) == 1
            assert (replaced[index].word, replaced[index].by) == (before[index], words[index])
        else:
            assert words[index] == before[index]
            if mark.bit(words[index - 1], words[index]) == 0:
                assert not any(mark.bit(words[index - 1], f"{words[index]}x{i}") for i in range(j))
    assert made.words == len(words) and made.eligible == len(words) - 1


@PAPER
def test_without_candidates_nothing_changes() -> None:
    text = "The old man walked slowly to the great house."
    never = [
        SynonymWatermark(KEY, {}),
        SynonymWatermark(KEY, lambda place: ["other"], filters=[lambda place, word: False]),
        SynonymWatermark(KEY, lambda place: ["other"], ranking=lambda place, words: [-math.inf] * len(words)),
        SynonymWatermark(KEY, lambda place: [place.word, "two words", "", "-", "the"]),
    ]
    for mark in never:
        made = mark.mark(text)
        assert made.text == text and not made.replaced and made.eligible == 6
        assert mark.detect_precisely(text).p_value == 1.0
        assert mark.detect_precisely(text).scored == 0


@PAPER
@pytest.mark.parametrize("share", [0.2, 0.4])
def test_deleting_words_weakens_as_predicted(share: float) -> None:
    """Mean z of ten marked texts falls to (1 - q)^1.5 of what it was, within a tenth: over 4 standard deviations."""
    before, after, random = [], [], np.random.default_rng(6)
    for number in range(10):
        mark = SynonymWatermark(KEY.derive(number), numbered(2), eligible=anything)
        words = mark.mark(" ".join(random_words(2000, 10**6, number))).text.split()
        kept = random.random(len(words)) >= share
        before.append(mark.detect(" ".join(words)).statistic)
        after.append(mark.detect(" ".join(np.array(words)[kept])).statistic)
    assert np.mean(after) / np.mean(before) == pytest.approx((1 - share) ** 1.5, rel=0.1)


def test_case_marks_and_spaces_stay() -> None:
    text = '  "Big CATS,"\n\nsaid   Él; BIG cats\u2014slept.\t'
    synonyms = {"big": ["large", "huge", "great"], "cats": ["lions", "tigers"], "él": ["ñandú"], "slept": ["dozed"]}
    changed = set()
    for number in range(40):
        made = SynonymWatermark(KEY.derive(number), synonyms, eligible=anything).mark(text)
        words, gaps = taken_apart(made.text)
        assert gaps == taken_apart(text)[1]
        changed.update(words)
    assert {"CATS", "LIONS", "Él", "Ñandú", "BIG", "LARGE", "dozed"} <= changed
    assert not {"Lions", "large"} & changed
    assert [cased_like(word, "ox") for word in ("Cow", "COW", "cow", "I")] == ["Ox", "OX", "ox", "Ox"]


@given(st.permutations(["naïve", "Ångström", "straße", "big", "old", "house"]))
def test_the_keyed_rule_knows_neither_case_nor_spelling(words: list[str]) -> None:
    mark, text = SynonymWatermark(KEY, eligible=anything), " ".join(words)
    for variant in (unicodedata.normalize("NFD", text), text.upper(), text.casefold()):
        assert mark.detect(variant) == mark.detect(text)


@PAPER
def test_precise_detection_looks_only_where_there_was_a_choice() -> None:
    words = random_words(1500, 10**6)

    def some(place: Place) -> list[str]:
        stem = place.word.split("x")[0]
        return [f"{stem}x{i}" for i in range(3)] if int(stem[1:]) % 3 == 0 else []

    mark = SynonymWatermark(KEY, some, eligible=anything)
    text = mark.mark(" ".join(words)).text
    fast, precise = mark.detect(text), mark.detect_precisely(text)
    assert precise.scored == pytest.approx(fast.scored / 3, rel=0.15)
    assert precise.statistic > fast.statistic > 3
    assert SynonymWatermark(KEY.derive(1), some, eligible=anything).detect_precisely(text).p_value > 1e-4


def test_nothing_to_read_is_no_evidence() -> None:
    for text in ("", "word", "of the and", "?!"):
        verdict = SynonymWatermark(KEY).detect(text)
        assert (verdict.p_value, verdict.scored) == (1.0, 0) and math.isnan(verdict.statistic)


@PAPER
@pytest.mark.slow
def test_the_text_alone_tells_in_a_new_process() -> None:
    text = " ".join(f"old{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(60))
    text = SynonymWatermark(KEY, lambda place: [place.word + "er", place.word + "ish"]).mark(text).text
    code = (
        "import sys; from nextoken.watermark import Key; from nextoken.watermark.synonyms import SynonymWatermark as S;"
        "v = S(Key(b'a key of the tests')).detect(sys.stdin.read()); print(v.p_value, v.statistic, v.scored)"
    )
    run = subprocess.run([sys.executable, "-c", code], input=text, capture_output=True, text=True, check=True)
    verdict = SynonymWatermark(KEY).detect(text)
    assert run.stdout.split() == [str(verdict.p_value), str(verdict.statistic), str(verdict.scored)]
    assert verdict.p_value < 1e-4


@PAPER
@given(st.text("ab ", min_size=6, max_size=14).filter(lambda text: "ab" in text.split()), st.floats(0, 3))
@settings(max_examples=30)
def test_fluency_is_the_gain_in_log_probability(text: str, lost: float) -> None:
    model = TableModel.random(["a", "b", " "], order=2, seed=7)

    def log_prob(string: str) -> float:
        ids = model.vocab.encode(string).ids
        return sum(model.row(ids[:i])[token].item() for i, token in enumerate(ids))

    text = text.strip()
    place = at(text, "ab")
    left = put_together(place.words[: place.index], place.gaps[: place.index + 1])[len(place.gaps[0]) :]
    right = text[len(place.gaps[0]) + len(left) + 2 :].rstrip()
    expected = [log_prob(left + word + right) - log_prob(left + "ab" + right) for word in ("ba", "a", "abba")]
    assert Fluency(model)(place, ["ba", "a", "abba"]) == pytest.approx(expected, abs=1e-5)
    strict = Fluency(model, most_lost=lost)(place, ["ba", "a", "abba"])
    for kept, gain in zip(strict, expected, strict=True):
        if abs(gain + lost) > 1e-4:
            assert kept == (pytest.approx(gain, abs=1e-5) if gain > -lost else -math.inf)


def test_the_best_one_by_the_ranking_is_taken() -> None:
    words = [f"c{i}" for i in range(8)]

    def ranking(place: Place, candidates: Any) -> list[float]:
        return [-abs(int(candidate[1:]) - 4.2) for candidate in candidates]

    for number in range(20):
        mark = SynonymWatermark(KEY.derive(number), lambda place: words, eligible=anything, ranking=ranking)
        if mark.bit("one", "two"):
            continue
        ones = [word for word in words if mark.bit("one", word)]
        best = max(ones, key=lambda word: -abs(int(word[1:]) - 4.2), default="two")
        assert mark.mark("one two").text == f"one {best}"
    with pytest.raises(ValueError, match="one for each"):
        SynonymWatermark(KEY, lambda place: words, eligible=anything, ranking=lambda p, c: [0.0] * 9).mark(TEXT)


def test_windows_end_with_their_sentences() -> None:
    text = 'One here. "Two there," he said! Three stands? Four goes.'
    assert at(text, "stands").window(sentences=1) == ("Three stands?", 6)
    assert at(text, "said").window() == ('One here. "Two there," he said!', 26)
    assert at(text, "said").window(sentences=1, reach=1) == ("he said!", 3)
    assert at(text, "goes").holding("went").window(sentences=1) == ("Four went.", 5)


def test_rules_of_words() -> None:
    text = "The quick Fox isn't 3rd as it jumped over an ox lazily, but Éva's café stays"
    words, gaps = taken_apart(text)
    chosen = [word for i, word in enumerate(words) if content_word(Place(words, gaps, i, word))]
    assert chosen == ["quick", "jumped", "lazily", "café", "stays"]
    pairs = [("walked", "strolled"), ("cats", "lions"), ("glass", "cup"), ("sing", "tell"), ("slowly", "lazily")]
    assert all(same_ending(at(word, word), other) for word, other in pairs)
    assert not any(same_ending(at(word, word), other) for word, other in [("walked", "walk"), ("cats", "lion")])


@given(st.text("abc", min_size=1, max_size=5), st.text("abc", min_size=1, max_size=5), st.floats(0, 1))
@settings(max_examples=60)
def test_spelling_is_told_apart_by_edits(a: str, b: str, least: float) -> None:
    def distance(x: str, y: str) -> int:
        if not x or not y:
            return len(x) + len(y)
        change = distance(x[1:], y[1:]) + (x[0] != y[0])
        return min(change, distance(x[1:], y) + 1, distance(x, y[1:]) + 1)

    assert SpelledApart(least)(at(a, a), b) == (distance(a, b) >= least * max(len(a), len(b)))


@pytest.fixture(scope="module")
def masked() -> MaskedCandidates:
    """A random masked model over a few words and pieces."""
    words = (
        "[PAD] [UNK] [CLS] [SEP] [MASK] the old young man woman walked ran slowly home house big small ##ish ##er , ."
    )
    vocab = {word: i for i, word in enumerate(words.split())}
    inner = Tokenizer(WordPiece(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = BertPreTokenizer()
    special = {name: f"[{name[:-6].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, mask_token="[MASK]", **special)
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        initializer_range=0.5,
    )
    return MaskedCandidates(BertForMaskedLM(config), tokenizer, top=30)


TEXT = "the old man walked slowly home, the young woman ran oldish house."


@PAPER
def test_masked_candidates_are_the_models_best_words(masked: MaskedCandidates) -> None:
    place = at(TEXT, "walked")
    told = masked.tokenizer(TEXT, return_tensors="pt")
    with torch.no_grad():
        logits = masked.model(input_ids=told["input_ids"], attention_mask=told["attention_mask"]).logits[0, 3]
    order = [masked.tokenizer.convert_ids_to_tokens(int(i)) for i in logits.argsort(descending=True)]
    words = [word for word in order[:30] if word.isalpha()]
    assert masked(place) == words == masked(place) and len(words) == 12
    assert masked(at(TEXT, "oldish")) == []
    few = MaskedCandidates(masked.model, masked.tokenizer, top=3)
    assert few(place) == [word for word in order[:3] if word.isalpha()]


def test_dropout_changes_candidates_and_a_seed_fixes_them(masked: MaskedCandidates) -> None:
    place = at(TEXT, "walked")
    half = [MaskedCandidates(masked.model, masked.tokenizer, top=30, dropout=0.5, seed=seed) for seed in (1, 1, 2)]
    first, again, other = (source(place) for source in half)
    assert first == again and len({tuple(first), tuple(other), tuple(masked(place))}) > 1


@PAPER
def test_similarity_in_context(masked: MaskedCandidates) -> None:
    place = at(TEXT, "walked")
    assert masked.similarity(place, "walked") == pytest.approx(1, abs=1e-5)
    assert masked.similarity(place, "oldish") == 0
    states = []
    for text in (TEXT, TEXT.replace("walked", "ran")):
        ids = masked.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            states.append(masked.model(input_ids=ids, output_hidden_states=True).hidden_states[-2:])
    by_hand = np.mean([torch.cosine_similarity(a[0, 3], b[0, 3], 0).item() for a, b in zip(*states, strict=True)])
    assert masked.similarity(place, "ran", layers=2) == pytest.approx(by_hand, abs=1e-5)


@PAPER
def test_a_masked_model_marks_a_text(masked: MaskedCandidates) -> None:
    rules: list[Any] = [same_ending, lambda place, word: masked.similarity(place, word) > -2]
    mark = SynonymWatermark(KEY, masked, filters=rules)
    text = f"{TEXT} the small house, old woman walked slowly."
    made = mark.mark(text)
    assert made.replaced and len(taken_apart(made.text)[0]) == made.words
    assert mark.detect_precisely(made.text).statistic > mark.detect_precisely(text).statistic
    assert all(same_ending(at(one.word, one.word), one.by) for one in made.replaced)


def test_misuse_is_refused(masked: MaskedCandidates, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="public"):
        SynonymWatermark("secret")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="most"):
        SynonymWatermark(KEY, most=0)
    for action in (SynonymWatermark(KEY).mark, SynonymWatermark(KEY).detect_precisely):
        with pytest.raises(ValueError, match="without synonyms"):
            action("a text")
    with pytest.raises(ValueError, match="dropout"):
        MaskedCandidates(masked.model, masked.tokenizer, dropout=1.0)
    with pytest.raises(ValueError, match="most_lost"):
        Fluency(TableModel.random(3), most_lost=-1.0)
    with pytest.raises(ModelError, match="masked"):
        MaskedCandidates.load(tmp_path)


def test_the_secret_does_not_show() -> None:
    mark = SynonymWatermark(KEY, {"big": ["large"]})
    assert "tests" not in repr(mark) + repr(mark.mark("a big house")) + str(vars(mark))
