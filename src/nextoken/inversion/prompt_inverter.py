"""Inversion: what a prompt was, from the distributions that followed it.

codec = LogRatioCodec.of_model(model)
inverter = PromptInverter.fit(answers(model, prompts, codec, steps=16), prompts, vocab_size=model.vocab.size)
inverter.recover(answers(model, hidden_prompts, codec, steps=16))
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nextoken.errors import InputError
from nextoken.inversion.log_ratios import LogRatioCodec
from nextoken.methods import method
from nextoken.model.base import LanguageModel
from nextoken.signature.output import writing, written

if TYPE_CHECKING:
    from transformers import T5ForConditionalGeneration

_PAD, _END, _FIRST = 0, 1, 2
"""Of the inverter's own vocabulary: padding (and begin), end; the model's token v is v + 2."""


@torch.no_grad()
def answers(
    model: LanguageModel, prompts: Sequence[Sequence[int]], codec: LogRatioCodec, *, steps: int, batch: int = 64
) -> Tensor:
    """x [N, T, k], float32: what the model says after each prompt at T greedy steps, in the codec's numbers.

    The raw distributions, whatever would be done to them before drawing. Decoding goes on after an end token.

    Args:
        prompts: token ids, begin token included where the model has one.
        steps: T.
        batch: prompts decoded at once, those of like length together.

    Raises:
        ValueError: a prompt is empty or does not fit the context with its answer.
    """
    if steps < 1 or not all(prompts):
        raise ValueError("steps must be at least 1, and every prompt have a token")
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    found = torch.zeros(len(prompts), steps, codec.size)
    begin = 0
    while begin < len(order):
        size = len(prompts[order[begin]])
        some = [number for number in order[begin : begin + batch] if len(prompts[number]) == size]
        state = model.start(len(some))
        following = model.extend(state, torch.tensor([list(prompts[number]) for number in some]))[:, -1]
        for step in range(steps):
            log_probs = following.log_probs()[:, 0]
            found[some, step] = codec.compress(log_probs).float()
            if step + 1 < steps:
                following = model.extend(state, log_probs.argmax(-1)[:, None].cpu())
        begin += len(some)
    return found


@method(
    name="PILS",
    arxiv="2506.17090",
    access="gray",
    trained=True,
    summary="a hidden prompt read back from the log-probabilities of several generated steps",
)
class PromptInverter(nn.Module):
    """p(prompt | x) of an encoder-decoder whose input embeddings are adapter(x_t), one for each of T steps.

        adapter(x) = W_2 GELU(dropout(W_1 z)) + b_2, z = (x - mean) / std over the training answers

    T5 of transformers, new and small, encodes and decodes; the paper fine-tunes T5-base. It learns one model's answers:
    those of another mean nothing to it, and other kept tokens are refused. More steps may be given than it was trained
    on.

    Source: PILS, arXiv:2506.17090, section 4.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, size: int, vocab_size: int, *, width: int = 128, layers: int = 2, heads: int = 4, dropout: float = 0.1
    ) -> None:
        from transformers import T5Config, T5ForConditionalGeneration

        super().__init__()
        self.settings: dict[str, Any] = {
            "size": size,
            "vocab_size": vocab_size,
            "width": width,
            "layers": layers,
            "heads": heads,
            "dropout": dropout,
        }
        self.first, self.second = nn.Linear(size, size), nn.Linear(size, width)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))
        config = T5Config(
            vocab_size=vocab_size + _FIRST,
            d_model=width,
            d_kv=width // heads,
            d_ff=4 * width,
            num_layers=layers,
            num_heads=heads,
            dropout_rate=dropout,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=_PAD,
            pad_token_id=_PAD,
            eos_token_id=_END,
        )
        self.body: T5ForConditionalGeneration = T5ForConditionalGeneration(config)

    @classmethod
    def fit(
        cls,
        seen: Tensor,
        prompts: Sequence[Sequence[int]],
        *,
        vocab_size: int,
        width: int = 128,
        layers: int = 2,
        epochs: int = 10,
        batch: int = 64,
        rate: float = 1e-3,
        seed: int = 0,
        on_step: Callable[[int, int, float], object] | None = None,
    ) -> PromptInverter:
        """Minimise the token-mean -log p(prompt | x) over pairs.

        Args:
            seen: x [N, T, k], from `answers`.
            prompts: what was hidden: token ids without the begin token.
            vocab_size: of the ids.
            width, layers: of encoder and decoder.
            epochs, batch, rate: of AdamW; the rate rises for 5 % of the steps and falls linearly to 0.
            seed: of weights, order and dropout.
            on_step: called with step, steps and loss.

        Raises:
            ValueError: counts differ, a prompt is empty or an id outside the vocabulary.
        """
        if seen.ndim != 3 or len(seen) != len(prompts) or not len(prompts):
            raise ValueError(
                f"answers must be [N, T, k] for as many prompts, got {tuple(seen.shape)} for {len(prompts)}"
            )
        if not all(prompts) or any(not 0 <= token < vocab_size for prompt in prompts for token in prompt):
            raise ValueError(f"prompts must have tokens, with ids below {vocab_size}")
        width_of = max(map(len, prompts)) + 1
        labels = torch.full((len(prompts), width_of), -100)
        for number, prompt in enumerate(prompts):
            labels[number, : len(prompt) + 1] = torch.tensor([*(token + _FIRST for token in prompt), _END])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = cls(seen.shape[2], vocab_size, width=width, layers=layers)
            made.mean.copy_(seen.flatten(0, 1).mean(0))
            made.std.copy_(seen.flatten(0, 1).std(0).clamp(min=1e-3))
            optimizer = torch.optim.AdamW(made.parameters(), lr=rate)
            steps = epochs * -(-len(prompts) // batch)
            rising = max(1, steps // 20)
            made.train()
            step = 0
            for _ in range(epochs):
                for chosen in torch.split(torch.randperm(len(prompts)), batch):
                    for group in optimizer.param_groups:
                        group["lr"] = rate * min((step + 1) / rising, (steps - step) / max(1, steps - rising))
                    loss = made.body(inputs_embeds=made._embedded(seen[chosen]), labels=labels[chosen]).loss
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(made.parameters(), 1.0)
                    optimizer.step()
                    step += 1
                    if on_step is not None:
                        on_step(step, steps, loss.item())
        return made.eval()

    @torch.no_grad()
    def recover(self, seen: Tensor, *, max_tokens: int = 64, batch: int = 64) -> list[tuple[int, ...]]:
        """The likeliest prompt token by token, for answers x [N, T, k]; at most `max_tokens` ids each.

        Raises:
            ValueError: x has not the numbers this was trained on.
        """
        if seen.ndim != 3 or seen.shape[2] != self.settings["size"]:
            raise ValueError(
                f"answers must be [N, T, {self.settings['size']}], in the numbers this inverter was trained on; got "
                f"{tuple(seen.shape)}"
            )
        found: list[tuple[int, ...]] = []
        for some in torch.split(seen, batch):
            ids = self.body.generate(  # type: ignore[no-untyped-call, unused-ignore]
                inputs_embeds=self._embedded(some),
                attention_mask=torch.ones(some.shape[:2], dtype=torch.long),
                max_new_tokens=max_tokens + 1,
                do_sample=False,
            )
            for row in ids[:, 1:].tolist():
                said = row[: row.index(_END)] if _END in row else row
                found.append(tuple(token - _FIRST for token in said if token >= _FIRST)[:max_tokens])
        return found

    def save(self, folder: str | Path) -> None:
        """Write `inverter.safetensors` and `inverter.json`.

        Raises:
            OutputError: the folder cannot be written to.
        """
        from safetensors.torch import save

        # Tied embeddings are one tensor under several names.
        state = {name: tensor.clone().contiguous() for name, tensor in self.state_dict().items()}
        target = Path(folder)
        with writing(target):
            target.mkdir(parents=True, exist_ok=True)
        about = json.dumps({"version": 1, **self.settings}, indent=2) + "\n"
        for name, data in (("safetensors", save(state)), ("json", about.encode())):
            with written(target / f"inverter.{name}") as out:
                out.write(data)

    @classmethod
    def load(cls, folder: str | Path) -> PromptInverter:
        """What `save` wrote.

        Raises:
            InputError: there is nothing of the kind.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        source = Path(folder)
        try:
            settings = json.loads((source / "inverter.json").read_text(encoding="utf-8"))
            settings.pop("version")
            made = cls(settings.pop("size"), settings.pop("vocab_size"), **settings)
            made.load_state_dict(load((source / "inverter.safetensors").read_bytes()))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise InputError(f"no inverter in {source}: {error}; give a folder that save() wrote") from error
        return made.eval()

    def _embedded(self, seen: Tensor) -> Tensor:
        z = (seen.float() - self.mean) / self.std
        embedded: Tensor = self.second(nn.functional.gelu(self.dropout(self.first(z))))
        return embedded


def token_f1(found: Sequence[int], true: Sequence[int]) -> float:
    """2 P R / (P + R) of the tokens as bags: P the share of found ones that are true, R of true ones that are found."""
    common = sum((Counter(found) & Counter(true)).values())
    return 2 * common / (len(found) + len(true)) if found or true else 1.0
