"""Proofs that a model keeps the contract."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nextoken.head import statistics_from_logits
from nextoken.model.base import ABSENT, LanguageModel, State, TreesNotSupported
from nextoken.model.next import Next
from nextoken.testing._proof import Proof

_TOLERANCE = {"float64": 1e-9, "float32": 2e-4, "float16": 5e-2, "bfloat16": 2e-1}


def check_language_model(
    model: LanguageModel,
    *,
    seed: int = 0,
    length: int = 12,
    tolerance: float | None = None,
    on_proof: Callable[[Proof], None] | None = None,
) -> list[Proof]:
    """Prove on random token strings that `model` keeps the contract of `LanguageModel`.

    Proved: probabilities sum to 1; feeding in pieces equals feeding at once; `predict` equals `extend`; rows of
    different lengths in one batch equal each alone; each node of a tree equals its path fed alone; `keep`, `rewind`,
    `fork` and `join` leave exactly the state that feeding the kept tokens would; the lazy statistics equal brute
    force over the vocabulary; narrowing a `Next` narrows its results; bad calls are refused and leave the state as it
    was.

    Args:
        model: any language model. Of one that knows only the top tokens (`is_partial`) all but normalisation and
            statistics is tried on those.
        seed: of the random strings.
        length: of the longest string, begin token included; at least 6.
        tolerance: largest difference in nats of log-probabilities above -30; by default by the model's precision.
        on_proof: called with each proof as it is done.

    Returns:
        One `Proof` per statement.

    Raises:
        AssertionError: at least one statement does not hold; the message names each.
    """
    if length < 6:
        raise ValueError(f"length must be at least 6, got {length}")
    limit = _TOLERANCE.get(model.dtype, 2e-4) if tolerance is None else tolerance
    trial = _Trial(model, seed, length)
    proofs: list[Proof] = []
    for name, statement, check in (
        ("normalised", "the probabilities of every distribution sum to 1", trial.normalised),
        ("cached", "feeding in pieces equals feeding at once", trial.cached),
        ("predicted", "predict() equals extend() on a new state", trial.predicted),
        ("batched", "rows of different lengths in one batch equal each alone", trial.batched),
        ("tree", "each node of a tree equals its path fed alone", trial.tree),
        ("trees in a batch", "each row may have a tree of its own, and rows may lack nodes", trial.trees_in_batch),
        ("kept", "keep(path) leaves the state that feeding the path would", trial.kept),
        ("rewound", "rewind(n) leaves the state before the last n tokens", trial.rewound),
        ("forked", "fork(rows) copies rows and leaves the original as it was", trial.forked),
        ("joined", "join() puts rows of several states side by side", trial.joined),
        ("statistics", "lazy statistics equal brute force over the vocabulary", trial.statistics),
        ("narrowed", "narrowing a Next narrows its log-probabilities", trial.narrowed),
        ("sampled", "sample() draws possible tokens, a row's draws independent of its batch", trial.sampled),
        ("refused", "bad calls raise and leave the state as it was", trial.refused),
    ):
        try:
            proof = Proof(name, statement, check(), limit)
        except _NotTried as reason:
            proof = Proof(name, statement, skipped=str(reason))
        proofs.append(proof)
        if on_proof is not None:
            on_proof(proof)
    broken = [str(proof) for proof in proofs if not proof.holds]
    if broken:
        raise AssertionError(f"{model.name} breaks the contract (tolerance {limit:.1e}):\n" + "\n".join(broken))
    return proofs


class _NotTried(Exception):
    """The statement does not apply to this model."""


class _Trial:
    """The strings of one check, and what the model says of each when it is read alone."""

    def __init__(self, model: LanguageModel, seed: int, length: int) -> None:
        self.model = model
        self.generator = torch.Generator().manual_seed(seed)
        if model.context_length is not None:
            length = min(length, model.context_length - 4)
        ordinary = [i for i in range(model.vocab.size) if i not in model.vocab.specials]
        draws = torch.randint(len(ordinary), (6, length), generator=self.generator)
        strings = [[ordinary[int(i)] for i in row] for row in draws]
        if model.vocab.bos_id is not None:
            strings = [[model.vocab.bos_id, *row[:-1]] for row in strings]
        self.strings, self.length, self.ordinary = strings, length, ordinary

    # Each statement returns the largest difference it saw.

    def normalised(self) -> float:
        if self.model.is_partial:
            raise _NotTried("the model knows only the most probable tokens")
        total = torch.logsumexp(self._next([self.strings[0]]).log_probs().double(), -1)
        return float(total.abs().max())

    def cached(self) -> float:
        whole = _seen(self._next([self.strings[0]]))
        worst = 0.0
        for cuts in ((1,), (3, 4), tuple(range(1, self.length))):
            state = self.model.start()
            pieces = []
            for begin, end in zip((0, *cuts), (*cuts, self.length), strict=True):
                pieces.append(_seen(self.model.extend(state, [self.strings[0][begin:end]])))
            worst = max(worst, _difference(torch.cat(pieces, 1), whole))
            _expect(state.tokens == (tuple(self.strings[0]),), "state.tokens are the tokens that were fed")
        return worst

    def predicted(self) -> float:
        rows = [self.strings[0], self.strings[1]]
        return _difference(_seen(self.model.predict(rows)), _seen(self._next(rows)))

    def batched(self) -> float:
        lengths = [self.length, 1, self.length // 2, 3]
        rows = [self.strings[i][:size] for i, size in enumerate(lengths)]
        worst = 0.0
        padded = _padded(rows)
        for result in (self._next(padded), self.model.predict(padded)):
            for b, row in enumerate(rows):
                worst = max(worst, _difference(_seen(result[b, : len(row)]), _seen(self._next([row]))))
        # The rows go on by different lengths, one of them not at all.
        state = self.model.start(len(rows))
        self.model.extend(state, padded)
        fresh = [self.strings[4][:2], self.strings[5][:3], [], self.strings[4][:1]]
        result = self.model.extend(state, _padded(fresh))
        for b, (row, more) in enumerate(zip(rows, fresh, strict=True)):
            if more:
                alone = self._next([row + more])[0, len(row) :]
                worst = max(worst, _difference(_seen(result[b, : len(more)]), _seen(alone)))
        return worst

    def tree(self) -> float:
        self._needs_trees()
        prefix, nodes = self.strings[0][:4], self.strings[1][1:6]
        parents = [-1, 0, 0, -1, 2]
        state = self.model.start()
        self.model.extend(state, [prefix])
        result = self.model.extend(state, [nodes], parents)
        return self._paths_alone(result, 0, prefix, nodes, parents)

    def trees_in_batch(self) -> float:
        self._needs_trees()
        prefixes = [self.strings[0][:4], self.strings[1][:2], self.strings[2][:5]]
        nodes = [
            self.strings[3][1:5],
            [*self.strings[4][1:4], ABSENT],
            [self.strings[5][1], ABSENT, self.strings[5][2], -1],
        ]
        parents = [[-1, -1, 0, 2], [-1, 0, 1, -1], [-1, -1, 0, -1]]
        state = self.model.start(3)
        self.model.extend(state, _padded(prefixes))
        result = self.model.extend(state, nodes, parents)
        return max(self._paths_alone(result, b, prefixes[b], nodes[b], parents[b]) for b in range(3))

    def kept(self) -> float:
        worst = 0.0
        prefix, more, probe = self.strings[0][:3], self.strings[1][1:5], self.strings[2][1:3]
        state = self.model.start()
        self.model.extend(state, [prefix])
        self.model.extend(state, [more])
        state.keep([0, 1])
        worst = max(worst, self._agrees(state, [prefix + more[:2]], probe))
        if not self.model.supports_trees:
            return worst
        prefixes, parents = [prefix, self.strings[3][:1]], [-1, 0, 0, 2]
        state = self.model.start(2)
        self.model.extend(state, _padded(prefixes))
        self.model.extend(state, [more, more], parents)
        state.keep([[0, 2, 3], [0, 1]])
        expected = [prefixes[0] + [more[0], more[2], more[3]], prefixes[1] + [more[0], more[1]]]
        worst = max(worst, self._agrees(state, expected, probe))
        state = self.model.start()
        self.model.extend(state, [prefix])
        self.model.extend(state, [more], parents)
        state.keep([])
        return max(worst, self._agrees(state, [prefix], probe))

    def rewound(self) -> float:
        rows = [self.strings[0][:5], self.strings[1][:4]]
        state = self.model.start(2)
        self.model.extend(state, _padded(rows))
        state.rewind([3, 1])
        return self._agrees(state, [rows[0][:2], rows[1][:3]], self.strings[2][1:4])

    def forked(self) -> float:
        rows = [self.strings[0][:5], self.strings[1][:3]]
        probe = self.strings[2][1:4]
        state = self.model.start(2)
        self.model.extend(state, _padded(rows))
        copies = state.fork([1, 0, 1])
        worst = self._agrees(copies, [rows[1], rows[0], rows[1]], probe)
        copies = state.fork([0, 0])
        self.model.extend(copies, [probe[:1], probe[1:2]])
        worst = max(worst, self._agrees(copies, [rows[0] + probe[:1], rows[0] + probe[1:2]], probe))
        return max(worst, self._agrees(state, rows, probe))

    def joined(self) -> float:
        first, second = self.model.start(2), self.model.start()
        rows = [self.strings[0][:5], self.strings[1][:2], self.strings[2][:4]]
        self.model.extend(first, _padded(rows[:2]))
        self.model.extend(second, [rows[2]])
        state = first.join(second)
        worst = self._agrees(state, rows, self.strings[3][1:4])
        return max(worst, self._agrees(second, rows[2:], self.strings[3][1:4]))

    def statistics(self) -> float:
        if self.model.is_partial:
            raise _NotTried("the model knows only the most probable tokens")
        result = self._next([self.strings[0]])
        targets = torch.tensor([[*self.strings[0][1:], ABSENT]])
        lazy = result.statistics(targets, top=5)
        brute = statistics_from_logits(result.log_probs().double(), targets, top=5)
        # Compared where both are steady: rank, mass above and the top ids jump when two tokens are equally probable.
        names = ("logprob", "entropy", "varentropy", "collision", "top1_prob", "margin", "top_logprobs", "rest_mass")
        return max(_difference(getattr(lazy, name), getattr(brute, name)) for name in names)

    def narrowed(self) -> float:
        rows = [self.strings[0][:4], self.strings[1][:4]]
        result = self._next(rows)
        whole = _seen(result)
        mask = torch.tensor([[True, False, True, False], [False, True, False, False]])
        worst = 0.0
        for narrowed, expected in (
            (result[1], whole[1:2]),
            (result[0, -1], whole[0:1, 3:4]),
            (result[:, 1:3], whole[:, 1:3]),
            (result[[1, 0], 2], whole[[1, 0], 2:3]),
            (result[mask], whole[mask.to(whole.device)][:, None]),
        ):
            _expect(narrowed.shape == tuple(expected.shape[:2]), "a narrowed Next is [rows, positions]")
            worst = max(worst, _difference(_seen(narrowed), expected))
        return worst

    def sampled(self) -> float:
        if self.model.is_partial:
            raise _NotTried("the model knows only the most probable tokens")
        rows = [self.strings[0][:4], self.strings[1][:4]]
        result = self._next(rows)
        drawn = result.sample([torch.Generator().manual_seed(b) for b in range(2)])
        chosen = torch.gather(result.log_probs(), 2, drawn[..., None].to(result.log_probs().device))
        _expect(bool((chosen > float("-inf")).all()), "sample() never draws an impossible token")
        alone = result[1].sample([torch.Generator().manual_seed(1)])
        _expect(bool((alone == drawn[1:]).all()), "a row's draws do not depend on its batch")
        return 0.0

    def refused(self) -> float:
        state = self.model.start()
        self.model.extend(state, [self.strings[0][:3]])
        before = state.tokens
        calls: list[tuple[str, Callable[[], object]]] = [
            ("an id beyond the vocabulary", lambda: self.model.extend(state, [[self.model.vocab.size]])),
            ("a gap in a chain", lambda: self.model.extend(state, [[ABSENT, self.strings[0][1]]])),
            ("rewinding more than there is", lambda: state.rewind(4)),
            ("keeping what is no path", lambda: state.keep([1])),
        ]
        if self.model.supports_trees:
            calls.append(("a parent after its node", lambda: self.model.extend(state, [self.strings[0][1:3]], [1, -1])))
        for what, call in calls:
            try:
                call()
            except ValueError:
                continue
            raise AssertionError(f"{self.model.name} accepts {what}")
        if not self.model.supports_trees:
            try:
                self.model.extend(state, [self.strings[0][1:3]], [-1, -1])
            except TreesNotSupported:
                pass
            else:
                raise AssertionError(f"{self.model.name} says it takes no trees, but took one")
        _expect(state.tokens == before, "a refused call leaves the state as it was")
        return self._agrees(state, [list(before[0])], self.strings[1][1:3])

    # What the statements share.

    def _next(self, rows: Sequence[Sequence[int]] | Tensor) -> Next:
        return self.model.extend(self.model.start(len(rows)), rows)

    def _needs_trees(self) -> None:
        if not self.model.supports_trees:
            raise _NotTried("the model takes chains only")

    def _paths_alone(
        self, result: Next, row: int, prefix: list[int], nodes: Sequence[int], parents: Sequence[int]
    ) -> float:
        worst = 0.0
        for node, token in enumerate(nodes):
            if token == ABSENT:
                continue
            path: list[int] = []
            at = node
            while at >= 0:
                path.insert(0, nodes[at])
                at = parents[at]
            alone = self._next([prefix + path])[0, -1]
            worst = max(worst, _difference(_seen(result[row, node]), _seen(alone)))
        return worst

    def _agrees(self, state: State, rows: list[list[int]], probe: list[int]) -> float:
        """How far continuing `state` by `probe` is from freshly fed `rows`; the state is left as it was."""
        _expect(state.tokens == tuple(map(tuple, rows)), f"the state holds {rows}, not {state.tokens}")
        result = self.model.extend(state, [probe] * len(rows))
        worst = 0.0
        for b, row in enumerate(rows):
            worst = max(worst, _difference(_seen(result[b]), _seen(self._next([row + probe])[0, len(row) :])))
        state.rewind(len(probe))
        return worst


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[ABSENT] * (width - len(row))] for row in rows])


def _seen(result: Next) -> Tensor:
    """What a Next says [B, n, ...]: all log-probabilities, or those of the top tokens where only they are known."""
    if not result.is_partial:
        return result.log_probs().double()
    top = result.statistics(top=5).top_logprobs
    assert top is not None
    return top.double()


def _difference(left: Tensor, right: Tensor) -> float:
    """Largest absolute difference where both are above -30; a token impossible on one side only counts as infinite."""
    left, right = left.double().cpu(), right.double().cpu()
    _expect(left.shape == right.shape, f"shapes {tuple(left.shape)} and {tuple(right.shape)} agree")
    if bool(((left == float("-inf")) != (right == float("-inf"))).any()):
        return float("inf")
    both_nan = left.isnan() & right.isnan()
    likely = ((left > -30) | (right > -30) | left.isnan() | right.isnan()) & ~both_nan
    gaps = (left - right).abs()[likely]
    return float(gaps.nan_to_num(nan=float("inf")).max()) if gaps.numel() else 0.0


def _expect(condition: bool, statement: str) -> None:
    if not condition:
        raise AssertionError(f"does not hold: {statement}")
