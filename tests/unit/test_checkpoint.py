"""Saving in the background, and what several processes agree on."""

import contextlib
import errno
import json
import shutil
import threading
import time

import jax.numpy as jnp
import pytest
from etils import epath

from mlpmem_jax.errors import RunFailed
from mlpmem_jax.failures import explain
from mlpmem_jax.store import verification
from mlpmem_jax.training import checkpoint, checksums
from mlpmem_jax.training.checkpoint import Checkpoints
from mlpmem_jax.training.checksums import read_checksums

ITEMS = ("params", "loop")
SLOW_SECS = 1.5
# Far below SLOW_SECS, far above what a busy machine takes for nothing.
BOUND_SECS = 0.5


def _items(step):
    return {
        "params": {"kernel": jnp.full((64, 64), float(step))},
        "loop": {"step": jnp.int32(step)},
    }


def _open(directory, keep=3):
    return Checkpoints(epath.Path(directory), keep, ITEMS)


def _save(directory, *steps):
    with contextlib.closing(_open(directory)) as checkpoints:
        for step in steps:
            checkpoints.save(step, _items(step))


def _sums(directory):
    return sorted(int(path.stem) for path in (directory / "checksums").glob("*.json"))


def _damage(directory, step):
    files = [p for p in (directory / "checkpoints" / str(step)).rglob("*") if p.is_file()]
    victim = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    return victim


def _timed(function, *arguments):
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


@pytest.fixture
def slow_checksums(monkeypatch):
    """Checksums of one checkpoint take SLOW_SECS; yields an event that is set when they begin."""
    begun, describe = threading.Event(), checksums.describe_file

    def slow(path):
        if not begun.is_set():
            begun.set()
            time.sleep(SLOW_SECS)
        return describe(path)

    monkeypatch.setattr(checksums, "describe_file", slow)
    return begun


def test_checksums_hold_up_no_step_and_close_waits_for_them(tmp_path, slow_checksums):
    checkpoints = _open(tmp_path)
    checkpoints.save(4, _items(4))
    polls = [_timed(checkpoints.poll)]
    # Nobody waits for Orbax, and still they begin.
    assert slow_checksums.wait(timeout=60)
    while not _sums(tmp_path) and len(polls) < 20:
        polls.append(_timed(checkpoints.poll))
        time.sleep(0.01)
    assert max(polls) < BOUND_SECS
    assert _sums(tmp_path) == []  # They are still being computed,
    closing = _timed(checkpoints.close)
    assert _sums(tmp_path) == [4] and closing > SLOW_SECS / 3  # and that is waited for.
    with contextlib.closing(_open(tmp_path)) as again:
        assert again.last_good_step() == 4


def test_a_second_save_waits_for_the_checksums_of_the_first(tmp_path, slow_checksums):
    checkpoints = _open(tmp_path)
    checkpoints.save(4, _items(4))
    assert slow_checksums.wait(timeout=60)
    checkpoints.save(8, _items(8))
    assert 4 in _sums(tmp_path)
    checkpoints.close()
    assert _sums(tmp_path) == [4, 8]


@pytest.mark.parametrize("noticed_by", ["poll", "save", "close"])
def test_an_error_of_the_background_comes_up(tmp_path, monkeypatch, noticed_by):
    """A disk that is full after Orbax has committed: the checkpoint does not count."""
    _save(tmp_path, 4)

    def full(file, value):
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    monkeypatch.setattr(checksums, "write_checked_json", full)
    checkpoints = _open(tmp_path)
    checkpoints.save(8, _items(8))

    def notice():
        if noticed_by == "save":
            checkpoints.save(12, _items(12))
        elif noticed_by == "close":
            checkpoints.close()
        else:
            for _ in range(1000):
                checkpoints.poll()
                time.sleep(0.02)

    with pytest.raises(OSError) as caught:
        notice()
    sums = tmp_path / "checksums" / "8.json"
    assert explain(caught.value).startswith(f"{sums}: no space left on the disk")
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [4, 8]
    with contextlib.closing(_open(tmp_path)) as again:
        assert again.last_good_step() == 4


def test_one_that_was_killed_before_its_checksums_is_replaced(tmp_path):
    _save(tmp_path, 4, 8)
    (tmp_path / "checksums" / "8.json").unlink()
    with contextlib.closing(_open(tmp_path)) as checkpoints:
        assert checkpoints.last_good_step() == 4
        checkpoints.save(8, _items(80))
        checkpoints.wait()
        assert checkpoints.last_good_step() == 8
        restored = checkpoints.restore(8, {"params": _items(0)["params"]})
    assert float(restored["params"]["kernel"][0, 0]) == 80


