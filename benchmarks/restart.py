"""How long after a kill a run of the quickstart makes its next step.

    .venv/bin/python -m benchmarks.restart [--config FILE] [--workdir runs/quickstart]

`pretrain`, and where there are targets `train`, are begun with one step more, in a work directory
of their own that shares the run's artifacts, killed (SIGKILL) once a checkpoint is complete, and
started again by the same command. The clock runs from that command to the first step that it
finishes: start of Python, checks, restoring and verifying the checkpoint, compiling, one step.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.program import run_main
from mlpmem_jax.config.load import load_config
from mlpmem_jax.config.schema import Config
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.resolve import resolved
from mlpmem_jax.store.run_record import store_of

INTERVAL = 5
LIMIT_SECS = 600.0


def last_step(metrics: Path) -> int:
    """Returns the step of the last whole line of a metrics file; 0 where there is none."""
    if not metrics.exists():
        return 0
    lines = [line for line in metrics.read_text().splitlines() if line.endswith("}")]
    return int(json.loads(lines[-1])["step"]) if lines else 0


def wait_for(metrics: Path, step: int, since: float, process: subprocess.Popen[bytes]) -> float:
    """Returns the seconds until a process has written a record of a step or a later one."""
    while time.time() - since < LIMIT_SECS:
        if process.poll() is not None:
            raise subprocess.CalledProcessError(process.returncode, process.args)
        fresh = metrics.exists() and metrics.stat().st_mtime > since
        if fresh and last_step(metrics) >= step:
            return time.time() - since
        time.sleep(0.05)
    raise SystemExit(f"{metrics}: no step {step} within {LIMIT_SECS:.0f} s")


def measure(command: str, path: str, config: Config, folder: str) -> float:
    """Returns seconds from the second start to its first finished step."""
    overrides = [
        f"store={store_of(config.workdir, config.store)}",
        f"{command}.num_steps={getattr(config, command).num_steps + 1}",
        f"{command}.checkpoint_interval_steps={INTERVAL}",
        f"{command}.log_interval_steps=1",
    ]
    start = [sys.executable, "-m", "mlpmem_jax", command, "--config", path]
    start += ["--workdir", folder, *overrides]
    longer = Artifacts(resolved(load_config(path, overrides, {"workdir": folder})))
    made = longer.decoder if command == "pretrain" else longer.memory
    made.remove()  # What another measurement left.
    name = made.relative.replace("/", "-")
    metrics = Path(folder) / "results" / "metrics" / name / "metrics.jsonl"
    sums = made.path / "checksums" / f"{INTERVAL}.json"
    first = subprocess.Popen(start, stdout=subprocess.DEVNULL)
    while not sums.exists() and first.poll() is None:
        time.sleep(0.05)
    if not sums.exists():
        raise subprocess.CalledProcessError(first.wait(), start)
    first.send_signal(signal.SIGKILL)
    first.wait()
    since = time.time()
    second = subprocess.Popen(start, stdout=subprocess.DEVNULL)
    seconds = wait_for(metrics, INTERVAL + 1, since, second)
    second.send_signal(signal.SIGKILL)
    second.wait()
    made.remove()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--workdir", type=Path, default=Path("runs/quickstart"))
    flags = parser.parse_args()
    config = load_config(flags.config, (), {"workdir": str(flags.workdir)})
    commands = ["pretrain"]
    if Artifacts(resolved(config)).targets("train").is_complete():
        commands.append("train")
    for command in commands:
        with tempfile.TemporaryDirectory(prefix="mlpmem-restart-") as folder:
            seconds = measure(command, flags.config, config, folder)
        print(f"{command}: first step {seconds:.1f} s after the restart", flush=True)


if __name__ == "__main__":
    run_main(main)
