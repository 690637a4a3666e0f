"""Two runs do not make the same artifact at the same time."""

import pytest

from mlpmem_jax.datastore.lock import LOCKS, only_maker
from mlpmem_jax.datastore.manifest import Artifact
from mlpmem_jax.errors import ArtifactError


def test_the_second_maker_is_refused_and_the_first_named(tmp_path):
    artifact = Artifact(tmp_path / "run", "memory/base", "memory")
    other = Artifact(tmp_path / "run", "memory/other", "memory")
    refused = pytest.raises(ArtifactError, match=r"is being made by another run \(process \d+ on")
    with only_maker(artifact), only_maker(other), refused, only_maker(artifact):
        raise AssertionError("held twice")
    with only_maker(artifact):
        assert list((tmp_path / "run" / LOCKS).iterdir())
    assert not (tmp_path / "run" / LOCKS).exists()


def test_what_a_killed_maker_left_does_not_hold(tmp_path):
    artifact = Artifact(tmp_path, "memory/base", "memory")
    (tmp_path / LOCKS).mkdir()
    (tmp_path / LOCKS / "memory.base").write_text("process 1 on nowhere")
    with only_maker(artifact):
        pass
    assert not (tmp_path / LOCKS).exists()
