"""Search in a datastore larger than the memory for it, against the search with all keys in memory.

    .venv/bin/python -m benchmarks.search_memory [--rows 1000000] [--width 128] [--queries 8192]
        [--neighbors 128] [--times 4] [--rounds 2] [--workdir DIR]

Makes up a datastore and searches the rows of another split in it, exactly and with ScaNN where it
is installed, and turns what is found into targets. Each search is a process of its own, with memory
for all keys and for one part in `--times` of them, in turns. Prints seconds and the peak of each
process's resident memory, which must not exceed the budget by more than 1 GB, and whether all found
the same.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
from etils import epath

from benchmarks.program import run_main
from mlpmem_jax.config.data import DatastoreConfig, RetrievalConfig, TargetsConfig
from mlpmem_jax.config.networks import MeshConfig
from mlpmem_jax.console import quiet_libraries, say
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.retrieval.engine import is_approximate_installed
from mlpmem_jax.retrieval.estimates import exact_bytes, index_shard_bytes
from mlpmem_jax.retrieval.index_builder import ExactCache, build_index
from mlpmem_jax.retrieval.search import Search, keep_neighbors
from mlpmem_jax.retrieval.targets import TargetInputs, make_valid_targets
from mlpmem_jax.store.array_specs import datastore_arrays
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.shards import ShardWriter

_ALLOWED_BYTES = 10**9
_VOCAB = 4096
_SEPARATOR = 0


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--queries", type=int, default=8192)
    parser.add_argument("--neighbors", type=int, default=128)
    parser.add_argument("--times", type=int, default=4, help="keys are so many budgets large")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workdir")
    parser.add_argument("--task", choices=("make", "index", "exact", "scann"), help="of a process")
    parser.add_argument("--memory-bytes", type=int, default=0)
    parser.add_argument("--out")
    return parser.parse_args()


class Datastore:
    """A made-up datastore and what is made from it.

    Args:
        flags: Of the command line.
    """

    def __init__(self, flags: argparse.Namespace):
        self.flags = flags
        self.root = epath.Path(flags.workdir)
        self.chunking = DatastoreConfig(dtype="float16", shard_rows=16384, chunk_rows=512)
        self.retrieval = RetrievalConfig(
            num_neighbors=flags.neighbors,
            query_batch=2048,
            # Eight shards: the index in a quarter of its memory is searched in four parts.
            shard_rows=-(-flags.rows // (2 * flags.times)),
            memory_bytes=flags.memory_bytes or "auto",
        )
        kinds = {"tokens": "tokens", "train": "datastore", "valid": "datastore"}
        kinds |= {"index": "index", "train_targets": "targets"}
        self.artifacts = {name: Artifact(self.root, name, kind) for name, kind in kinds.items()}

    def make(self) -> None:
        """Writes keys in clusters, with the labels that these have."""
        generator = np.random.default_rng(0)
        centre_CD = generator.normal(size=(2000, self.flags.width)).astype(np.float32)
        counts = {"separator_id": _SEPARATOR, "vocab_size": _VOCAB}
        for name, about in (("tokens", counts), ("train_targets", {"temperature": 10.0})):
            self.artifacts[name].begin({})
            self.artifacts[name].finish(counts=about)
        specs = datastore_arrays(self.chunking, self.flags.width)
        specs = {name: specs[name] for name in ("key", "label", "logprob")}
        for split, num_rows in (("train", self.flags.rows), ("valid", self.flags.queries)):
            artifact = self.artifacts[split]
            artifact.begin({})
            writer = ShardWriter(artifact.path, specs, num_rows)
            for rows in writer.own_rows():
                count = rows.stop - rows.start
                cluster = generator.integers(0, len(centre_CD), count)
                noise = generator.normal(size=(count, self.flags.width)).astype(np.float32)
                logprob = np.full(count, -np.log(_VOCAB))
                key = centre_CD[cluster] + 0.5 * noise
                writer.put(rows.start, {"key": key, "label": cluster + 1, "logprob": logprob})
            artifact.finish(counts={"rows": num_rows}, arrays=writer.close())

    def index(self) -> None:
        """Builds the index."""
        mesh, artifact = single_device_mesh(), self.artifacts["index"]
        artifact.begin({})
        made = build_index(artifact, self.artifacts["train"], self.retrieval, 0, mesh)
        artifact.finish(counts=made.counts, files=made.files, measured=made.measured)

    def search(self, engine: str) -> None:
        """Searches for the other split's rows and makes their targets."""
        train, valid = self.artifacts["train"], self.artifacts["valid"]
        exact = ExactCache(train, self.retrieval, MeshConfig())
        index = None if engine == "exact" else self.artifacts["index"]
        search = Search(train, index, exact, self.retrieval, 0, self.artifacts["tokens"])
        out = epath.Path(self.flags.out)
        found = Artifact(out, "neighbors", "neighbors")
        found.begin({})
        made = keep_neighbors(found, valid, "valid", self.chunking, search)
        found.finish(counts=made.counts, arrays=made.arrays, measured=made.measured)
        exact.release()
        targets = Artifact(out, "targets", "targets")
        targets.begin({})
        given = (self.artifacts["tokens"], valid, found, TargetsConfig(), self.chunking)
        inputs = TargetInputs(*given)
        made = make_valid_targets(targets, inputs, train, self.artifacts["train_targets"])
        manifest = targets.finish(counts=made.counts, arrays=made.arrays)
        shards = {name: about["shards"] for name, about in manifest.arrays.items()}
        (out / "shards.json").write_text(json.dumps(shards))


