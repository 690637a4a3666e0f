"""Runs checks in a process of its own with eight simulated devices."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

NUM_DEVICES = 8
TIMEOUT_SECS = 300


def environment_of_eight_devices() -> dict[str, str]:
    """Returns the environment of a process with eight simulated devices."""
    flags = f"--xla_force_host_platform_device_count={NUM_DEVICES}"
    return os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }


@pytest.fixture
def on_eight_devices() -> Callable[..., str]:
    """Returns a function that runs a script of this folder and returns what it printed.

    A failed assertion in the script fails the test with the script's traceback.
    """

    def run(script: str, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name(script)), *arguments],
            env=environment_of_eight_devices(),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECS,
            check=False,
        )
        assert done.returncode == 0, f"{script} {' '.join(arguments)}\n{done.stderr[-6000:]}"
        return done.stdout

    return run
