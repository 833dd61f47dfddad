"""The window plan."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextoken.signature import Window, windows


@st.composite
def _plans(draw: st.DrawFn) -> tuple[int, int, int, int]:
    context = draw(st.integers(2, 12))
    return draw(st.integers(0, 60)), context, draw(st.integers(1, context - 1)), draw(st.integers(1, 20))


@given(_plans())
def test_each_token_is_scored_once_with_enough_context(plan: tuple[int, int, int, int]) -> None:
    length, context, overlap, start = plan
    found = windows(length, context, overlap, given=start)
    scored = [token for window in found for token in range(window.first, window.end)]
    assert scored == list(range(start, length))
    for window in found:
        assert 0 <= window.begin < window.first < window.end <= length
        assert len(window) <= context
        assert window.first - window.begin >= min(overlap, window.first)
        # Never less than could be shown: it is full, or it shows everything before it.
        assert len(window) == context or window.begin == 0 or window.end - context < window.begin
    full = [window for window in found if window.end < length]
    assert all(len(window) == context or window.begin == 0 for window in full)


@given(_plans())
def test_there_are_no_more_windows_than_needed(plan: tuple[int, int, int, int]) -> None:
    length, context, overlap, _ = plan
    needed = 0 if length < 2 else 1 + max(0, -(-(length - context) // (context - overlap)))
    assert len(windows(length, context, overlap)) == needed


def test_by_hand() -> None:
    assert windows(5, 10) == [Window(0, 5, 1)]
    assert windows(10, 10) == [Window(0, 10, 1)]
    assert windows(11, 10) == [Window(0, 10, 1), Window(1, 11, 10)]
    assert windows(17, 10, 4) == [Window(0, 10, 1), Window(6, 16, 10), Window(7, 17, 16)]
    assert windows(16, 10, 4, given=3) == [Window(0, 10, 3), Window(6, 16, 10)]
    assert windows(1_000, None) == [Window(0, 1_000, 1)]
    assert windows(1, None) == windows(1, 4) == windows(0, 4) == []


def test_what_is_given_may_fill_the_context() -> None:
    assert windows(12, 4, 2, given=9) == [Window(7, 11, 9), Window(8, 12, 11)]


@pytest.mark.parametrize(("context", "overlap", "start"), [(1, None, 1), (8, 8, 1), (8, 0, 1), (8, 2, 0)])
def test_what_makes_no_sense_is_refused(context: int, overlap: int | None, start: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        windows(20, context, overlap, given=start)