def _process(flags: argparse.Namespace, task: str, memory_bytes: int, out: str) -> dict[str, Any]:
    """Runs a task in a process of its own; returns its seconds and peak memory."""
    own = {name: value for name, value in vars(flags).items() if name not in ("task", "out")}
    own |= {"memory_bytes": memory_bytes}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in own.items()]
    command = [sys.executable, "-m", "benchmarks.search_memory", *words]
    done = subprocess.run(
        [*command, f"--task={task}", f"--out={out}"], check=True, stdout=subprocess.PIPE, text=True
    )
    about: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return about


def _task(flags: argparse.Namespace) -> None:
    started = time.monotonic()
    datastore = Datastore(flags)
    if flags.task in ("make", "index"):
        getattr(datastore, flags.task)()
    else:
        datastore.search(flags.task)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    say(json.dumps({"seconds": time.monotonic() - started, "peak_bytes": peak}))


def main() -> None:
    flags = _parsed()
    quiet_libraries()
    if flags.task:
        _task(flags)
        return
    with tempfile.TemporaryDirectory(dir=flags.workdir, prefix="search-memory-") as workdir:
        flags.workdir = workdir
        _process(flags, "make", 0, "")
        keys = exact_bytes(flags.rows, flags.width, 1)
        say(f"{flags.rows:,} rows of width {flags.width}: {keys / 1e6:,.0f} MB of keys in float32")
        whole = {"exact": keys}
        if is_approximate_installed():
            built = _process(flags, "index", 0, "")
            say(f"index: {built['seconds']:.0f} s, peak {built['peak_bytes'] / 1e6:,.0f} MB")
            shards = 2 * flags.times
            whole["scann"] = shards * index_shard_bytes(
                -(-flags.rows // shards), flags.width, RetrievalConfig()
            )
        for engine, memory in whole.items():
            _compare(flags, engine, memory)


def _compare(flags: argparse.Namespace, engine: str, memory_bytes: int) -> None:
    budgets = {"all in memory": memory_bytes, "in parts": -(-memory_bytes // flags.times)}
    seconds: dict[str, list[float]] = {name: [] for name in budgets}
    peaks: dict[str, list[int]] = {name: [] for name in budgets}
    made = set()
    for number in range(flags.rounds):
        for name, budget in budgets.items():
            out = f"{flags.workdir}/{engine}-{number}-{budget}"
            about = _process(flags, engine, budget, out)
            seconds[name].append(about["seconds"])
            peaks[name].append(about["peak_bytes"])
            made.add((epath.Path(out) / "shards.json").read_text())
    for name, budget in budgets.items():
        peak = max(peaks[name])
        verdict = "within" if peak <= budget + _ALLOWED_BYTES else "NOT WITHIN"
        spent = ", ".join(f"{each:.1f}" for each in seconds[name])
        say(
            f"{engine}, {name}: {spent} s; peak {peak / 1e6:,.0f} MB, {verdict} 1 GB of the budget "
            f"of {budget / 1e6:,.0f} MB"
        )
    ratio = min(seconds["in parts"]) / min(seconds["all in memory"])
    same = "the same targets" if len(made) == 1 else "DIFFERENT TARGETS"
    say(f"{engine}: in parts takes {ratio:.2f} times as long; {same}")


if __name__ == "__main__":
    run_main(main)
