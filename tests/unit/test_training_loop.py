"""The loop on a small regression: resumed equals uninterrupted, damage is survived."""

import contextlib
import json
import os
import signal
import struct
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tensorboardX.proto.event_pb2 import Event

from mlpmem_jax import signals
from mlpmem_jax.config.stages import OptimizerConfig, TrainingConfig
from mlpmem_jax.errors import RunFailed
from mlpmem_jax.input.feed import Feed
from mlpmem_jax.models.layers import parameter
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.parallel.preemption import Preempted, stopping_where_asked
from mlpmem_jax.training import loop, monitor
from mlpmem_jax.training.loop import assemble, fit
from mlpmem_jax.training.optimizer import learning_rate_schedule
from mlpmem_jax.training.step import LossParts

CONFIG = TrainingConfig(
    num_steps=12,
    batch_size=8,
    optimizer=OptimizerConfig(warmup_steps=2, learning_rate=0.4),
    checkpoint_interval_steps=4,
    eval_interval_steps=6,
    log_interval_steps=1,
    keep_checkpoints=3,
)


class Linear(nnx.Module):
    def __init__(self, rngs):
        self.kernel = parameter((4, 4), ("embed", "ffn"), 0.5, "matrix", rngs)
        self.offset_bias = parameter((4,), ("state",), 0.0, "bias", rngs)


class Points:
    num_windows = 40

    def read(self, windows):
        x = np.stack([np.random.default_rng(int(w)).normal(size=4) for w in windows])
        return {"x": x.astype(np.float32), "weight": (windows % 5 != 0).astype(np.float32)}


class Task:
    """Learns y = 3x; dies before a given step when told to, once a file is there.

    Attributes:
        fed: The steps whose batches were asked for.
    """

    name = "pretrain"
    frozen = ()
    tokens_per_step = 8
    flops_per_step = 1e3

    def __init__(self, die_at=None, poison_at=None, term_at=None, die_after=None, slow=None):
        self._die_at = die_at
        self._die_after = die_after
        self._term_at = term_at
        self._poison_at = poison_at
        self._slow = slow or {}
        self.fed = []

    def flops_of(self, steps):
        return len(steps) * self.flops_per_step

    def build(self, rngs):
        return Linear(rngs)

    def continued(self, abstract):
        return None

    def prepare(self, state):
        return state

    def loss(self, model, frozen, batch, step):
        y = batch["x"] @ model.kernel[...] + model.offset_bias[...][None]
        error = jnp.sum(jnp.square(y - 3 * batch["x"]), axis=-1) * batch["weight"]
        total, weight = jnp.sum(error), jnp.sum(batch["weight"])
        return LossParts(total, {"loss_sum": total, "weight_sum": weight})

    def feed(self, steps):
        feed = Feed(Points(), single_device_mesh(), batch_size=8, seed=1, steps=steps)
        task = self

        class Watched:
            wait_secs = 0.0

            def __init__(self):
                self._step = steps.start

            def __next__(self):
                if self._step == task._die_at:
                    task._wait_for(task._die_after)
                    raise KeyboardInterrupt
                task.fed.append(self._step)
                task._linger("batch", self)
                if self._step == task._term_at:
                    os.kill(os.getpid(), signal.SIGTERM)
                batch = next(feed)
                if self._step == task._poison_at:
                    batch = batch | {"x": batch["x"] * jnp.nan}
                self._step += 1
                return batch

        return Watched()

    def _wait_for(self, file):
        while file is not None and not file.exists():  # The test's time limit ends it.
            time.sleep(0.01)

    def _linger(self, where, feed=None):
        seconds = self._slow.get(where, 0.0)
        time.sleep(seconds)
        if feed is not None:
            feed.wait_secs += seconds

    def validate(self, state):
        self._linger("validation")
        return {"kernel": float(jnp.sum(jax.tree.leaves(state.params)[0]))}


def _fit(directory, config=CONFIG, task=None, **keys):
    return fit(
        task or Task(**keys),
        config,
        seed=0,
        mesh=single_device_mesh(),
        directory=directory / "run",
        metrics_directory=directory / "metrics",
    )


