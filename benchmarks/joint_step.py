"""A step of joint training against a decoder step and an offline memory step, side by side.

    .venv/bin/python -m benchmarks.joint_step [--config FILE] [--workdir DIR] [--rounds 12]

Needs a finished run of the configuration. The three steps have the same number of tokens and
take turns in one process; the target is joint ≤ 1.05 × (decoder + memory), since the decoder
runs once. Printed: medians, and the median over rounds of the ratio.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.program import run_main
from mlpmem_jax.config.load import load_config
from mlpmem_jax.config.schema import Config
from mlpmem_jax.config.stages import TrainingConfig
from mlpmem_jax.parallel.host import keep_freed_memory
from mlpmem_jax.parallel.mesh import make_mesh
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.resolve import resolved
from mlpmem_jax.pipeline.tasks import joint_task, memory_task, pretrain_task
from mlpmem_jax.training.loop import assemble

WARM_UP = 2


def stepper(task: Any, section: TrainingConfig, mesh: jax.sharding.Mesh) -> Callable[[], float]:
    """Returns a function that makes one step on one batch and returns its seconds."""
    blueprint, step = assemble(task, section, seed=0, mesh=mesh)
    state = [task.prepare(blueprint.create())]
    with jax.set_mesh(mesh):
        batch = next(task.feed(range(1)))

    def one() -> float:
        with jax.set_mesh(mesh):
            started = time.perf_counter()
            state[0], metrics = step(state[0], task.frozen, batch)
            jax.block_until_ready((state[0], metrics))
            return time.perf_counter() - started

    return one


def steppers(alone: Config, together: Config) -> dict[str, Callable[[], float]]:
    """Returns the three steps."""
    run, joint = (Artifacts(resolved(config)) for config in (alone, together))
    mesh = make_mesh(alone.mesh)
    tasks: dict[str, tuple[Any, TrainingConfig]] = {
        "decoder": (pretrain_task(run, mesh), alone.pretrain),
        "memory": (memory_task(run, mesh), alone.train),
        "joint": (joint_task(joint, mesh), together.train),
    }
    sizes = {name: task.tokens_per_step for name, (task, _) in tasks.items()}
    assert len(set(sizes.values())) == 1, f"steps of different sizes: {sizes}"
    return {name: stepper(task, section, mesh) for name, (task, section) in tasks.items()}


def in_turns(steps: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Makes the steps in turns; returns the seconds of each, the first rounds left out."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(WARM_UP + rounds):
        for name, one in steps.items():
            spent = one()
            if turn >= WARM_UP:
                seconds[name].append(spent)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--workdir", default="runs/quickstart")
    parser.add_argument("--rounds", type=int, default=12)
    flags = parser.parse_args()
    keep_freed_memory()
    where = {"workdir": flags.workdir}
    overrides = ("train.mode=joint", "memory.gate=learned")
    steps = steppers(
        load_config(flags.config, (), where), load_config(flags.config, overrides, where)
    )
    seconds = in_turns(steps, flags.rounds)
    for name, spent in seconds.items():
        print(f"{name:<8} {statistics.median(spent):.3f} s a step")
    ratios = [
        joint / (decoder + memory)
        for decoder, memory, joint in zip(*(seconds[n] for n in steps), strict=True)
    ]
    print(f"joint / (decoder + memory): {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    run_main(main)
