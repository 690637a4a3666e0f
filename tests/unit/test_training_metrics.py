"""The metrics of a training loop: what each step logs, and what is timed."""

import struct
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tensorboardX.proto.event_pb2 import Event

from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.training import loop, monitor
from mlpmem_jax.training.loop import assemble
from mlpmem_jax.training.optimizer import learning_rate_schedule
from tests.unit.small_training import CONFIG, Task, fit_small, records_of

pytestmark = pytest.mark.usefixtures("short_measurement")

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
    measured = fit_small(tmp_path).measured
    records = records_of(tmp_path)
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
    fit_small(tmp_path)
    records = records_of(tmp_path)
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
    fit_small(tmp_path)
    (file,) = (tmp_path / "metrics").glob("events.out.tfevents.*")
    events = {(tag, step): value for tag, step, value in _events(file)}
    for record in records_of(tmp_path):
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
    measured = fit_small(tmp_path, config, Task(slow={"batch": 0.05, "validation": 3})).measured
    records = records_of(tmp_path)
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
    measured = fit_small(tmp_path).measured
    records = [record for record in records_of(tmp_path) if "share_of_peak" in record]
    shares = [record["share_of_peak"] for record in records]
    assert shares and max(shares) == 1.0 and 0 < measured["share_of_peak"] <= 1
    rates = [record["model_flops_per_sec"] for record in records]
    so_far = np.maximum.accumulate(rates)
    np.testing.assert_allclose(shares, np.asarray(rates) / so_far, rtol=1e-6)
    assert capsys.readouterr().out.count("more than the devices' peak") == 1
