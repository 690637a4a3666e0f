"""A training step of the memory by what it reads, in turns in one process.

    .venv/bin/python -m benchmarks.memory_inputs [--config FILE] [--workdir runs/quickstart]
        [--rounds 12]

Reads the rows of a finished run. Prints the median seconds of a step for the paper's memory (the
state alone), with two recent tokens, and with hashed 2-grams and 3-grams besides, and the median
of the ratios to the first, taken within rounds.
"""

import argparse
import statistics

from benchmarks.joint_step import in_turns, stepper
from benchmarks.program import run_main
from mlpmem_jax.config.load import load_config
from mlpmem_jax.parallel.host import keep_freed_memory
from mlpmem_jax.parallel.mesh import make_mesh
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.resolve import resolved
from mlpmem_jax.pipeline.tasks import memory_task

INPUTS = {
    "state": ("memory.recent_tokens=0", "memory.ngram_orders=[]"),
    "+ 2 tokens": ("memory.recent_table=decoder", "memory.ngram_orders=[]"),
    "+ n-grams": ("memory.recent_table=decoder",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--workdir", default="runs/quickstart")
    parser.add_argument("--rounds", type=int, default=12)
    flags = parser.parse_args()
    keep_freed_memory()
    steps = {}
    for name, overrides in INPUTS.items():
        config = load_config(flags.config, overrides, {"workdir": flags.workdir})
        mesh = make_mesh(config.mesh)
        steps[name] = stepper(memory_task(Artifacts(resolved(config)), mesh), config.train, mesh)
    seconds = in_turns(steps, flags.rounds)
    for name, spent in seconds.items():
        ratios = [own / first for own, first in zip(spent, seconds["state"], strict=True)]
        median = statistics.median(spent)
        print(f"{name:<12} {median:.3f} s a step, ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    run_main(main)
