"""Labels: how the tokens that occur in a signature read."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from nextoken.model.vocab import Vocab


class Labels:
    """Collects the ids of `token_id` and `top_ids` and names each once."""

    def __init__(self, vocab: Vocab) -> None:
        self._vocab = vocab
        self._seen = np.zeros(vocab.size, dtype=bool)

    def add(self, table: pa.Table) -> None:
        for chunk in table["token_id"].chunks:
            self._seen[chunk.to_numpy()] = True
        for chunk in table["top_ids"].chunks:
            self._seen[chunk.flatten().drop_null().to_numpy()] = True

    def as_dict(self) -> dict[int, str]:
        return {int(token_id): self._vocab.label(int(token_id)) for token_id in self._seen.nonzero()[0]}
