"""The columns of a signature: their names, types and meaning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

COLUMNS: dict[str, str] = {
    "text_id": "which text, from 0",
    "position": "index of the token in its text, from 0; the begin token is not counted",
    "token_id": "the token that came, x",
    "token": "the bytes of the text that it covers",
    "byte_start": "where they begin in the text",
    "byte_end": "where they end",
    "logprob": "log p(x), nats",
    "rank": "tokens strictly more probable than x",
    "mass_above": "their probability",
    "entropy": "H = E[-log p], nats",
    "varentropy": "Var[-log p], nats^2",
    "skewness": "third standardised moment of -log p under p",
    "kurtosis": "fourth standardised moment of -log p under p (3 for a normal)",
    "collision": "sum p^2",
    "mean_logprob": "unweighted mean of log p over the vocabulary, nats",
    "std_logprob": "unweighted standard deviation of log p over the vocabulary, nats",
    "top1_prob": "p of the most probable token",
    "margin": "p of the most probable token less p of the second",
    "log_normalizer": "log sum exp of the logits",
    "half_sum": "sum p^(1/2)",
    "quarter_sum": "sum p^(1/4)",
    "cube_sum": "sum p^3",
    "fourth_sum": "sum p^4",
    "top_ids": "the k most probable tokens, most probable first",
    "top_logprobs": "their log p, nats",
    "rest_mass": "probability outside the top k",
    "entropy_lower": "least entropy that the known probabilities allow, nats (partial models)",
    "entropy_upper": "greatest entropy that the known probabilities allow, nats (partial models)",
    "cross_entropy": "E_p[-log q] of the second model q, nats",
    "kl": "KL(p || q), nats",
    "reverse_kl": "KL(q || p), nats",
    "js": "Jensen-Shannon divergence of p and q, nats (at most log 2)",
    "against_logprob": "log q(x), nats",
    "hidden": "final hidden state from which p is computed",
}
"""Every column a signature may have, in order, and what it holds. p is the model's distribution at that place."""

PLACE = ("text_id", "position", "token_id", "token", "byte_start", "byte_end")
"""What each row is about."""
BOUNDS = ("entropy_lower", "entropy_upper")
"""Columns of partial models only."""
AGAINST = ("cross_entropy", "kl", "reverse_kl", "js", "against_logprob")
"""Columns of a reading with two models."""
STATISTICS = tuple(name for name in COLUMNS if name not in {*PLACE, *BOUNDS, *AGAINST, "hidden"})
"""Columns that every signature has beside its places."""

_TYPES = {
    "text_id": pa.int32(),
    "position": pa.int32(),
    "token_id": pa.int32(),
    "token": pa.binary(),
    "byte_start": pa.int64(),
    "byte_end": pa.int64(),
    "rank": pa.int32(),
    "top_ids": pa.list_(pa.int32()),
    "top_logprobs": pa.list_(pa.float32()),
}


def schema(*, against: bool = False, is_partial: bool = False, hidden_size: int | None = None) -> pa.Schema:
    """The Arrow schema of a signature; numbers not listed in `_TYPES` are float32."""
    absent = {"hidden", *(() if against else AGAINST), *(() if is_partial else BOUNDS)}
    fields = [pa.field(name, _TYPES.get(name, pa.float32())) for name in COLUMNS if name not in absent]
    if hidden_size is not None:
        fields.append(pa.field("hidden", pa.list_(pa.float32(), hidden_size)))
    return pa.schema(fields)


def check(found: pa.Schema) -> None:
    """Raise ValueError unless a schema is that of a signature; the message names each column that is not."""
    hidden = found.field("hidden").type if "hidden" in found.names else None
    if hidden is not None and not pa.types.is_fixed_size_list(hidden):
        raise ValueError(f"not a signature: column hidden is {hidden}, not a fixed-size list of float")
    expected = schema(
        against=any(name in found.names for name in AGAINST),
        is_partial=any(name in found.names for name in BOUNDS),
        hidden_size=None if hidden is None else hidden.list_size,
    )
    wrong = [f"{name} is missing" for name in expected.names if name not in found.names]
    wrong += [f"{name} is unknown" for name in found.names if name not in expected.names]
    wrong += [
        f"{name} is {found.field(name).type}, not {expected.field(name).type}"
        for name in expected.names
        if name in found.names and not found.field(name).type.equals(expected.field(name).type)
    ]
    if not wrong and found.names != expected.names:
        wrong = [f"columns are not in order {', '.join(expected.names)}"]
    if wrong:
        raise ValueError(f"not a signature: {'; '.join(wrong)}")


