"""Kills runs at random moments and compares what they end with, bit for bit.

    .venv/bin/python -m benchmarks.kills [--kills 200] [--config configs/tiny.yaml] [--seed 0]

One run goes through undisturbed. Others are started again and again by the same command, each
start ended by SIGKILL after a random time, until they are done; then all arrays, all weights and
the numbers of the table are compared with the undisturbed run's. Says in which artifact each kill
fell. Exit code 1 if anything differs, or if a start fails on its own.
"""

import argparse
import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from mlpmem_jax.config.load import load_config
from mlpmem_jax.console import quiet_libraries
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.networks import finished_decoder, finished_memory
from mlpmem_jax.pipeline.resolve import resolved
from mlpmem_jax.store.arrays import open_array, read_rows
from mlpmem_jax.store.manifest import BUILDING

LIMIT_SECS = 900.0
TIMED = ("latency", "seconds", "measured")  # What differs between any two runs.


def command_of(config: str, workdir: Path) -> list[str]:
    start = [sys.executable, "-m", "mlpmem_jax", "run", "--config", config]
    return [*start, "--workdir", str(workdir)]


def run_of(config: str, workdir: Path) -> Artifacts:
    """Returns the artifacts of a finished run."""
    return Artifacts(resolved(load_config(config, (), {"workdir": str(workdir)})))


def arrays_of(workdir: Path) -> dict[str, np.ndarray]:
    """Reads every array below a work directory."""
    folders = sorted(file.parent for file in workdir.rglob("zarr.json"))
    stores = {str(folder.relative_to(workdir)): open_array(folder) for folder in folders}
    return {name: read_rows(store, 0, store.shape[0]) for name, store in stores.items()}


def weights_of(run: Artifacts) -> list[np.ndarray]:
    mesh = single_device_mesh()
    networks = finished_decoder(run, mesh), finished_memory(run, mesh)
    return [np.asarray(leaf) for net in networks for leaf in jax.tree.leaves(nnx.state(net))]


def numbers_of(run: Artifacts) -> dict[str, Any]:
    raw = json.loads((run.results.path / "evaluate.json").read_text())
    return {name: value for name, value in raw.items() if name not in TIMED}


def differences(run: Artifacts, reference: Artifacts) -> list[str]:
    """Returns what differs between two finished runs."""
    found, expected = (arrays_of(Path(one.workdir)) for one in (run, reference))
    names = set(found) ^ set(expected)
    names |= {n for n in set(found) & set(expected) if not _same(found[n], expected[n])}
    pairs = zip(weights_of(run), weights_of(reference), strict=True)
    if not all(_same(one, other) for one, other in pairs):
        names.add("weights")
    if numbers_of(run) != numbers_of(reference):
        names.add("evaluate.json")
    return sorted(names)


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.tobytes() == other.tobytes()


def begun_in(workdir: Path) -> str:
    """Returns the artifact that is begun and not finished."""
    begun = sorted(str(f.parent.relative_to(workdir)) for f in workdir.rglob(BUILDING))
    return begun[0] if begun else "between artifacts"


def interrupted_start(command: list[str], after_secs: float) -> int | None:
    """Starts a command and kills it; returns its exit code, None where it was killed."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _, stderr = process.communicate(timeout=after_secs)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return None
    if process.returncode:
        print(stderr.decode(errors="replace"), flush=True)
    return process.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/tiny.yaml")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    quiet_libraries()
    draw = random.Random(flags.seed)
    places: collections.Counter[str] = collections.Counter()
    finished = 0
    with tempfile.TemporaryDirectory(prefix="mlpmem-kills-") as folder:
        # Compiled programs are kept, so that a start comes far before it is killed.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/compiled")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        workdir = Path(folder) / "undisturbed"
        began = time.monotonic()
        code = interrupted_start(command_of(flags.config, workdir), LIMIT_SECS)
        if code != 0:
            return code or 1
        whole = time.monotonic() - began
        print(f"undisturbed: {whole:.0f} s", flush=True)
        reference = run_of(flags.config, workdir)
        while sum(places.values()) < flags.kills:
            workdir = Path(folder) / f"run-{finished}"
            command = command_of(flags.config, workdir)
            while (code := interrupted_start(command, draw.uniform(0.5, whole / 5))) is None:
                places[begun_in(workdir)] += 1
            if code != 0:
                print(f"run {finished}: a start failed with {code}")
                return 1
            different = differences(run_of(flags.config, workdir), reference)
            if different:
                print(f"run {finished}: differs in {', '.join(different)}")
                return 1
            finished += 1
            print(f"{sum(places.values())} kills, {finished} runs the same", flush=True)
    for place, number in places.most_common():
        print(f"  {number:4} {place}")
    print(f"{sum(places.values())} kills in {finished} runs: all equal the undisturbed run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
