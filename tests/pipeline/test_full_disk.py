"""A disk that is really full: one clear line, and nothing finished is lost."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlpmem_jax.pipeline.graph import Artifacts

ROOT = Path(__file__).resolve().parents[2]
# A file system of its own in a name space of its own: no root needed where that is allowed.
ALONE = ["unshare", "--map-root-user", "--mount"]
# Sizes of the disk and commands. `run` is refused before its first stage; `pretrain` begins, and
# the disk ends before its checkpoint; the last but one before the datastore.
STARTS = (
    ("1500k", "run"),
    ("1900k", "tokenize"),
    ("2100k", "pretrain"),
    ("3300k", "pretrain"),
    ("3300k", "run"),
    ("128m", "run"),
)
SCRIPT = """
mount -t tmpfs -o size=1m tmpfs "${DISK}" || exit 99
for start in ${STARTS}; do
  mount -o remount,size=${start%-*} tmpfs "${DISK}" || exit 99
  "$@" ${start#*-} --config "${CONFIG}" --workdir "${DISK}/run" \
    > "${LOGS}/$start.out" 2> "${LOGS}/$start.err"
  echo $? > "${LOGS}/$start.rc"
  (cd "${DISK}" && find . -name manifest.json) > "${LOGS}/$start.finished"
done
cp "${DISK}"/run/results/evaluate-*/evaluate.json "${LOGS}/evaluate.json"
"""


def _cannot_mount(place):
    if shutil.which("unshare") is None:
        return "unshare is not installed"
    command = [*ALONE, "mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(place)]
    tried = subprocess.run(command, capture_output=True, text=True)
    return tried.stderr.strip() if tried.returncode else None


def _starts(tmp_path):
    """Starts each command with its size of the disk; returns what each start left."""
    disk, logs = tmp_path / "disk", tmp_path / "logs"
    disk.mkdir()
    logs.mkdir()
    run = [sys.executable, "-m", "mlpmem_jax"]
    # What decides how BLAS and XLA compute is inherited: results are compared bit for bit.
    environment = os.environ | {
        "DISK": str(disk),
        "LOGS": str(logs),
        "STARTS": " ".join("-".join(start) for start in STARTS),
        "CONFIG": str(ROOT / "configs" / "tiny.yaml"),
        "PYTHONPATH": str(ROOT),
        "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        "MLPMEM_PROGRESS": "off",
    }
    command = [*ALONE, "bash", "-c", SCRIPT, "bash", *run]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    kinds = ("out", "err", "rc", "finished")
    results = json.loads((logs / "evaluate.json").read_text())
    names = ["-".join(start) for start in STARTS]
    return [{k: (logs / f"{name}.{k}").read_text() for k in kinds} for name in names], results


@pytest.mark.timeout(600)
def test_a_full_disk_is_one_line_and_the_same_command_continues(tiny_run, tmp_path):
    reason = _cannot_mount(tmp_path)
    if reason is not None:
        pytest.skip(f"no small file system can be mounted here: {reason}")
    starts, results = _starts(tmp_path)
    run = Artifacts(tiny_run)  # Of the same content, so with the same ids.
    refused, tokens, cut, decoder, again, last = starts
    for each in (refused, cut, again):
        assert each["rc"].strip() == "2", each
        assert each["err"].startswith("error: "), each["err"]
        assert each["err"].count("\n") == 1, each["err"]
        assert "free" in each["err"]
    for each in (tokens, decoder, last):
        assert each["rc"].strip() == "0", each["err"]
    # All stages are summed before the first: nothing is made that a later one makes useless.
    assert refused["finished"] == "" and "the artifacts to be made need" in refused["err"]
    assert "checkpoint of step" in cut["err"]
    finished = [set(each["finished"].split()) for each in starts]
    assert f"./run/artifacts/{run.tokens.relative}/manifest.json" in finished[1]
    assert finished[2] == finished[1]
    assert f"./run/artifacts/{run.decoder.relative}/manifest.json" in finished[3] - finished[2]
    assert finished[4] == finished[3] < finished[5]
    # What was finished is not made again.
    assert f"{run.tokens.title}: complete" in last["out"]
    assert f"{run.decoder.title}: complete" in last["out"]
    expected = json.loads((run.results.path / "evaluate.json").read_text())
    assert results == expected
