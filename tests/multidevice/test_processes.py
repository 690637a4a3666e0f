"""Several processes joined by jax.distributed: the same result, and one error."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlpmem_jax.launching import environments_of

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("joined_script.py")
START = """
import os, sys
from pathlib import Path
from mlpmem_jax.launching import environments_of
from mlpmem_jax.parallel.processes import run_processes
command = [sys.executable, {script!r}, {mode!r}]
sys.exit(run_processes(command, environments_of(2, 2, os.environ), Path({logs!r})))
"""

pytestmark = pytest.mark.multidevice


@pytest.fixture
def join(tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()

    def run(mode):
        text = START.format(script=str(SCRIPT), mode=mode, logs=str(logs))
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", text], capture_output=True, text=True, cwd=ROOT, timeout=300
        )
        return done.returncode, done.stdout, done.stderr, time.monotonic() - began

    return run


def test_joined(join, tmp_path):
    code, out, err, _ = join("fine")
    assert code == 0, err
    assert out == "process 0 of 2 4\n"  # and no notices of Gloo
    assert (tmp_path / "logs" / "process-1.log").read_text().endswith("process 1 of 2 4\n")


def test_an_exception_ends_the_run_and_is_shown_once(join):
    code, _, err, seconds = join("raise")
    assert code == 1
    assert seconds < 60
    assert "process 1 of 2 failed (exit code 1)" in err
    assert err.count("Traceback (most recent call last)") == 1 and "ValueError: mine" in err


def test_a_killed_process_ends_the_run(join):
    code, _, err, seconds = join("kill")
    assert code == 137
    assert seconds < 60
    assert "process 1 of 2 failed (killed by SIGKILL" in err and "Traceback" not in err


def test_what_all_refuse_is_shown_once(join):
    code, _, err, _ = join("refuse")
    assert code == 2
    assert err.count("error: all refuse") == 1


def test_a_process_with_another_configuration_is_named(join):
    code, _, err, _ = join("differ")
    assert code == 2
    said = "error: process 1 was started otherwise: memory.width=64, process 0 has 32; seed=7, "
    assert err.count(said + "process 0 has 0") == 1


@pytest.mark.slow
def test_the_others_wait_for_the_first_at_the_end(join):
    code, _, err, _ = join("slow")
    assert (code, err) == (0, "")


def test_a_process_that_never_comes_is_named():
    environment = environments_of(3, 1, os.environ)[0] | {"MLPMEM_JOIN_SECS": "4"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "fine"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: process 1, 2 of 3 did not come within 4 s: start the")
    assert done.stderr.count("\n") == 1


@pytest.mark.timeout(1800)  # it compiles three times, here on whatever is left of the machine
def test_pretraining_does_not_depend_on_the_number_of_processes(tmp_path):
    def command(name, *arguments, processes=2, devices=1):
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        launcher = ["mlpmem_jax.launching", f"--processes={processes}"]
        launcher += [f"--devices-per-process={devices}"]
        if processes == 1:
            launcher = ["mlpmem_jax"]
            environment["MLPMEM_DEVICES_PER_PROCESS"] = str(devices)
        given = [*arguments, "--config", "configs/tiny.yaml", "--workdir", str(tmp_path / name)]
        small = ["decoder.num_layers=1", "pretrain.num_steps=4", "mesh.fsdp=2"]
        done = subprocess.run(
            [sys.executable, "-m", *launcher, *given, *small],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        return done

    def metrics(name):
        file = tmp_path / name / "results" / "metrics" / "decoder-base" / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        keep = ("step", "loss", "grad_norm", "valid_loss")
        return [{key: line[key] for key in keep if key in line} for line in lines]

    done = command("two", "tokenize")
    assert done.stdout.count("tokens: made in") == 1
    shutil.copytree(tmp_path / "two", tmp_path / "one", ignore=shutil.ignore_patterns("logs"))
    command("two", "pretrain")
    command("one", "pretrain", processes=1, devices=2)
    one, two = metrics("one"), metrics("two")
    assert [line["step"] for line in two] == [2, 4, 4]
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
