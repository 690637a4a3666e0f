"""Paths in buckets: what cannot be reached or written is named for every key."""

import re

import pytest
from etils.epath import backend
from fsspec import AbstractFileSystem

from mlpmem_jax.config.keys import all_keys
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.store.files import check_reachable

SETTINGS = {
    "workdir": "gs://runs/a",
    "seed": 0,
    "corpus": {
        "paths": ["gs://texts/*.txt", "gs://texts/more/*.txt", "here/*.txt"],
        "train": {"paths": []},
        "more": [{"paths": ["here.txt"]}, {"paths": ["gs://texts/b.txt", "s3://others/b.txt"]}],
    },
    "tokenizer": {"path": "s3://others/tokenizer.json"},
    "targets": {"workdir": None},
}


class Unreachable(AbstractFileSystem):
    """A driver whose errors nobody else has, of several lines."""

    class Refused(Exception):
        pass

    cachable = False

    def info(self, path, **_):
        raise self.Refused(f"no route to {path}\nask the administrator")

    def exists(self, path, **_):
        self.info(path)


@pytest.fixture
def drivers(monkeypatch):
    """Lets a test say what file systems etils finds; returns how many questions they got."""

    def use(make):
        asked = []

        def find(name):
            asked.append(name)
            return make(name)

        monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", find)
        return asked

    return use


def test_a_missing_package_is_named_for_every_key(drivers):
    def missing(name):
        raise ImportError(f"Please install the driver of {name}")

    asked = drivers(missing)
    with pytest.raises(ConfigError) as caught:
        check_reachable(SETTINGS)
    need = "paths in buckets need further packages (pip install -r requirements-remote.txt)"
    assert list(caught.value.messages) == [
        f"workdir=gs://runs/a: {need}",
        f"corpus.paths=gs://texts/*.txt: {need}",
        f"corpus.more.1.paths=gs://texts/b.txt: {need}",
        f"corpus.more.1.paths=s3://others/b.txt: {need}",
        f"tokenizer.path=s3://others/tokenizer.json: {need}",
    ]
    assert asked == ["gcs", "gcs", "s3"]  # Each bucket once.


def test_a_bucket_that_cannot_be_reached_is_named_for_every_key(drivers):
    drivers(lambda name: Unreachable())
    with pytest.raises(ConfigError) as caught:
        check_reachable(SETTINGS)
    assert list(caught.value.messages) == [
        "workdir=gs://runs/a: cannot be reached (no route to gs://runs/a)",
        "corpus.paths=gs://texts/*.txt: cannot be reached (no route to gs://texts)",
        "corpus.more.1.paths=gs://texts/b.txt: cannot be reached (no route to gs://texts)",
        "corpus.more.1.paths=s3://others/b.txt: cannot be reached (no route to s3://others/b.txt)",
        "tokenizer.path=s3://others/tokenizer.json: cannot be reached (no route to "
        "s3://others/b.txt)",
    ]


def test_keys_that_a_command_does_not_read_are_not_asked_about(drivers):
    asked = drivers(lambda name: Unreachable())
    check_reachable(SETTINGS, ("seed", "corpus.attention", "tokenizer.vocab_size", "targets"))
    check_reachable({"workdir": "runs/local", "corpus": {"paths": ["*.txt"]}})
    assert not asked
    with pytest.raises(ConfigError, match="^tokenizer.path=s3://others/tokenizer.json: cannot"):
        check_reachable(SETTINGS, ("tokenizer",))


def test_buckets_that_nothing_can_write_to(drivers):
    asked = drivers(lambda name: Unreachable())
    with pytest.raises(ConfigError) as caught:
        check_reachable({"workdir": "ftp://host/run", "targets": {"workdir": "ftp://host/run"}})
    assert list(caught.value.messages) == [
        "workdir=ftp://host/run: must be a local path, gs://… or s3://…",
        "targets.workdir=ftp://host/run: must be a local path, gs://… or s3://…",
    ]
    for path in ("gs://b/a[1]", "gs://b/run?", "s3://b/*/run"):
        with pytest.raises(ConfigError, match=r"targets.workdir=.*: .* may hold none of \* \? \["):
            check_reachable({"workdir": "here/a[1]", "targets": {"workdir": path}})
    with pytest.raises(ConfigError, match="workdir=s3://b/run: checkpoints cannot be written"):
        check_reachable({"workdir": "s3://b/run"})
    assert not asked


def test_every_key_that_names_a_path_is_looked_at(drivers):
    drivers(lambda name: Unreachable())
    about_files = re.compile(r"director|\bfiles\b|tokenizer\.json")
    keys = [key.path for key in all_keys().values() if about_files.search(key.description)]
    assert {"workdir", "corpus.paths", "corpus.test.paths", "targets.workdir"} < set(keys)
    for key in keys:
        settings: dict[str, object] = {key.split(".")[-1]: "gs://bucket/path"}
        for section in reversed(key.split(".")[:-1]):
            settings = {section: settings}
        with pytest.raises(ConfigError, match=f"^{key}=gs://bucket/path: cannot be reached"):
            check_reachable(settings)
