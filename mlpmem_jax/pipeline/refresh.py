"""Joint training in phases: between two of them the targets are made anew.

Phase k ends at step (k + 1)·R with a checkpoint of everything. Its decoder becomes a decoder
artifact, and embed, index and retrieve make datastore and targets from it as from any other;
phase k + 1 goes on from the checkpoint with these. Each part is an artifact, so that a kill
costs no more than elsewhere.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from mlpmem_jax.config.schema import Config
from mlpmem_jax.pipeline import embed, index, retrieve
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.store.layout import REFRESHED, Layout
from mlpmem_jax.store.manifest import Artifact, Completion


@dataclasses.dataclass(frozen=True)
class Phases:
    """The phases of a joint run.

    Attributes:
        config: The whole configuration.
        stops: Step at which each phase ends.
    """

    config: Config
    stops: tuple[int, ...]

    @classmethod
    def of(cls, config: Config) -> "Phases":
        """Returns the phases; one, where nothing is refreshed."""
        last, interval = config.train.num_steps, config.train.refresh_interval_steps
        inner = range(interval, last, interval) if interval else ()
        return cls(config, (*inner, last))

    def first(self, phase: int) -> int:
        """Returns the step at which a phase begins."""
        return self.stops[phase - 1] if phase else 0

    def artifact(self, phase: int) -> Artifact:
        """Returns the checkpoints of a phase; the last one's are the joint model."""
        joint = Layout(self.config).joint
        if phase == len(self.stops) - 1:
            return joint
        return Artifact(joint.workdir, f"{joint.relative}.phase-{phase}", joint.kind)

    def refreshed(self, phase: int) -> Config:
        """Returns the configuration whose names are those of what is made after a phase."""
        name = f"{self.config.joint_name}{REFRESHED}{phase}"
        sections = ("decoder", "datastore", "targets")
        changed: dict[str, Any] = {
            each: getattr(self.config, each).model_copy(update={"name": name}) for each in sections
        }
        own_names = {"name": "auto", "exact_name": "auto"}
        changed["retrieval"] = self.config.retrieval.model_copy(update=own_names)
        return self.config.model_copy(update=changed)

    def is_fresh(self, phase: int) -> str | None:
        """Returns why the targets need not be made anew after a phase; None: they must."""
        agreement = self.artifact(phase).load().measured["neighbor_agreement"]
        wanted = self.config.train.refresh_agreement
        if wanted >= 1 or agreement < wanted:
            return None
        return f"{agreement:.3f} of the neighbours are the same, at least {wanted} are asked for"

    def sources(self, phase: int) -> Config:
        """Returns the configuration whose datastore and targets a phase uses.

        To be asked once the phases before are done.
        """
        for before in reversed(range(phase)):
            if self.is_fresh(before) is None:
                return self.refreshed(before)
        return self.config


def phase_build(phases: Phases, phase: int) -> Completion:
    """Trains one phase."""
    from mlpmem_jax.corpus.tokens import TokenSplit
    from mlpmem_jax.parallel.mesh import make_mesh
    from mlpmem_jax.pipeline.network_stage import train_task
    from mlpmem_jax.pipeline.settings import embedding_settings
    from mlpmem_jax.retrieval.drift import neighbor_agreement
    from mlpmem_jax.training.joint_training import JointTask
    from mlpmem_jax.training.networks import finished_joint

    artifact, sources = phases.artifact(phase), phases.sources(phase)
    before = phases.artifact(phase - 1) if phase else None
    # Names of the start, targets of the latest refresh.
    config = phases.config.model_copy(update={"targets": sources.targets})
    task = functools.partial(JointTask, continues=before)
    first, stop = phases.first(phase), phases.stops[phase]
    completion = train_task(config, "train", task, artifact, first_step=first, stop_step=stop)
    if phase < len(phases.stops) - 1:
        mesh = make_mesh(config.mesh)
        # The manifest is not written yet: the checkpoint is named by its step.
        decoder, _ = finished_joint(config, artifact, mesh, step=stop)
        layout = Layout(sources)
        agreement = neighbor_agreement(
            decoder,
            TokenSplit.open(layout.tokens, "train"),
            layout.datastore("train"),
            embedding_settings(sources, ("key",)),
            sources.seed,
            mesh,
        )
        measured = {**completion.measured, "neighbor_agreement": agreement}
        return dataclasses.replace(completion, measured=measured)
    return completion


def refresh_stages(phases: Phases, phase: int) -> list[Stage]:
    """Returns what is made between a phase and the next: decoder, datastore, index, targets."""
    config = phases.refreshed(phase)
    layout = Layout(config)
    decoder = Stage(
        artifact=layout.decoder,
        recipe={"decoder": config.decoder.recipe()},
        upstream=(layout.tokens, phases.artifact(phase)),
        build=functools.partial(_export_decoder, phases, phase),
        estimate=lambda: {"model flops": 0.0},
    )
    made = [decoder, *embed.stages(config), *index.stages(config), *retrieve.stages(config)]
    wanted = _needed(made, layout)
    skip = functools.partial(phases.is_fresh, phase)
    return [dataclasses.replace(stage, skip=skip) for stage in wanted]


def _needed(stages: Sequence[Stage], layout: Layout) -> list[Stage]:
    """Leaves out what only evaluation reads."""
    test = {layout.datastore("test").relative, layout.neighbors("test").relative}
    return [stage for stage in stages if stage.name not in test]


def _export_decoder(phases: Phases, phase: int) -> Completion:
    from mlpmem_jax.parallel.mesh import make_mesh
    from mlpmem_jax.training.networks import finished_joint, save_network, vocab_size

    config = phases.refreshed(phase)
    artifact, mesh = phases.artifact(phase), make_mesh(config.mesh)
    decoder, _ = finished_joint(phases.config, artifact, mesh)
    step = phases.stops[phase]
    files = save_network(decoder, Layout(config).decoder, step, mesh)
    counts = {"steps": step, "vocab_size": vocab_size(config)}
    return Completion(counts=counts, files=files, measured={"model_flops": 0.0})
