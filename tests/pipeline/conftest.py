"""What tests of the pipeline share: a finished run that they only read, texts, buckets."""

import fcntl
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlpmem_jax.__main__ import main
from mlpmem_jax.config.load import load_config
from mlpmem_jax.config.schema import Config
from mlpmem_jax.pipeline.resolve import resolved
from mlpmem_jax.store.run_record import ARTIFACTS, RUNS, RunRecord
from tests.pipeline import tokenizing

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny.yaml"


@pytest.fixture(scope="session", autouse=True)
def quick_training(short_measurement: None) -> None:
    """All of these tests train."""


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The configuration of a finished run of configs/tiny.yaml, as its commands saw it.

    The first worker that needs it makes it, the others copy it. Do not change its work directory.
    """
    workdir = tmp_path_factory.mktemp("tiny") / "run"
    if "PYTEST_XDIST_WORKER" not in os.environ:
        _run_tiny(workdir)
    else:
        shared = tmp_path_factory.getbasetemp().parent / "tiny"
        with open(f"{shared}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not shared.exists():
                _run_tiny(workdir)
                shutil.copytree(workdir, f"{shared}.copying")
                Path(f"{shared}.copying").rename(shared)
        if not workdir.exists():
            shutil.copytree(shared, workdir)
            shutil.rmtree(workdir / ARTIFACTS / RUNS)
            RunRecord.update(workdir, None, {}, {})  # Registers the copy with its own store.
    return resolved(load_config(TINY, (), {"workdir": str(workdir)}))


def _run_tiny(workdir: Path) -> None:
    assert main(["run", "--config", str(TINY), "--workdir", str(workdir)]) == 0


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards and batches of tokens so small that a tiny corpus has many."""
    tokenizing.shrink(monkeypatch.setattr)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A directory with sixty texts."""
    tokenizing.write_corpus(tmp_path / "text")
    return tmp_path


@pytest.fixture(scope="module")
def objects() -> Iterator[Any]:
    """All buckets, while the server runs."""
    from tests.pipeline.bucket_server import serving

    with serving() as held:
        yield held


_numbers = itertools.count()


@pytest.fixture
def bucket(objects: Any) -> str:
    """An empty bucket."""
    return f"gs://bucket-{next(_numbers)}"
