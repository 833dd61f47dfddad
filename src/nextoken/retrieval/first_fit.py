"""Training for FIRST: a pairwise loss on the logits of the first identifier, beside that of the whole ranking."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nextoken.methods import method
from nextoken.model.hf import HFModel
from nextoken.retrieval.first import identifiers, letter_scores, ranking_prompt


@dataclass(frozen=True)
class RankedList:
    """One list with a teacher's verdict.

    Args:
        query: what was asked.
        passages: as they are shown.
        ranks: of each passage, 1 for the best: a permutation of 1 ... m.
    """

    query: str
    passages: tuple[str, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if sorted(self.ranks) != list(range(1, len(self.passages) + 1)):
            raise ValueError(f"ranks must be a permutation of 1 to {len(self.passages)}, got {list(self.ranks)}")

    def shuffled(self, seed: int) -> RankedList:
        """The same list in another order, so that places tell nothing."""
        order = list(range(len(self.passages)))
        random.Random(seed).shuffle(order)
        return RankedList(self.query, tuple(self.passages[i] for i in order), tuple(self.ranks[i] for i in order))

    @property
    def order(self) -> tuple[int, ...]:
        """Places of the passages, best first."""
        return tuple(sorted(range(len(self.ranks)), key=lambda place: self.ranks[place]))


def rank_loss(scores: Tensor, ranks: Sequence[int], *, weighted: bool = True) -> Tensor:
    """(1 / |P|) sum over pairs r_i < r_j of w_ij log(1 + exp(s_j - s_i)), w_ij = 1 / (r_i + r_j), or 1 unweighted.

    |P| = m (m - 1) / 2 counts pairs, not weights. A list of one has no pairs, and loss 0. It is invariant to a constant
    added to all scores.

    Args:
        scores: s [m].
        ranks: r, integers, 1 for the best; equal scores are pairs like any other, which the released code drops.

    Source: arXiv:2406.15657, section 3.2.
    """
    r = torch.as_tensor(list(ranks), device=scores.device)
    if scores.shape != r.shape:
        raise ValueError(f"scores {tuple(scores.shape)} for {len(r)} ranks")
    better, worse = (r[:, None] < r[None]).nonzero(as_tuple=True)
    if not len(better):
        return scores.sum() * 0
    terms = F.softplus(scores[worse] - scores[better])
    return (terms / (r[better] + r[worse]) if weighted else terms).mean()


@method(
    name="FIRST training",
    arxiv="2411.05508",
    access="white",
    trained=True,
    summary="weighted RankNet on first-identifier logits, jointly with the loss of writing the ranking",
)
def fit_first(
    model: HFModel,
    lists: Sequence[RankedList],
    *,
    weight: float = 10.0,
    steps: int = 200,
    batch: int = 8,
    rate: float = 5e-4,
    seed: int = 0,
    max_tokens: int = 100,
    on_step: Callable[[int, float, float], object] | None = None,
) -> HFModel:
    """Minimise L_LM + weight * L_rank on a copy of the model, which is returned; the model itself stays as it is.

    L_LM is the token-mean cross-entropy of the teacher's ranking written out, L_rank is `rank_loss` of the identifiers'
    logits where the first of them is due. Lists are shown in a new order each time they come up, or the model learns
    places. weight = 0 is plain training to write rankings.

    Args:
        lists: of at most 26 passages each.
        steps, batch, rate: of AdamW, the rate falling linearly to 0.
        seed: of the order of lists and passages.
        on_step: called with step, L_LM and L_rank after each step.

    Raises:
        ValueError: no lists, or one that does not fit the context.

    Source: arXiv:2406.15657, section 3.2, with the settings of arXiv:2411.05508 (lambda = 10, weighted RankNet).
    """
    if not lists:
        raise ValueError("there is no list to learn from")
    if weight < 0 or steps < 1 or batch < 1 or rate <= 0:
        raise ValueError("weight must be at least 0, steps and batch at least 1, and rate above 0")
    learner = HFModel(copy.deepcopy(model.model), model.tokenizer, name=f"{model.name}+first")
    network = learner.model
    letters = identifiers(learner, max(len(one.passages) for one in lists))
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.0)
    draw = random.Random(seed)
    was_training = network.training
    network.train()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for step in range(steps):
                for group in optimizer.param_groups:
                    group["lr"] = rate * (1 - step / steps)
                shown = [draw.choice(lists).shuffled(draw.getrandbits(32)) for _ in range(batch)]
                written, ranked = _losses(learner, shown, letters, max_tokens)
                loss = written + weight * ranked if weight else written
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                if on_step is not None:
                    on_step(step, written.item(), ranked.item())
    finally:
        network.train(was_training)
    return learner


def _losses(
    model: HFModel, lists: Sequence[RankedList], letters: Sequence[Tensor], max_tokens: int
) -> tuple[Tensor, Tensor]:
    """L_LM and L_rank of a batch, the first over all its answer tokens, the second the mean over lists."""
    prompts = [ranking_prompt(model, one.query, one.passages, max_tokens=max_tokens) for one in lists]
    answers = [_answer(model, one) for one in lists]
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(map(len, rows))
    if model.context_length is not None and width > model.context_length:
        raise ValueError(f"a list with its ranking takes {width} tokens, and {model.name} holds {model.context_length}")
    device = model.model.device
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    # Rows are filled on the right: positions, and so what is learnt, are those of use.
    logits = model.model(input_ids=ids, attention_mask=mask).logits.float()
    targets = torch.full_like(ids, -100)
    for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        targets[number, len(prompt) - 1 : len(row) - 1] = ids[number, len(prompt) : len(row)]
    written = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    ranked = [
        rank_loss(letter_scores(logits[number, len(prompt) - 1], letters[: len(one.ranks)]), one.ranks)
        for number, (prompt, one) in enumerate(zip(prompts, lists, strict=True))
    ]
    return written, torch.stack(ranked).mean()


def _answer(model: HFModel, one: RankedList) -> list[int]:
    """The ranking's tokens, each letter one of its own and each joint encoded alone, as it is generated."""
    joint, letters = model.vocab.encode("] > [").ids, identifiers(model, len(one.passages))
    answer = [token for place in one.order for token in (int(letters[place][0]), *joint)]
    return [*answer[: -len(joint)], *model.vocab.encode("]").ids]
