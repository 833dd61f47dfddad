"""Proofs that a user can run on a model or a pair of models: ours, an operator, or one of their own.

    from nextoken.testing import check_language_model, check_speculation

    for proof in check_language_model(model):
        print(proof)
    for proof in check_speculation(target, lambda: Speculation(DraftModel(draft))):
        print(proof)
    for proof in check_properly_weighted(AWRS()):
        print(proof)

The same proofs run on every model of the library's own tests and behind `nextoken verify`.
"""

from __future__ import annotations

from nextoken.testing._language_model import check_language_model
from nextoken.testing._proof import Proof
from nextoken.testing._speculation import check_speculation
from nextoken.testing._weighted import check_properly_weighted

__all__ = ["Proof", "check_language_model", "check_properly_weighted", "check_speculation"]
