"""`nextoken verify`: the proofs of `nextoken.testing`, run on the model of the person who asks."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from nextoken.app._loading import load_quietly
from nextoken.app._speculation import speculation


def verify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Bundled name, Hugging Face id, folder or address.")],
    seed: Annotated[int, typer.Option("--seed", help="Of the random token strings it is tried on.")] = 0,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", help="Largest difference allowed, in nats; by default by the model's precision."),
    ] = None,
    speculate: Annotated[
        str | None,
        typer.Option(
            "--speculate", metavar="DRAFT", help="Prove instead that speculation with this draft changes nothing."
        ),
    ] = None,
) -> None:
    """Prove on random token strings that a model keeps the contract that everything in nextoken stands on.

    Prints each statement with the largest error seen: cached equals uncached, a batch equals its rows alone, a tree
    equals each of its paths alone, statistics equal brute force, and so on. Exit code 1 if a statement does not hold.

    Examples:

        nextoken verify nano
        nextoken verify ./my-finetuned-model --seed 7
        nextoken verify http://localhost:8080/v1
        nextoken verify tiny --speculate nano
    """
    source = load_quietly(model)

    from rich.console import Console
    from rich.text import Text

    from nextoken.testing import Proof, check_language_model, check_speculation

    console, proofs = Console(), []

    def show(proof: Proof) -> None:
        proofs.append(proof)
        style = "dim" if proof.skipped is not None else "green" if proof.holds else "bold red"
        console.print(Text(str(proof), style=style), soft_wrap=True)

    try:
        if speculate is None:
            check_language_model(source, seed=seed, tolerance=tolerance, on_proof=show)
        else:
            check_speculation(source, partial(speculation, speculate), seed=seed, on_proof=show)
    except AssertionError as error:
        failed = [proof.name for proof in proofs if not proof.holds]
        reason = ", ".join(failed) or str(error)  # a check that broke down before it had an error to weigh says why
        broken = "breaks the contract" if speculate is None else f"says otherwise with {speculate}"
        console.print(Text(f"{source.name} {broken}: {reason}"), soft_wrap=True)
        raise typer.Exit(1) from error
    tried = sum(proof.skipped is None for proof in proofs)
    kept = "keeps the contract" if speculate is None else f"says the same with {speculate}"
    console.print(Text(f"{source.name} {kept}: {tried} statements proved"), soft_wrap=True)
