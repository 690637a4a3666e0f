"""What is not ours is never removed or overwritten; the old artifact goes when the new is whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.pipeline.plan import intention
from mlpmem_jax.pipeline.stage import Rebuild, Stage, run_stages
from mlpmem_jax.store.manifest import Artifact, Completion, Status

FILE = "checkpoints/4/state"
REBUILDS = pytest.mark.parametrize("rebuild", list(Rebuild), ids=lambda one: one.value)


@pytest.fixture
def decoder(tmp_path):
    return _named(tmp_path / "run", "decoder/base")


def _named(store, relative, inputs=()):
    recipe = {"size": 1}
    return Artifact(store, relative, "decoder", recipe=recipe, inputs=inputs)


def _stage(artifact, content="new", fails=False):
    def build():
        file = Path(artifact.path / FILE)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        if fails:
            raise KeyboardInterrupt
        return Completion(files=[FILE])

    return Stage(artifact, build)


def _write(file, text="mine"):
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(text)
    return Path(file)


@REBUILDS
@pytest.mark.parametrize("name", ["weights.bin", FILE, "a/b/c", ".hidden"])
def test_a_directory_without_our_records_is_refused(decoder, rebuild, name):
    mine = _write(decoder.path / name)
    made = []
    tokens = Artifact(decoder.root, "tokens", "tokens")
    first = Stage(tokens, lambda: made.append(1) or Completion())
    with pytest.raises(ArtifactError, match=f"{mine}: not written by this program"):
        run_stages([first, _stage(decoder)], rebuild)
    assert "REFUSED" in intention(_stage(decoder), rebuild)
    assert mine.read_text() == "mine" and not made  # Before the stages before it are made.
    with pytest.raises(ArtifactError, match="not written"):
        decoder.begin({})
    with pytest.raises(ArtifactError, match="not written"):
        decoder.remove()
    assert [path for path in Path(decoder.path).rglob("*") if path.is_file()] == [mine]


@pytest.mark.parametrize(
    "name", ["weights.bin", "checkpoints/mine", "checksums/4.txt", "checkpoint"]
)
def test_a_foreign_file_in_an_artifact_of_ours_stops_a_rebuild(decoder, name):
    run_stages([_stage(decoder, "old")])
    mine = _write(decoder.path / name)
    run_stages([_stage(decoder)], Rebuild.STALE)  # It is current, so nothing is removed.
    stale = Artifact(decoder.root, decoder.relative, "decoder", recipe={"size": 2})
    for rebuild, artifact in ((Rebuild.ALWAYS, decoder), (Rebuild.STALE, stale)):
        with pytest.raises(ArtifactError, match=f"{mine}: not written by this program"):
            run_stages([_stage(artifact)], rebuild)
    assert mine.read_text() == "mine" and Path(decoder.path / FILE).read_text() == "old"
    mine.unlink()
    run_stages([_stage(decoder)], Rebuild.ALWAYS)
    assert Path(decoder.path / FILE).read_text() == "new"


def test_links_are_neither_followed_nor_replaced(decoder, tmp_path):
    run_stages([_stage(decoder, "old")])
    Path(decoder.path).rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", decoder.path)
    run_stages([_stage(decoder)])
    with pytest.raises(ArtifactError, match="decoder/base: is a symbolic link"):
        run_stages([_stage(decoder)], Rebuild.ALWAYS)
    assert (tmp_path / "elsewhere" / FILE).read_text() == "old"
    os.unlink(decoder.path)
    os.symlink(tmp_path / "nowhere", decoder.path)
    with pytest.raises(ArtifactError, match="decoder/base: is a symbolic link"):
        run_stages([_stage(decoder)])


def test_a_link_within_an_artifact_is_foreign(decoder, tmp_path):
    run_stages([_stage(decoder, "old")])
    Path(decoder.path / "checkpoints" / "4").rename(tmp_path / "4")
    os.symlink(tmp_path / "4", decoder.path / "checkpoints" / "4")
    with pytest.raises(ArtifactError, match="checkpoints/4: not written"):
        run_stages([_stage(decoder)], Rebuild.ALWAYS)
    assert (tmp_path / "4" / "state").read_text() == "old"


def test_a_file_in_the_place_of_the_directory(decoder):
    mine = _write(decoder.path)
    for rebuild in Rebuild:
        with pytest.raises(ArtifactError, match="decoder/base: is a file"):
            run_stages([_stage(decoder)], rebuild)
    assert mine.read_text() == "mine"


def test_what_systems_leave_in_directories_is_not_minded(decoder):
    for name in (".DS_Store", "checkpoints/._x", "Thumbs.db", ".nfs0000a1"):
        _write(decoder.path / name)
    run_stages([_stage(decoder, "old")])
    _write(decoder.path / "checkpoints" / "4" / ".DS_Store")
    run_stages([_stage(decoder)], Rebuild.ALWAYS)
    assert Path(decoder.path / FILE).read_text() == "new"


def test_the_old_one_is_kept_until_the_new_one_is_whole(decoder, capsys):
    run_stages([_stage(decoder, "old")])
    kept = Path(decoder.root / "decoder" / ".replaced.base")
    for content in ("first attempt", "second attempt"):
        with pytest.raises(KeyboardInterrupt):
            run_stages([_stage(decoder, content, fails=True)], Rebuild.ALWAYS)
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"the old one is kept in {kept}" in line and len(line) < 400
        assert (kept / FILE).read_text() == "old" and (kept / "manifest.json").exists()
        assert decoder.status({}) is Status.PARTIAL
    run_stages([_stage(decoder)])  # Without the flag: it continues.
    assert Path(decoder.path / FILE).read_text() == "new"
    assert [path.name for path in (decoder.root / "decoder").iterdir()] == ["base"]


def test_the_old_one_can_be_moved_back(decoder):
    run_stages([_stage(decoder, "old")])
    with pytest.raises(KeyboardInterrupt):
        run_stages([_stage(decoder, fails=True)], Rebuild.ALWAYS)
    decoder.remove()
    os.rename(decoder.root / "decoder" / ".replaced.base", decoder.path)
    run_stages([_stage(decoder)])
    assert Path(decoder.path / FILE).read_text() == "old" and decoder.verify()


def test_what_a_user_put_into_the_old_one_is_kept(decoder, capsys):
    run_stages([_stage(decoder, "old")])
    with pytest.raises(KeyboardInterrupt):
        run_stages([_stage(decoder, fails=True)], Rebuild.ALWAYS)
    mine = _write(decoder.root / "decoder" / ".replaced.base" / "mine")
    run_stages([_stage(decoder)])
    assert mine.read_text() == "mine" and str(mine) in capsys.readouterr().err
    assert Path(decoder.path / FILE).read_text() == "new"


def test_damage_upstream_is_found_before_anything_is_set_aside(tmp_path):
    """Also what only a later stage of the command reads."""
    store = tmp_path / "run"
    index, first = _named(store, "index/base"), _named(store, "targets/a")
    second = _named(store, "targets/b", (index, first))
    run_stages([_stage(index), _stage(first, "old"), _stage(second, "old")])
    stale = Artifact(store, "targets/b", "decoder", recipe={"size": 2}, inputs=(index, first))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    _write(index.path / FILE, "nEw")
    for rebuild in (Rebuild.ALWAYS, Rebuild.STALE):
        changed = [_stage(first), _stage(stale)]
        with pytest.raises(ArtifactError, match=f"index/base/{FILE}: damaged"):
            run_stages(changed, rebuild)
        left = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
        assert left == before | {Path(index.path / FILE): b"nEw"}


@pytest.mark.parametrize("before", [0, 10])
def test_kills_at_every_moment_of_a_rebuild(tmp_path, root, before):
    """Before each operation on a file; after a rebuild that was killed there too."""
    script = [sys.executable, str(root / "tests" / "unit" / "rebuild_script.py")]
    done = subprocess.run(
        [*script, str(tmp_path), str(before)],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) > 20
    for one in found:
        kept = {"base": "old"}, {".replaced.base": "old"}, {"base": "new"}
        assert one["killed"] in (*kept, {".replaced.base": "old", "base": "new"}), one
        is_kept = one["killed"] == {"base": "old"}  # The kill came before anything was done.
        assert one["continued"] == ({"base": "old"} if is_kept else {"base": "new"}), one
        assert one["rebuilt"] == {"base": "again"} and one["left"] == ["base"], one
    assert {".replaced.base": "old"} in [one["killed"] for one in found]
