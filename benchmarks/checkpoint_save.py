"""How long a step waits for a save, against the copy of the state to the host.

    .venv/bin/python -m benchmarks.checkpoint_save [--megabytes N] [--rounds N]

In turns: `Checkpoints.save` of a state, until it returns, and a copy of the same arrays to the
host. Between two saves the one before is waited for and its time to complete is told apart: that
is what training does not wait for.
"""

import argparse
import contextlib
import statistics
import tempfile
import time

import jax
import numpy as np
from etils import epath

from mlpmem_jax.training.checkpoint import Checkpoints


def main() -> None:
    """Prints the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1000, help="of the state")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    shape = (given.megabytes * 10**6 // 16 // 4 // 1024, 1024)
    # Random bits do not compress: trained weights hardly do.
    state = {f"array-{n}": jax.random.normal(jax.random.key(n), shape) for n in range(16)}
    jax.block_until_ready(state)
    saves, copies, whole = [], [], []
    with (
        tempfile.TemporaryDirectory() as directory,
        contextlib.closing(Checkpoints(epath.Path(directory), 1, ("params",))) as checkpoints,
    ):
        for step in range(given.rounds + 1):
            started = time.perf_counter()
            held = jax.tree.map(lambda array: np.array(array, copy=True), state)
            copied = time.perf_counter() - started
            del held
            started = time.perf_counter()
            checkpoints.save(step, {"params": state})
            saved = time.perf_counter() - started
            checkpoints.wait()
            complete = time.perf_counter() - started
            if step:  # The first one warms up.
                copies.append(copied)
                saves.append(saved)
                whole.append(complete)
    copy, save = statistics.median(copies), statistics.median(saves)
    print(f"state: {given.megabytes} MB, medians of {given.rounds} rounds")
    print(f"copy to the host: {1000 * copy:.0f} ms")
    print(f"save, until it returns: {1000 * save:.0f} ms ({save / copy:.2f} of the copy)")
    print(f"save, until its checksums are written: {1000 * statistics.median(whole):.0f} ms")


if __name__ == "__main__":
    main()
