"""The MLP Memory, trained to imitate the retriever, alone or together with the decoder."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlpmem_jax.config.schema import Config
from mlpmem_jax.parallel.hardware import Machine
from mlpmem_jax.pipeline.checks import check_devices, check_teacher
from mlpmem_jax.pipeline.execute import execute
from mlpmem_jax.pipeline.fitting import Need, RowCounter
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.refresh import Phases, phase_build, refresh_stages
from mlpmem_jax.pipeline.resolve import compute_dtypes
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.store.layout import Layout
from mlpmem_jax.store.manifest import Artifact, Completion


def recipe(config: Config) -> dict[str, Any]:
    """Returns what decides the networks, besides what they are trained on."""
    decided: dict[str, Any] = {
        "seed": config.seed,
        "memory": config.memory.recipe(),
        "train": config.train.recipe() | {"mix_windows": config.train_mix_windows},
    }
    if config.train.mode == "joint":
        decided["decoder"] = config.decoder.recipe()
    elif config.decoder_runs:
        decided |= compute_dtypes(config, "decoder")
    if config.decoder_runs:
        decided["corpus"] = {"attention": config.corpus.attention}
        decided["datastore"] = {"input": config.datastore.input.recipe()}
    return decided


def stages(config: Config) -> list[Stage]:
    """Returns the stage of this command; in joint mode its phases and what lies between."""
    if config.train.mode == "memory":
        build = functools.partial(_build, config)
        steps = range(config.train.num_steps)
        return [_stage(config, Layout(config).memory, _memory_upstream(config), build, steps)]
    phases, result = Phases.of(config), []
    for phase in range(len(phases.stops)):
        build = functools.partial(phase_build, phases, phase)
        upstream = functools.partial(_phase_upstream, phases, phase)
        steps = range(phases.first(phase), phases.stops[phase])
        result.append(_stage(config, phases.artifact(phase), upstream, build, steps))
        if phase < len(phases.stops) - 1:
            result += refresh_stages(phases, phase)
    return result


def _stage(
    config: Config,
    artifact: Artifact,
    upstream: Sequence[Artifact] | Callable[[], Sequence[Artifact]],
    build: Callable[[], Completion],
    steps: range,
) -> Stage:
    return Stage(
        artifact=artifact,
        recipe=recipe(config),
        upstream=upstream,
        build=build,
        check=functools.partial(_check, config),
        estimate=functools.partial(_estimate, config, steps),
        need=functools.partial(_need, config),
    )


def _memory_upstream(config: Config) -> list[Artifact]:
    layout = Layout(config)
    upstream = [layout.tokens, layout.targets("train"), layout.targets("valid"), layout.decoder]
    if not config.decoder_runs:
        upstream += [layout.datastore("train"), layout.datastore("valid")]
    return upstream


def _phase_upstream(phases: Phases, phase: int) -> list[Artifact]:
    """Returns what a phase is made from: the start or the phase before, and its targets."""
    config, layout = phases.config, Layout(phases.config)
    targets = Layout(phases.sources(phase)).targets
    upstream = [layout.tokens, targets("train"), targets("valid")]
    if phase:
        return [*upstream, phases.artifact(phase - 1)]
    if config.train.decoder_start == "checkpoint":
        upstream.append(layout.decoder)
    if config.train.memory_start == "checkpoint":
        upstream.append(layout.memory)
    return upstream


def _check(config: Config) -> None:
    check_devices(config, "train")
    check_teacher(config)


def _estimate(config: Config, steps: range) -> Mapping[str, Any]:
    from mlpmem_jax.pipeline.estimates import training_estimate

    return training_estimate(config, steps)


def _build(config: Config) -> Completion:
    from mlpmem_jax.pipeline.network_stage import train_task
    from mlpmem_jax.pipeline.tasks import memory_task

    return train_task(config, "train", memory_task, Layout(config).memory)


def _need(config: Config, machine: Machine, count: RowCounter) -> Need:
    from mlpmem_jax.pipeline.needs import training_need

    return training_need(config, machine, count)


def main(config: Config, options: Options) -> int:
    """Runs the command."""
    return execute(stages, config, options)
