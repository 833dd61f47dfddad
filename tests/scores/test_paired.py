import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nextoken
from nextoken.scores.paired import paired_difference
from nextoken.signature.comparison import Comparison

TEXTS = ["The horse ran over the hill and down to the river. " * 40, "Nobody knew what the letter said. " * 40]


def made(differences: list[float], *, size: int = 100, text: int = 0) -> Comparison:
    """Segments of `size` bytes in which the second model is better by these nats."""
    count = len(differences)
    starts = np.arange(count) * size
    table = pa.table(
        {
            "text_id": np.full(count, text, dtype=np.int32),
            "byte_start": starts,
            "byte_end": starts + size,
            "bytes": [b"x" * size] * count,
            "tokens_a": np.ones(count, dtype=np.int32),
            "tokens_b": np.ones(count, dtype=np.int32),
            "nats_a": np.array(differences) + 1,
            "nats_b": np.ones(count),
            "difference": np.array(differences),
        }
    )
    return Comparison(table, ("a", "b"), ("text",))


def test_value_is_the_difference_of_the_two_figures():
    a, b = nextoken.read("tiny", TEXTS, progress=False), nextoken.read("nano", TEXTS, progress=False)
    comparison = nextoken.compare(a, b)
    found = paired_difference(comparison)
    assert found.value == pytest.approx(comparison.summary()["difference"], abs=1e-9)
    assert found.low <= found.value <= found.high


def test_a_model_beside_itself_differs_by_nothing():
    reading = nextoken.read("nano", TEXTS, progress=False)
    found = paired_difference(nextoken.compare(reading, reading))
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_equal_gains_everywhere_leave_no_doubt():
    found = paired_difference(made([math.log(2) * 100] * 20), block=100)
    assert found.value == found.low == found.high == pytest.approx(1.0)


def test_the_error_is_that_of_the_mean_of_stretches():
    rng = np.random.default_rng(0)
    bits = rng.normal(size=400)
    found = paired_difference(made((bits * math.log(2) * 100).tolist()), block=100, resamples=4000)
    # The bootstrap's own noise with 4,000 resamples is about 1 % of the error.
    assert found.error == pytest.approx(bits.std() / math.sqrt(400), rel=0.06)


def test_what_hangs_together_is_drawn_together():
    """Ten copies of each gain are no ten times the evidence, if they lie in one stretch."""
    rng = np.random.default_rng(1)
    gains = np.repeat(rng.normal(size=40), 10).tolist()
    apart = paired_difference(made(gains, size=10), block=10).error
    together = paired_difference(made(gains, size=10), block=100).error
    assert together == pytest.approx(apart * math.sqrt(10), rel=0.2)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=2, max_size=30), st.integers(1, 400))
def test_swapping_the_models_changes_the_sign(differences: list[float], block: int):
    one = paired_difference(made(differences), block=block, resamples=50)
    other = paired_difference(made([-d for d in differences]), block=block, resamples=50)
    assert one.value == pytest.approx(-other.value, abs=1e-12)
    if not math.isnan(one.low):
        assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-12)


def test_one_stretch_has_no_interval_and_none_is_an_error():
    found = paired_difference(made([3.0]), block=1000)
    assert math.isnan(found.low) and math.isnan(found.high) and not math.isnan(found.value)
    with pytest.raises(ValueError, match="nothing to compare"):
        paired_difference(made([]))
    with pytest.raises(ValueError, match="at least 1 byte"):
        paired_difference(made([1.0]), block=0)
