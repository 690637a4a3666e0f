"""Joint training in phases: between two of them the targets are made anew.

Phase k ends at step (k + 1)·R with a checkpoint of everything. Its decoder becomes a decoder
artifact, and embed, index and retrieve make datastore and targets from it as from any other;
phase k + 1 goes on from the checkpoint with these. Each part is an artifact, so that a kill
costs no more than elsewhere.
"""

import dataclasses
import functools
from collections.abc import Sequence

from mlpmem_jax.pipeline import embed, exact_sample, index, retrieve
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.store.manifest import Artifact, Completion


@dataclasses.dataclass(frozen=True)
class Phases:
    """The phases of a joint run."""

    run: Artifacts

    @property
    def stops(self) -> tuple[int, ...]:
        """Step at which each phase ends."""
        return self.run.phase_stops

    @property
    def artifacts(self) -> list[Artifact]:
        """Checkpoints of each phase; the last one's are the joint model."""
        return self.run.joint_phases

    def first(self, phase: int) -> int:
        """Returns the step at which a phase begins."""
        return self.stops[phase - 1] if phase else 0

    def refreshed(self, phase: int) -> Artifacts:
        """Returns the artifacts that are made after a phase from its decoder."""
        recipe = {"decoder": self.run.config.decoder.recipe(), "refreshed": self.stops[phase]}
        inputs = (self.run.tokens, self.artifacts[phase])
        step = f"step {self.stops[phase]}"
        # A title of their own: in `run.json` they do not take the place of the run's own.
        title = f"{self.run.title}, {step}" if self.run.title else step
        decoder = Artifact.of(self.run.store, "decoder", recipe, inputs, f"decoder [{title}]")
        return self.run.with_given({"decoder": decoder}).titled(title)

    def is_fresh(self, phase: int) -> str | None:
        """Returns why the targets need not be made anew after a phase; None: they must."""
        agreement = self.artifacts[phase].load().measured["neighbor_agreement"]
        wanted = self.run.config.train.refresh_agreement
        if wanted >= 1 or agreement < wanted:
            return None
        return f"{agreement:.3f} of the neighbours are the same, at least {wanted} are asked for"

    def sources(self, phase: int) -> Artifacts:
        """Returns the artifacts whose datastore and targets a phase uses.

        To be asked once the phases before are done.
        """
        for before in reversed(range(phase)):
            if self.is_fresh(before) is None:
                return self.refreshed(before)
        return self.run

    def inputs(self, phase: int) -> Sequence[Artifact]:
        """Returns what a phase is made from: the start or the phase before, and its targets."""
        inputs = self.artifacts[phase].inputs
        if not phase:
            return inputs
        sources = self.sources(phase)
        return (*inputs, sources.targets("train"), sources.targets("valid"))


def phase_build(phases: Phases, phase: int) -> Completion:
    """Trains one phase."""
    from mlpmem_jax.corpus.tokens import TokenSplit
    from mlpmem_jax.parallel.mesh import make_mesh
    from mlpmem_jax.pipeline.network_stage import train_task
    from mlpmem_jax.pipeline.networks import finished_joint
    from mlpmem_jax.pipeline.settings import embedding_settings
    from mlpmem_jax.pipeline.tasks import joint_task
    from mlpmem_jax.retrieval.drift import neighbor_agreement

    artifact, sources = phases.artifacts[phase], phases.sources(phase)
    before = phases.artifacts[phase - 1] if phase else None
    # What the run starts from, and the targets of the latest refresh.
    targets = {f"targets/{split}": sources.targets(split) for split in ("train", "valid")}
    run = phases.run.with_given(targets)
    task = functools.partial(joint_task, continues=before)
    first, stop = phases.first(phase), phases.stops[phase]
    completion = train_task(run, "train", task, artifact, first_step=first, stop_step=stop)
    if phase < len(phases.stops) - 1:
        mesh = make_mesh(run.config.mesh)
        # The manifest is not written yet: the checkpoint is named by its step.
        decoder, _ = finished_joint(run, artifact, mesh, step=stop, frozen=True)
        agreement = neighbor_agreement(
            decoder,
            TokenSplit.open(sources.tokens, "train"),
            sources.datastore("train"),
            embedding_settings(sources.config, ("key",)),
            sources.config.seed,
            mesh,
        )
        measured = {**completion.measured, "neighbor_agreement": agreement}
        return dataclasses.replace(completion, measured=measured)
    return completion


def refresh_stages(phases: Phases, phase: int) -> list[Stage]:
    """Returns what is made between a phase and the next: decoder, datastore, index, targets."""
    run = phases.refreshed(phase)
    decoder = Stage(
        artifact=run.decoder,
        build=functools.partial(_export_decoder, phases, phase),
        estimate=lambda: {"model flops": 0.0},
    )
    made = [decoder, *embed.stages(run), *index.stages(run), *retrieve.stages(run)]
    of_test = [run.datastore("test"), *exact_sample.neighbors_of_test(run)]
    only_evaluated = {one.relative for one in of_test}
    skip = functools.partial(phases.is_fresh, phase)
    return [
        dataclasses.replace(stage, skip=skip)
        for stage in made
        if stage.artifact.relative not in only_evaluated
    ]


def _export_decoder(phases: Phases, phase: int) -> Completion:
    from mlpmem_jax.parallel.mesh import make_mesh
    from mlpmem_jax.pipeline.networks import finished_joint, vocab_size
    from mlpmem_jax.training.networks import save_network

    run = phases.refreshed(phase)
    artifact, mesh = phases.artifacts[phase], make_mesh(run.config.mesh)
    decoder, _ = finished_joint(phases.run, artifact, mesh)
    saved = save_network(decoder, run.decoder, phases.stops[phase], mesh)
    return dataclasses.replace(saved, counts={**saved.counts, "vocab_size": vocab_size(run)})
