"""Several processes on this machine, with stand-ins that need no JAX."""

import os
import signal
import subprocess
import sys
import time

import pytest

from mlpmem_jax.errors import PREEMPTED
from mlpmem_jax.launching import environments_of
from mlpmem_jax.parallel import processes
from tests.conftest import ROOT

# What process k does: sleep SECONDS, print, leave with CODE; "deaf" to SIGTERM.
PROGRAM = """
import os, signal, sys, time
index = int(os.environ["MLPMEM_PROCESS_INDEX"])
seconds, code, deaf = {plan}[index]
signal.signal(signal.SIGTERM, signal.SIG_IGN if deaf else signal.SIG_DFL)
print(f"out {{index}}", flush=True)
deadline = time.monotonic() + seconds
while time.monotonic() < deadline: time.sleep(0.02)
if code: print(f"error: mine {{index}}", file=sys.stderr, flush=True)
if code < 0: os.kill(os.getpid(), -code)
os._exit(code)
"""
START = """
import os, sys
from pathlib import Path
from mlpmem_jax.launching import environments_of
from mlpmem_jax.parallel import processes
processes.STOP_SECS = processes.SAVE_SECS = processes.INTERRUPT_SECS = 2.0
command = [sys.executable, "-S", "-c", {program!r}]
environments = environments_of({number}, 2, os.environ)
sys.exit(processes.run_processes(command, environments, Path({logs!r})))
"""


@pytest.fixture
def start(tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()

    def begin(plan):
        program = PROGRAM.format(plan=plan)
        text = START.format(program=program, number=len(plan), logs=str(logs))
        return subprocess.Popen(
            [sys.executable, "-c", text],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    return begin


@pytest.fixture
def run(start):
    def finish(plan):
        began = time.monotonic()
        process = start(plan)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err, time.monotonic() - began

    return finish


def test_first_has_the_terminal_and_the_others_have_logs(run, tmp_path):
    code, out, err, _ = run([(0, 0, False), (0.3, 0, False), (0, 0, False)])
    assert (code, out, err) == (0, "out 0\n", "")
    assert [path.name for path in sorted((tmp_path / "logs").iterdir())] == [
        "process-1.log", "process-2.log",
    ]  # fmt: skip
    assert (tmp_path / "logs" / "process-2.log").read_text().endswith("process-2\nout 2\n")


@pytest.mark.parametrize("deaf", [False, True])
def test_one_that_fails_takes_the_rest_down_and_is_shown_once(run, deaf):
    code, _, err, seconds = run([(600, 0, deaf), (600, 0, deaf), (0.2, 3, False)])
    assert code == 3
    assert seconds < 60
    assert "process 2 of 3 failed (exit code 3)" in err
    assert err.count("error: ") == err.count("error: mine 2") == 1


def test_a_failure_of_the_first_is_not_repeated(run):
    code, _, err, _ = run([(0.2, 1, False), (600, 0, True)])
    assert code == 1
    assert "process 0 of 2 failed (exit code 1)" in err
    assert err.count("error: ") == 1


def test_a_mistake_that_all_find_is_shown_once(run):
    code, _, err, _ = run([(0.6, 2, False), (0, 2, False), (0.1, 2, False)])
    assert code == 2
    assert err.count("error: ") == err.count("error: mine 0") == 1


def test_a_killed_process_is_named_with_its_signal(run):
    code, _, err, _ = run([(600, 0, False), (0.1, -signal.SIGKILL, False)])
    assert code == 128 + signal.SIGKILL
    assert "process 1 of 2 failed (killed by SIGKILL; out of memory?)" in err


def test_all_may_save_after_a_preemption(run):
    code, _, err, seconds = run([(1.5, PREEMPTED, False), (0, PREEMPTED, False)])
    assert code == PREEMPTED and "failed" not in err
    # One that never leaves is killed, and the run starts again all the same.
    code, _, _, seconds = run([(600, 0, True), (0, PREEMPTED, False)])
    assert code == PREEMPTED and seconds < 60


@pytest.mark.parametrize(
    ("number", "deaf", "code"),
    [(signal.SIGTERM, False, 143), (signal.SIGINT, False, 130), (signal.SIGINT, True, 130)],
)
def test_signals_reach_all(start, number, deaf, code):
    process = start([(600, 0, deaf)] * 3)
    assert process.stdout.readline() == "out 0\n"
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code


def test_no_orphans_when_the_launcher_is_killed(start):
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux tells children that their parent died")
    process = start([(600, 0, True)] * 2)
    process.stdout.readline()
    children = subprocess.run(
        ["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True
    ).stdout.split()
    assert len(children) == 2
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{child}") for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_environments():
    first, second = environments_of(2, None, {"HOME": "h", "JAX_PLATFORMS": "cuda"})
    assert (first["MLPMEM_PROCESS_INDEX"], second["MLPMEM_PROCESS_INDEX"]) == ("0", "1")
    assert first["MLPMEM_COORDINATOR"] == second["MLPMEM_COORDINATOR"]
    assert first["HOME"] == "h" and first["JAX_PLATFORMS"] == "cuda"
    assert "MLPMEM_DEVICES_PER_PROCESS" not in first
    assert environments_of(2, 4, {})[1]["MLPMEM_DEVICES_PER_PROCESS"] == "4"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nerror: x\nb", ["error: x", "b"]),
        ("error: old\nTraceback (most recent call last):\n  f\nE: y", 3),
        ("no mark", ["no mark"]),
        ("\n".join(map(str, range(100))), 40),
    ],
)
def test_last_error(text, shown):
    lines = processes.last_error(text)
    assert lines == shown if isinstance(shown, list) else len(lines) == shown


def test_mistakes_and_help_start_nothing(tmp_path):
    def launch(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "mlpmem_jax.launching", "--processes", "2", *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )

    workdir = tmp_path / "run"
    given = ["--config", "configs/tiny.yaml", "--workdir", str(workdir)]
    done = launch("pretrain", *given, "decodr.width=1")
    assert done.returncode == 2 and done.stderr.count("error: ") == 1
    done = launch("pretrain", "--help")
    assert done.returncode == 0 and "usage: mlpmem pretrain" in done.stdout
    done = launch("tokenize", *given, "--dry-run")
    assert done.returncode == 0 and done.stdout.count("# plan") == 1
    assert not workdir.exists()
    (tmp_path / "file").write_text("")
    done = launch("pretrain", *given[:2], "--workdir", str(tmp_path / "file" / "run"))
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
