"""Responses: those of generate() with seeds of their own, whatever else is drawn at the same time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextoken.decode.generate import derived_seed, generate
from nextoken.model.table import TableModel
from nextoken.values.responses import responses

TABLE = TableModel.random(3, order=2, eos=True, seed=1)


@given(st.lists(st.text("abc", max_size=3), max_size=4), st.integers(1, 3), st.integers(0, 99), st.integers(1, 5))
@settings(max_examples=25)
def test_each_prompt_draws_as_it_would_alone(prompts: list[str], n: int, seed: int, max_rows: int) -> None:
    made = responses(TABLE, prompts, n=n, max_tokens=5, stop="cc", seed=seed, max_rows=max_rows)
    assert [len(group) for group in made] == [n] * len(prompts)
    for number, (prompt, group) in enumerate(zip(prompts, made, strict=True)):
        alone = generate(TABLE, [prompt], n=n, max_tokens=5, stop="cc", seed=derived_seed(seed, number + 1))
        assert group == alone


def test_equal_prompts_have_different_texts() -> None:
    made = responses(TABLE, ["ab"] * 30, max_tokens=5)
    assert len({group[0].tokens for group in made}) > 5
    with pytest.raises(ValueError, match="n must be"):
        responses(TABLE, [""], n=0)
