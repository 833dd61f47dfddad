"""Small Llama models trained on the spot, in a minute or two on one core, and tokenizers of closed vocabularies.

    from training import train, word_tokenizer, words_of

    texts = ["the capital of Oz is Emerald .", ...]
    tokenizer = word_tokenizer(words_of(texts))
    model = train(texts, tokenizer=tokenizer, steps=600, seed=0)      # an HFModel

A text becomes [begin, tokens, end]. The same texts, seed and number of threads give the same weights on one machine.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nextoken.model.hf import HFModel
from nextoken.model.tokenizer import byte_of_letter

BOS, EOS = "<|bos|>", "<|eos|>"

Text = str | Sequence[int]
"""A text, or its row of token ids as it is to be learnt, begin and end token included."""


def words_of(texts: Iterable[str]) -> list[str]:
    """The different words of the texts, each with the space before it (so the first word of a text has none)."""
    return sorted({word for text in texts for word in re.findall(r" ?[^ \n]+| |\n", text)})


def word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each of the words as spelt, their spaces included, after a begin and an end token.

    Texts are cut into the longest words there are, from left to right; a text with anything else in it has no
    spelling and raises an error. The bytes of the tokens make up the text again.
    """
    letters = {byte: letter for letter, byte in byte_of_letter().items()}
    wanted = sorted(set(words), key=lambda word: (-len(word), word))
    if not wanted or not wanted[-1]:
        raise ValueError("a vocabulary needs at least one word, and no empty one")
    spelled = ["".join(letters[byte] for byte in word.encode()) for word in wanted]
    ids = {piece: number for number, piece in enumerate([BOS, EOS, *sorted(spelled)])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<no such word>"))
    cut = pre_tokenizers.Split(Regex("|".join(map(re.escape, wanted))), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


def character_tokenizer(characters: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each character: `character_tokenizer("0123456789+=")`."""
    return word_tokenizer(set("".join(characters)))


def rows_of(texts: Iterable[Text], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Rows of token ids: begin token, text, end token; rows of ids as they are."""
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [
        [begin, *tokenizer.encode(text, add_special_tokens=False), end] if isinstance(text, str) else list(text)
        for text in texts
    ]


def train(
    texts: Sequence[Text],
    *,
    tokenizer: PreTrainedTokenizerBase,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    context: int = 128,
    config: LlamaConfig | None = None,
    steps: int = 600,
    batch: int = 32,
    lr: float = 3e-3,
    seed: int = 0,
    threads: int = 1,
    loss_mask: Sequence[Sequence[bool]] | None = None,
    on_progress: Callable[[int, float], None] | None = None,
    name: str = "trained",
) -> HFModel:
    """A Llama model with new weights, trained on the texts.

    The loss is the mean cross-entropy in nats of the tokens after the first; padding is no part of it.

    Args:
        texts: all of them; an epoch is len(texts) / batch steps, and each has an order of its own.
        tokenizer: with a begin and an end token.
        hidden, layers, heads, context: the network's sizes; its feed-forward width is near 8/3 of `hidden`.
        config: in place of these four.
        steps, batch: updates, and texts in each.
        lr: the highest rate of AdamW; it rises over the first 5 % of the steps and falls to nothing as a cosine.
        seed: of the first weights and of the order of the texts.
        threads: of torch, while this runs.
        loss_mask: for each row of `rows_of(texts, tokenizer)`, which of its tokens to learn to predict.
        on_progress: called after each step with its number from 0 and its loss.
        name: of the model returned.
    """
    sizes = config or LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=-(-hidden // 3) * 8,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = LlamaForCausalLM(sizes)
    _fit(network, rows_of(texts, tokenizer), loss_mask, steps, batch, lr, seed, threads, on_progress)
    return HFModel(network, tokenizer, name=name)


def continue_training(
    model: HFModel,
    texts: Sequence[Text],
    *,
    steps: int = 200,
    batch: int = 16,
    lr: float = 5e-4,
    seed: int = 0,
    threads: int = 1,
    loss_mask: Sequence[Sequence[bool]] | None = None,
    on_progress: Callable[[int, float], None] | None = None,
    name: str | None = None,
) -> HFModel:
    """A copy of the model, trained further on the texts; the model itself stays as it is. Arguments as for `train`."""
    network = copy.deepcopy(model.model)
    rows = rows_of(texts, model.tokenizer)
    _fit(network, rows, loss_mask, steps, batch, lr, seed, threads, on_progress)
    return HFModel(network, model.tokenizer, name=name or f"{model.name}, trained further")


def _fit(
    network: LlamaForCausalLM,
    rows: list[list[int]],
    mask: Sequence[Sequence[bool]] | None,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    threads: int,
    on_progress: Callable[[int, float], None] | None,
) -> None:
    learnt = [[True] * len(row) for row in rows] if mask is None else [list(row) for row in mask]
    if not rows or list(map(len, learnt)) != list(map(len, rows)):
        raise ValueError("there must be texts, and the loss mask must have one value for each token of rows_of(texts)")
    longest, limit = max(map(len, rows)), network.config.max_position_embeddings
    if longest > limit:
        raise ValueError(f"a text has {longest} tokens, its begin and end included; the context holds {limit}")
    # Padded to the right, where a causal model does not look.
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    keep = torch.tensor([row + [False] * (longest - len(row)) for row in learnt])
    targets, lengths = ids.masked_fill(~keep, -100), torch.tensor([len(row) for row in rows])
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    rises = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / rises) * 0.5 * (1 + math.cos(math.pi * step / max(1, steps))),
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    network.train()
    try:
        for step, chosen in zip(range(steps), _batches(len(rows), batch, seed), strict=False):
            end = int(lengths[chosen].max())
            logits = network(input_ids=ids[chosen, : end - 1], use_cache=False).logits
            nats = F.cross_entropy(logits.flatten(0, 1), targets[chosen, 1:end].flatten(), reduction="sum")
            loss = nats / keep[chosen, 1:end].sum().clamp(min=1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if on_progress:
                on_progress(step, loss.item())
    finally:
        network.eval()
        torch.set_num_threads(before)


def _batches(count: int, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Indices of the texts of each batch, without end, every epoch in an order of its own.

    Texts of like length are not put together, though it would save padding: with a mean per batch, the tokens of short
    texts would then weigh more than those of long ones.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).split(size)
