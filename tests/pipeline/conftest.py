"""One finished run of the whole pipeline, shared by the tests that only read it."""

from pathlib import Path

import pytest

from mlpmem_jax.__main__ import main
from mlpmem_jax.config.load import load_config
from mlpmem_jax.config.schema import Config
from mlpmem_jax.pipeline.resolve import resolved

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny.yaml"


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The configuration of a finished run of configs/tiny.yaml, as its commands saw it.

    Do not change its work directory.
    """
    workdir = str(tmp_path_factory.mktemp("tiny") / "run")
    assert main(["run", "--config", str(TINY), "--workdir", workdir]) == 0
    return resolved(load_config(TINY, (), {"workdir": workdir}))
