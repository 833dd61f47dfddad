"""logged(): what is kept of the texts sampled, and their rewards."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from nextoken.decode.generate import generate
from nextoken.decode.logged import logged
from nextoken.model.table import TableModel

MODEL = TableModel.random(3, order=2, eos=True, seed=0)


def share_of_b(texts: Sequence[str]) -> list[float]:
    return [text.count("b") / max(1, len(text)) for text in texts]


def test_texts_are_those_of_generate_with_their_rewards() -> None:
    made = generate(MODEL, ["a", "cb"], n=8, max_tokens=6, seed=3)
    # A threshold that one of the texts meets exactly.
    threshold = sorted(share_of_b([p + one.text for p, one in zip(["a"] * 8 + ["cb"] * 8, made, strict=True)]))[8]
    found = logged(MODEL, ["a", "cb"], share_of_b, n=8, max_tokens=6, threshold=threshold, seed=3)
    assert len(found) == 16
    for text, prompt, one in zip(found, ["a"] * 8 + ["cb"] * 8, made, strict=True):
        assert text.tokens == (3, *MODEL.vocab.encode(prompt).ids, *one.tokens)
        assert text.given == 1 + len(prompt)
        assert text.reward == (-1.0 if share_of_b([prompt + one.text])[0] >= threshold else 0.0)
    assert {text.reward for text in found} == {-1.0, 0.0}


def test_most_keeps_the_extremes_of_each_prompt() -> None:
    found = logged(MODEL, ["a", "cb"], share_of_b, n=8, max_tokens=6, keep="all", seed=3)
    kept = logged(MODEL, ["a", "cb"], share_of_b, n=8, max_tokens=6, keep="most", seed=3)
    assert len(kept) == 4
    for group in range(2):
        scores = share_of_b([MODEL.vocab.decode_text(text.tokens) for text in found[8 * group : 8 * group + 8]])
        most, least = share_of_b([MODEL.vocab.decode_text(text.tokens) for text in kept[2 * group : 2 * group + 2]])
        assert (most, least) == (max(scores), min(scores))
    alike = logged(MODEL, ["a"], lambda texts: [0.0] * len(texts), n=4, max_tokens=6, keep="most", seed=3)
    every = logged(MODEL, ["a"], lambda texts: [0.0] * len(texts), n=4, max_tokens=6, seed=3)
    assert alike == [every[0], every[-1]]


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt"):
        logged(MODEL, [], share_of_b)
    with pytest.raises(ValueError, match="n of at least 2"):
        logged(MODEL, ["a"], share_of_b, n=1, keep="most")
    with pytest.raises(ValueError, match="from 0 to 1"):
        logged(MODEL, ["a"], lambda texts: [2.0] * len(texts), n=2)
    with pytest.raises(ValueError, match="for each of 2 texts"):
        logged(MODEL, ["a"], lambda texts: [0.0], n=2)
