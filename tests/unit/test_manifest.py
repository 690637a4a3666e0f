"""Artifacts: missing, partial, complete, refused, damaged."""

import json

import pytest

from mlpmem_jax.errors import ArtifactError, UserError
from mlpmem_jax.store.files import check_free_space, write_bytes
from mlpmem_jax.store.manifest import Artifact, Status
from mlpmem_jax.store.nearest import nearest

RECIPE = {"tokenizer": {"vocab_size": 4096}, "paths": ("a", "b")}


@pytest.fixture
def artifact(tmp_path):
    return Artifact(tmp_path, "tokens/1", "tokens", recipe=RECIPE, label="tokens")


def _finished(artifact):
    artifact.begin({"tokenizer": "1234"})
    (artifact.path / "part.bin").write_bytes(b"content")
    return artifact.finish(counts={"rows": 3}, files=["part.bin"], measured={"seconds": 1.0})


def test_life_of_an_artifact(artifact):
    assert artifact.status({"tokenizer": "1234"}) is Status.MISSING
    with pytest.raises(ArtifactError, match="does not exist.*`tokenize`"):
        artifact.load()
    artifact.begin({"tokenizer": "1234"})
    (artifact.path / "progress.npz").write_bytes(b"half")
    assert artifact.status({"tokenizer": "1234"}) is Status.PARTIAL
    with pytest.raises(ArtifactError, match="is not finished"):
        artifact.load()
    manifest = _finished(artifact)
    assert artifact.status({"tokenizer": "1234"}) is Status.COMPLETE
    assert artifact.verify() == artifact.load() == manifest
    artifact.remove()
    assert artifact.status({"tokenizer": "1234"}) is Status.MISSING


def test_the_fingerprint_depends_on_content_and_not_on_measurements(artifact, tmp_path):
    first = _finished(artifact)
    artifact.remove()
    artifact.begin({"tokenizer": "1234"})
    (artifact.path / "part.bin").write_bytes(b"content")
    same = artifact.finish(counts={"rows": 3}, files=["part.bin"], measured={"seconds": 2.0})
    assert same.fingerprint == first.fingerprint
    artifact.remove()
    artifact.begin({"tokenizer": "1234"})
    (artifact.path / "part.bin").write_bytes(b"contenT")
    other = artifact.finish(counts={"rows": 3}, files=["part.bin"])
    assert other.fingerprint != first.fingerprint


def test_seconds_of_another_attempt_are_not_carried_over(artifact):
    artifact.begin({"tokenizer": "1234"})
    artifact.record_spent(600.0)
    artifact.begin({"tokenizer": "1234"})
    assert artifact.spent() == 600.0
    artifact.begin({"tokenizer": "5678"})
    assert artifact.spent() == 0.0


def test_one_that_another_run_finishes_while_its_status_is_asked(artifact, monkeypatch):
    made_from = {"tokenizer": "1234"}
    artifact.begin(made_from)
    begun = Artifact._begun

    def finished_before(self):
        monkeypatch.setattr(Artifact, "_begun", begun)
        self.finish()
        return begun(self)

    monkeypatch.setattr(Artifact, "_begun", finished_before)
    assert artifact.status(made_from) is Status.COMPLETE


@pytest.mark.parametrize("finish", [True, False])
def test_one_whose_input_was_rebuilt_is_stale(artifact, finish):
    artifact.begin({"tokenizer": "1234"})
    if finish:
        artifact.finish()
    else:
        (artifact.path / "shard").write_bytes(b"half")
    with pytest.raises(ArtifactError) as caught:
        artifact.status({"tokenizer": "5678"})
    message = str(caught.value)
    assert "tokens is stale" in message and "`tokenize --rebuild`" in message
    assert 'from another tokenizer="1234", now "5678"' in message


