"""The loop on a small regression: resumed equals uninterrupted, damage is survived."""

import contextlib
import os
import signal

import numpy as np
import pytest

from mlpmem_jax import signals
from mlpmem_jax.errors import RunFailed
from mlpmem_jax.parallel.preemption import Preempted, stopping_where_asked
from tests.unit.small_training import CONFIG, Task, fit_small, leaves_of, losses_of, steps_of

pytestmark = pytest.mark.usefixtures("short_measurement")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    return fit_small(directory), losses_of(directory)


def test_it_learns(uninterrupted):
    _, losses = uninterrupted
    assert list(losses) == list(range(1, 13))
    assert losses[12] < 0.5 * losses[1]


@pytest.mark.parametrize(("die_at", "expected"), [(2, 0), (6, 4), (11, 8)])
def test_resumed_equals_uninterrupted(tmp_path, uninterrupted, die_at, expected):
    whole, losses = uninterrupted
    # Dead after the newest checkpoint has its checksums: the loop does nothing for that.
    sums = tmp_path / "run" / "checksums" / f"{expected}.json" if expected else None
    dead, task = Task(die_at=die_at, die_after=sums), Task()
    with pytest.raises(KeyboardInterrupt):
        fit_small(tmp_path, task=dead)
    assert dead.fed == list(range(die_at))
    resumed = fit_small(tmp_path, task=task)
    assert task.fed == list(range(expected, 12))
    assert die_at - task.fed[0] <= CONFIG.checkpoint_interval_steps
    for a, b in zip(leaves_of(whole), leaves_of(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert losses_of(tmp_path) == losses


@contextlib.contextmanager
def listening():
    """Lets notices reach loops of this process, as in a program of its own."""
    before = signal.signal(signal.SIGTERM, signals.answer)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        signals._state.came = False


def test_a_notice_saves_at_once_and_the_rest_follows(tmp_path, uninterrupted):
    whole, losses = uninterrupted
    with listening(), pytest.raises(Preempted, match=r"pretrain: saved at step 6 of 12"):
        fit_small(tmp_path, term_at=5)
    assert (tmp_path / "run" / "checksums" / "6.json").exists()
    # It is kept beside the schedule's until the next one, and costs none of these.
    assert steps_of(tmp_path) == [4, 6]
    task = Task()
    resumed = fit_small(tmp_path, task=task)
    assert task.fed == list(range(6, 12))
    for a, b in zip(leaves_of(whole), leaves_of(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert losses_of(tmp_path) == losses
    assert steps_of(tmp_path) == [4, 8, 12]


def test_a_notice_after_the_last_question_is_not_lost():
    with listening(), pytest.raises(Preempted, match="stopped by SIGTERM"), stopping_where_asked():
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_finished_run_is_only_read(tmp_path, uninterrupted):
    task = Task()
    first, second = fit_small(tmp_path), fit_small(tmp_path, task=task)
    assert task.fed == []
    for a, b in zip(leaves_of(first), leaves_of(second), strict=True):
        np.testing.assert_array_equal(a, b)
    assert second.files == first.files
    # A start that was killed before its manifest loses no validation.
    assert second.measured["validation"] == first.measured["validation"] != {}


def test_a_damaged_checkpoint_is_named_skipped_and_replaced(tmp_path, uninterrupted, capsys):
    whole, _ = uninterrupted
    fit_small(tmp_path)
    data = [p for p in (tmp_path / "run" / "checkpoints" / "12").rglob("*") if p.is_file()]
    victim = max(data, key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    task = Task()
    resumed = fit_small(tmp_path, task=task)
    error = capsys.readouterr().err
    assert "checkpoint of step 12 is skipped" in error and str(victim) in error
    assert "the newest good one is of step 8" in error
    assert task.fed == list(range(8, 12))
    for a, b in zip(leaves_of(whole), leaves_of(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_non_finite_loss_stops_with_step_and_last_good_checkpoint(tmp_path):
    with pytest.raises(RunFailed, match=r"loss is nan at step 7 \(last good checkpoint: 4\)"):
        fit_small(tmp_path, poison_at=6)
    steps = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()]
    assert steps == ["4"]


def test_a_poisoned_first_step_says_that_nothing_was_saved(tmp_path):
    with pytest.raises(RunFailed, match="no checkpoint was saved before"):
        fit_small(tmp_path, poison_at=0)


def test_accumulation_changes_memory_and_not_the_result(tmp_path, uninterrupted):
    whole, _ = uninterrupted
    parts = fit_small(tmp_path, CONFIG.model_copy(update={"accumulation_steps": 4}))
    for a, b in zip(leaves_of(whole), leaves_of(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    fit_small(tmp_path, CONFIG.model_copy(update={"keep_checkpoints": 2}))
    steps = {p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()}
    sums = {p.stem for p in (tmp_path / "run" / "checksums").iterdir()}
    assert steps == sums == {"8", "12"}
