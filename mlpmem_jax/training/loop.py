"""The training loop, one for all networks; a task says what is trained and on what."""

import contextlib
import dataclasses
from typing import Any

import jax
from etils import epath

from mlpmem_jax.config.stages import TrainingConfig
from mlpmem_jax.parallel.preemption import Preempted, preempted, stopping_where_asked
from mlpmem_jax.training.checkpoint import Checkpoints
from mlpmem_jax.training.content import digest_of
from mlpmem_jax.training.monitor import Monitor
from mlpmem_jax.training.optimizer import group_optimizer, parameter_groups
from mlpmem_jax.training.state import ITEM_NAMES, Blueprint, TrainState
from mlpmem_jax.training.step import TrainStep, make_train_step, waiting_groups
from mlpmem_jax.training.task import WindowTask


@dataclasses.dataclass
class Fit:
    """A finished run: its state, what the files of its last checkpoint are and hold."""

    state: TrainState
    files: dict[str, Any]
    content: str
    measured: dict[str, Any]


def fit(
    task: WindowTask,
    config: TrainingConfig,
    *,
    seed: int,
    mesh: jax.sharding.Mesh,
    directory: epath.Path,
    metrics_directory: epath.Path,
    first_step: int = 0,
    stop_step: int | None = None,
) -> Fit:
    """Trains from the last good checkpoint, if there is one, to the end.

    Args:
        config: Steps, optimiser, intervals.
        seed: Of the initial weights; the data order is the task's.
        directory: The artifact's directory; checkpoints go below it.
        metrics_directory: Where metrics go.
        first_step: Where a phase of a run in phases begins; its flops count from there.
        stop_step: Where it pauses; None: at `config.num_steps`.

    Raises:
        RunFailed: The loss or a norm is not finite.
        Preempted: The machine is about to go; the state is saved.
    """
    blueprint, train_step = assemble(task, config, seed=seed, mesh=mesh)
    stop = config.num_steps if stop_step is None else stop_step

    def saves(step: int) -> bool:
        return _due(step, config.checkpoint_interval_steps, stop)

    checkpoints = Checkpoints(directory, config.keep_checkpoints, ITEM_NAMES, saves)
    state, start = _begin(task, blueprint, checkpoints)
    monitor = Monitor(task, config, start, stop, metrics_directory, checkpoints)
    waiting = waiting_groups(config, start)
    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        feed = task.feed(range(start, stop))
        for step in range(start, stop):
            batch = next(feed)
            if waiting_groups(config, step) != waiting:
                waiting = waiting_groups(config, step)
                monitor.compiles()
            state, metrics = train_step(state, task.frozen, batch, waiting=waiting)
            if step == start:  # While it was compiled there was nothing to save.
                stack.enter_context(stopping_where_asked())
            monitor.dispatched(step + 1, metrics, feed.wait_secs)
            if _due(step + 1, config.eval_interval_steps, stop):
                monitor.pause()
                state, more = task.finish(state) if step + 1 == stop else (state, {})
                monitor.validation(step + 1, {**task.validate(state), **more})
            stops = preempted()
            if stops or saves(step + 1):
                monitor.settle()  # A poisoned state must not become a checkpoint.
                checkpoints.save(step + 1, state.items())
                monitor.flush()
            if stops:
                checkpoints.close()
                monitor.close()
                raise Preempted(f"{task.name}: saved at step {step + 1} of {stop}")
        if start == stop:  # The start before was killed when all but its record was done. What
            # `finish` set is in the checkpoint; its metrics are in the log of that start.
            monitor.pause()
            monitor.validation(stop, task.validate(state))
        monitor.settle()
        checkpoints.close()
        monitor.close()
    measured = monitor.summary(range(first_step, stop))
    return Fit(state, checkpoints.files(stop), digest_of(state.items()), measured)


def assemble(
    task: WindowTask, config: TrainingConfig, *, seed: int, mesh: jax.sharding.Mesh
) -> tuple[Blueprint, TrainStep]:
    """Returns how the state of a task is made, and the jitted step that changes it."""
    optimizer = group_optimizer(parameter_groups(config))
    blueprint = Blueprint(task.build, optimizer, seed, mesh)
    return blueprint, make_train_step(task.loss, blueprint.graphdef, optimizer, config)


def _due(step: int, interval: int, last: int) -> bool:
    return step % interval == 0 or step == last


def _begin(
    task: WindowTask, blueprint: Blueprint, checkpoints: Checkpoints
) -> tuple[TrainState, int]:
    step = checkpoints.last_good_step()
    abstract = blueprint.abstract()
    if step is not None:
        return abstract.with_items(checkpoints.restore(step, abstract.items())), step
    # Before anything is made: the device need not hold two states.
    state = task.continued(abstract)
    if state is None:
        state = task.prepare(blueprint.create())
    return state, int(state.step)
