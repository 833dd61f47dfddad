"""PromptReps: ask a language model for one word about a text; its answer, before it is given, represents the text.

passages = represent(model, texts)
queries = represent(model, ["who found the island?"], prompt=QUERY)
ranking = Index(passages).search(queries)          # module `fusion`
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import sparse

from nextoken.methods import method
from nextoken.model.base import ABSENT, LanguageModel
from nextoken.model.loading import load

_SYSTEM = "You are an AI assistant that can understand human language."
_WORD = re.compile(r"\w+(?:['’]\w+)*")
_LISTED = """
a about above after again against all am an and any are as at be because been before being below between both
but by can did do does doing don down during each few for from further had has have having he her here hers
herself him himself his how i if in into is it its itself just me more most my myself no nor not now of off on
once only or other our ours ourselves out over own s same she should so some such t than that the their theirs
them themselves then there these they this those through to too under until up very was we were what when
where which while who whom why will with you your yours yourself yourselves
"""
_STOP_WORDS = frozenset(_LISTED.split())


@dataclass(frozen=True)
class WordPrompt:
    """How a text is shown: as a chat turn where the model has a chat template, else as plain text.

    Args:
        asked: with {text} in it.
        begun: the beginning of the answer, so that the next token begins the word.
    """

    asked: str
    begun: str = 'The word is: "'

    def __post_init__(self) -> None:
        if "{text}" not in self.asked:
            raise ValueError(f"the prompt {self.asked!r} has no place for the text: write {{text}} where it goes")


PASSAGE = WordPrompt(
    'Passage: "{text}". Use one word to represent the passage in a retrieval task. Make sure your word is in lowercase.'
)
QUERY = WordPrompt(
    'Query: "{text}". Use one word to represent the query in a retrieval task. Make sure your word is in lowercase.'
)


@dataclass(frozen=True)
class Representations:
    """Two views of N texts.

    Args:
        dense: final hidden states where the word would come, of length 1 [N, H], float32.
        sparse: impacts of the words, whole numbers [N, V], a CSR matrix.
    """

    dense: np.ndarray
    sparse: sparse.csr_matrix

    def __len__(self) -> int:
        return len(self.dense)


@method(
    name="PromptReps",
    arxiv="2404.18424",
    access="white",
    summary="texts as hidden state and as words weighted by the logits, where a model is asked for one word",
)
@torch.no_grad()
def represent(
    model: LanguageModel | str | Path,
    texts: Sequence[str],
    *,
    prompt: WordPrompt = PASSAGE,
    max_tokens: int = 512,
    terms: int = 128,
    expansion: int = 0,
    batch: int = 16,
) -> Representations:
    """h / |h| [H] and rint(100 log(1 + relu(z))) [V], h and z the hidden state and raw logits at the prompt's end.

    Of z only the text's own words count: lower-cased, without stop words and punctuation, each spelt without a space
    before it, and of their tokens the `terms` greatest; the ten greatest of all for a text without such words. With
    `expansion` = e the e greatest beyond the text are added, of tokens that are ASCII words.

    Raw logits are arbitrary up to a constant, so where they are cut at 0 is a habit of the model's family; relu of
    log-probabilities would be 0 everywhere.

    Args:
        model: one with hidden states (`Next.hidden`) and raw logits, as HFModel, or what `nextoken.load` takes.
        texts: not empty; each is cut after its first `max_tokens` tokens.
        prompt: `PASSAGE`, `QUERY`, or one of your own.
        batch: texts read at once.

    Raises:
        ValueError: a text is empty, the prompt does not fit the context, or the model has no hidden states.

    Source: PromptReps, arXiv:2404.18424, section 3, its first-token mode. The words are cut by a regular expression,
        where the released code uses NLTK's tokenizer and list of stop words.
    """
    model = load(model)
    if terms < 1 or expansion < 0 or batch < 1 or max_tokens < 1:
        raise ValueError("terms, batch and max_tokens must be at least 1, and expansion at least 0")
    empty = [number for number, text in enumerate(texts) if not text.strip()]
    if empty or not texts:
        raise ValueError(f"text {empty[0]} is empty: there is nothing to represent" if empty else "there is no text")
    shown = [_cut(text, model, max_tokens) for text in texts]
    prompts = [_prompt(model, text, prompt) for text in shown]
    longest = max(map(len, prompts))
    if model.context_length is not None and longest > model.context_length:
        raise ValueError(
            f"a prompt of {longest} tokens does not fit the context of {model.name}, {model.context_length}: "
            f"lower max_tokens, now {max_tokens}"
        )
    wordy = _wordy(model) if expansion else np.zeros(0, dtype=bool)
    dense, rows = [], []
    # Like lengths together, so that little of a batch is padding.
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    for begin in range(0, len(order), batch):
        chosen = order[begin : begin + batch]
        hidden, logits = _last(model, [prompts[number] for number in chosen])
        dense += list(hidden / np.maximum(np.linalg.norm(hidden, axis=1, keepdims=True), 1e-12))
        weights = np.log1p(np.maximum(logits, 0))
        rows += [
            _impacts(row, _tokens(shown[number], model), terms, expansion, wordy)
            for row, number in zip(weights, chosen, strict=True)
        ]
    back = np.argsort(order)
    return Representations(np.stack(dense)[back], _matrix([rows[number] for number in back], model.vocab.size))


def _cut(text: str, model: LanguageModel, most: int) -> str:
    ends = model.vocab.encode(text).ends
    return text if len(ends) <= most else text.encode()[: ends[most - 1]].decode(errors="ignore")


def _prompt(model: LanguageModel, text: str, prompt: WordPrompt) -> list[int]:
    vocab = model.vocab
    # Not str.format: the text may hold braces itself.
    asked = prompt.asked.replace("{text}", text, 1)
    begun = vocab.encode(prompt.begun).ids
    messages: list[Mapping[str, str]] = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": asked}]
    try:
        return [*vocab.chat(messages), *begun]
    except ValueError:  # no chat template
        start = () if vocab.bos_id is None else (vocab.bos_id,)
        return [*start, *vocab.encode(asked + "\n").ids, *begun]


def _last(model: LanguageModel, prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states [B, H] and raw logits [B, V] after the last token of each prompt."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[*prompt, *[ABSENT] * (width - len(prompt))] for prompt in prompts])
    end = torch.zeros(tokens.shape, dtype=torch.bool)
    end[range(len(prompts)), [len(prompt) - 1 for prompt in prompts]] = True
    following = model.predict(tokens)[end]
    if following.hidden is None:
        raise ValueError(f"{model.name} has no hidden states, which are half of a representation; take an HFModel")
    return following.hidden[:, 0].float().cpu().numpy(), following.logits()[:, 0].float().cpu().numpy()


def _tokens(text: str, model: LanguageModel) -> np.ndarray:
    """Ids of the tokens of the text's words."""
    words = {word for word in _WORD.findall(text.lower()) if word not in _STOP_WORDS}
    return np.array(sorted({token for word in words for token in model.vocab.encode(word).ids}), dtype=np.int64)


