"""What tests of the training loop share: a small regression, and what a run of it leaves."""

import json
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlpmem_jax.config.stages import OptimizerConfig, TrainingConfig
from mlpmem_jax.input.feed import Feed
from mlpmem_jax.models.layers import parameter
from mlpmem_jax.parallel.mesh import single_device_mesh
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

    def finish(self, state):
        return state, {}

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


def fit_small(directory, config=CONFIG, task=None, **keys):
    return fit(
        task or Task(**keys),
        config,
        seed=0,
        mesh=single_device_mesh(),
        directory=directory / "run",
        metrics_directory=directory / "metrics",
    )


def records_of(directory):
    lines = (directory / "metrics" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def losses_of(directory):
    return {record["step"]: record["loss"] for record in records_of(directory)}


def steps_of(directory):
    return sorted(int(path.name) for path in (directory / "run" / "checkpoints").iterdir())


def leaves_of(fit_result):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(fit_result.state)]