def test_a_kill_before_the_checksums_leaves_one_that_counts(tmp_path, monkeypatch):
    """With one to keep, too: Orbax removes the one before as soon as the new one is written."""
    _save(tmp_path, 4)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "write_checksums", _killed)
        with contextlib.closing(_open(tmp_path, keep=1)) as checkpoints:
            assert checkpoints.last_good_step() == 4
            checkpoints.save(8, _items(8))
    with contextlib.closing(_open(tmp_path, keep=1)) as checkpoints:
        assert checkpoints.last_good_step() == 4


def test_a_damaged_one_does_not_push_out_the_good_one(tmp_path, monkeypatch):
    _save(tmp_path, 4, 16)
    _damage(tmp_path, 16)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "write_checksums", _killed)
        with contextlib.closing(_open(tmp_path, keep=2)) as checkpoints:
            assert checkpoints.last_good_step() == 4
            checkpoints.save(8, _items(8))  # of another interval
    with contextlib.closing(_open(tmp_path, keep=2)) as checkpoints:
        assert checkpoints.last_good_step() == 4


def _killed(*_):
    raise KeyboardInterrupt


def test_what_is_not_kept_goes_once_the_newer_one_counts(tmp_path):
    def steps():
        return sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())

    with contextlib.closing(_open(tmp_path, keep=1)) as checkpoints:
        for step in (4, 8, 12):
            checkpoints.save(step, _items(step))
            checkpoints.wait()
            assert steps() == [4] if step == 4 else [step - 4, step]  # never three
    assert steps() == _sums(tmp_path) == [12]


def test_checksums_go_with_their_checkpoints(tmp_path):
    with contextlib.closing(_open(tmp_path, keep=2)) as checkpoints:
        for step in (4, 8, 12, 16):
            checkpoints.save(step, _items(step))
    assert _sums(tmp_path) == [12, 16]


def test_a_damaged_one_is_named_with_the_one_that_is_used(tmp_path, capsys):
    _save(tmp_path, 4, 8)
    victim = _damage(tmp_path, 8)
    with contextlib.closing(_open(tmp_path)) as checkpoints:
        assert checkpoints.last_good_step() == 4
        error = capsys.readouterr().err
        assert "checkpoint of step 8 is skipped" in error and str(victim) in error
        assert error.endswith("; the newest good one is of step 4\n")
        _damage(tmp_path, 4)
        assert checkpoints.last_good_step() is None
        assert capsys.readouterr().err.count("; no other is good\n") == 2


def _sums_of(directory, step):
    return read_checksums(epath.Path(directory) / "checksums" / f"{step}.json")


class _Other:
    """Stands in for the first process, to which the one of the test is the second of two."""

    def __init__(self, monkeypatch, steps, sums, damage=None):
        said = [{"steps": steps, "finished": sorted(sums)}]
        said += [{"sums": sums[step]} for step in sorted(sums, reverse=True)]
        self.said, self.read = iter(said), []
        verify = verification.verify_file

        def counted(path, expected):
            self.read.append(path)
            verify(path, expected)

        monkeypatch.setattr(checkpoint, "is_writer", lambda: False)
        monkeypatch.setattr(checkpoint, "of_first", lambda value: next(self.said))
        monkeypatch.setattr(verification, "of_all", lambda found: [damage, found])
        monkeypatch.setattr(verification, "verify_file", counted)
        monkeypatch.setattr(verification, "process_index", lambda: 1)
        monkeypatch.setattr(verification, "process_count", lambda: 2)


def test_a_process_reads_its_share_and_believes_the_others(tmp_path, monkeypatch):
    _save(tmp_path, 4, 8)
    sums = {step: _sums_of(tmp_path, step) for step in (4, 8)}
    with contextlib.closing(_open(tmp_path)) as checkpoints, monkeypatch.context() as patch:
        other = _Other(patch, [4, 8], sums)
        assert checkpoints.last_good_step() == 8
        root = epath.Path(tmp_path) / "checkpoints" / "8"
        assert other.read == [root / name for name in sorted(sums[8])[1::2]]
    with contextlib.closing(_open(tmp_path)) as checkpoints, monkeypatch.context() as patch:
        _Other(patch, [4, 8], sums, damage="file of another share: damaged")
        assert checkpoints.last_good_step() is None


def test_steps_that_process_0_does_not_name_do_not_count(tmp_path, monkeypatch):
    _save(tmp_path, 4, 8)
    with contextlib.closing(_open(tmp_path)) as checkpoints, monkeypatch.context() as patch:
        _Other(patch, [4, 8], {4: _sums_of(tmp_path, 4)})
        assert checkpoints.last_good_step() == 4  # Whatever this process would find: 8.