def _wordy(model: LanguageModel) -> np.ndarray:
    """Which tokens may stand for words beyond the text [V]: ASCII letters and digits that begin with a to z."""
    return np.array([re.fullmatch(rb"[a-z][A-Za-z0-9]*", spelled) is not None for spelled in model.vocab.token_bytes])


def _impacts(
    weights: np.ndarray, own: np.ndarray, terms: int, expansion: int, wordy: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and impacts of one text, weights [V]."""
    kept = own[np.argsort(-weights[own], kind="stable")[:terms]] if len(own) else np.argsort(-weights)[:10]
    if expansion:
        beyond = np.where(wordy, weights, -np.inf)
        beyond[own] = -np.inf
        added = np.argsort(-beyond, kind="stable")[:expansion]
        kept = np.union1d(kept, added[np.isfinite(beyond[added])])
    impacts = np.rint(100 * weights[kept]).astype(np.int64)
    return kept[impacts > 0], impacts[impacts > 0]


def _matrix(rows: Sequence[tuple[np.ndarray, np.ndarray]], size: int) -> sparse.csr_matrix:
    bounds = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in rows])])
    ids = np.concatenate([ids for ids, _ in rows])
    impacts = np.concatenate([impacts for _, impacts in rows])
    return sparse.csr_matrix((impacts, ids, bounds), shape=(len(rows), size))
