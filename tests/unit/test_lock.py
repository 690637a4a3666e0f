"""Two runs do not make the same artifact at the same time."""

import os
import signal
import subprocess
import sys

import pytest

from mlpmem_jax.datastore.lock import LOCKS, only_maker
from mlpmem_jax.datastore.manifest import Artifact
from mlpmem_jax.errors import ArtifactError


def test_the_second_maker_is_refused_and_the_first_named(tmp_path):
    artifact = Artifact(tmp_path / "run", "memory/base", "memory")
    other = Artifact(tmp_path / "run", "memory/other", "memory")
    refused = pytest.raises(ArtifactError, match=r"is being made by another run \(process \d+ on")
    with only_maker(artifact), only_maker(other), refused, only_maker(artifact):
        raise AssertionError("held twice")
    with only_maker(artifact):
        assert list((tmp_path / "run" / LOCKS).iterdir())
    assert not (tmp_path / "run" / LOCKS).exists()


def test_what_a_killed_maker_left_does_not_hold(tmp_path):
    artifact = Artifact(tmp_path, "memory/base", "memory")
    (tmp_path / LOCKS).mkdir()
    (tmp_path / LOCKS / "memory.base").write_text("process 1 on nowhere")
    with only_maker(artifact):
        pass
    assert not (tmp_path / LOCKS).exists()


def test_a_second_run_of_the_same_command_is_refused(tmp_path, root):
    """The first one is held in the middle of a step; it is none the worse for the second."""
    arguments = ["pretrain", "--config", str(root / "configs" / "tiny.yaml")]
    arguments += ["--workdir", str(tmp_path / "run")]
    program = [sys.executable, "-m", "mlpmem_jax"]
    environment = os.environ | {"PYTHONPATH": str(root), "KILLED_BY": "SIGSTOP"}
    made = subprocess.run([*program, "tokenize", *arguments[1:]], env=environment, cwd=root)
    assert made.returncode == 0
    held = [sys.executable, str(root / "tests" / "pipeline" / "killed.py")]
    held += ["mlpmem_jax.training.monitor.Monitor.dispatched", "3", "after"]
    first = subprocess.Popen([*held, *arguments], env=environment, cwd=root)
    try:
        _, status = os.waitpid(first.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        second = subprocess.run(
            [*program, *arguments], env=environment, cwd=root, capture_output=True, text=True
        )
        assert second.returncode == 2
        (line,) = [line for line in second.stderr.splitlines() if line.startswith("error:")]
        assert "decoder/base" in line
    finally:
        first.send_signal(signal.SIGCONT)
    assert first.wait() == 0
    assert (tmp_path / "run" / "decoder" / "base" / "manifest.json").exists()
