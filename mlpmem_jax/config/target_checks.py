"""Rules about targets: which rows have them, and who teaches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlpmem_jax.config.schema import Config


def target_mistakes(config: Config) -> Iterator[str]:
    """Yields one line for each broken rule."""
    for rule in (_made_elsewhere, _share, _arrow, _without_search):
        yield from rule(config)


def _made_elsewhere(config: Config) -> Iterator[str]:
    targets, ours = config.targets, ("teacher", "min_mass", "share")
    if targets.workdir is None:
        return
    for name in ours:
        value = getattr(targets, name)
        if value != type(targets).model_fields[name].default:
            yield (
                f"targets.{name}={value} has no effect with targets.workdir={targets.workdir}: "
                "set it in the run that makes the targets"
            )


def _share(config: Config) -> Iterator[str]:
    targets, kept = config.targets, config.retrieval.keep_train
    if targets.share < 1 and kept == "all" and targets.teacher == "knn":
        yield (
            f"targets.share={targets.share} saves the search for the other rows, and "
            f"retrieval.keep_train={kept} searches for all: use retrieval.keep_train=none"
        )


def _arrow(config: Config) -> Iterator[str]:
    targets = config.targets
    for key in ("train_arrow", "valid_arrow"):
        path = getattr(targets, key)
        if targets.teacher == "arrow" and path is None:
            yield f"targets.teacher=arrow needs targets.{key}: a file or directory of targets"
        if targets.teacher != "arrow" and path is not None:
            yield f"targets.{key}={path} has no effect with targets.teacher={targets.teacher}"


def _without_search(config: Config) -> Iterator[str]:
    if config.targets.teacher == "knn":
        return
    retrieval, teacher = config.retrieval, f"targets.teacher={config.targets.teacher}"
    if retrieval.exclude != "row":
        yield f"retrieval.exclude={retrieval.exclude} has no effect with {teacher}"
    if retrieval.exclude_repeats_tokens:
        repeats = f"retrieval.exclude_repeats_tokens={retrieval.exclude_repeats_tokens}"
        yield f"{repeats} has no effect with {teacher}"
    interval = config.train.refresh_interval_steps
    if interval is not None:
        yield (
            f"train.refresh_interval_steps={interval} rebuilds targets from the current decoder, "
            f"and {teacher} does not read it: drop one of the two"
        )
