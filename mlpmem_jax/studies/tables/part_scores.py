"""Parts of systems: a trained network or retriever, its stages, and its stored scores."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

from mlpmem_jax.config.schema import Config
from mlpmem_jax.parallel.hardware import Machine
from mlpmem_jax.pipeline.checks import check_devices
from mlpmem_jax.pipeline.fitting import Need, RowCounter
from mlpmem_jax.pipeline.resolve import Network, compute_dtypes
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.store.array_specs import Split
from mlpmem_jax.store.layout import Layout
from mlpmem_jax.store.manifest import Artifact, Completion
from mlpmem_jax.studies.tables.variants import Variant

SCORED: tuple[Split, ...] = ("valid", "test")


@dataclasses.dataclass(frozen=True)
class Part:
    """Something that gives each label a probability.

    Attributes:
        kind: What it is; `knn_by_index` is the kNN distribution of the neighbours that the
            engine of the index finds, `knn` that of the exact ones; `joint` is decoder and
            memory trained together, mixed by the λ that they were trained with, `mixture`
            a memory with the frozen decoder, where it was trained with a λ.
        variant: How it is made.
        step: Of a network, a step before its last whose checkpoint is kept; none: the last.
    """

    kind: Literal["decoder", "knn", "knn_by_index", "memory", "mixture", "joint"]
    variant: Variant
    step: int | None = None

    @property
    def config(self) -> Config:
        """The configuration that names it."""
        return self.variant.config

    @property
    def name(self) -> str:
        """Its name among the scores."""
        named = {
            "decoder": self.config.decoder.name,
            "knn": self.config.retrieval_name,
            "knn_by_index": self.config.retrieval_name,
            "memory": self.config.memory.name,
            "mixture": self.config.memory.name,
            "joint": self.config.joint_name,
        }
        after = "" if self.step is None else f"-step-{self.step}"
        return f"{self.kind.replace('_', '-')}-{named[self.kind]}{after}"

    def scores(self, split: Split) -> Artifact:
        """Where its log-probabilities of the labels of a split lie."""
        return Layout(self.config).scores(self.name, split)

    def made_of(self) -> list[str]:
        """Returns the artifacts that it takes before it can be used, by path."""
        layout = Layout(self.config)
        if self.kind == "decoder":
            return [layout.decoder.relative]
        if self.kind == "memory":
            return [layout.memory.relative]
        if self.kind == "mixture":
            return [layout.decoder.relative, layout.memory.relative]
        if self.kind == "joint":
            return [layout.joint.relative]
        tuned_on = layout.neighbors("valid")
        if self.kind == "knn_by_index":
            tuned_on = layout.neighbors_by_index("valid")
        return [layout.datastore("train").relative, tuned_on.relative]

    def stages(self) -> list[Stage]:
        """Returns all stages up to the stored scores of valid and test."""
        making: dict[str, Callable[[], list[Stage]]] = {
            "decoder": self.variant.decoder_stages,
            "knn": self.variant.retrieval_stages,
            "knn_by_index": functools.partial(_by_index_stages, self.variant),
            "memory": self.variant.memory_stages,
            "mixture": self.variant.memory_stages,
            "joint": self.variant.memory_stages,
        }
        stages = making[self.kind]()
        if self.kind == "knn":  # Targets and the index serve memories alone.
            wanted = {Layout(self.config).neighbors(split).relative for split in SCORED}
            stages = [
                stage
                for stage in stages
                if stage.artifact.kind in ("decoder", "datastore") or stage.name in wanted
            ]
        return [*stages, *(_score_stage(self, split) for split in SCORED)]


def _by_index_stages(variant: Variant) -> list[Stage]:
    """Returns the stages up to the neighbours of valid and test that the index finds."""
    from mlpmem_jax.retrieval.index_builder import ExactCache

    config = variant.config
    layout = Layout(config)
    exact = ExactCache(layout.datastore("train"), config.retrieval.key_chunk_rows, config.mesh)
    retrieval = config.retrieval.recipe()
    names = ("num_neighbors", "min_recall", "recall_queries")
    found = [
        Stage(
            artifact=layout.neighbors_by_index(split),
            recipe={
                "seed": config.seed,
                "retrieval": {name: retrieval[name] for name in names},
                "datastore": _chunking(config),
            },
            upstream=(layout.datastore("train"), layout.index, layout.datastore(split)),
            build=functools.partial(_find, config, split, exact),
            need=functools.partial(_need_by_index, config, split),
        )
        for split in SCORED
    ]
    kept = [
        stage
        for stage in variant.retrieval_stages()
        if stage.artifact.kind not in ("targets", "neighbors")
    ]
    return [*kept, *found]


def _need_by_index(config: Config, split: Split, machine: Machine, count: RowCounter) -> Need:
    from mlpmem_jax.pipeline.needs import neighbors_need

    return neighbors_need(config, split, machine, count, by_index=True)


def _find(config: Config, split: Split, exact: Any) -> Completion:
    from mlpmem_jax.retrieval.search import Search, keep_neighbors

    layout = Layout(config)
    train, rows = layout.datastore("train"), layout.datastore(split)
    search = Search(train, layout.index, exact, config.retrieval, config.seed)
    return keep_neighbors(layout.neighbors_by_index(split), rows, split, config.datastore, search)


def _chunking(config: Config) -> dict[str, int]:
    store = config.datastore
    return {"shard_rows": store.shard_rows, "chunk_rows": store.chunk_rows}


def _score_stage(part: Part, split: Split) -> Stage:
    config, layout = part.config, Layout(part.config)
    recipe: dict[str, Any] = {"datastore": _chunking(config)}
    if part.step is not None:
        recipe["step"] = part.step
        if part.kind == "mixture" and config.train.interpolation_final is not None:
            recipe["interpolation"] = "of the step"
    run: tuple[Network, ...] = () if part.kind.startswith("knn") else ("decoder", "memory")
    if part.kind == "decoder":
        run = ("decoder",)
    recipe |= compute_dtypes(config, *run)
    upstream: list[Artifact]
    if part.kind in ("decoder", "joint"):
        recipe["datastore"] |= {
            "window_tokens": config.embedding_window_tokens,
            "stride_tokens": config.embedding_stride_tokens,
        }
        recipe["corpus"] = {"attention": config.corpus.attention}
        upstream = [layout.tokens, layout.decoder if part.kind == "decoder" else layout.joint]
    elif part.kind in ("memory", "mixture"):
        upstream = [layout.tokens, layout.decoder, layout.datastore(split), layout.memory]
    else:
        recipe |= {
            "seed": config.seed,
            "evaluate": {"knn_valid_rows": config.evaluate.knn_valid_rows},
        }
        by_index = part.kind == "knn_by_index"
        found = layout.neighbors_by_index(split) if by_index else layout.neighbors(split)
        upstream = [layout.tokens, layout.datastore("train"), layout.datastore(split), found]
        if split == "test":  # τ is chosen on validation.
            upstream.append(part.scores("valid"))
    return Stage(
        artifact=part.scores(split),
        recipe=recipe,
        upstream=tuple(upstream),
        build=functools.partial(_score, part, split),
        check=functools.partial(check_devices, config, *_batches_of(part)),
        need=functools.partial(_need, part, split),
    )


def _need(part: Part, split: Split, machine: Machine, count: RowCounter) -> Need:
    from mlpmem_jax.pipeline.needs import scores_need

    if not part.kind.startswith("knn") or split == "test":  # τ is chosen on validation.
        return Need()
    return scores_need(part.config, machine, count)


def _batches_of(part: Part) -> tuple[str, ...]:
    """Returns the sections whose batches are cut over the mesh: windows are those of `embed`."""
    return ("datastore",) if part.kind in ("decoder", "joint") else ("evaluate",)


def _score(part: Part, split: Split) -> Completion:
    from mlpmem_jax.parallel.mesh import make_mesh
    from mlpmem_jax.studies.tables import row_scores
    from mlpmem_jax.training.networks import finished_decoder, finished_memory

    config, artifact = part.config, part.scores(split)
    if part.kind == "decoder":
        mesh = make_mesh(config.mesh)
        decoder = finished_decoder(config, mesh, part.step)
        return row_scores.score_decoder(config, decoder, split, artifact, mesh)
    if part.kind == "memory":
        mesh = make_mesh(config.mesh)
        memory = finished_memory(config, mesh, part.step)
        return row_scores.score_memory_alone(config, memory, split, artifact, mesh)
    if part.kind in ("joint", "mixture"):
        mesh = make_mesh(config.mesh)
        return row_scores.score_mixture(config, split, artifact, mesh, part.step)
    temperature = None
    if split == "test":
        temperature = float(part.scores("valid").load().counts["temperature"])
    by_index = part.kind == "knn_by_index"
    return row_scores.score_knn(config, split, artifact, by_index=by_index, temperature=temperature)
