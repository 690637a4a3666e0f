"""The quickstart with several seeds, beside the paper's memory and two controls of equal cost.

    .venv/bin/python -m benchmarks.quickstart_seeds [--config FILE] [--seeds 0 1 2] [--workdir DIR]

For each seed: the whole pipeline; the memory that reads the state alone (the paper's); the
memory trained with cross-entropy only (alpha 0); and the same decoder trained for as many more
steps as embedding and memory training cost in model flops. Everything is resumable: a second
start only prints. The result is written to `<workdir>/seeds.json` and printed as Markdown.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.program import run_main
from mlpmem_jax.config.load import load_config
from mlpmem_jax.console import quiet_libraries
from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.pipeline import embed
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.resolve import resolved
from mlpmem_jax.pipeline.stage import run_stages
from mlpmem_jax.store.arrays import open_array, read_rows
from mlpmem_jax.store.files import read_json, write_json

ROWS = (
    "decoder", "longer decoder", "+ kNN-LM", "+ memory", "+ memory, state alone",
    "+ memory, CE only",
)  # fmt: skip
VARIANTS = {
    "+ memory, state alone": (
        "memory.recent_tokens=0",
        "memory.ngram_orders=[]",
    ),
    "+ memory, CE only": ("train.alpha=0.0",),
}


def command(name: str, config: str, workdir: Path, *overrides: str) -> float:
    """Runs a command in a process of its own; returns its wall time in seconds."""
    arguments = [name, "--config", config, "--workdir", str(workdir), *overrides]
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "mlpmem_jax", *arguments], check=True)
    return time.monotonic() - started


def artifacts(path: str, workdir: Path, *overrides: str) -> Artifacts:
    """Returns the artifacts of a configuration."""
    return Artifacts(resolved(load_config(path, overrides, {"workdir": str(workdir)})))


def longer_steps(run: Artifacts) -> int:
    """Pretraining steps that cost what decoder, embedding and memory training cost together."""
    pretraining = run.decoder.load().measured["model_flops"]
    extra = run.memory.load().measured["model_flops"]
    extra += run.datastore("train").load().measured["model_flops"]
    return round(run.config.pretrain.num_steps * (pretraining + extra) / pretraining)


def decoder_nats(run: Artifacts) -> float:
    """Test nats per scored token of the configured decoder, from its datastore."""
    folder = run.datastore("test").path
    run_stages([stage for stage in embed.stages(run) if stage.artifact.path == folder])
    stores = {name: open_array(folder / name) for name in ("label", "logprob")}
    label, logprob = (read_rows(s, 0, s.shape[0]) for s in stores.values())
    scored = label != TokenSplit.open(run.tokens, "test").separator_id
    return float(-np.mean(logprob[scored], dtype=np.float64))


def memory_nats(path: str, workdir: Path, *overrides: str) -> float:
    """Trains another memory; returns test nats per scored token of decoder and memory."""
    command("train", path, workdir, *overrides)
    command("evaluate", path, workdir, *overrides)
    results = artifacts(path, workdir, *overrides).results
    return float(read_json(results.path / "evaluate.json")["systems"]["memory"]["test_nats"])


def one_seed(path: str, seed: int, workdir: Path) -> dict[str, float]:
    """Runs the pipeline and the controls of one seed."""
    own = (f"seed={seed}",)
    wall = command("run", path, workdir, *own)
    run = artifacts(path, workdir, *own)
    systems = read_json(run.results.path / "evaluate.json")["systems"]
    timing = workdir / "wall.json"
    if not timing.exists():
        write_json(timing, {"run_secs": wall})
    variants = {
        row: memory_nats(path, workdir, *own, *overrides) for row, overrides in VARIANTS.items()
    }
    longer = (*own, f"pretrain.num_steps={longer_steps(run)}")
    command("pretrain", path, workdir, *longer)
    return {
        "decoder": systems["decoder"]["test_nats"],
        "longer decoder": decoder_nats(artifacts(path, workdir, *longer)),
        "+ kNN-LM": systems["knn"]["test_nats"],
        "+ memory": systems["memory"]["test_nats"],
        **variants,
        "gain": -systems["memory"]["difference_nats"],
        "gain_low": -systems["memory"]["difference_high"],
        "gain_high": -systems["memory"]["difference_low"],
        "recovered": systems["memory"]["gain_recovered"],
        "longer_steps": float(longer[1].split("=")[1]),
        "run_secs": json.loads(timing.read_text())["run_secs"],
    }


def as_markdown(results: dict[str, dict[str, float]]) -> str:
    """Returns a table: test nats per token by seed, and their mean."""
    seeds = list(results)
    lines = [
        "| test nats per token | " + " | ".join(f"seed {s}" for s in seeds) + " | mean |",
        "|---" * (len(seeds) + 2) + "|",
    ]
    shown = {row: ("{:.3f}", row) for row in ROWS}
    shown |= {
        "memory's gain": ("{:.3f}", "gain"),
        "… interval, low": ("{:.3f}", "gain_low"),
        "… interval, high": ("{:.3f}", "gain_high"),
        "share of the kNN-LM's gain": ("{:.0%}", "recovered"),
        "seconds of `run`": ("{:.0f}", "run_secs"),
    }
    for title, (form, key) in shown.items():
        values = [results[s][key] for s in seeds]
        cells = [form.format(v) for v in (*values, statistics.mean(values))]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workdir", type=Path, default=Path("runs/seeds"))
    flags = parser.parse_args()
    quiet_libraries()
    results = {
        str(seed): one_seed(flags.config, seed, flags.workdir / f"seed-{seed}")
        for seed in flags.seeds
    }
    write_json(flags.workdir / "seeds.json", results)
    print(as_markdown(results))


if __name__ == "__main__":
    run_main(main)
