"""GroundingSpace: what a model says within a few texts known to be true, to be found again by similar contexts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from nextoken.errors import InputError, ModelError
from nextoken.model.base import LanguageModel

Embed: TypeAlias = Callable[[Sequence[str]], Any]
"""Texts -> vectors [n, d]: a tensor, an array, or lists of numbers."""

_REMOVED = float("-inf")
_TENSORS = ("keys", "token_ids", "log_probs", "rest", "mean")


@dataclass(frozen=True)
class NgramVectors:
    """e(text) [d] = sum over byte n-grams g of sign(g) / (1 + r / reach) at place hash(g), r bytes before the end.

    An embedding that needs no other model: signed feature hashing of the n-grams of a text between two marks. The end
    of a text weighs most, so that prefixes of one text differ, and its beginning never vanishes. It knows spelling, not
    meaning: where phrasings vary, give a sentence embedder.

    Args:
        dimensions: d.
        sizes: n of the n-grams, in bytes.
        reach: bytes from the end at which an n-gram counts half; infinite for a plain bag.
    """

    dimensions: int = 2048
    sizes: tuple[int, ...] = (2, 3, 4, 5)
    reach: float = 16.0

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return torch.from_numpy(np.stack([self._vector(text) for text in texts]))

    def _vector(self, text: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        data = np.frombuffer(b"\x02" + text.encode() + b"\x03", dtype=np.uint8).astype(np.uint64) + np.uint64(1)
        vector = np.zeros(self.dimensions)
        for size in self.sizes:
            count = len(data) - size + 1
            if count < 1:
                continue
            mixed = np.zeros(count, dtype=np.uint64)
            for place in range(size):
                mixed = mixed * np.uint64(0x100000001B3) + data[place : place + count]
            # The low bits of such a sum are poor: it is folded and multiplied once more before bits are taken from it.
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0x9E3779B97F4A7C15)
            index = ((mixed >> np.uint64(33)) % np.uint64(self.dimensions)).astype(np.int64)
            sign = np.where(mixed >> np.uint64(63) == 0, 1.0, -1.0)
            weight = 1 / (1 + np.arange(count - 1, -1, -1) / self.reach)
            vector += np.bincount(index, weights=sign * weight, minlength=self.dimensions)
        return vector


@dataclass(frozen=True, eq=False)
class GroundingSpace:
    """M prefixes of true texts: unit keys e_i = Emb(prefix_i) [M, d], values l_i = log p(. | prefix_i) [M, V].

    The values are what the model itself says within a true answer, not the token that came there. Of each the K largest
    are kept, in float32; the mass of the others is shared evenly among them, which leaves the value normalised and is
    within log(V - K) nats. Being normalised, values do not depend on the constant that logits are known up to.

    Args:
        keys: [M, d].
        token_ids, log_probs: the K largest of each value [M, K].
        rest: log of the mass of the others [M], -inf where there is none.
        mean: of log p over the vocabulary, impossible tokens left out [M].
        vocab_size, model_digest, vocab_digest: of the model that gave the values.
        example: text of the first prefix, by which another embedder is noticed.
        embed: the embedder.

    Source: Context-Aware Adaptive Decoding, arXiv:2508.02184.
    """

    keys: Tensor
    token_ids: Tensor
    log_probs: Tensor
    rest: Tensor
    mean: Tensor
    vocab_size: int
    model_digest: str
    vocab_digest: str
    example: str
    embed: Embed = field(repr=False)

    @classmethod
    def build(
        cls,
        model: LanguageModel,
        pairs: Sequence[tuple[str, str]],
        *,
        embed: Embed | None = None,
        context: str = "",
        chunk: int = 1,
        top: int = 512,
    ) -> GroundingSpace:
        """The space of some questions with true answers, which must not be among the texts it is judged on.

        Args:
            model: that will be shaped.
            pairs: (question, answer); the two are joined as they are, so one of them has the space between.
            embed: any embedder of texts; by default `NgramVectors()`.
            context: read before each pair, and no part of its keys. Empty in the paper; but then, where model and truth
                part, a value says what the model says, and adding it only sharpens that. Other true answers as context
                let the values know what is wanted (ours).
            chunk: take every `chunk`-th position of an answer.
            top: K.

        Raises:
            ValueError: there is no position to take, an argument is below 1, or a text does not fit the context.
        """
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        texts: list[str] = []
        logits: list[Tensor] = []
        begin = () if model.vocab.bos_id is None else (model.vocab.bos_id,)
        begin = (*begin, *model.vocab.encode(context).ids)
        for question, answer in pairs:
            encoding = model.vocab.encode(question + answer)
            ids = (*begin, *encoding.ids)
            # A token that holds the end of the question and the beginning of the answer is the first of the answer.
            first = sum(end <= len(question.encode()) for end in encoding.ends) + len(begin)
            taken = [at for at in range(first, len(ids), chunk) if at > 0]
            if taken:
                texts += [prefix_text(model.vocab.decode(ids[len(begin) : at])) for at in taken]
                logits.append(model.predict([ids])[0, [at - 1 for at in taken]].logits()[0].cpu())
        if not texts:
            raise ValueError("no position to keep: pairs needs a question with an answer that is not empty")
        return cls.of(model, texts, torch.cat(logits), embed=embed, top=top)

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        prefixes: Sequence[str],
        logits: Tensor,
        *,
        embed: Embed | None = None,
        top: int = 512,
    ) -> GroundingSpace:
        """The space of given prefixes and the model's logits [M, V] after them, up to a constant each."""
        if top < 1 or logits.shape != (len(prefixes), model.vocab.size):
            raise ValueError(
                f"{len(prefixes)} prefixes need logits [{len(prefixes)}, {model.vocab.size}] and top >= 1; got "
                f"{tuple(logits.shape)} and {top}"
            )
        embed = embed or NgramVectors()
        values = torch.log_softmax(logits.double(), -1)
        best = values.topk(min(top, values.shape[1]), -1)
        finite = torch.isfinite(values)
        return cls(
            keys=_unit(embed, prefixes).float(),
            token_ids=best.indices,
            log_probs=best.values.float(),
            rest=values.scatter(-1, best.indices, _REMOVED).logsumexp(-1).float(),
            mean=(values.masked_fill(~finite, 0.0).sum(-1) / finite.sum(-1)).float(),
            vocab_size=model.vocab.size,
            model_digest=model.digest,
            vocab_digest=model.vocab.digest,
            example=prefixes[0],
            embed=embed,
        )

    @cached_property
    def digest(self) -> str:
        """Fingerprint of keys and values: 16 hexadecimal digits."""
        sha = hashlib.sha256(repr((self.vocab_size, self.model_digest, self.vocab_digest)).encode())
        for tensor in (self.keys, self.token_ids, self.log_probs, self.rest, self.mean):
            sha.update(tensor.contiguous().numpy().tobytes())
        return sha.hexdigest()[:16]

    def values(self, entries: Tensor) -> Tensor:
        """l of entries [R], whole [R, V], in float32."""
        others = max(1, self.vocab_size - self.token_ids.shape[1])
        whole = (self.rest[entries] - math.log(others))[:, None].repeat(1, self.vocab_size)
        return whole.scatter_(-1, self.token_ids[entries], self.log_probs[entries])

    def similarities(self, texts: Sequence[str]) -> Tensor:
        """Cosines of texts and keys [R, M], to nine decimals, so that rounding never decides between equal keys."""
        embedded = _unit(self.embed, texts)
        if embedded.shape[1] != self.keys.shape[1]:
            raise ValueError(
                f"the embedder gives {embedded.shape[1]} numbers and the keys have {self.keys.shape[1]}: use the one "
                "that made the space"
            )
        return (embedded @ self.keys.double().T).round(decimals=9)

    def check(self, model: LanguageModel) -> None:
        """Raise ModelError unless the values are of this model, as far as fingerprints tell."""
        if self.vocab_digest != model.vocab.digest or self.vocab_size != model.vocab.size:
            raise ModelError(f"the grounding space is of another vocabulary than that of {model.name}: build it anew")
        if self.model_digest and model.digest and self.model_digest != model.digest:
            raise ModelError(f"the grounding space holds what another model than {model.name} said: build it anew")

    def save(self, path: str | Path) -> None:
        """Write the space, less its embedder, to a safetensors file."""
        from safetensors.torch import save_file

        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        words = {name: getattr(self, name) for name in ("model_digest", "vocab_digest", "example")}
        save_file(tensors, str(path), metadata={**words, "vocab_size": str(self.vocab_size)})

    @classmethod
    def load(cls, path: str | Path, *, model: LanguageModel, embed: Embed | None = None) -> GroundingSpace:
        """A saved space, for the model and the embedder that made it.

        Raises:
            InputError: there is no such file, or it is not a grounding space.
            ModelError: it was made with another model or vocabulary, or with another embedder.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                words = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in _TENSORS}
                size, origin = int(words["vocab_size"]), (words["model_digest"], words["vocab_digest"])
                example = words["example"]
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(f"{path} is not a grounding space that GroundingSpace.save wrote: {error}") from error
        space = cls(
            **tensors,
            vocab_size=size,
            model_digest=origin[0],
            vocab_digest=origin[1],
            example=example,
            embed=embed or NgramVectors(),
        )
        space.check(model)
        again = _unit(space.embed, [example]).float()
        if again.shape[1:] != space.keys.shape[1:] or not torch.allclose(again[0], space.keys[0], atol=1e-3):
            raise ModelError(f"{path} was made with another embedder than the one given: pass embed=...")
        return space


def prefix_text(data: bytes) -> str:
    """Bytes as text, less what is no whole character: a prefix may end within one."""
    return data.decode("utf-8", errors="ignore")


def _unit(embed: Embed, texts: Sequence[str]) -> Tensor:
    """Embeddings of length 1 [n, d] in float64; a vector of zeros stays one."""
    vectors = torch.as_tensor(embed(texts)).detach().cpu().double()
    if vectors.ndim != 2 or vectors.shape[0] != len(texts):
        raise ValueError(f"embed must give [{len(texts)}, d] for {len(texts)} texts, got {tuple(vectors.shape)}")
    return torch.nn.functional.normalize(vectors, dim=-1)
