"""Ctrl-C and SIGTERM at every moment after the start of a command: the exit code says what came."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlpmem_jax.errors import EXIT_INTERRUPTED, PREEMPTED

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "configs" / "tiny.yaml")
CODES = {signal.SIGTERM: PREEMPTED, signal.SIGINT: EXIT_INTERRUPTED}
# The command, and a pattern of what it has printed once all its work is done.
GENERATE = (["generate", "--prompt", "a", "--prompt", "def "], "generated ")
TRAIN = (["train", "--rebuild"], r"memory \(\w{8}\): made in")
# The process must end within so many seconds, also where the machine is busy.
LIMIT_SECS = 60
STEP_SECS, START_SECS = 0.05, 4.0


def _started(command, workdir):
    """Starts a command; returns once it listens: before that, Python itself starts."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mlpmem_jax", *command, "--config", TINY, "--workdir", workdir],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    heard = sum(1 << (number - 1) for number in CODES)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(status.split("SigCgt:")[1].split()[0], 16)
        if caught & heard == heard:
            break
        time.sleep(0.002)
    return process


def _duration(command, workdir):
    started = time.monotonic()
    process = _started(command, workdir)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return time.monotonic() - started


def _check_told(command, done, workdir, number, after_secs):
    process = _started(command, workdir)
    time.sleep(after_secs)
    process.send_signal(number)
    out, err = process.communicate(timeout=LIMIT_SECS)
    about = (command[0], number.name, after_secs, process.returncode, out, err)
    assert "Traceback" not in err and "Exception" not in err and "Error" not in err, about
    if process.returncode == 0:
        assert re.search(done, out + err), about
    else:
        assert process.returncode == CODES[number], about
        line = "error: interrupted" if number == signal.SIGINT else "preempted: "
        assert err.splitlines()[-1].startswith(line), about
        assert err.endswith("stopped\n") or err.endswith("; the same command continues\n"), about
    return process.returncode


def _sweep(command, done, workdir, moments):
    codes = [
        _check_told(command, done, workdir, list(CODES)[place % len(CODES)], moment)
        for place, moment in enumerate(moments)
    ]
    assert {PREEMPTED, EXIT_INTERRUPTED} <= set(codes)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.timeout(900)
def test_generate_is_stopped_now_and_then(tiny_run):
    seconds = _duration(GENERATE[0], tiny_run.workdir)
    _sweep(*GENERATE, tiny_run.workdir, [0.0, *(seconds * k / 5 for k in range(1, 5))])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("command", "done"), [GENERATE, TRAIN], ids=["generate", "train"])
def test_stopped_at_every_moment(tiny_run, tmp_path, command, done):
    """Every 50 ms of the start, where libraries are imported and compile, then now and then."""
    workdir = str(tmp_path / "run")
    shutil.copytree(tiny_run.workdir, workdir)
    seconds = _duration(command, workdir)
    start = [k * STEP_SECS for k in range(int(min(START_SECS, seconds) / STEP_SECS))]
    later = [START_SECS + (seconds - START_SECS) * k / 12 for k in range(12)]
    _sweep(command, done, workdir, start + later)
