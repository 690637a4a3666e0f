"""Several processes joined by jax.distributed: the same result, and one error."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from zlib import crc32

import pytest
from etils import epath

from mlpmem_jax.launching import environments_of
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.training.checksums import read_checksums

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("joined_script.py")
CONTENT = str(Path(__file__).with_name("content_script.py"))
CHECKSUMS = str(Path(__file__).with_name("checksums_script.py"))
WRITERS = str(Path(__file__).with_name("writers_script.py"))
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


def test_what_one_process_cannot_reach_is_refused_by_all_at_once(join):
    code, out, err, seconds = join("unreachable")
    assert (code, out) == (2, "") and seconds < 60
    said = "error: process 1: corpus.paths=gs://ours/a.txt: cannot be reached (no credentials)"
    assert err.count(said) == 1 and "did not come" not in err


def test_a_process_with_another_configuration_is_named(join):
    code, _, err, _ = join("differ")
    assert code == 2
    said = "error: process 1 was started with different settings: memory.width=64, process 0 has "
    assert err.count(said + "32; seed=7, process 0 has 0") == 1


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


@pytest.mark.parametrize("processes", [1, 3])
def test_each_reads_its_share_of_a_checkpoint_and_all_hear_of_damage(
    on_processes, tmp_path, processes
):
    (tmp_path / "4" / "d").mkdir(parents=True)
    names = ["a", "b", "c", "d/e", "d/f"]
    for name in names:
        (tmp_path / "4" / name).write_bytes(name.encode() * 3)
    done = on_processes(processes, 1, CHECKSUMS, str(tmp_path))
    assert done.returncode == 0, done.stderr
    expected = {n: {"bytes": 3 * len(n), "crc32": f"{crc32(n.encode() * 3):08x}"} for n in names}
    assert read_checksums(epath.Path(tmp_path / "4.json")) == expected
    said = [json.loads((tmp_path / f"read-{k}.json").read_text()) for k in range(processes)]
    for index, one in enumerate(said):
        share = [Path(name).name for name in names[index::processes]]
        assert one["described"] == share and one["verified"][: len(share)] == share
        assert "truncated or changed" in one["said"] and f"{tmp_path}/4/b" in one["said"]


def test_the_manifest_knows_the_shards_of_all_processes(on_processes, tmp_path):
    found = []
    for processes in (1, 3):
        workdir = tmp_path / str(processes)
        workdir.mkdir()
        done = on_processes(processes, 1, WRITERS, str(workdir))
        assert done.returncode == 0, done.stderr
        wrote = [int((workdir / f"wrote-{index}").read_text()) for index in range(processes)]
        assert sum(wrote) == 7 and min(wrote) > 0
        found.append(Artifact(workdir, "datastore/0", "datastore").load())
    assert [len(set(about["shards"])) for about in found[0].arrays.values()] == [7, 7]
    assert found[0].arrays == found[1].arrays and found[0].fingerprint == found[1].fingerprint


def test_the_digest_of_arrays_is_the_same_on_any_devices(on_processes):
    found = set()
    for processes, devices in ((1, 1), (1, 4), (2, 2)):
        done = on_processes(processes, devices, CONTENT)
        assert done.returncode == 0, done.stderr
        found.add(done.stdout.strip())
    (digest,) = found
    assert len(digest) == 16
