"""What the path of several processes costs a training step, with one process.

    .venv/bin/python -m benchmarks.process_overhead [--rounds N] [--steps N]

A process joins `jax.distributed` as the only one of its run and trains a small decoder again and
again: in turns as one of several, which asks for notices of preemption at every step and meets
the others at barriers, and as one that is alone. In one process, because two of the same program
differ by more than what is measured. Beside it: what the joined process does while it sleeps.
"""

import argparse
import contextlib
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mlpmem_jax.launching import free_port
from mlpmem_jax.parallel import multihost
from mlpmem_jax.parallel.cluster import Cluster

if TYPE_CHECKING:
    from mlpmem_jax.config.schema import Config

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
IDLE_SECS = 10.0
QUESTIONS = 1000


@contextlib.contextmanager
def taken_for_alone() -> Iterator[None]:
    """Makes the package take the process for one that has joined no others."""
    import jax

    asked, jax.distributed.is_initialized = jax.distributed.is_initialized, lambda: False
    try:
        yield
    finally:
        jax.distributed.is_initialized = asked


def config_of(workdir: Path, seed: int, steps: int) -> "Config":
    """Returns the configuration of one training; each seed's is another decoder."""
    from mlpmem_jax.config.load import load_config

    overrides = [
        f"workdir={workdir}",
        f"seed={seed}",
        f"pretrain.num_steps={steps}",
        f"pretrain.eval_interval_steps={steps}",
        f"pretrain.checkpoint_interval_steps={steps}",
        "pretrain.log_interval_steps=5",
        "pretrain.batch_size=2",
        "pretrain.eval_batches=1",
        "decoder.num_layers=2",
        "corpus.max_bytes=300_000",
        "corpus.valid_fraction=0.1",
        "corpus.test_fraction=0.1",
    ]
    return load_config(str(CONFIG), overrides)


def start(command: str, config: "Config") -> None:
    """Runs a command in this process."""
    import importlib

    from mlpmem_jax.pipeline.options import Options

    module = importlib.import_module(f"mlpmem_jax.pipeline.{command}")
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        module.main(config, Options(workdir=config.workdir))


def secs_per_step(config: "Config") -> float:
    """Returns the median over the log intervals of a decoder's training."""
    from mlpmem_jax.pipeline.graph import Artifacts
    from mlpmem_jax.pipeline.resolve import resolved

    name = Artifacts(resolved(config)).decoder.path.name
    file = Path(config.workdir) / "results" / "metrics" / f"decoder-{name}" / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return statistics.median([r["secs_per_step"] for r in records if "secs_per_step" in r][2:])


def main() -> None:
    """Prints each round, the median ratio and what sleeping costs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=100)
    flags = parser.parse_args()
    multihost.find_cluster = lambda: Cluster(1, None, f"localhost:{free_port()}", 0)
    kinds = {"alone": taken_for_alone, "joined": contextlib.nullcontext}
    ratios = []
    with multihost.joined(), tempfile.TemporaryDirectory() as folder:
        assert multihost.is_active()
        os.environ["MLPMEM_PROGRESS"] = "off"
        import jax

        jax.config.update("jax_compilation_cache_dir", f"{folder}/compiled")
        of_seed = functools.partial(config_of, Path(folder), steps=flags.steps)
        start("tokenize", of_seed(0))
        start("pretrain", of_seed(0))
        for number in range(flags.rounds):
            secs = {}
            # Who goes first changes: the machine may be slower for a while.
            for kind in list(kinds)[:: 1 if number % 2 else -1]:
                config = of_seed(1 + 2 * number + list(kinds).index(kind))
                with kinds[kind]():
                    start("pretrain", config)
                secs[kind] = secs_per_step(config)
            ratios.append(secs["joined"] / secs["alone"])
            shown = ", ".join(f"{kind} {1e3 * one:.2f} ms" for kind, one in secs.items())
            print(f"{shown}, ratio {ratios[-1]:.4f}", flush=True)
        from mlpmem_jax.parallel.preemption import preempted

        started = time.perf_counter()
        for _ in range(QUESTIONS):
            preempted()
        question = (time.perf_counter() - started) / QUESTIONS
        before = time.process_time()
        time.sleep(IDLE_SECS)
        idle = (time.process_time() - before) / IDLE_SECS
    low, middle, high = statistics.quantiles(ratios * 2, n=4)
    print(f"median ratio {middle:.4f} (quartiles {low:.4f}, {high:.4f})")
    print(f"one question for a notice: {1e6 * question:.1f} µs")
    print(f"joined and asleep: {100 * idle:.2f} % of a core")


if __name__ == "__main__":
    main()
