"""A disk that is really full, twice: one clear line, and nothing finished is lost."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlpmem_jax.datastore.layout import Layout

ROOT = Path(__file__).resolve().parents[2]
# A file system of its own in a name space of its own: no root needed where that is allowed.
ALONE = ["unshare", "--map-root-user", "--mount"]
# The first size ends before the decoder's checkpoints, the second before the datastore.
SIZES = ("1500k", "3m", "128m")
SCRIPT = """
mount -t tmpfs -o size=1m tmpfs "${DISK}" || exit 99
for size in ${SIZES}; do
  mount -o remount,size=$size tmpfs "${DISK}" || exit 99
  "$@" > "${LOGS}/$size.out" 2> "${LOGS}/$size.err"
  echo $? > "${LOGS}/$size.rc"
  (cd "${DISK}" && find . -name manifest.json) > "${LOGS}/$size.finished"
done
cp "${DISK}/run/results/base/evaluate.json" "${LOGS}/evaluate.json"
"""


def _cannot_mount(place):
    if shutil.which("unshare") is None:
        return "unshare is not installed"
    command = [*ALONE, "mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(place)]
    tried = subprocess.run(command, capture_output=True, text=True)
    return tried.stderr.strip() if tried.returncode else None


def _starts(tmp_path):
    """Starts the same command with each size of the disk; returns what each start left."""
    disk, logs = tmp_path / "disk", tmp_path / "logs"
    disk.mkdir()
    logs.mkdir()
    config = str(ROOT / "configs" / "tiny.yaml")
    run = [sys.executable, "-m", "mlpmem_jax", "run", "--config", config]
    # What decides how BLAS and XLA compute is inherited: results are compared bit for bit.
    environment = os.environ | {
        "DISK": str(disk),
        "LOGS": str(logs),
        "SIZES": " ".join(SIZES),
        "PYTHONPATH": str(ROOT),
        "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        "MLPMEM_PROGRESS": "off",
    }
    command = [*ALONE, "bash", "-c", SCRIPT, "bash", *run, "--workdir", f"{disk}/run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    kinds = ("out", "err", "rc", "finished")
    results = json.loads((logs / "evaluate.json").read_text())
    return [{k: (logs / f"{size}.{k}").read_text() for k in kinds} for size in SIZES], results


@pytest.mark.timeout(600)
def test_a_full_disk_is_one_line_and_the_same_command_continues(tiny_run, tmp_path):
    reason = _cannot_mount(tmp_path)
    if reason is not None:
        pytest.skip(f"no small file system can be mounted here: {reason}")
    (first, second, last), results = _starts(tmp_path)
    for each in (first, second):
        assert each["rc"].strip() == "2", each
        assert each["err"].startswith("error: "), each["err"]
        assert each["err"].count("\n") == 1, each["err"]
        assert "free" in each["err"]
    assert last["rc"].strip() == "0", last["err"]
    finished = [set(each["finished"].split()) for each in (first, second, last)]
    assert "./run/tokens/manifest.json" in finished[0]
    assert "./run/decoder/base/manifest.json" in finished[1] - finished[0]
    assert finished[0] < finished[1] < finished[2]
    # What was finished is not made again.
    assert "tokens: complete" in second["out"]
    assert "decoder/base: complete" in last["out"]
    expected = json.loads((Layout(tiny_run).results.path / "evaluate.json").read_text())
    assert results == expected