def arrow(values: np.ndarray, kind: pa.DataType, *, nan_is_null: bool = False) -> pa.Array:
    """Numbers [N], or [N, H] for a fixed-size list, as an Arrow array.

    Args:
        nan_is_null: NaN stands for unknown, and so do negative integers.
    """
    flat = values.reshape(-1)
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(_flat(flat, kind.value_type), kind.list_size)
    return pa.array(
        flat.astype(kind.to_pandas_dtype(), copy=False), type=kind, mask=~_known(flat) if nan_is_null else None
    )


def lists(ids: np.ndarray, logprobs: np.ndarray, *, is_partial: bool = False) -> tuple[pa.Array, pa.Array]:
    """The columns `top_ids` and `top_logprobs` from arrays [N, k].

    Args:
        is_partial: lists may be shorter, ending in NaN, and an id may be unknown (-1), which becomes null.
    """
    there = ~np.isnan(logprobs) if is_partial else np.ones(ids.shape, dtype=bool)
    offsets = pa.array(np.concatenate([[0], there.sum(1).cumsum()]).astype(np.int32))
    inner = arrow(ids[there], pa.int32(), nan_is_null=is_partial), arrow(logprobs[there], pa.float32())
    return pa.ListArray.from_arrays(offsets, inner[0]), pa.ListArray.from_arrays(offsets, inner[1])


def spelled(pieces: Iterable[bytes], ends: Sequence[np.ndarray]) -> pa.Array:
    """A binary array from stretches of text and, for each, the ends of its tokens counted from its beginning."""
    data = b"".join(pieces)
    offsets, base = [np.zeros(1, dtype=np.int64)], 0
    for end in ends:
        offsets.append(end + base)
        base = int(offsets[-1][-1]) if len(end) else base
    joined = np.concatenate(offsets)
    if base >= 2**31:
        raise ValueError("a signature's block of text is limited to 2 GiB")
    return pa.Array.from_buffers(
        pa.binary(), len(joined) - 1, [None, pa.py_buffer(joined.astype(np.int32)), pa.py_buffer(data)]
    )


def numpy(column: pa.ChunkedArray) -> np.ndarray:
    """A column as numpy: [N], or [N, k] for lists of one length; objects for bytes and for lists of several lengths.

    Null is NaN, which makes integer columns with nulls float64.
    """
    kind = column.type
    if pa.types.is_binary(kind):
        return np.array([*column.to_pylist(), None], dtype=object)[:-1]
    if not pa.types.is_nested(kind):
        return np.asarray(column.to_numpy())
    whole = column.combine_chunks()
    flat: np.ndarray = whole.flatten().to_numpy(zero_copy_only=False)
    if pa.types.is_fixed_size_list(kind):
        return flat.reshape(len(whole), int(kind.list_size))
    offsets = whole.offsets.to_numpy()
    sizes = np.diff(offsets)
    if len(whole) and (sizes == sizes[0]).all():
        return flat.reshape(len(whole), sizes[0])
    if not len(whole):
        return flat.reshape(0, 0)
    rows = np.empty(len(whole), dtype=object)
    for row, part in enumerate(np.split(flat, sizes.cumsum()[:-1])):
        rows[row] = part
    return rows


def table(values: Mapping[str, Any], wanted: pa.Schema, *, nan_is_null: bool = False) -> pa.Table:
    """A table of `wanted` columns from arrays, numpy or Arrow; unknown numbers (see `arrow`) are null."""
    size = len(values["text_id"])
    nothing = np.zeros((size, 0))
    ids, logprobs = values.get("top_ids", nothing), values.get("top_logprobs", nothing)
    given = {
        **values,
        **dict(zip(("top_ids", "top_logprobs"), lists(ids, logprobs, is_partial=nan_is_null), strict=True)),
    }
    arrays = [
        given[field.name]
        if isinstance(given[field.name], pa.Array)
        else arrow(given[field.name], field.type, nan_is_null=nan_is_null and field.name not in PLACE)
        for field in wanted
    ]
    return pa.Table.from_arrays(arrays, schema=wanted)


def _known(values: np.ndarray) -> np.ndarray:
    known: np.ndarray = ~np.isnan(values) if np.issubdtype(values.dtype, np.floating) else values >= 0
    return known


def _flat(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    return pa.array(values.astype(kind.to_pandas_dtype(), copy=False), type=kind)
