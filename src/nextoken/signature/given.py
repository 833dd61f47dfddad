"""signature_of(): the signature of tokens that are given, rather than of a text that is still to be tokenised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import accumulate

import numpy as np
import torch

import nextoken
from nextoken.head import Statistics
from nextoken.model.base import LanguageModel
from nextoken.signature import columns
from nextoken.signature.labels import Labels
from nextoken.signature.metadata import Metadata
from nextoken.signature.signature import Signature
from nextoken.signature.texts import Text, TextInfo


@torch.no_grad()
def signature_of(
    model: LanguageModel,
    prompt: Sequence[int],
    output: Sequence[int],
    *,
    top: int = 10,
    name: str = "text-0",
    statistics: Callable[[int], Statistics] | None = None,
) -> Signature:
    """One row per token of `output`: statistics of p(. | prompt, output before it).

    Unlike `read`, it takes token ids as they are, so the tokens of a generated text need not be those into which its
    text would be cut again. The text of the signature is that of `output`; end tokens have rows and no bytes.

    Args:
        model: that predicts.
        prompt: what stands before, not scored; at least one token.
        output: tokens to be scored; prompt and output must fit the context.
        top: k of the top-k columns.
        name: of the text.
        statistics: gives the statistics [N] of other distributions for the same tokens, for a given k; by default the
            model's own are computed.

    Raises:
        ValueError: the prompt is empty, or there are too many tokens.
    """
    if not prompt:
        raise ValueError("nothing stands before the first token, so it has no distribution: the prompt needs a token")
    targets = torch.tensor(list(output), dtype=torch.long)
    if not len(targets):
        values: dict[str, np.ndarray] = {"text_id": np.zeros(0, dtype=np.int32)}
    elif statistics is not None:
        values = {key: value.cpu().numpy() for key, value in statistics(top).as_dict().items()}
    else:
        following = model.predict([[*prompt, *output[:-1]]])[:, len(prompt) - 1 :]
        found = following.statistics(targets[None], top=top)
        values = {key: value[0].cpu().numpy() for key, value in found.as_dict().items()}
    spelled = [model.vocab.token_bytes[token] for token in output]
    data, ends = b"".join(spelled), np.array(list(accumulate(map(len, spelled))), dtype=np.int64)
    values |= {
        "text_id": np.zeros(len(targets), dtype=np.int32),
        "position": np.arange(len(targets)),
        "token_id": targets.numpy(),
        "byte_start": np.concatenate([[0], ends[:-1]]).astype(np.int64) if len(ends) else ends,
        "byte_end": ends,
    }
    wanted = columns.schema(is_partial=model.is_partial)
    placed = values | {"token": columns.spelled([data], [ends])}
    table = columns.table(placed, wanted, nan_is_null=model.is_partial) if len(targets) else wanted.empty_table()
    labels = Labels(model.vocab)
    labels.add(table)
    metadata = Metadata(
        model=model.name,
        model_digest=model.digest,
        tokenizer_digest=model.vocab.digest,
        vocab_size=model.vocab.size,
        dtype=model.dtype,
        top=top,
        is_partial=model.is_partial,
        against=None,
        against_digest=None,
        context_length=model.context_length,
        overlap=None,
        bos_text=None,
        versions={"nextoken": nextoken.__version__, "torch": version("torch"), "transformers": version("transformers")},
    )
    text = Text(name, data)
    info = TextInfo(name=name, size=len(data), n_rows=len(targets), digest=text.digest)
    return Signature(table, metadata, [info], labels.as_dict())
