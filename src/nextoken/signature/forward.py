"""Forward: windows of texts in, the numbers of every scored token out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from nextoken.errors import ModelError
from nextoken.head import Statistics, compare, compare_logits
from nextoken.model.base import ABSENT, LanguageModel
from nextoken.model.next import HeadNext, Next
from nextoken.signature import columns
from nextoken.signature.passage import Job

Numbers = dict[str, np.ndarray]
_CPU_TOKENS = 1024
"""Most tokens fed at once to a CPU, whose cores are busy with that many, and whose caches do not hold more."""
_ENTRIES = 1 << 24
"""Log-probabilities held at once where two models are compared without their heads."""


class Forward:
    """One model, or two over one vocabulary, and what is wanted of them.

    Args:
        model: p.
        against: q, or None.
        top: k of the top-k.
        hidden: whether p's hidden states are wanted.
        batch_tokens: most tokens, padding included, that are fed at once.
    """

    def __init__(
        self, model: LanguageModel, against: LanguageModel | None, *, top: int, hidden: bool, batch_tokens: int
    ) -> None:
        self.models = (model,) if against is None else (model, against)
        self.top = top
        self.hidden = hidden
        self.batch_tokens = batch_tokens
        # Known from the first result, for a model does not say where it computes.
        self._accelerated = False

    def run(self, jobs: Sequence[Job]) -> Numbers:
        """The numbers of all tokens that these jobs score, in the order of the jobs."""
        order, pieces = [], []
        for batch in batches([job.fed for job in jobs], self._most):
            pieces.append(self._batch([jobs[number] for number in batch]))
            order += batch
        numbers = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        # Pieces follow each other in the order of the batches; each job's goes back to where its job stands.
        counts = np.array([job.window.scored for job in jobs])
        begins = counts.cumsum() - counts
        source = np.concatenate([np.arange(begins[number], begins[number] + counts[number]) for number in order])
        target = np.empty_like(source)
        target[source] = np.arange(len(source))
        return {name: values[target] for name, values in numbers.items()}

    def _most(self) -> int:
        return self.batch_tokens if self._accelerated else min(self.batch_tokens, _CPU_TOKENS)

    def stream(self, job: Job) -> Iterator[tuple[int, int, Numbers]]:
        """The numbers of one long job, fed in pieces of `batch_tokens` by models that remember the pieces before.

        Yields (begin, end, numbers) for the tokens [begin, end) of the passage.
        """
        window, tokens = job.window, torch.from_numpy(job.passage.tokens)
        states = [model.start() for model in self.models]
        for begin in range(window.begin, window.end - 1, self.batch_tokens):
            end = min(begin + self.batch_tokens, window.end - 1)
            nexts = [
                model.extend(state, tokens[None, begin:end]) for model, state in zip(self.models, states, strict=True)
            ]
            first = max(begin + 1, window.first)
            if first > end:
                continue
            scored = torch.arange(begin + 1, end + 1)[None] >= first
            yield first, end + 1, self._numbers(nexts, scored, tokens[first : end + 1])

    def _batch(self, jobs: Sequence[Job]) -> Numbers:
        """The numbers of one padded batch, in the order of its jobs."""
        width = max(job.fed for job in jobs)
        tokens = torch.full((len(jobs), width), ABSENT, dtype=torch.long)
        scored = torch.zeros(len(jobs), width, dtype=torch.bool)
        targets = []
        for row, job in enumerate(jobs):
            window, own = job.window, torch.from_numpy(job.passage.tokens)
            tokens[row, : job.fed] = own[window.begin : window.end - 1]
            scored[row, window.first - window.begin - 1 : job.fed] = True
            targets.append(own[window.first : window.end])
        return self._numbers([model.predict(tokens) for model in self.models], scored, torch.cat(targets))

    @torch.no_grad()
    def _numbers(self, nexts: Sequence[Next], scored: Tensor, targets: Tensor) -> Numbers:
        chosen = [following[scored] for following in nexts]
        first = chosen[0]
        statistics = first.statistics(targets[:, None], top=self.top)
        self._accelerated = statistics.entropy.device.type != "cpu"
        numbers = _numpy(statistics)
        if self.hidden:
            if first.hidden is None:
                raise ModelError(f"{self.models[0].name} has no hidden states; read it without hidden=True")
            numbers["hidden"] = first.hidden[:, 0].float().cpu().numpy()
        if len(chosen) == 2:
            numbers |= _compared(first, chosen[1])
            against = chosen[1].statistics(targets[:, None]).logprob
            assert against is not None
            numbers["against_logprob"] = against[:, 0].float().cpu().numpy()
        return numbers


def batches(lengths: Sequence[int], most: Callable[[], int]) -> Iterator[list[int]]:
    """Group sequences of these lengths so that number * longest <= most(), asked at each group; the longest first.

    Sorting by length leaves little padding. A sequence longer than that makes a group of its own.

    Yields:
        The indices of each group; each index occurs once.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        count = max(1, most() // max(1, lengths[order[0]]))
        yield order[:count]
        order = order[count:]


def _compared(p: Next, q: Next) -> Numbers:
    """Cross-entropy and divergences of two Next of shape [N, 1]."""
    if isinstance(p, HeadNext) and isinstance(q, HeadNext):
        found = [compare(p.hidden[:, 0], p.head, q.hidden[:, 0], q.head)]
    else:
        rows = max(1, _ENTRIES // p.vocab_size)
        found = [
            compare_logits(p[start : start + rows].log_probs()[:, 0], q[start : start + rows].log_probs()[:, 0])
            for start in range(0, p.shape[0], rows)
        ]
    names = [name for name in columns.AGAINST if name != "against_logprob"]
    return {name: torch.cat([getattr(part, name) for part in found]).float().cpu().numpy() for name in names}


def _numpy(statistics: Statistics) -> Numbers:
    """The fields of Statistics of shape [N, 1] as arrays [N], [N, k]."""
    return {name: values[:, 0].cpu().numpy() for name, values in statistics.as_dict().items()}
