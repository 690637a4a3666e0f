"""Recipes of training rows and neighbours after the training text has changed."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mlpmem_jax.errors import ConfigError
from mlpmem_jax.pipeline import recipes
from mlpmem_jax.pipeline.corpus_record import FILE, HeldOut
from mlpmem_jax.pipeline.recipes import Recipe
from mlpmem_jax.store.array_specs import Split
from mlpmem_jax.store.checked_json import fingerprint_of
from mlpmem_jax.store.differences import differences
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.run_record import RunRecord

if TYPE_CHECKING:
    from mlpmem_jax.pipeline.graph import Artifacts


BEFORE = "before change "  # Of the titles of artifacts that a changed corpus has left behind.
CONTINUES = "train.mode=memory with train.memory_start=checkpoint"


def late_role(role: str, num_changes: int) -> str:
    """Returns the role of what a command made of the text before so many changes, after them."""
    return f"{role} [{BEFORE}{num_changes}]"


def finished_memory_of(run: "Artifacts") -> str:
    """Returns the last finished memory that the run directory has; empty: there is none."""
    roles, num_changes = RunRecord.read(run.workdir).roles, len(run.corpus.changes)
    named = roles.get("memory", "")
    if named and Artifact(run.store, named, "memory").is_complete():
        return named
    known = run.corpus.changes[-1].memory if num_changes else ""
    return known or roles.get(late_role("memory", num_changes), "")


def memory_before(run: "Artifacts") -> Artifact:
    """Returns the memory that the run had before its text was changed last.

    Raises:
        ConfigError: The text was not changed, or there was none.
    """
    changes = run.corpus.changes
    if not changes:
        raise ConfigError(
            f"{CONTINUES} continues the memory from before `append`, and no text was appended in "
            f"{run.workdir}; use train.memory_start=fresh"
        )
    role = late_role("memory", len(changes))
    found = changes[-1].memory or RunRecord.read(run.workdir).roles.get(role, "")
    if not found:
        raise ConfigError(
            f"{CONTINUES}: {run.workdir} had no finished memory before its text was changed last; "
            "use train.memory_start=fresh"
        )
    return Artifact(run.store, found, "memory", label=role)


def rows_recipe(run: "Artifacts") -> Recipe:
    """Returns the recipe of the training rows after the last change."""
    change = run.corpus.changes[-1]
    own = {"removed": list(change.documents)} if change.kind == "remove" else {"appended": True}
    return {"split": "train", **own, **recipes.datastore(run.config)}


def neighbors_recipe(run: "Artifacts", split: Split) -> Recipe:
    """Returns the recipe of a split's neighbours, updated from those before the last change."""
    return {
        "split": split,
        "updates": run.before.neighbors(split).relative,
        **recipes.exact_neighbors(run.config),
    }


def made_with(run: "Artifacts", *, compacted: bool) -> dict[str, str]:
    """Returns what all rows of a corpus that changes must be made with.

    Args:
        compacted: Whether neighbours are kept whose number can no longer be chosen.
    """
    found = {
        "tokenizer": run.tokenizer.relative,
        "decoder": run.decoder.relative,
        "attention": run.config.corpus.attention,
        "datastore": fingerprint_of(recipes.datastore(run.config)),
    }
    if compacted:
        found["neighbors"] = fingerprint_of(recipes.exact_neighbors(run.config))
    return found


def check_made_with(run: "Artifacts") -> None:
    """Refuses settings with which the changed corpus was not made.

    Raises:
        ConfigError: Names what differs.
    """
    if run.sources.is_blind:
        return
    asked = made_with(run, compacted=bool(run.corpus.start))
    lines = differences(dict(run.corpus.made_with), asked)
    if lines:
        raise ConfigError(
            f"{run.workdir / FILE}: the training text was changed with other settings: "
            f"{'; '.join(lines)}; use those, or another workdir"
        )


def segment_inputs(run: "Artifacts") -> list[Artifact]:
    """Returns what the tokens of the last appended text are made from, besides that text.

    Documents that were known before, and those that are held out, are left out of it.
    """
    before = [run.tokenizer, run.tokens, run.before.datastore("train")]
    return before + held_out_tokens(run, run.corpus.changes[-1].num_held_out)


def held_out_tokens(run: "Artifacts", number: int | None = None) -> list[Artifact]:
    """Returns the tokens of appended text that is held out, of the first so many or all."""
    return [tokens_of(run, one) for one in run.corpus.held_out[:number]]


def tokens_of(run: "Artifacts", held: HeldOut) -> Artifact:
    """Returns the tokens of a held-out text.

    The training rows before it are named by the recipe and are no input, so that they can be
    removed once the text is compacted.
    """
    recipe = {**held.text, "held_out_from": held.rows}
    return Artifact.of(run.store, "tokens", recipe, (run.tokenizer,), f"tokens/{held.name}")


def rows_of(run: "Artifacts", held: HeldOut) -> Artifact:
    """Returns the rows of a held-out text."""
    recipe, inputs = {"split": "test", **recipes.datastore(run.config)}, tokens_of(run, held)
    return Artifact.of(
        run.store, "datastore", recipe, (inputs, run.decoder), f"datastore/{held.name}"
    )


def neighbors_of(run: "Artifacts", held: HeldOut) -> Artifact:
    """Returns the exact neighbours of a held-out text among the training rows of now."""
    recipe = {"split": "test", **recipes.exact_neighbors(run.config)}
    inputs = (run.datastore("train"), rows_of(run, held))
    return Artifact.of(run.store, "neighbors", recipe, inputs, f"neighbors/{held.name}")


def held_out_inputs(run: "Artifacts") -> Iterator[Artifact]:
    """Yields what `evaluate` reads of held-out text."""
    for held in run.corpus.held_out:
        yield from (tokens_of(run, held), rows_of(run, held), neighbors_of(run, held))
