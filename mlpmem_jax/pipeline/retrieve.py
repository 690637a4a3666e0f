"""Neighbours of every row, and the next-token distributions that they imply."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from mlpmem_jax.pipeline import changed_stages, estimates, exact_sample, held_out_stages, needs
from mlpmem_jax.pipeline.changed_stages import exact_cache
from mlpmem_jax.pipeline.checks import check_retrieval
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.store.array_specs import Split
from mlpmem_jax.store.manifest import Artifact, Completion

if TYPE_CHECKING:
    from mlpmem_jax.retrieval.index_builder import ExactCache
    from mlpmem_jax.retrieval.search import Search
    from mlpmem_jax.retrieval.targets import TargetInputs

_WITH_TARGETS: tuple[Split, ...] = ("train", "valid")


def stages(run: Artifacts) -> list[Stage]:
    """Returns the stages: neighbours of valid and test, then targets of train and valid.

    Valid and test tune and score the explicit kNN-LM that the memory is held against, so they are
    searched exactly unless `retrieval.exact_rows` asks for the engine of the index. It always
    searches for train, where its targets are those of the kNN-LM.
    """
    exact = exact_cache(run)
    splits: tuple[Split, ...] = ("valid", "test")
    if run.config.retrieval.keep_train == "all":
        splits = (*splits, "train")
    found = [
        _neighbors_stage(run, split, exact)
        for split in splits
        if f"neighbors/{split}" not in run.given  # What `compact` made is made once.
    ]
    found += [
        Stage(
            artifact=one,
            build=functools.partial(exact_sample.build, run, one, exact),
            need=functools.partial(needs.exact_sample_need, run),
        )
        for one in exact_sample.artifacts(run)
    ]
    found += held_out_stages.neighbor_stages(run, exact)
    if not run.makes_targets:
        return found  # The teacher's targets are read, never made here.
    teacher = run.config.targets.teacher
    if teacher == "arrow":  # Files that changed are other targets.
        for split in _WITH_TARGETS:
            run.sources.arrow(run.config, split, again=True)
    builds: dict[Split, Callable[[], Completion]] = {
        "train": functools.partial(_build_train_targets, run, exact),
        "valid": functools.partial(_build_valid_targets, run),
    }
    if teacher != "knn":
        make = _build_ngram_targets if teacher == "ngram" else _build_arrow_targets
        builds = {split: functools.partial(make, run, split) for split in builds}
    targets = [
        Stage(
            artifact=run.targets(split),
            build=build,
            check=functools.partial(_check_targets, run),
            estimate=functools.partial(estimates.targets_estimate, run, split),
            need=functools.partial(needs.targets_need, run, split),
        )
        for split, build in builds.items()
    ]
    return [*found, *targets]


def _check_targets(run: Artifacts) -> None:
    if run.corpus.made_with:
        changed_stages.check_reads_rows(run)
    if run.config.targets.teacher == "knn":
        check_retrieval(run)
    if run.config.targets.teacher == "arrow":
        from mlpmem_jax.retrieval.arrow_files import ArrowFiles

        for split in _WITH_TARGETS:
            path = run.config.targets.arrow_of(split)
            assert path is not None
            ArrowFiles(path, f"targets.{split}_arrow").check()


def _neighbors_stage(run: Artifacts, split: Split, exact: "ExactCache") -> Stage:
    if run.corpus.changes:
        return changed_stages.neighbors_stage(run, split, exact)
    return Stage(
        artifact=run.neighbors(split),
        build=functools.partial(_build_neighbors, run, split, exact),
        check=functools.partial(check_retrieval, run),
        estimate=functools.partial(estimates.neighbors_estimate, run, split),
        need=functools.partial(needs.neighbors_need, run, split),
    )


def by_index_stages(run: Artifacts) -> list[Stage]:
    """Returns the neighbours of valid and test as the engine of the index finds them."""
    exact = exact_cache(run)
    splits: tuple[Split, ...] = ("valid", "test")
    return [
        Stage(
            artifact=run.neighbors_by_index(split),
            build=functools.partial(_build_neighbors, run, split, exact, by_index=True),
            need=functools.partial(needs.neighbors_need, run, split, by_index=True),
        )
        for split in splits
    ]


def _build_neighbors(
    run: Artifacts, split: Split, exact: "ExactCache", *, by_index: bool = False
) -> Completion:
    from mlpmem_jax.retrieval.search import keep_neighbors

    index = run.index if by_index or run.config.retrieval.searches_by_index(split) else None
    artifact = run.neighbors_by_index(split) if by_index else run.neighbors(split)
    rows, search = run.datastore(split), _search(run, index, exact)
    return keep_neighbors(artifact, rows, split, run.config.datastore, search)


def _build_train_targets(run: Artifacts, exact: "ExactCache") -> Completion:
    from mlpmem_jax.retrieval.targets import make_train_targets

    kept = run.neighbors("train") if run.config.retrieval.keep_train == "all" else None
    search = _search(run, run.index, exact)
    return make_train_targets(run.targets("train"), _target_inputs(run), search, kept)


def _build_valid_targets(run: Artifacts) -> Completion:
    from mlpmem_jax.retrieval.targets import make_valid_targets

    train = run.datastore("train"), run.targets("train")
    return make_valid_targets(run.targets("valid"), _target_inputs(run), *train)


def _build_ngram_targets(run: Artifacts, split: Split) -> Completion:
    from mlpmem_jax.retrieval.ngram_targets import make_ngram_targets

    config = run.config
    given = run.tokens, config.targets, config.datastore, config.seed
    return make_ngram_targets(run.targets(split), split, *given)


def _build_arrow_targets(run: Artifacts, split: Split) -> Completion:
    from mlpmem_jax.retrieval.arrow_targets import make_arrow_targets

    config = run.config
    given = run.tokens, config.targets, config.datastore, config.seed
    return make_arrow_targets(run.targets(split), split, *given)


def _search(run: Artifacts, index: Artifact | None, exact: "ExactCache") -> "Search":
    from mlpmem_jax.retrieval.search import Search

    retrieval, seed = run.config.retrieval, run.config.seed
    return Search(run.datastore("train"), index, exact, retrieval, seed, run.tokens)


def _target_inputs(run: Artifacts) -> "TargetInputs":
    from mlpmem_jax.retrieval.targets import TargetInputs

    return TargetInputs(
        tokens=run.tokens,
        valid=run.datastore("valid"),
        valid_neighbors=run.neighbors("valid"),
        targets=run.config.targets,
        chunking=run.config.datastore,
    )
