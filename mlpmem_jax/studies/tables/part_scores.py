"""Parts of systems: a trained network or retriever, its stages, and its stored scores."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

from mlpmem_jax.parallel.hardware import Machine
from mlpmem_jax.pipeline import recipes, retrieve
from mlpmem_jax.pipeline.checks import check_devices
from mlpmem_jax.pipeline.fitting import Need, RowCounter
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.store.array_specs import Split
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
    def run(self) -> Artifacts:
        """The artifacts of its configuration."""
        return self.variant.run

    def scores(self, split: Split) -> Artifact:
        """Where its log-probabilities of the labels of a split lie."""
        role = f"scores/{self.kind}/{split}"
        role += "" if self.step is None else f"/step-{self.step}"
        return self.run.scores(self._recipe(split), self._inputs(split), role)

    def _recipe(self, split: Split) -> recipes.Recipe:
        config = self.run.config
        recipe: recipes.Recipe = {
            "part": self.kind,
            "split": split,
            "datastore": recipes.chunking(config),
        }
        if self.step is not None:
            recipe["step"] = self.step
            if self.kind == "mixture" and config.train.interpolation_final is not None:
                recipe["interpolation"] = "of the step"
        if self.kind.startswith("knn"):
            tuned = {"knn_valid_rows": config.evaluate.knn_valid_rows}
            return recipe | {"seed": config.seed, "evaluate": tuned}
        networks = ("decoder",) if self.kind == "decoder" else ("decoder", "memory")
        recipe |= recipes.compute_dtypes(config, *networks)
        if self.kind in ("decoder", "joint"):
            recipe["datastore"] |= {
                "window_tokens": config.embedding_window_tokens,
                "stride_tokens": config.embedding_stride_tokens,
            }
            recipe["corpus"] = {"attention": config.corpus.attention}
        return recipe

    def _inputs(self, split: Split) -> list[Artifact]:
        run = self.run
        if self.kind == "decoder":
            return [run.tokens, run.decoder]
        if self.kind == "joint":
            return [run.tokens, run.joint]
        if self.kind in ("memory", "mixture"):
            return [run.tokens, run.decoder, run.datastore(split), run.memory]
        by_index = self.kind == "knn_by_index"
        found = run.neighbors_by_index(split) if by_index else run.neighbors(split)
        inputs = [run.tokens, run.datastore("train"), run.datastore(split), found]
        return [*inputs, self.scores("valid")] if split == "test" else inputs  # τ is validation's.

    def made_of(self) -> list[str]:
        """Returns the artifacts that it takes before it can be used, by path."""
        run = self.run
        if self.kind == "decoder":
            return [run.decoder.relative]
        if self.kind == "memory":
            return [run.memory.relative]
        if self.kind == "mixture":
            return [run.decoder.relative, run.memory.relative]
        if self.kind == "joint":
            return [run.joint.relative]
        tuned_on = run.neighbors("valid")
        if self.kind == "knn_by_index":
            tuned_on = run.neighbors_by_index("valid")
        return [run.datastore("train").relative, tuned_on.relative]

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
        if self.kind == "knn":  # Targets serve memories alone, and so may the index.
            wanted = {self.run.neighbors(split).relative for split in SCORED}
            kinds = {"tokenizer", "tokens", "decoder", "datastore"}
            if self.run.config.retrieval.searches_by_index("test"):
                kinds.add("index")
            stages = [
                stage
                for stage in stages
                if stage.artifact.kind in kinds or stage.artifact.relative in wanted
            ]
        return [*stages, *(_score_stage(self, split) for split in SCORED)]


def _by_index_stages(variant: Variant) -> list[Stage]:
    """Returns the stages up to the neighbours of valid and test that the index finds."""
    kept = [
        stage
        for stage in variant.retrieval_stages()
        if stage.artifact.kind not in ("targets", "neighbors")
    ]
    return [*kept, *retrieve.by_index_stages(variant.run)]


def _score_stage(part: Part, split: Split) -> Stage:
    # The section whose batches are cut over the mesh: windows are those of `embed`.
    section = "datastore" if part.kind in ("decoder", "joint") else "evaluate"
    return Stage(
        artifact=part.scores(split),
        build=functools.partial(_score, part, split),
        check=functools.partial(check_devices, part.run, section),
        need=functools.partial(_need, part, split),
    )


def _need(part: Part, split: Split, machine: Machine, count: RowCounter) -> Need:
    from mlpmem_jax.pipeline.needs import scores_need

    if not part.kind.startswith("knn") or split == "test":  # τ is chosen on validation.
        return Need()
    return scores_need(part.run, machine, count)


def _score(part: Part, split: Split) -> Completion:
    from mlpmem_jax.parallel.mesh import make_mesh
    from mlpmem_jax.pipeline.networks import finished_decoder, finished_memory
    from mlpmem_jax.studies.tables import row_scores

    run, artifact = part.run, part.scores(split)
    if part.kind.startswith("knn"):
        temperature = None
        if split == "test":
            temperature = float(part.scores("valid").load().counts["temperature"])
        by_index = part.kind == "knn_by_index"
        return row_scores.score_knn(
            run, split, artifact, by_index=by_index, temperature=temperature
        )
    mesh = make_mesh(run.config.mesh)
    if part.kind == "decoder":
        decoder = finished_decoder(run, mesh, part.step, frozen=True)
        return row_scores.score_decoder(run, decoder, split, artifact, mesh)
    if part.kind == "memory":
        memory = finished_memory(run, mesh, part.step, frozen=True)
        return row_scores.score_memory_alone(run, memory, split, artifact, mesh)
    return row_scores.score_mixture(run, split, artifact, mesh, part.step)