def _records(directory):
    lines = (directory / "metrics" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def _losses(directory):
    return {record["step"]: record["loss"] for record in _records(directory)}


def _steps(directory):
    return sorted(int(path.name) for path in (directory / "run" / "checkpoints").iterdir())


def _leaves(fit_result):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(fit_result.state)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    return _fit(directory), _losses(directory)


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
        _fit(tmp_path, task=dead)
    assert dead.fed == list(range(die_at))
    resumed = _fit(tmp_path, task=task)
    assert task.fed == list(range(expected, 12))
    assert die_at - task.fed[0] <= CONFIG.checkpoint_interval_steps
    for a, b in zip(_leaves(whole), _leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert _losses(tmp_path) == losses


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
        _fit(tmp_path, term_at=5)
    assert (tmp_path / "run" / "checksums" / "6.json").exists()
    # It is kept beside the schedule's until the next one, and costs none of these.
    assert _steps(tmp_path) == [4, 6]
    task = Task()
    resumed = _fit(tmp_path, task=task)
    assert task.fed == list(range(6, 12))
    for a, b in zip(_leaves(whole), _leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert _losses(tmp_path) == losses
    assert _steps(tmp_path) == [4, 8, 12]


def test_a_notice_after_the_last_question_is_not_lost():
    with listening(), pytest.raises(Preempted, match="stopped by SIGTERM"), stopping_where_asked():
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_finished_run_is_only_read(tmp_path, uninterrupted):
    task = Task()
    first, second = _fit(tmp_path), _fit(tmp_path, task=task)
    assert task.fed == []
    for a, b in zip(_leaves(first), _leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
    assert second.files == first.files
    # A start that was killed before its manifest loses no validation.
    assert second.measured["validation"] == first.measured["validation"] != {}


def test_a_damaged_checkpoint_is_named_skipped_and_replaced(tmp_path, uninterrupted, capsys):
    whole, _ = uninterrupted
    _fit(tmp_path)
    data = [p for p in (tmp_path / "run" / "checkpoints" / "12").rglob("*") if p.is_file()]
    victim = max(data, key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    task = Task()
    resumed = _fit(tmp_path, task=task)
    error = capsys.readouterr().err
    assert "checkpoint of step 12 is skipped" in error and str(victim) in error
    assert "the newest good one is of step 8" in error
    assert task.fed == list(range(8, 12))
    for a, b in zip(_leaves(whole), _leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_non_finite_loss_stops_with_step_and_last_good_checkpoint(tmp_path):
    with pytest.raises(RunFailed, match=r"loss is nan at step 7 \(last good checkpoint: 4\)"):
        _fit(tmp_path, poison_at=6)
    steps = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()]
    assert steps == ["4"]


def test_a_poisoned_first_step_says_that_nothing_was_saved(tmp_path):
    with pytest.raises(RunFailed, match="no checkpoint was saved before"):
        _fit(tmp_path, poison_at=0)


def test_accumulation_changes_memory_and_not_the_result(tmp_path, uninterrupted):
    whole, _ = uninterrupted
    parts = _fit(tmp_path, CONFIG.model_copy(update={"accumulation_steps": 4}))
    for a, b in zip(_leaves(whole), _leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    _fit(tmp_path, CONFIG.model_copy(update={"keep_checkpoints": 2}))
    steps = {p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()}
    sums = {p.stem for p in (tmp_path / "run" / "checksums").iterdir()}
    assert steps == sums == {"8", "12"}


SPEED = {
    "tokens_per_sec", "model_flops_per_sec", "share_of_peak", "input_wait_share", "secs_per_step",
}  # fmt: skip


def _first_step(task):
    """Returns the parameters, their gradients, and the next parameters, without the loop."""
    mesh = single_device_mesh()
    blueprint, train_step = assemble(task, CONFIG, seed=0, mesh=mesh)
    state, batch = blueprint.create(), next(task.feed(range(1)))

    def mean(params):
        model = nnx.merge(blueprint.graphdef, params, state.fixed)
        return task.loss(model, (), batch, state.step).total / jnp.sum(batch["weight"])

    before = jax.tree.map(np.array, state.params)  # Copies: the step consumes its state.
    gradients = jax.grad(mean)(state.params)
    return before, gradients, train_step(state, (), batch)[0].params


def _norm(tree):
    return np.sqrt(sum(np.sum(np.square(np.asarray(x))) for x in jax.tree.leaves(tree)))


def test_the_metrics_of_each_step(tmp_path):
    measured = _fit(tmp_path).measured
    records = _records(tmp_path)
    assert [record["step"] for record in records] == list(range(1, 13))
    for record in records:
        assert {"loss", "grad_norm", "update_norm", "learning_rate"} <= record.keys()
    for record in records[1:]:  # The first one compiles.
        assert record.keys() >= SPEED
        assert record["tokens_per_sec"] * record["secs_per_step"] == pytest.approx(8)
        assert record["model_flops_per_sec"] * record["secs_per_step"] == pytest.approx(1e3)
        assert 0 < record["share_of_peak"] <= 1
        assert 0 <= record["input_wait_share"] <= 1
    assert measured["tokens_per_sec"] * measured["secs_per_step"] == pytest.approx(8)
    assert 0 < measured["share_of_peak"] <= 1 and 0 <= measured["input_wait_share"] <= 1


def test_norms_and_rates_are_those_of_the_step(tmp_path):
    before, gradients, after = _first_step(Task())
    _fit(tmp_path)
    records = _records(tmp_path)
    assert records[0]["grad_norm"] == pytest.approx(_norm(gradients), rel=1e-5)
    moved = jax.tree.map(lambda a, b: np.asarray(b) - np.asarray(a), before, after)
    assert records[0]["update_norm"] == pytest.approx(_norm(moved), rel=1e-3)
    rate = learning_rate_schedule(CONFIG.optimizer, CONFIG.num_steps)
    expected = [float(rate(step)) for step in range(12)]
    assert [record["learning_rate"] for record in records] == pytest.approx(expected)


def _events(file):
    """Reads a file of TensorBoard events: (tag, step, value)."""
    data, place, found = file.read_bytes(), 0, []
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        event = Event.FromString(data[place + 12 : place + 12 + length])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        place += 12 + length + 4
    return found


def test_tensorboard_shows_the_same(tmp_path):
    _fit(tmp_path)
    (file,) = (tmp_path / "metrics").glob("events.out.tfevents.*")
    events = {(tag, step): value for tag, step, value in _events(file)}
    for record in _records(tmp_path):
        for name in record.keys() - {"step"}:
            assert events[name, record["step"]] == pytest.approx(record[name], rel=1e-6)
    assert {("valid_kernel", 6), ("valid_kernel", 12)} <= events.keys()


def test_what_is_timed_is_training_and_not_compiling_or_validating(tmp_path, monkeypatch):
    """Batches take 50 ms, compiling and each validation 3 s."""

    def compiling(*arguments, **keys):
        blueprint, train_step = assemble(*arguments, **keys)
        monkeypatch.setattr(loop, "assemble", assemble)
        compiled = []

        def slow(*arguments, waiting):
            if not compiled:
                compiled.append(time.sleep(3))
            return train_step(*arguments, waiting=waiting)

        return blueprint, slow

    monkeypatch.setattr(loop, "assemble", compiling)
    config = CONFIG.model_copy(update={"num_steps": 10, "log_interval_steps": 3})
    measured = _fit(tmp_path, config, Task(slow={"batch": 0.05, "validation": 3})).measured
    records = _records(tmp_path)
    assert [record["step"] for record in records] == [3, 6, 9, 10]
    assert [record.get("compile_secs", 0) > 3 for record in records] == [True, False, False, False]
    # The first two batches were there before the clock ran.
    seconds = measured["secs_per_step"] * 9
    assert 8 * 0.05 <= seconds < 3
    assert max(record["secs_per_step"] for record in records) < 0.9
    assert measured["input_wait_share"] * seconds == pytest.approx(8 * 0.05)
    assert measured["compile_secs"] == records[0]["compile_secs"]


def test_the_clock_leaves_out_what_is_compiled_on_the_way(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: now[0])

    def step(seconds):
        now[0] += seconds
        clock.dispatched(0.0)
        clock.finished()

    clock = monitor._Clock()
    for seconds in (30.0, 1.0, 1.0):  # The first compiles.
        step(seconds)
    clock.begin_anew()
    for seconds in (30.0, 2.0):
        step(seconds)
    assert clock.lap() == (3, 4.0, 0.0)
    assert clock.compile_secs == 30.0


def test_a_share_of_peak_is_never_more_than_one(tmp_path, monkeypatch, capsys):
    """The peak was measured while the machine was busy: what is reached is the better figure."""
    monkeypatch.setattr(monitor, "peak_flops", lambda device: 1.0)
    measured = _fit(tmp_path).measured
    shares = [record["share_of_peak"] for record in _records(tmp_path) if "share_of_peak" in record]
    assert shares and max(shares) == 1.0 and 0 < measured["share_of_peak"] <= 1
    rates = [r["model_flops_per_sec"] for r in _records(tmp_path) if "share_of_peak" in r]
    so_far = np.maximum.accumulate(rates)
    np.testing.assert_allclose(shares, np.asarray(rates) / so_far, rtol=1e-6)
    assert capsys.readouterr().out.count("more than the devices' peak") == 1
