"""kill -9 while ScaNN builds: the same command continues, and the index is the same bit for bit."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlpmem_jax.config.schema import Config
from mlpmem_jax.store.files import read_json
from mlpmem_jax.store.run_record import ARTIFACTS
from tests.pipeline.conftest import TINY
from tests.pipeline.roles import place_of

HERE = Path(__file__).resolve().parent
WRITTEN = "mlpmem_jax.retrieval.approximate._check_written"
ENGINE = ("retrieval.engine=scann", "retrieval.shard_rows=10000")


def _index(workdir: Path, *killed: str) -> subprocess.CompletedProcess[str]:
    arguments = ["index", "--config", str(TINY), "--workdir", str(workdir), *ENGINE]
    command = [sys.executable, str(HERE / "killed.py"), *(killed or (WRITTEN, "0", "after"))]
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    return subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_build_goes_on_and_equals_an_uninterrupted_one(tiny_run: Config, tmp_path: Path):
    pytest.importorskip("scann")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for workdir in (whole, stopped):
        for name in ("tokenizer", "tokens", "decoder", "datastore"):
            shutil.copytree(Path(tiny_run.workdir) / ARTIFACTS / name, workdir / ARTIFACTS / name)
    assert _index(whole).returncode == 0
    for number in ("2", "1"):  # the second shard; then, after a restart, the same one again
        assert _index(stopped, WRITTEN, number, "before").returncode == -signal.SIGKILL
        index = place_of(stopped, "index")
        assert [path.name for path in index.glob("shard-*")] == ["shard-00000"]
        assert list(index.glob("building-*"))  # nobody cleaned up
        first = (index / "shard-00000" / "dataset.npy").stat().st_mtime_ns
    last = _index(stopped)
    assert last.returncode == 0, last.stderr
    assert not list(index.glob("building-*"))
    assert (index / "shard-00000" / "dataset.npy").stat().st_mtime_ns == first  # not built again
    names = ("fingerprint", "files", "counts")
    expected, found = (read_json(place_of(w, "index") / "manifest.json") for w in (whole, stopped))
    assert {n: found[n] for n in names} == {n: expected[n] for n in names}
