"""What all tests share. JAX is configured through the environment, so that the processes
which tests start inherit it and tests that need no JAX do not import it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("MLPMEM_PROGRESS", "off")
# Images of containers often set it; then each process that a test starts compiles the package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Started in the background (nohup, a job of a script) this process ignores signals, and so
# would those that tests start and then interrupt: handlers, unlike ignoring, end at exec.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)
_COMPILED = tempfile.TemporaryDirectory(prefix="mlpmem-compiled-")
# Tests start the same tiny networks dozens of times: compiled once, they take a third of the
# time. A directory of this session's own, so that no result depends on an earlier one.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _COMPILED.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
# Compiling such networks takes longer than running them. JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests
# what users run; .ci/run does so with its second Python.
_OLD_EMITTERS = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1":
    # On CPU the older of two code generators takes a third of the time; XLA ignores names that it
    # does not know.
    _flags = os.environ.get("XLA_FLAGS", "").replace(_OLD_EMITTERS, "")
    os.environ["XLA_FLAGS"] = f"{_flags} {_OLD_EMITTERS}".strip()

import pytest  # noqa: E402

from mlpmem_jax.config.load import load_config  # noqa: E402
from mlpmem_jax.config.schema import Config  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "unit" / "golden"
UPDATE = "MLPMEM_UPDATE_GOLDEN"


def load_shipped(path: Path) -> Config:
    """Loads a configuration; where a user has a pretrained decoder, a tiny one stands for it."""
    if "\n  pretrained: " not in path.read_text(encoding="utf-8"):
        return load_config(path)
    tokenizer = Path(_COMPILED.name) / "tokenizer.json"
    tokenizer.write_text(json.dumps({"added_tokens": [{"id": 0, "content": "<s>"}]}))
    given = (
        f"decoder.pretrained={GOLDEN / 'pretrained' / 'llama'}",
        "decoder.context_tokens=64",
        "datastore.stride_tokens=auto",  # What follows from its window and its width.
        "memory.width=16",
        f"tokenizer.path={tokenizer}",
        "tokenizer.separator=<s>",
    )
    return load_config(path, given)


@pytest.fixture
def root() -> Path:
    """The project's directory."""
    return ROOT


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Config]:
    """Returns a maker of tiny configurations: make_config("decoder.num_layers=3", …)."""

    def make(*overrides: str, workdir: Path | None = None) -> Config:
        return load_config(
            ROOT / "configs" / "tiny.yaml",
            overrides,
            {"workdir": str(workdir or tmp_path / "run")},
        )

    return make


@pytest.fixture
def tiny_config(make_config: Callable[..., Config]) -> Config:
    """The tiny configuration, with a work directory of the test's own."""
    return make_config()


@pytest.fixture(scope="session")
def short_measurement() -> Iterator[None]:
    """Each training measures what this CPU can do: for 60 ms in place of 400."""
    from mlpmem_jax.training import flops

    with pytest.MonkeyPatch.context() as patch:
        measure = flops.measure_cpu_flops
        patch.setattr(flops, "measure_cpu_flops", lambda *_: measure(0.06))
        yield


@pytest.fixture
def check_golden() -> Callable[[Path | str, str], None]:
    """Compares a text with a stored one (a name in tests/unit/golden, or a path)."""

    def check(name: Path | str, text: str) -> None:
        path = GOLDEN / name
        if os.environ.get(UPDATE) == "1":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        stored = path.read_text(encoding="utf-8") if path.exists() else ""
        assert text == stored, f"{path} is not current; {UPDATE}=1 bash launch/test.sh writes it"

    return check


# The launcher's own supervision, around any Python command.
LAUNCHER = """
import json, os, sys
from pathlib import Path
from mlpmem_jax.launching import environments_of
from mlpmem_jax.parallel.processes import run_processes
processes, devices, logs, *command = sys.argv[1:]
environments = environments_of(int(processes), int(devices), os.environ)
sys.exit(run_processes([sys.executable, *command], environments, Path(logs)))
"""


@pytest.fixture
def on_processes(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Returns a function that runs a Python command in N processes of D devices each."""

    def run(
        processes: int, devices: int, *command: str, variables: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        logs = tmp_path / "logs"
        logs.mkdir(exist_ok=True)
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        environment |= variables or {}
        start = [sys.executable, "-c", LAUNCHER, str(processes), str(devices), str(logs)]
        if processes == 1:
            environment["MLPMEM_DEVICES_PER_PROCESS"] = str(devices)
            start = [sys.executable]
        return subprocess.run(
            [*start, *command], env=environment, capture_output=True, text=True, cwd=ROOT
        )

    return run


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """An environment with everything that the tests run with, so that nothing is installed."""
    venv = tmp_path / "venv"
    for name in ("bin", "installed"):
        (venv / name).mkdir(parents=True)
    (venv / "pyvenv.cfg").touch()
    python = venv / "bin" / "python"
    python.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    shutil.copy(ROOT / "requirements.txt", venv / "installed")
    return venv


@pytest.fixture
def run_sh(installed: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Returns a function that calls launch/run.sh as a user does, with nothing to install."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"MLPMEM_VENV": str(installed), "MLPMEM_RESTARTS": "0"}
        environment.pop("MLPMEM_PYTHON", None)  # would ask for an environment of its own
        return subprocess.run(
            ["bash", str(ROOT / "launch" / "run.sh"), *arguments],
            env=environment,
            capture_output=True,
            text=True,
        )

    return run
