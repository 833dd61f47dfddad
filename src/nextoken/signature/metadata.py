"""Metadata: which model, vocabulary and settings a signature was made with."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Metadata:
    """Where a signature comes from.

    Args:
        model: name of the model.
        model_digest: fingerprint of its weights, empty where unknown.
        tokenizer_digest: fingerprint of its vocabulary.
        vocab_size: V.
        dtype: precision the model computed in.
        top: k of `top_ids` and `top_logprobs`.
        is_partial: the model told only its most probable tokens; what cannot be known is null.
        against: name of the second model that read the same texts, or None.
        against_digest: fingerprint of its weights.
        context_length: most tokens the model saw at once, None for no limit.
        overlap: tokens by which windows overlap, None where there is no limit.
        bos_text: what stood before each text: the label of the begin token, or the text given; None for nothing.
        versions: of nextoken, torch and transformers.
    """

    model: str
    model_digest: str
    tokenizer_digest: str
    vocab_size: int
    dtype: str
    top: int = 10
    is_partial: bool = False
    against: str | None = None
    against_digest: str | None = None
    context_length: int | None = None
    overlap: int | None = None
    bos_text: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def disagreement(self, other: Metadata) -> str | None:
        """The first setting in which rows made under the two could differ, as one line; None if there is none.

        Names and versions may differ: the digest says which weights they were. Models without a digest go by name.
        """
        mine, others = self.as_dict(), other.as_dict()
        for setting in mine:
            # What the name of a model does not say its digest does.
            digest = {"model": "model_digest", "against": "against_digest"}.get(setting)
            told = digest is not None and mine[digest] and others[digest]
            if setting != "versions" and not told and mine[setting] != others[setting]:
                return f"{setting} is {mine[setting]!r} in one and {others[setting]!r} in the other"
        return None
