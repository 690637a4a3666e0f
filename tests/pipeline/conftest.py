"""What tests of the pipeline share: a finished run that they only read, texts, buckets."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlpmem_jax.__main__ import main
from mlpmem_jax.config.load import load_config
from mlpmem_jax.config.schema import Config
from mlpmem_jax.pipeline.resolve import resolved
from tests.pipeline import tokenizing

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny.yaml"


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The configuration of a finished run of configs/tiny.yaml, as its commands saw it.

    Do not change its work directory.
    """
    workdir = str(tmp_path_factory.mktemp("tiny") / "run")
    assert main(["run", "--config", str(TINY), "--workdir", workdir]) == 0
    return resolved(load_config(TINY, (), {"workdir": workdir}))


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
