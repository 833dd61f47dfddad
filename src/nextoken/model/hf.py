"""HFModel: any causal language model of Hugging Face transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from nextoken.errors import ModelError, OutputError
from nextoken.model import _checkpoint
from nextoken.model._chains import ChainMemory, Manner
from nextoken.model._digest import fingerprint
from nextoken.model._kv import KVMemory, Visibility
from nextoken.model._network import Network
from nextoken.model._packed import PackedNetwork
from nextoken.model._proof import Proof, Remembering
from nextoken.model.base import ABSENT, Memory, State
from nextoken.model.next import Next
from nextoken.model.soft import SoftModel
from nextoken.model.tokenizer import TokenizerVocab

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MASKED_ATTENTION = {"eager", "sdpa"}
_LENGTH_NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx")


class HFModel(SoftModel):
    """softmax(W h_t + b) of a transformers model, h_t its final hidden state after token t.

    On construction the model is tried on a dozen tokens, and of everything below the first that reproduces its own
    logits is used: the fused head or the logits themselves (`has_fused_head`); a memory of keys and values that takes
    trees and rows of different lengths in one pass, or one that only goes on from where it is (`remembering`).

    A live model stays yours: it is run in evaluation mode and left in the mode it was in, its weights may be trained or
    moved in between, and states made before such a change are worth nothing after it.

    Args:
        model: a causal LM with eager or SDPA attention.
        tokenizer: its tokenizer.
        name: for display and records; by default where the model was loaded from.

    Raises:
        ModelError: the model is not causal, or its attention implementation takes no masks.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        if getattr(model.config, "is_encoder_decoder", False):
            raise ModelError(f"{self.name} is an encoder-decoder model; nextoken reads models that only decode")
        attention = getattr(model.config, "_attn_implementation", None)
        if attention is not None and attention not in _MASKED_ATTENTION:
            raise ModelError(
                f"{self.name} uses {attention}, which takes no masks for trees and rows of different lengths; load it "
                'with attn_implementation="sdpa" or call model.set_attn_implementation("sdpa")'
            )
        self._network = Network(model)
        self.vocab = TokenizerVocab(tokenizer, size=self._network.vocab_size, eos_ids=_end_tokens(model))
        self.context_length = _context_length(self._network.config)
        self._fingerprint: tuple[object, str] | None = None
        with torch.no_grad():
            proof = Proof(self._network)
            proof.settle_head()
            self._visibility: Visibility | None = proof.visibility()
            self._manner: Manner | None = proof.manner() if self._visibility is None else None
        self.supports_trees = self._visibility is not None

    @classmethod
    def from_pretrained(
        cls,
        spec: str | Path,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        device_map: str | dict[str, Any] | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        local_files_only: bool = False,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        packed: bool = False,
    ) -> HFModel:
        """Load a folder or a model of the Hugging Face hub; weights from safetensors files only.

        Args:
            spec: a folder, or an id such as "Qwen/Qwen3-0.6B".
            dtype: "float32", "bfloat16", "float16", or "auto" for that of the checkpoint; by default float32 on a CPU
                and "auto" elsewhere.
            device: by default the first GPU, else the CPU.
            device_map: spread the model over devices instead ("auto" or a mapping, see accelerate).
            revision: branch, tag or commit on the hub.
            trust_remote_code: run Python code that comes with the checkpoint.
            local_files_only: do not use the network.
            tokenizer: another tokenizer than the checkpoint's own: a folder, an id, or a live object.
            packed: see `packed`.

        Raises:
            ModelError: unknown id or folder, no network, no access, no safetensors, not a causal language model, code
                that is not trusted, weights missing from the checkpoint.
        """
        model, vocabulary = _checkpoint.load(
            str(spec),
            dtype=dtype,
            device=device,
            device_map=device_map,
            revision=revision,
            trust_remote_code=trust_remote_code,
            local_files_only=local_files_only,
            tokenizer=tokenizer,
        )
        loaded = cls(model, vocabulary, name=str(spec))
        return loaded.packed() if packed else loaded

    def save(self, folder: str | Path) -> None:
        """Write weights (safetensors), configuration and tokenizer to a folder in Hugging Face layout.

        Raises:
            OutputError: the folder cannot be written.
        """
        try:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        except (OSError, SafetensorError, AssertionError) as error:
            raise OutputError(f"{self.name} cannot be written to {folder}: {error}") from error

    @property
    def has_fused_head(self) -> bool:
        """Whether statistics come from hidden states and the output weights, without logits."""
        return self._network.is_fused

    @property
    def remembering(self) -> Remembering:
        """How states remember: "slots" (keys and values; trees), or for chains "chunks", "steps" or "rereads".

        "steps" goes on token by token, "rereads" reads every text from its start at each call: correct, but slow.
        """
        return self._manner or "slots"

    @property
    def dtype(self) -> str:
        return str(self._network.dtype).removeprefix("torch.")

    @property
    def digest(self) -> str:
        """Fingerprint of weights and configuration (see `_digest.fingerprint`); empty for offloaded weights.

        Kept until a weight is changed in place, as optimisers do.
        """
        version = tuple((id(p), p._version) for p in self.model.parameters())
        if self._fingerprint is None or self._fingerprint[0] != version:
            self._fingerprint = (version, fingerprint(self.model))
        return self._fingerprint[1]

    @property
    def network(self) -> Network:
        """The forward passes, for what reads or edits activations on their way."""
        return self._network

    @property
    def embedding_width(self) -> int:
        return self._network.embedding_width

    def embeddings(self, ids: Tensor) -> Tensor:
        return self._network.embeddings(ids)

    def check_soft(self) -> None:
        if self._visibility is None:
            raise ModelError(
                f"{self.name} may read a text again from its tokens, which do not tell what a mixture was: mixtures "
                "need a model that remembers keys and values (remembering == 'slots')"
            )
        if not self._network.takes_embeddings:
            raise ModelError(
                f"{type(self.model).__name__} gives other results for the embeddings of tokens than for the tokens: it "
                "cannot be fed mixtures"
            )

    def packed(self) -> HFModel:
        """The same model, quicker on a CPU: its larger linear layers have their weights in blocks as well.

        Passes of 2 to 64 tokens, as in verifying a draft or decoding a batch, gain most, passes of one token nothing.
        The blocks need as much memory again as those weights. Results differ by rounding. Weights changed afterwards
        are seen, at their old speed.

        Raises:
            ModelError: the weights are few or not in float32 on a CPU, or PyTorch was built without oneDNN.
        """
        return self.over(PackedNetwork(self._network))

    def over(self, network: Network) -> HFModel:
        """This model with its passes run by another network over the same weights; all else is shared."""
        other = copy.copy(self)
        other._network = network
        return other

    def _remember(self, batch: int) -> Memory:
        if self._visibility is not None:
            return KVMemory([0] * batch, self._visibility)
        assert self._manner is not None
        return ChainMemory.empty(self._network, self._manner, batch)

    def _feed(self, state: State, tokens: Tensor, parents: Tensor | None) -> Next:
        if isinstance(state.memory, ChainMemory):
            return self._network.next(state.memory.feed(tokens))
        return self._pass(state, tokens.clamp(min=0), tokens, parents)

    def _feed_embedded(self, state: State, embedded: Tensor, tokens: Tensor, parents: Tensor | None) -> Next:
        return self._pass(state, embedded, tokens, parents)

    def _pass(self, state: State, inputs: Tensor, tokens: Tensor, parents: Tensor | None) -> Next:
        """Feed inputs, ids [B, n] or embeddings [B, n, d], where `tokens` says that a row has any."""
        network, memory = self._network, state.memory
        if not isinstance(memory, KVMemory):
            raise ValueError(f"this state was started by another model than {self.name}; call start() of this one")
        batch, n = tokens.shape
        counts = (tokens != ABSENT).sum(1).tolist()
        # Columns of a chain in which no row has a token could lie beyond the positions that the model knows.
        width = max(counts) if parents is None else n
        if width == 0:
            return network.next(network.blank(batch, n))
        if width < n:
            inputs, tokens = inputs[:, :width], tokens[:, :width]
        raw = network.run(inputs, **memory.arguments(tokens, parents, network))
        if parents is None:
            memory.advance(counts)
        return network.next(raw if width == n else torch.nn.functional.pad(raw, (0, 0, 0, n - width)))

    def _predict(self, tokens: Tensor) -> Next:
        # Absent tokens stand to the right of all others, where a causal model does not look: no mask is needed.
        return self._network.next(self._network.run(tokens.clamp(min=0), use_cache=False))


def _end_tokens(model: Any) -> set[int]:
    ends: set[int] = set()
    for config in (model.config, model.config.get_text_config(decoder=True), getattr(model, "generation_config", None)):
        given = getattr(config, "eos_token_id", None)
        ends.update([given] if isinstance(given, int) else given or [])
    return ends


def _context_length(config: Any) -> int | None:
    lengths = [getattr(config, name, None) for name in _LENGTH_NAMES]
    return next((length for length in lengths if isinstance(length, int) and length > 0), None)