def test_files_that_were_moved_to_another_id_are_noticed(artifact, tmp_path):
    _finished(artifact)
    other = {"tokenizer": {"vocab_size": 1024}, "paths": ("a", "b")}
    moved = Artifact(tmp_path, "tokens/1", "tokens", recipe=other)
    with pytest.raises(ArtifactError, match="tokenizer.vocab_size=4096, now 1024"):
        moved.status({"tokenizer": "1234"})


def test_one_that_was_begun_and_holds_nothing_starts_afresh(artifact):
    artifact.begin({"tokenizer": "1234"})
    assert artifact.status({}) is Status.MISSING
    artifact.begin({})
    assert artifact.finish().made_from == {}


def test_the_id_is_known_before_the_artifact_is_made(tmp_path):
    def made(recipe=RECIPE, seed=0, kind="memory", root=tmp_path):
        tokens = Artifact.of(root, "tokens", {"seed": seed})
        return Artifact.of(root, kind, recipe, (tokens,), "memory")

    one = made()
    assert one.relative == f"memory/{one.path.name}" and one.path == tmp_path / one.relative
    # A tuple is a list once it was written; where the store lies decides nothing.
    again = made({"paths": ["a", "b"], "tokenizer": {"vocab_size": 4096}}, root=tmp_path / "b")
    assert again.relative == one.relative
    others = {made(RECIPE | {"more": 1}).path.name, made(seed=1).path.name}
    others.add(made(kind="joint").path.name)
    assert len(others) == 3 and one.path.name not in others


def test_a_missing_artifact_names_the_nearest_one(tmp_path):
    def decoder(steps, width=8):
        return Artifact.of(tmp_path, "decoder", {"steps": steps, "width": width}, (), "decoder")

    def rows(split, steps, dtype="float16"):
        recipe = {"split": split, "dtype": dtype}
        return Artifact.of(tmp_path, "datastore", recipe, (decoder(steps),), f"datastore/{split}")

    for made in (decoder(5), decoder(7, width=16), rows("train", 5), rows("valid", 6)):
        made.begin({one.relative: "1234" for one in made.inputs})
        made.finish()
    with pytest.raises(
        ArtifactError, match=r"does not exist.*\(the nearest is .*: steps=5, now 6\)"
    ):
        decoder(6).load()
    # What differs may be an input's; another split is no alternative.
    assert nearest(rows("train", 6)) == (rows("train", 5).path.name, ["steps=5, now 6"])
    number, lines = nearest(rows("train", 6, dtype="bfloat16"))
    assert number == rows("train", 5).path.name
    assert sorted(lines) == ['dtype="float16", now "bfloat16"', "steps=5, now 6"]
    assert nearest(rows("test", 6)) is None


@pytest.mark.parametrize("damage", ["truncate", "flip", "missing"])
def test_a_damaged_file_is_named(artifact, damage):
    _finished(artifact)
    file = artifact.path / "part.bin"
    if damage == "truncate":
        file.write_bytes(b"conte")
    elif damage == "flip":
        file.write_bytes(b"contenu")
    else:
        file.unlink()
    with pytest.raises(ArtifactError, match="part.bin: (truncated|damaged|missing)"):
        artifact.verify()


@pytest.mark.parametrize("edit", [lambda t: t[:-20], lambda t: t.replace('"rows": 3', '"rows": 4')])
def test_a_damaged_manifest_is_named(artifact, edit):
    _finished(artifact)
    file = artifact.path / "manifest.json"
    file.write_text(edit(file.read_text()))
    with pytest.raises(ArtifactError, match="manifest.json: damaged"):
        artifact.load()


