"""The MLP Memory: trained to imitate the retriever, alone or with the decoder, or imported."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlpmem_jax.parallel.hardware import Machine
from mlpmem_jax.pipeline.checks import check_devices, check_stored_rows, check_teacher
from mlpmem_jax.pipeline.fitting import Need, RowCounter
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.memory_import import import_stage
from mlpmem_jax.pipeline.refresh import Phases, phase_build, refresh_stages
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.store.manifest import Artifact, Completion


def stages(run: Artifacts) -> list[Stage]:
    """Returns the stage of this command; in joint mode its phases and what lies between."""
    run.sources.trains = True
    path = run.config.memory.pretrained
    if run.config.train.mode == "memory" and path is not None:
        return [import_stage(run, path)]
    if run.config.train.mode == "memory":
        steps = range(run.config.train.num_steps)
        return [_stage(run, run.memory, functools.partial(_build, run), steps)]
    # An imported memory is imported first; any other has been trained before.
    result = [] if path is None else [import_stage(run, path)]
    phases = Phases(run)
    for phase in range(len(phases.stops)):
        build = functools.partial(phase_build, phases, phase)
        steps = range(phases.first(phase), phases.stops[phase])
        upstream = functools.partial(phases.inputs, phase)
        result.append(_stage(run, phases.artifacts[phase], build, steps, upstream))
        if phase < len(phases.stops) - 1:
            result += refresh_stages(phases, phase)
    return result


def _stage(
    run: Artifacts,
    artifact: Artifact,
    build: Callable[[], Completion],
    steps: range,
    upstream: Callable[[], Sequence[Artifact]] | None = None,
) -> Stage:
    return Stage(
        artifact=artifact,
        build=build,
        upstream=upstream,
        check=functools.partial(_check, run),
        estimate=functools.partial(_estimate, run, steps),
        need=functools.partial(_need, run),
    )


def _check(run: Artifacts) -> None:
    from mlpmem_jax.pipeline.continuing import check_continued

    check_devices(run, "train")
    check_stored_rows(run)
    check_teacher(run)
    check_continued(run)


def _estimate(run: Artifacts, steps: range) -> Mapping[str, Any]:
    from mlpmem_jax.pipeline.estimates import training_estimate

    return training_estimate(run, steps)


def _build(run: Artifacts) -> Completion:
    from mlpmem_jax.pipeline.network_stage import train_task
    from mlpmem_jax.pipeline.tasks import memory_task

    return train_task(run, "train", memory_task, run.memory)


def _need(run: Artifacts, machine: Machine, count: RowCounter) -> Need:
    from mlpmem_jax.pipeline.needs import training_need

    return training_need(run, machine, count)
