"""Clusters of output embeddings, and whether tokens owe their rank to the company they keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextoken.decode.navigation import Answer, Listing, ban_only
from nextoken.errors import ModelError
from nextoken.methods import method
from nextoken.model.base import LanguageModel
from nextoken.model.next import HeadNext

_BLOCK = 1 << 24  # distances computed at a time


def output_keys(model: LanguageModel) -> Tensor:
    """The rows k_v of the output layer [V, H], in which p(v | x) = softmax_v(q(x) . k_v).

    Raises:
        ModelError: the model's distributions do not come from a linear output layer in memory.
    """
    first = 0 if model.vocab.bos_id is None else model.vocab.bos_id
    following = model.predict([[first]])
    if not isinstance(following, HeadNext):
        raise ModelError(f"{model.name} does not compute its logits from hidden states by a linear layer in memory")
    return following.head.weight


def key_clusters(keys: Tensor, *, clusters: int = 1024, seed: int = 0, most: int = 50) -> Tensor:
    """The cluster of each key [V]: a local minimum of sum_v |k_v - c_cluster(v)|^2.

    Lloyd's iterations from k-means++ seeds, Euclidean, on the rows as they are, as in the paper: their norms count, and
    rare tokens tend to make one large cluster. A cluster that runs empty starts anew at the key farthest from its own
    centre.

    Args:
        keys: [V, H].
        clusters: fewer come out where there are fewer different keys.
        seed: of the k-means++ draws.
        most: iterations.
    """
    if not 1 <= clusters <= len(keys):
        raise ValueError(f"clusters must be from 1 to the number of keys, {len(keys)}; got {clusters}")
    points = keys.detach().to(torch.promote_types(keys.dtype, torch.float32))
    centres = _seeds(points, clusters, torch.Generator().manual_seed(seed))
    nearest, squares = _assigned(points, centres)
    for _ in range(most):
        counts = torch.bincount(nearest, minlength=len(centres))
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        empty = counts == 0
        centres = sums / counts.clamp(min=1)[:, None].to(sums.dtype)
        centres[empty] = points[squares.topk(int(empty.sum())).indices]
        before = nearest
        nearest, squares = _assigned(points, centres)
        if torch.equal(nearest, before):
            break
    return nearest.cpu()


def _seeds(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    squares = (points - points[chosen[0]]).square().sum(-1)
    while len(chosen) < clusters and float(squares.max()) > 0:
        chosen.append(int(torch.multinomial(squares.cpu().double(), 1, generator=generator)))
        squares = torch.minimum(squares, (points - points[chosen[-1]]).square().sum(-1))
    return points[chosen]


def _assigned(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre of each point, and the squared distance to it, [V] each."""
    norms = centres.square().sum(-1)
    blocks = torch.split(points, max(1, _BLOCK // len(centres)))
    found = [(norms - 2 * (block @ centres.T)).min(-1) for block in blocks]
    squares = torch.cat([best.values for best in found]) + points.square().sum(-1)
    return torch.cat([best.indices for best in found]), squares.clamp(min=0.0)


@dataclass(frozen=True)
class Group:
    """Some of the candidates: how many, their share of all below the top, how often right, mean rank (nan of none)."""

    count: int
    share: float
    accuracy: float
    mean_rank: float


@dataclass(frozen=True)
class Diagnosis:
    """Answers by rank of their first tokens, which are right, the first tokens' clusters, and the two groups.

    `inside` are the candidates below the `top` first whose cluster occurs among those, `outside` the others. Where the
    first tokens drag their look-alikes up, the inside ones are ranked higher and right less often.
    """

    answers: tuple[Answer, ...]
    right: tuple[bool, ...]
    clusters: tuple[int, ...]
    top: int
    inside: Group
    outside: Group

    def mean_precision(self, k: int) -> float:
        """MAP@k of the ranking."""
        return mean_precision(self.right, k)


@method(
    name="Key-space diagnosis",
    arxiv="2410.02284",
    access="white",
    summary="are first tokens whose output embeddings resemble the top ones ranked too high?",
)
def diagnose(
    model: LanguageModel,
    instruction: str,
    *,
    judge: Callable[[str], bool],
    clusters: Tensor,
    candidates: int = 100,
    top: int = 10,
    listing: Listing | None = None,
    max_tokens: int = 64,
) -> Diagnosis:
    """accuracy, mean rank and share of candidates inside and outside the clusters of the `top` best first tokens.

    Each of the `candidates` best first tokens is forced and decoded greedily to an answer, and judged.

    Args:
        model: any.
        instruction: that has many right answers.
        judge: whether an answer is right.
        clusters: of each token [V]: `key_clusters(output_keys(model))`.
        candidates, top: as above.
        listing, max_tokens: as of `navigate`.

    Source: Peng et al., arXiv:2410.02284, section 3.
    """
    if len(clusters) != model.vocab.size or not 1 <= top < candidates:
        raise ValueError(
            f"clusters must be [V] = [{model.vocab.size}] and 1 <= top < candidates, got {len(clusters)}, {top} and "
            f"{candidates}"
        )
    answers = ban_only(model, instruction, runs=1, k=candidates, listing=listing, max_tokens=max_tokens).answers
    right = tuple(judge(answer.text) for answer in answers)
    placed = tuple(int(clusters[answer.tokens[0]]) for answer in answers)
    leading = set(placed[:top])
    groups = [
        _group([i for i in range(top, len(answers)) if (placed[i] in leading) == inside], answers, right, top)
        for inside in (True, False)
    ]
    return Diagnosis(answers, right, placed, top, *groups)


def _group(members: Sequence[int], answers: Sequence[Answer], right: Sequence[bool], top: int) -> Group:
    nan, count = float("nan"), len(members)
    below = len(answers) - top
    return Group(
        count=count,
        share=count / below if below > 0 else nan,
        accuracy=sum(right[i] for i in members) / count if count else nan,
        mean_rank=sum(answers[i].rank for i in members) / count if count else nan,
    )


def mean_precision(right: Sequence[bool], k: int | None = None) -> float:
    """MAP@k = (1 / k) sum_{i <= k} (number of right ones among the first i) / i, over answers in the order found."""
    k = len(right) if k is None else k
    if not 1 <= k <= len(right):
        raise ValueError(f"k must be from 1 to the number of answers, {len(right)}; got {k}")
    return sum(sum(right[:i]) / i for i in range(1, k + 1)) / k
