"""The loop on a small regression: resumed equals uninterrupted, damage is survived."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlpmem_jax.config.stages import OptimizerConfig, TrainingConfig
from mlpmem_jax.errors import RunFailed
from mlpmem_jax.input.feed import Feed
from mlpmem_jax.models.layers import parameter
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.parallel.preemption import Preempted, listening, stopping_where_asked
from mlpmem_jax.training.loop import fit
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
        self.kernel = parameter((4, 4), ("embed", "ffn"), 0.5, rngs)
        self.offset_bias = parameter((4,), ("state",), 0.0, rngs)


class Points:
    num_windows = 40

    def read(self, windows):
        x = np.stack([np.random.default_rng(int(w)).normal(size=4) for w in windows])
        return {"x": x.astype(np.float32), "weight": (windows % 5 != 0).astype(np.float32)}


class Task:
    """Learns y = 3x; dies after a given number of batches when told to."""

    name = "pretrain"
    frozen = ()
    tokens_per_step = 8
    flops_per_step = 1e3

    def __init__(self, die_at=None, poison_at=None, term_at=None):
        self._die_at = die_at
        self._term_at = term_at
        self._poison_at = poison_at

    def build(self, rngs):
        return Linear(rngs)

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
                    raise KeyboardInterrupt
                if self._step == task._term_at:
                    os.kill(os.getpid(), signal.SIGTERM)
                batch = next(feed)
                if self._step == task._poison_at:
                    batch = batch | {"x": batch["x"] * jnp.nan}
                self._step += 1
                return batch

        return Watched()

    def validate(self, state):
        return {"kernel": float(jnp.sum(jax.tree.leaves(state.params)[0]))}


def _fit(directory, config=CONFIG, **task):
    return fit(
        Task(**task),
        config,
        seed=0,
        mesh=single_device_mesh(),
        directory=directory / "run",
        metrics_directory=directory / "metrics",
    )


def _losses(directory):
    lines = (directory / "metrics" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {r["step"]: r["loss"] for r in records if "loss" in r}


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


@pytest.mark.parametrize("die_at", [2, 6, 11])
def test_resumed_equals_uninterrupted(tmp_path, uninterrupted, die_at):
    whole, losses = uninterrupted
    with pytest.raises(KeyboardInterrupt):
        _fit(tmp_path, die_at=die_at)
    resumed = _fit(tmp_path)
    for a, b in zip(_leaves(whole), _leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert _losses(tmp_path) == losses


def test_a_notice_saves_at_once_and_the_rest_follows(tmp_path, uninterrupted):
    whole, losses = uninterrupted
    with listening(), pytest.raises(Preempted, match=r"pretrain: saved at step 6 of 12"):
        _fit(tmp_path, term_at=5)
    assert (tmp_path / "run" / "checksums" / "6.json").exists()
    # It is kept beside the schedule's until the next one, and costs none of these.
    assert _steps(tmp_path) == [4, 6]
    resumed = _fit(tmp_path)
    for a, b in zip(_leaves(whole), _leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert _losses(tmp_path) == losses
    assert _steps(tmp_path) == [4, 8, 12]


def test_a_notice_after_the_last_question_is_not_lost():
    with listening(), pytest.raises(Preempted, match="stopped by SIGTERM"), stopping_where_asked():
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_finished_run_is_only_read(tmp_path, uninterrupted):
    first, second = _fit(tmp_path), _fit(tmp_path)
    for a, b in zip(_leaves(first), _leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
    assert second.files == first.files


def test_a_damaged_checkpoint_is_named_skipped_and_replaced(tmp_path, uninterrupted, capsys):
    whole, _ = uninterrupted
    _fit(tmp_path)
    data = [p for p in (tmp_path / "run" / "checkpoints" / "12").rglob("*") if p.is_file()]
    victim = max(data, key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    resumed = _fit(tmp_path)
    error = capsys.readouterr().err
    assert "checkpoint of step 12 is skipped" in error and str(victim) in error
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
