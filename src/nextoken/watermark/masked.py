"""MaskedCandidates: words that a masked language model would put in a place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nextoken.errors import ModelError
from nextoken.watermark.places import Place, cased_like, is_one_word

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class MaskedCandidates:
    """The k most probable words of a masked model at a place, the word that stands there left visible.

    With dropout d, each number of the word's embedding is set to 0 with probability d and the others divided by 1 - d,
    so that the model half sees the word; with d = 0 candidates are a function of the text, as precise detection wants
    them. Words of several pieces have no candidates, and candidates are words of one piece.

        masked = MaskedCandidates.load(folder)
        SynonymWatermark(key, masked, filters=[same_ending, lambda place, word: masked.similarity(place, word) >= 0.8])

    Args:
        model: of transformers, for masked language modelling.
        tokenizer: its fast tokenizer.
        top: k.
        dropout: d, from 0 up to but not including 1.
        seed: of the dropout; one text gives the same candidates again.
        sentences: how many are read, the last of them that of the word.

    Raises:
        ValueError: a number is out of range, or the tokenizer tells no offsets.

    Source: Yang et al., arXiv:2305.08883, section 3.2; the official code has k = 32 and d = 0.3 (8 and 0 in its faster
    form), lambda 0.83 between contextual and static similarity (here contextual alone), and layers = 8.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        top: int = 32,
        dropout: float = 0.0,
        seed: int = 0,
        sentences: int = 2,
    ) -> None:
        if top < 1 or sentences < 1 or not 0 <= dropout < 1:
            raise ValueError(
                f"top and sentences must be at least 1 and dropout from 0 to below 1, got {top}, {sentences}, {dropout}"
            )
        if not tokenizer.is_fast:
            raise ValueError("the tokenizer tells no offsets: load it with use_fast=True")
        self.model, self.tokenizer = model.eval(), tokenizer
        self.top, self.dropout, self.seed, self.sentences = top, dropout, seed, sentences

    @classmethod
    def load(cls, source: str | Path, *, top: int = 32, dropout: float = 0.0, seed: int = 0) -> MaskedCandidates:
        """With model and tokenizer of a folder or hub id.

        Raises:
            ModelError: there is none.
        """
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        try:
            model, tokenizer = AutoModelForMaskedLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"{source} cannot be loaded as a masked language model: {reason}") from error
        return cls(model, tokenizer, top=top, dropout=dropout, seed=seed)

    @torch.no_grad()
    def __call__(self, place: Place) -> list[str]:
        """Candidates, the most probable first."""
        text, start = place.window(sentences=self.sentences)
        ids, at = self._piece(text, start, len(place.word))
        if at is None:
            return []
        embedded: Tensor = self.model.get_input_embeddings()(ids)
        if self.dropout:
            generator = torch.Generator().manual_seed(self.seed + place.index)
            kept = (torch.rand(embedded.shape[-1], generator=generator) >= self.dropout) / (1 - self.dropout)
            embedded = embedded.clone()
            embedded[0, at] *= kept.to(embedded)
        logits = self.model(inputs_embeds=embedded, attention_mask=torch.ones_like(ids)).logits[0, at]
        best = logits.topk(min(self.top, len(logits))).indices.tolist()
        specials = set(self.tokenizer.all_special_ids)
        spelled = [(token, self.tokenizer.decode([token]).strip()) for token in best if token not in specials]
        return [
            word for token, word in spelled if is_one_word(word) and self._is_whole(text, start, place, token, word)
        ]

    @torch.no_grad()
    def similarity(self, place: Place, candidate: str, *, layers: int = 8) -> float:
        """Mean over the last layers of the cosine between the vectors of word and candidate, each in its place.

        0 where either is of several pieces.
        """
        text, start = place.window(sentences=self.sentences)
        word = cased_like(place.word, candidate)
        changed = text[:start] + word + text[start + len(place.word) :]
        found = []
        for variant, length in ((text, len(place.word)), (changed, len(word))):
            ids, at = self._piece(variant, start, length)
            if at is None:
                return 0.0
            states = self.model(input_ids=ids, output_hidden_states=True).hidden_states
            found.append(torch.stack([state[0, at] for state in states[1:][-layers:]]))
        return float(torch.cosine_similarity(found[0], found[1], dim=-1).mean())

    def _is_whole(self, text: str, start: int, place: Place, token: int, word: str) -> bool:
        """Whether the tokenizer spells the word in this place by this token alone, so that it is no piece of a word."""
        cased = cased_like(place.word, word)
        ids, at = self._piece(text[:start] + cased + text[start + len(place.word) :], start, len(cased))
        return at is not None and (int(ids[0, at]) == token or cased != word)

    def _piece(self, text: str, start: int, length: int) -> tuple[Tensor, int | None]:
        """Token ids [1, n] of a text, and which of them is the word, if it is one and the model takes so many."""
        told = self.tokenizer(text, return_offsets_mapping=True, truncation=False)
        ids, offsets = told["input_ids"], told["offset_mapping"]
        limit = getattr(self.model.config, "max_position_embeddings", None)
        covering = [at for at, (a, b) in enumerate(offsets) if a < start + length and b > start]
        if len(covering) != 1 or (limit is not None and len(ids) > limit):
            return torch.tensor([ids]), None
        return torch.tensor([ids]), covering[0]
