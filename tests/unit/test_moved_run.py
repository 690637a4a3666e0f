"""A work directory that was moved, copied or reached by a link still uses its artifacts."""

import shutil

import pytest
from etils import epath

from mlpmem_jax.config.load import load_config
from mlpmem_jax.pipeline import artifacts
from mlpmem_jax.pipeline.execute import record
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.store.listing import entries
from mlpmem_jax.store.manifest import Artifact, Completion
from mlpmem_jax.store.run_record import RunRecord, store_of


class _Run(Artifacts):
    """A run with one artifact, of the role "made"."""

    @property
    def made(self):
        return Artifact.of(self.store, "machine", {"number": 1}, label="made")


@pytest.fixture
def start(root):
    """Returns a function that makes the artifact of a work directory, or finds it made."""

    def run(workdir, store=None):
        overrides = [] if store is None else [f"store={store}"]
        made = _Run(
            load_config(root / "configs" / "tiny.yaml", overrides, {"workdir": str(workdir)})
        )
        made.workdir.mkdir(exist_ok=True)
        if not made.made.is_complete():
            made.made.begin({})
            made.made.finish()
        record(made, [Stage(made.made, Completion)])
        return made

    return run


def _users(store, workdir):
    (entry,) = entries(epath.Path(store), epath.Path(workdir))
    return entry.users


@pytest.mark.parametrize("how", [shutil.move, shutil.copytree])
def test_the_artifacts_of_a_moved_or_copied_run_are_used(start, tmp_path, root, how):
    start(tmp_path / "before")
    after = tmp_path / "after"
    how(tmp_path / "before", after)
    store = store_of(after, None)
    assert f"{after}: made" in _users(store, after)
    config = load_config(root / "configs" / "tiny.yaml", (), {"workdir": str(after)})
    assert artifacts.main(Artifacts(config), Options(str(after), remove_unused=True)) == 0
    assert start(after).made.is_complete()


def test_a_run_that_was_moved_is_registered_by_its_next_command(start, tmp_path):
    store = tmp_path / "store"
    start(tmp_path / "before", store)
    (tmp_path / "before").rename(tmp_path / "after")
    assert _users(store, tmp_path / "else") == (f"{tmp_path}/before: made",)
    start(tmp_path / "after", store)
    assert f"{tmp_path}/after: made" in _users(store, tmp_path / "else")


def test_a_store_is_found_from_any_current_directory(start, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    start(tmp_path / "run", "shared")
    monkeypatch.chdir("/")
    assert RunRecord.read(tmp_path / "run").store == f"{tmp_path}/shared"
    for folder in (tmp_path, tmp_path / "link"):
        assert _users(folder / "shared", tmp_path / "else") == (f"{tmp_path}/run: made",)


def test_a_run_that_cannot_be_seen_keeps_what_it_uses_in_a_shared_store(start, tmp_path):
    shared = tmp_path / "shared"
    start(tmp_path / "elsewhere", shared)
    (tmp_path / "elsewhere").rename(tmp_path / "unmounted")
    here = start(tmp_path / "here", shared)
    assert f"{tmp_path / 'elsewhere'}: made" in _users(shared, here.workdir)
    (registered,) = [
        file
        for file in (shared / ".runs").iterdir()
        if str(tmp_path / "elsewhere") in file.read_text()
    ]
    registered.unlink()  # Forgotten.
    assert _users(shared, here.workdir) == (f"{here.workdir}: made",)
