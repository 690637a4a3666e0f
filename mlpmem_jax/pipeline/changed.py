"""Recipes of training rows and neighbours after the training text has changed."""

from typing import TYPE_CHECKING

from mlpmem_jax.errors import ConfigError
from mlpmem_jax.pipeline import recipes
from mlpmem_jax.pipeline.corpus_record import FILE
from mlpmem_jax.pipeline.recipes import Recipe
from mlpmem_jax.store.array_specs import Split
from mlpmem_jax.store.checked_json import fingerprint_of
from mlpmem_jax.store.differences import differences

if TYPE_CHECKING:
    from mlpmem_jax.pipeline.graph import Artifacts


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
