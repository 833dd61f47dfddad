"""Learning restart prediction: pairs of the model's own responses, and one token to be answered behind each."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from nextoken.decode.generate import Prompt
from nextoken.decode.generation import Generation
from nextoken.decode.transform import Transform
from nextoken.methods import method
from nextoken.model._network import Network
from nextoken.model.base import LanguageModel
from nextoken.model.hf import HFModel
from nextoken.model.sarsa import FitStep
from nextoken.values._descent import Schedule, descend
from nextoken.values.responses import responses
from nextoken.values.restart import Question, RestartPredictor

Score = Callable[[Sequence[Generation]], Sequence[float]]
"""How good each of these responses is, by whatever is to be had at training time; larger is better."""


@dataclass(frozen=True)
class RestartExample:
    """A response, whole or cut off midway, and whether the whole one was at least as good as a fresh one.

    Args:
        prompt: token ids.
        response: the drawn ids, as many as were kept.
        stays: True for a win or a tie.
    """

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    stays: bool


def restart_examples(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    score: Score,
    *,
    pairs: int = 1,
    cuts: int = 1,
    margin: float = 0.01,
    transform: Transform | str | None = None,
    max_tokens: int = 256,
    seed: int = 0,
    max_rows: int = 64,
) -> list[RestartExample]:
    """Pairs of the model's own responses: of each pair, stays_a = score_a > score_b - margin, and the same for b.

    With a fair coin for the partner, the label is a Bernoulli draw of P(at least as good as a fresh response). Ties
    stay on both sides: without them r would be a mere preference, and know nothing of what the model is able to.

    Args:
        model: the one whose restarts are to be predicted.
        prompts: each answered 2 * pairs times.
        score: called once, with all responses; it is not needed later.
        pairs: per prompt.
        cuts: of each response also so many beginnings, cut at a random token, with its label.
        margin: scores that differ by less tie; equal ones always do.
        transform, max_tokens, max_rows: as of `nextoken.generate`; r holds for this transform.
        seed: of the responses and of the cuts; see `responses`.

    Raises:
        ValueError: a number is out of range, or score gives not one finite number for each response.

    Source: Manvi et al., arXiv:2410.02725, section 3.
    """
    if not prompts or pairs < 1 or cuts < 0 or margin < 0:
        raise ValueError(
            f"give a prompt, pairs of at least 1, cuts and margin of at least 0; got {pairs}, {cuts} and {margin}"
        )
    drawn = responses(
        model, prompts, n=2 * pairs, transform=transform, max_tokens=max_tokens, seed=seed, max_rows=max_rows
    )
    made = [one for group in drawn for one in group]
    scores = torch.tensor([float(x) for x in score(made)], dtype=torch.float64)
    if len(scores) != len(made) or not bool(torch.isfinite(scores).all()):
        raise ValueError(f"score must give a finite number for each of {len(made)} responses, got {len(scores)}")
    gap = scores[0::2] - scores[1::2]
    tied = (gap.abs() < margin) | (gap == 0)
    stays = torch.stack([(gap > 0) | tied, (gap < 0) | tied], 1).flatten().tolist()
    rng = random.Random(seed)
    examples = []
    for one, label in zip(made, stays, strict=True):
        size = len(one.tokens)
        sizes = [size, *(rng.randrange(1, size) for _ in range(cuts if size > 1 else 0))]
        examples += [RestartExample(one.request.prompt, one.tokens[:kept], label) for kept in sizes]
    return examples


@method(
    name="Restart prediction",
    arxiv="2410.02725",
    access="white",
    trained=True,
    summary="the model says by one token, even midway, whether starting over would give a better response",
)
def fit_restart(
    model: HFModel,
    examples: Sequence[RestartExample],
    question: Question,
    *,
    schedule: Schedule | None = None,
    seed: int = 0,
    on_step: Callable[[FitStep], object] | None = None,
) -> RestartPredictor:
    """Minimise the mean of -log p(answer | prompt, response, question), nats, on a copy of the model.

    The answer is the first token of `question.stay` where the example stays, else that of `question.restart`; nothing
    else is learnt, prompt and response least of all. Weights that require no gradient stay as they are: freeze what is
    not to be trained.

    Args:
        model: it stays as it is. Where the trained copy also generates, evaluations go on from its own memory; then
            its samples are no longer quite those it was trained on.
        examples: some that stay and some that do not; see `restart_examples`.
        question: its answers must be single tokens.
        schedule, seed, on_step: how to train, the order of the examples, and what is called after each step.

    Raises:
        ValueError: there are no examples, all have one label, or one does not fit vocabulary or context.

    Source: Manvi et al., arXiv:2410.02725, section 3.
    """
    _check(model, examples, question)
    body = HFModel(copy.deepcopy(model.model).to(torch.float32), model.tokenizer, name=f"restart({model.name})")
    predictor = RestartPredictor(body, question)
    weights = [weight for weight in body.model.parameters() if weight.requires_grad]
    answer = {True: question.stay[0], False: question.restart[0]}

    def loss_of(chosen: list[int]) -> Tensor:
        rows = [[*examples[i].prompt, *examples[i].response, *question.tokens] for i in chosen]
        width = max(map(len, rows))
        # Padded to the right, where a causal model does not look.
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        last = torch.tensor([len(row) - 1 for row in rows])
        logits = _last_logits(body, ids, last)
        targets = torch.tensor([answer[examples[i].stays] for i in chosen], device=logits.device)
        return F.cross_entropy(logits.float(), targets)

    descend(weights, loss_of, len(examples), schedule=schedule or Schedule(), seed=seed, on_step=on_step)
    return predictor


def _last_logits(body: HFModel, ids: Tensor, last: Tensor) -> Tensor:
    """Logits [B, V] after position last[b] of each row, with gradients."""
    network = Network(body.model)
    rows = torch.arange(len(ids))
    head, layer = network.head(), body.model.get_output_embeddings()
    if not network.is_fused or head is None:
        return network.logits(ids, use_cache=False)[rows, last]
    hidden = network.run(ids, use_cache=False)
    # The network's own head is cut off from the graph.
    return replace(head, weight=layer.weight, bias=layer.bias).logits(hidden[rows, last])


def _check(model: HFModel, examples: Sequence[RestartExample], question: Question) -> None:
    if len({example.stays for example in examples}) < 2:
        raise ValueError("there must be examples that stay and examples that do not, to tell them apart")
    for number, example in enumerate(examples):
        row = (*example.prompt, *example.response, *question.tokens, *question.restart, *question.stay)
        if not 0 <= min(row) <= max(row) < model.vocab.size:
            raise ValueError(f"example {number} has token ids outside the vocabulary of {model.vocab.size}")
        size = len(example.prompt) + len(example.response) + len(question.tokens)
        if model.context_length is not None and size > model.context_length:
            raise ValueError(
                f"example {number} has {size} tokens with the question, and the context of {model.name} holds "
                f"{model.context_length}: shorten it"
            )
