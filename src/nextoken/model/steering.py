"""Finding what to steer: which activations, or which direction, part right answers from wrong ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from nextoken.errors import ModelError
from nextoken.methods import method
from nextoken.model._derived import Derived, transformers_model
from nextoken.model._network import Network
from nextoken.model._sites import Act, Site, Sites, Spot, watching
from nextoken.model.hf import HFModel
from nextoken.model.steered import Edit, Mode, read_table, write_table

Triple: TypeAlias = tuple[str, str, str]
"""A prompt, an answer wanted after it, and one not wanted."""

Ties = Literal["order", "effect"]
_PAIRS_AT_ONCE = 8


@dataclass(frozen=True, eq=False)
class Units:
    """What N pairs of answers say of every activation at one site; all tables are [L, D].

    Args:
        site: where.
        beta: +max(P, Q) / N if P >= Q, else -max(P, Q) / N, where P and Q count the pairs whose wanted answer has the
            larger and the smaller activation. From -1 to 1: how consistent the sign is, not how large the difference.
        mean, std: of the difference wanted - unwanted over the pairs (divided by N).
        pairs: N.
    """

    site: Site
    beta: Tensor
    mean: Tensor
    std: Tensor
    pairs: int

    @property
    def effect(self) -> Tensor:
        """|mean| / std [L, D]; 0 where the difference is always 0, inf where it is always the same."""
        return torch.where(self.mean == 0, 0.0, self.mean.abs() / self.std)

    def top(self, k: int, *, mode: Mode = "scale", ties: Ties = "order") -> Edit:
        """An edit with amounts beta at the k units of largest |beta|, of all layers together, and 0 elsewhere.

        Args:
            k: how many.
            mode: of the edit; "scale" is the paper's.
            ties: which of equal |beta| come first: "order", those of earlier layers and then of lower index, as in the
                released code, or "effect", those of larger `effect`.

        Raises:
            ValueError: fewer than k units have differed in any pair.
        """
        live = int((self.beta != 0).sum())
        if not 0 <= k <= live:
            raise ValueError(f"k must be from 0 to {live}, the number of units that differ in some pair; got {k}")
        amounts = torch.zeros_like(self.beta).flatten()
        kept = self.ranking(ties=ties)[:k]
        amounts[kept] = self.beta.flatten()[kept]
        return Edit(self.site, amounts.view_as(self.beta), mode)

    def tied(self, k: int) -> tuple[int, int]:
        """Of the units with the |beta| of the k-th: how many are among the first k, and how many there are.

        Where these differ, which ones are kept is for the tie-break to say. With few pairs that is the rule.
        """
        size = self.beta.abs().flatten()
        if not 0 < k <= size.numel():
            raise ValueError(f"k must be from 1 to {size.numel()}, the number of units; got {k}")
        at = size[self.ranking()[k - 1]]
        return k - int((size > at).sum()), int((size == at).sum())

    def ranking(self, *, ties: Ties = "order") -> Tensor:
        """Indices l D + i of all units [L D], largest |beta| first; ties as in `top`."""
        if ties not in get_args(Ties):
            raise ValueError(f"ties must be 'order' or 'effect', got {ties!r}")
        first = torch.arange(self.beta.numel())
        if ties == "effect":
            first = self.effect.flatten().argsort(descending=True, stable=True)
        return first[self.beta.abs().flatten()[first].argsort(descending=True, stable=True)]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that `load` reads."""
        tensors = {"beta": self.beta, "mean": self.mean, "std": self.std}
        write_table(path, "units", tensors, {"site": self.site, "pairs": str(self.pairs)})

    @classmethod
    def load(cls, path: str | Path) -> Units:
        """Those that `save` wrote.

        Raises:
            InputError: there is no such file, or it holds something else.
        """
        tensors, settings = read_table(path, "units", ("beta", "mean", "std"))
        return cls(settings["site"], **tensors, pairs=int(settings["pairs"]))


