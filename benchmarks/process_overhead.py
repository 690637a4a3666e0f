"""What the path of several processes costs a training step, with one process.

    .venv/bin/python -m benchmarks.process_overhead [--rounds N] [--steps N]

In turns: `pretrain` by a process that is alone, and by one that has joined
`jax.distributed` as the only process of its run, so that it asks for notices of preemption
and passes barriers like each of many. Medians of the seconds a step, after compilation.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ALONE = "from mlpmem_jax.__main__ import main; import sys; sys.exit(main(sys.argv[1:]))"
# One process of the launcher is alone: the benchmark joins it all the same.
JOINED = f"""
from mlpmem_jax.launching import _free_port
from mlpmem_jax.parallel import multihost
from mlpmem_jax.parallel.cluster import Cluster
multihost.find_cluster = lambda: Cluster(1, None, f"localhost:{{_free_port()}}", 0)
{ALONE}
"""
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"


def secs_per_step(workdir: Path, name: str, program: str, steps: int) -> float:
    """Trains a decoder of this name; returns the median over the log intervals."""
    overrides = [
        f"decoder.name={name}",
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
    arguments = ["--config", str(CONFIG), "--workdir", str(workdir), *overrides]
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(workdir / "compiled"),
        "MLPMEM_PROGRESS": "off",
    }
    for command, started_by in (("tokenize", ALONE), ("pretrain", program)):
        done = subprocess.run(
            [sys.executable, "-c", started_by, command, *arguments],
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(done.stderr)
    file = workdir / "results" / "metrics" / f"decoder-{name}" / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return statistics.median([r["secs_per_step"] for r in records if "secs_per_step" in r][2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    flags = parser.parse_args()
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(flags.rounds):
            # Who goes first changes: the machine may be slower for a while.
            order = [("alone", ALONE), ("joined", JOINED)][:: 1 if number % 2 else -1]
            secs = {
                name: secs_per_step(Path(folder), f"{name}-{number}", program, flags.steps)
                for name, program in order
            }
            ratios.append(secs["joined"] / secs["alone"])
            print(
                f"alone {1e3 * secs['alone']:.2f} ms, joined {1e3 * secs['joined']:.2f} ms, "
                f"ratio {ratios[-1]:.4f}",
                flush=True,
            )
    print(f"median ratio {statistics.median(ratios):.4f}")


if __name__ == "__main__":
    main()
