"""The loader with rows dealt out of more and more windows, in turns.

    .venv/bin/python -m benchmarks.mixed_rows [--config FILE] [--workdir DIR] [--mix 1 8 32]
        [--steps 100] [--rounds 3]

Reads the batches of `train` from a finished run, without a network, and prints rows a second, the
time as a ratio to the first of `--mix`, the process's peak memory after its first measurement (it
only grows: name them ascending), and the rows a second that training itself took.
"""

import argparse
import resource
import statistics
import time

from benchmarks.program import run_main
from mlpmem_jax.config.load import load_config
from mlpmem_jax.console import quiet_libraries
from mlpmem_jax.input.feed import Feed
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.resolve import resolved
from mlpmem_jax.pipeline.tasks import run_data


def seconds(run: Artifacts, mix_windows: int, steps: int) -> float:
    """Returns the seconds that `steps` batches take, the first one included."""
    config = run.config
    source = run_data(run, "train").stored_rows("train", config.train_window_tokens)
    started = time.perf_counter()
    feed = Feed(
        source,
        single_device_mesh(),
        batch_size=config.train.batch_size,
        seed=config.seed,
        steps=range(steps),
        prefetch=config.train.prefetch_batches,
        mix_windows=mix_windows,
    )
    for _ in feed:
        pass
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--workdir")
    parser.add_argument("--mix", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    quiet_libraries()
    config = load_config(flags.config, (), {"workdir": flags.workdir} if flags.workdir else {})
    rows = flags.steps * config.train.batch_size * config.train_window_tokens
    spent: dict[int, list[float]] = {mix: [] for mix in flags.mix}
    peak: dict[int, float] = {}
    run = Artifacts(resolved(config))
    seconds(run, 1, 2)  # Imports, files.
    for _ in range(flags.rounds):
        for mix in flags.mix:
            spent[mix].append(seconds(run, mix, flags.steps))
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            peak.setdefault(mix, used)
    first = statistics.median(spent[flags.mix[0]])
    for mix, times in spent.items():
        median = statistics.median(times)
        print(
            f"mix {mix:4}: {rows / median:12,.0f} rows/s, time {median / first:.2f}, "
            f"peak {peak[mix]:,.0f} MiB"
        )
    measured = run.memory.load().measured
    print(
        f"training: {measured['tokens_per_sec']:,.0f} rows/s, "
        f"{measured['input_wait_share']:.1%} of it waiting for rows"
    )


if __name__ == "__main__":
    run_main(main)