@method(
    name="AUSteer",
    arxiv="2602.04428",
    access="white",
    summary="steer by rescaling the few activations that most consistently part right answers from wrong ones",
)
def momentum(
    model: HFModel | Derived, triples: Sequence[Triple], *, site: Site = "ffn", max_tokens: int = 512
) -> Units:
    """beta [L, D] of every activation at `site`: over N pairs, how consistently its sign parts the answers.

        delta[n, l, i] = a(x_n y_n+)[l, i] - a(x_n y_n-)[l, i], activations at the last token of each text
        P = #{n: delta > 0}, Q = #{n: delta < 0}; beta = max(P, Q) / N, negative if P < Q

    `units.top(k).scaled(alpha)` is then an edit for `Steered`. The released settings go from k = 2 to 100 and from
    alpha = 8 to 100, chosen for each model and task: choose them on pairs kept apart from those of the test. Where the
    answers are always the same two texts, each must be the right one equally often, or else the units found tell the
    texts apart and not right from wrong.

    Texts of more than max_tokens tokens lose their beginning here. The released code cuts off their end, which is the
    answer, so that both texts of a long pair are one and the pair says nothing.

    Args:
        model: a transformers model.
        triples: (prompt, wanted answer, unwanted answer); a text is prompt and answer joined, spaces included.
        site: "attention", "ffn" or "layer", see `Edit`.
        max_tokens: most tokens of a text, begin token included.

    Raises:
        ValueError: there are no triples, or no such site.
        ModelError: the site is not found in a model of this family, or activations are not finite.

    Source: AUSteer, arXiv:2602.04428, and its released code.
    """
    network = transformers_model(model).network
    found = Sites.find(network, site)
    above, below, total, squares = (torch.zeros(found.depth, found.width, dtype=torch.float64) for _ in range(4))
    for delta in _differences(model, found.spots, triples, max_tokens):
        above += (delta > 0).sum(0)
        below += (delta < 0).sum(0)
        total += delta.sum(0)
        squares += delta.square().sum(0)
    n = len(triples)
    votes = torch.where(above >= below, above, -below) / n
    mean = total / n
    std = (squares / n - mean.square()).clamp(min=0).sqrt()
    # What is left of a variance after rounding would make a constant difference look like a varying one.
    std = std.masked_fill(std <= 1e-7 * mean.abs(), 0.0)
    return Units(site, votes.float(), mean.float(), std.float(), n)


@method(
    name="Contrastive activation addition",
    arxiv="2312.06681",
    access="white",
    summary="steer by adding the mean difference between right and wrong answers to the residual stream",
)
def difference_of_means(
    model: HFModel | Derived, triples: Sequence[Triple], *, layer: int, max_tokens: int = 512
) -> Edit:
    """v [D] = mean over pairs of h(x y+) - h(x y-), to be added to the residual stream h after one layer.

    h is read at the last token of each text. The edit is a "shift" of all D activations of that layer; scale it to the
    strength wanted. Rimsky et al. add v after the prompt only, `Steered` at every position.

    Args:
        model, triples, max_tokens: as for `momentum`.
        layer: from 0.

    Raises:
        ValueError: there are no triples, or no such layer.
        ModelError: the layers are not found in a model of this family, or activations are not finite.

    Source: Rimsky et al., arXiv:2312.06681, section 3.
    """
    found = Sites.find(transformers_model(model).network, "layer")
    if not 0 <= layer < found.depth:
        raise ValueError(f"layer must be from 0 to {found.depth - 1}, got {layer}")
    amounts = torch.zeros(found.depth, found.width, dtype=torch.float64)
    for delta in _differences(model, found.spots[layer : layer + 1], triples, max_tokens):
        amounts[layer] += delta.sum((0, 1))
    return Edit("layer", amounts / len(triples), "shift")


def _differences(
    model: HFModel | Derived, spots: Sequence[Spot], triples: Sequence[Triple], max_tokens: int
) -> Iterator[Tensor]:
    """Activations at the last token, wanted less unwanted, [pairs, spots, D] in float64, some pairs at a time."""
    if not triples:
        raise ValueError("there must be at least one triple of a prompt, a wanted and an unwanted answer")
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    limit = max_tokens if model.context_length is None else min(max_tokens, model.context_length)
    pairs = [[_tokens(model, prompt + answer, limit) for answer in answers] for prompt, *answers in triples]
    pairs.sort(key=lambda pair: max(map(len, pair)))
    for begin in range(0, len(pairs), _PAIRS_AT_ONCE):
        some = pairs[begin : begin + _PAIRS_AT_ONCE]
        rows = [row for pair in some for row in pair]
        seen = _last_activations(transformers_model(model).network, spots, rows).view(len(some), 2, len(spots), -1)
        if not bool(seen.isfinite().all()):
            raise ModelError(
                f"activations of {model.name} are not finite in {model.dtype}; load it with dtype='float32'"
            )
        yield seen[:, 0] - seen[:, 1]


def _tokens(model: HFModel | Derived, text: str, limit: int) -> list[int]:
    begin = [] if model.vocab.bos_id is None else [model.vocab.bos_id]
    ids = list(model.vocab.encode(text).ids)
    row = [*begin, *ids[max(0, len(ids) - limit + len(begin)) :]]
    if not row:
        raise ValueError(f"a prompt and its answer must have at least one token together; got {text!r}")
    return row


@torch.no_grad()
def _last_activations(network: Network, spots: Sequence[Spot], rows: Sequence[Sequence[int]]) -> Tensor:
    """Activations [rows, spots, D] at the last token of each row, in float64."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    # Padded to the right, where a causal model does not look.
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    seen: list[Tensor] = []

    def note(activations: Tensor) -> None:
        # Some families work on all tokens of a batch in one long row.
        table = activations.reshape(len(rows), width, -1)
        seen.append(table[torch.arange(len(rows)), lengths - 1].double().cpu())

    acts: list[tuple[Spot, Act]] = [(spot, note) for spot in spots]
    with watching(acts):
        network.run(ids, use_cache=False)
    return torch.stack(seen, 1)