def _damages(nested):
    """Yields what may have become of a record: cut, flipped, renamed, of another type."""
    yield lambda text: text[: len(text) // 2]
    yield lambda text: ""
    yield lambda text: "[1, 2]"
    yield lambda text: "9" * 5000
    yield lambda text: "[" * 100_000
    yield lambda text: text.replace('"vocab_size": 4096', '"vocab_size": 4097')
    for key in ("recipe", "made_from", "run"):
        yield lambda text, key=key: text.replace(f'"{key}"', f'"{key[:-1]}_"')
    for value in nested:
        yield lambda text, value=value: json.dumps(json.loads(text) | value)


BUILDING = [
    *_damages([{"recipe": 1}, {"made_from": []}, {"made_from": {"a": 1}}]),
    lambda text: json.dumps(json.loads(text) | {"seconds": "9", "checksum": None}),
]
MANIFEST = list(
    _damages(
        [
            {"counts": 3},
            {"files": {"part.bin": 3}},
            {"measured": []},
            {"measured": {"seconds": ""}},
        ],
    )
)


@pytest.mark.parametrize("damage", BUILDING, ids=range(len(BUILDING)))
def test_a_damaged_record_of_the_beginning_is_one_line_with_a_way_out(artifact, damage):
    made_from = {"tokenizer": "1234"}
    artifact.begin(made_from, "run-1")
    (artifact.path / "progress.npz").write_bytes(b"half")
    file = artifact.path / "building.json"
    file.write_text(damage(file.read_text()))
    for ask in (
        lambda: artifact.status(made_from),
        lambda: artifact.begin(made_from),
        artifact.spent,
        artifact.finish,
    ):
        with pytest.raises(ArtifactError, match="building.json: damaged.*--rebuild`") as caught:
            ask()
        assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
    artifact.is_of("run-1")  # Whether it is kept, `status` says.
    artifact.remove()
    assert artifact.status(made_from) is Status.MISSING


@pytest.mark.parametrize("damage", MANIFEST, ids=range(len(MANIFEST)))
def test_a_damaged_manifest_is_one_line_with_a_way_out(artifact, damage):
    _finished(artifact)
    file = artifact.path / "manifest.json"
    file.write_text(damage(file.read_text()))
    with pytest.raises(ArtifactError, match="manifest.json: damaged.*--rebuild`") as caught:
        artifact.load()
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
    artifact.is_of("run-1")


def test_a_manifest_of_another_schema_is_refused(artifact):
    _finished(artifact)
    file = artifact.path / "manifest.json"
    raw = json.loads(file.read_text()) | {"schema_version": 99}
    file.write_text(json.dumps(raw))
    with pytest.raises(ArtifactError, match="damaged|schema version"):
        artifact.load()


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "f.json"
    write_bytes(file, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_bytes(file, b"new content")
    assert file.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]


def test_free_space_is_checked_beforehand(tmp_path):
    check_free_space(tmp_path / "not" / "yet", 1, "embedding")
    with pytest.raises(UserError, match="embedding needs .* are free"):
        check_free_space(tmp_path, 1 << 60, "embedding")


def test_a_relative_workdir_makes_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Artifact("runs/a", "tokens", "tokens").path == tmp_path / "runs" / "a" / "tokens"
    assert str(Artifact("gs://bucket/a", "tokens", "tokens").path) == "gs://bucket/a/tokens"


def test_what_a_run_has_made_or_begun_is_its_own(artifact):
    assert not artifact.is_of("run-1")
    artifact.begin({"tokenizer": "1234"}, "run-1")
    assert artifact.is_of("run-1") and not artifact.is_of("run-2") and not artifact.is_of(None)
    (artifact.path / "ids.bin").write_bytes(b"x")
    made = artifact.finish(files=["ids.bin"])
    assert made.run == "run-1" and artifact.load() == made
    assert artifact.is_of("run-1") and not artifact.is_of("run-2") and not artifact.is_of(None)
    (artifact.path / "manifest.json").write_text("{")
    assert not artifact.is_of("run-1")


def test_the_name_of_the_run_is_not_fingerprinted(artifact):
    artifact.begin({"tokenizer": "1234"}, "run-1")
    made = artifact.finish()
    artifact.begin({"tokenizer": "1234"})
    again = artifact.finish()
    assert (made.run, again.run) == ("run-1", None)
    assert made.fingerprint == again.fingerprint
    assert not artifact.is_of(None)  # Runs without a name are not the same run.