def test_an_old_listing_is_waited_for(tmp_path, monkeypatch):
    _save(tmp_path, 4, 8)
    late = tmp_path / "checkpoints" / "8"
    shutil.move(late, tmp_path / "hidden")
    told = {"steps": [4, 8], "finished": [4, 8]}
    answers = iter([told, {"sums": _sums_of(tmp_path, 8)}])
    monkeypatch.setattr(checkpoint, "of_first", lambda value: next(answers))
    monkeypatch.setattr(checkpoint, "_LISTING_PAUSE_SECS", 0.02)
    with contextlib.closing(_open(tmp_path)) as checkpoints:
        appears = threading.Timer(0.3, shutil.move, (tmp_path / "hidden", late))
        appears.start()
        assert checkpoints.last_good_step() == 8
        appears.join()
        assert float(checkpoints.restore(8, {"loop": _items(0)["loop"]})["loop"]["step"]) == 8


def test_a_work_directory_of_its_own_is_an_error(tmp_path, monkeypatch):
    _save(tmp_path, 4)
    told = {"steps": [4, 8], "finished": [4, 8]}
    monkeypatch.setattr(checkpoint, "of_first", lambda value: told)
    monkeypatch.setattr(checkpoint, "LISTING_SECS", 0.1)
    monkeypatch.setattr(checkpoint, "_LISTING_PAUSE_SECS", 0.02)
    expected = r"sees the steps \[4\], process 0 \[4, 8\]; all processes need the same work dir"
    with (
        contextlib.closing(_open(tmp_path)) as checkpoints,
        pytest.raises(RunFailed, match=expected),
    ):
        checkpoints.last_good_step()


@pytest.mark.parametrize("folder", ["a[1] b*?", "[!x]", "run"])
def test_any_folder_keeps_checkpoints(tmp_path, folder):
    """Orbax looks for the parts of a checkpoint with a glob that holds the folder."""
    directory = tmp_path / folder / "decoder"
    _save(directory, 4, 8)
    with contextlib.closing(_open(directory, keep=1)) as checkpoints:
        assert checkpoints.last_good_step() == 8
        restored = checkpoints.restore(8, {"params": _items(0)["params"]})
        assert float(restored["params"]["kernel"][0, 0]) == 8
        checkpoints.save(12, _items(12))
        checkpoints.wait()
        assert set(checkpoints.files(12)) == {
            str(file.relative_to(directory))
            for file in (directory / "checkpoints" / "12").rglob("*")
            if file.is_file()
        }
    assert _sums(directory) == [12]  # Those of checkpoints that are gone are gone too.


def test_foreign_files_among_checkpoints_are_nothing(tmp_path):
    _save(tmp_path, 4)
    folders = [tmp_path / name for name in ("checksums", "checkpoints", "checkpoints/4")]
    for folder in folders:
        for name in (".DS_Store", "._4.json", "Thumbs.db", ".nfs01", "4.json~", "notes.json"):
            (folder / name).write_bytes(b"x")
    with contextlib.closing(_open(tmp_path, keep=1)) as checkpoints:
        assert checkpoints.last_good_step() == 4
        checkpoints.save(8, _items(8))
        checkpoints.wait()
        assert checkpoints.last_good_step() == 8
        assert not [name for name in checkpoints.files(8) if "DS_Store" in name]
    assert (tmp_path / "checksums" / "notes.json").exists()


def test_foreign_files_in_a_checkpoint_are_not_of_it(tmp_path):
    (tmp_path / "4" / "params").mkdir(parents=True)
    for name in ("params/data", "params/.DS_Store", "._data", "Thumbs.db"):
        (tmp_path / "4" / name).write_bytes(b"x")
    checksums.write_checksums(epath.Path(tmp_path) / "4.json", epath.Path(tmp_path) / "4")
    assert list(read_checksums(epath.Path(tmp_path) / "4.json")) == ["params/data"]


@pytest.mark.parametrize("damage", ["renamed", "left out", "flipped", "cut"])
def test_damaged_checksums_are_no_proof(tmp_path, damage, capsys):
    """A checkpoint whose list of files is not what was written is skipped, and named."""
    _save(tmp_path, 4, 8)
    file = tmp_path / "checksums" / "8.json"
    text = file.read_text()
    listed = json.loads(text)
    listed.pop(next(iter(listed)))
    file.write_text(
        {
            "renamed": text.replace('"bytes"', '"byte"', 1),
            "left out": json.dumps(listed),
            "flipped": text.replace('"crc32": "', '"crc32": "0', 1),
            "cut": text[:-40],
        }[damage]
    )
    with contextlib.closing(_open(tmp_path)) as checkpoints:
        assert checkpoints.last_good_step() == 4
    assert f"{file}: damaged" in capsys.readouterr().err
