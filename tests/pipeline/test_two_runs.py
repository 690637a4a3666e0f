"""Two runs that want the same artifact, here and in a bucket: one makes it, the other waits."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from etils import epath

from mlpmem_jax.errors import PREEMPTED
from mlpmem_jax.store.lock import LOCKS, only_maker
from mlpmem_jax.store.manifest import Artifact
from tests.conftest import LAUNCHER
from tests.pipeline.making import LEASE_SECS

ROOT = Path(__file__).resolve().parents[2]
TITLE = "tokenizer (tokenize): "  # Role and beginning of the id; here the path has none.
MAKING = str(ROOT / "tests" / "pipeline" / "making.py")


class Run:
    """A process of a test, and the lines that it prints."""

    def __init__(self, *command, **variables):
        self.lines = []
        self.process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )

    def until(self, text):
        """Reads up to a line that holds a text, and returns it."""
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if text in line:
                return self.lines[-1]
        raise AssertionError(f"ended without {text!r}: {self.lines}")

    def end(self):
        """Reads what is left; returns the exit code."""
        self.lines += self.process.stdout.read().splitlines()
        return self.process.wait()


@pytest.fixture
def start():
    """Returns a function that starts a process which ends with the test at the latest."""
    started = []

    def run(*command, **variables):
        started.append(Run(*command, **variables))
        return started[-1]

    yield run
    for one in started:
        one.process.kill()
        one.process.wait()
        one.process.stdout.close()


def _place(request, tmp_path, where):
    """Returns the arguments of making.py that name the place and its leases."""
    if where == "local":
        return str(tmp_path / "run"), ()
    return f"{request.getfixturevalue('bucket')}/run", (0.1,)


def _maker_of(workdir):
    artifact = Artifact(workdir, "tokenizer", "tokenizer")
    artifact.verify()
    assert not (epath.Path(workdir) / LOCKS / "tokenizer").exists()
    return int((artifact.path / "tokenizer.json").read_text())


@pytest.mark.parametrize("where", ["local", "bucket"])
def test_the_second_run_waits_and_finds_the_artifact_complete(request, tmp_path, start, where):
    workdir, lease = _place(request, tmp_path, where)
    first = start(MAKING, workdir, tmp_path / "go", *lease)
    first.until("building")
    second = start(MAKING, workdir, tmp_path / "go", *lease)
    line = second.until("waiting")
    assert re.fullmatch(
        re.escape(TITLE)
        + rf"being made by another run \(process {first.process.pid} on .+\); waiting",
        line,
    )
    time.sleep(2 * LEASE_SECS)  # A lease that were not renewed would be taken over.
    assert second.process.poll() is None
    (tmp_path / "go").touch()
    assert first.end() == 0 and second.end() == 0
    assert _maker_of(workdir) == first.process.pid
    told = [line for line in second.lines if line.startswith(TITLE)]
    assert len(told) == 2 and told[1].startswith(f"{TITLE}complete (")


@pytest.mark.parametrize("where", ["local", "bucket"])
def test_where_the_maker_is_killed_the_second_run_continues(request, tmp_path, start, where):
    workdir, lease = _place(request, tmp_path, where)
    first = start(MAKING, workdir, tmp_path / "go", *lease)
    first.until("building")
    second = start(MAKING, workdir, tmp_path / "go", *lease)
    second.until("waiting")
    first.process.kill()
    killed = time.monotonic()
    second.until(f"{TITLE}continuing")
    waited = time.monotonic() - killed
    if where == "bucket":
        assert waited > LEASE_SECS / 2  # It runs from the last heartbeat, or what was seen of it.
    (tmp_path / "go").touch()
    assert second.end() == 0
    assert _maker_of(workdir) == second.process.pid


@pytest.mark.parametrize("heartbeat", [0.1, 1000.0])
def test_a_maker_that_was_stopped_for_longer_than_its_lease_finishes_nothing(
    bucket, tmp_path, start, heartbeat
):
    """Its heartbeat tells it, or, where that does not run, its last look before the manifest."""
    workdir = f"{bucket}/run"
    first = start(MAKING, workdir, tmp_path / "go", heartbeat)
    first.until("building")
    second = start(MAKING, workdir, tmp_path / "go", 0.1)
    second.until("waiting")
    first.process.send_signal(signal.SIGSTOP)
    second.until("building")
    if heartbeat < LEASE_SECS:  # It is in the midst of its work.
        first.process.send_signal(signal.SIGCONT)
        assert first.end() == PREEMPTED
    (tmp_path / "go").touch()
    assert second.end() == 0
    manifest = epath.Path(workdir) / "tokenizer" / "manifest.json"
    content = manifest.read_bytes()
    first.process.send_signal(signal.SIGCONT)
    assert first.end() == PREEMPTED
    (line,) = [line for line in first.lines if line.startswith("error:")]
    assert f"{workdir}/{LOCKS}/tokenizer: another run has taken over" in line
    assert not any("made in" in line or "Traceback" in line for line in first.lines)
    assert manifest.read_bytes() == content


def test_several_processes_wait_together_and_are_told_to_stop_meanwhile(tmp_path, start):
    artifact = Artifact(tmp_path / "run", "tokenizer", "tokenizer")
    (tmp_path / "go").touch()
    (tmp_path / "logs").mkdir()
    launched = ("-c", LAUNCHER, 2, 1, tmp_path / "logs", MAKING, tmp_path / "run", tmp_path / "go")
    with only_maker(artifact):
        stopped = start(*launched)
        stopped.until("waiting")
        stopped.process.send_signal(signal.SIGTERM)
        assert stopped.end() == PREEMPTED
        assert any(f"{TITLE}is being made by another run" in line for line in stopped.lines)
        waiting = start(*launched)
        waiting.until("waiting")
    assert waiting.end() == 0
    assert waiting.lines[-1].startswith(f"{TITLE}made in")
    assert not (tmp_path / "run" / LOCKS).exists()


@pytest.mark.slow
def test_a_second_run_of_a_command_that_trains(tmp_path, start):
    """The first one is held in the middle of a step; it is none the worse for the second."""
    flags = ["--config", ROOT / "configs" / "tiny.yaml", "--workdir", tmp_path / "run"]
    assert start("-m", "mlpmem_jax", "tokenize", *flags).end() == 0
    held = ["mlpmem_jax.training.monitor.Monitor.dispatched", 3, "after"]
    killed = ROOT / "tests" / "pipeline" / "killed.py"
    first = start(killed, *held, "pretrain", *flags, KILLED_BY="SIGSTOP")
    _, status = os.waitpid(first.process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    second = start("-m", "mlpmem_jax", "pretrain", *flags)
    second.until(": being made by another run")
    first.process.send_signal(signal.SIGCONT)
    assert first.end() == 0 and second.end() == 0
    assert any(re.match(r"decoder \(\w{8}\): made in", line) for line in first.lines)
    assert any(re.match(r"decoder \(\w{8}\): complete", line) for line in second.lines)
