"""Watches a training run: metrics of the step before, the bar, the finite-loss check."""

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
from etils import epath

from mlpmem_jax.config.stages import TrainingConfig
from mlpmem_jax.errors import RunFailed
from mlpmem_jax.training.checkpoint import Checkpoints
from mlpmem_jax.training.flops import peak_flops
from mlpmem_jax.training.metrics import MetricsLog, TrainingBar

if TYPE_CHECKING:
    from mlpmem_jax.training.loop import Task

_MUST_BE_FINITE = ("loss", "grad_norm", "update_norm")


class Monitor:
    """Reads the metrics of step n−1 while step n runs, so that nothing waits for them."""

    def __init__(
        self,
        task: "Task",
        config: TrainingConfig,
        start_step: int,
        stop_step: int,
        directory: epath.Path,
        checkpoints: Checkpoints,
    ):
        self._task = task
        self._config = config
        self._stop_step = stop_step
        self._checkpoints = checkpoints
        self._log = MetricsLog(directory, start_step)
        self._bar = TrainingBar(stop_step, start_step, task.name)
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None
        # NaN for an accelerator that the table does not know: no share is better than a wrong one.
        peak = peak_flops(jax.local_devices()[0])
        self._peak = math.nan if peak is None else peak * jax.device_count()
        self._steps_in_window = 0
        self._wait_at_window = 0.0
        self._wait_secs = 0.0
        self._window_started = time.perf_counter()
        self._train_secs = 0.0
        self._train_steps = 0
        self._last_validation: dict[str, float] = {}

    def dispatched(self, step: int, metrics: Mapping[str, jax.Array], wait_secs: float) -> None:
        """Takes the metrics of a step that has just been dispatched."""
        self._read_pending()
        self._pending = (step, metrics)
        self._wait_secs = wait_secs
        self._checkpoints.poll()

    def settle(self) -> None:
        """Waits for the last dispatched step and reads its metrics."""
        self._read_pending()

    def _read_pending(self) -> None:
        if self._pending is None:
            return
        (step, on_device), self._pending = self._pending, None
        metrics = {name: float(value) for name, value in jax.device_get(dict(on_device)).items()}
        self._refuse_non_finite(step, metrics)
        self._steps_in_window += 1
        if step % self._config.log_interval_steps == 0 or step == self._stop_step:
            metrics |= self._speed()
            self._log.write(step, metrics)
            self._bar.update(loss=f"{metrics['loss']:.4f}")
        else:
            self._bar.update()

    def _refuse_non_finite(self, step: int, metrics: Mapping[str, float]) -> None:
        bad = {n: metrics[n] for n in _MUST_BE_FINITE if not math.isfinite(metrics[n])}
        if not bad:
            return
        self._checkpoints.wait()
        self._log.write(step, metrics)
        self.close()
        good = self._checkpoints.last_good_step()
        kept = "no checkpoint was saved before" if good is None else f"last good checkpoint: {good}"
        name, value = next(iter(bad.items()))
        raise RunFailed(
            f"{self._task.name}: {name} is {value} at step {step} ({kept}); lower "
            f"{self._task.name}.optimizer.learning_rate or clip_norm and start again"
        )

    def _speed(self) -> dict[str, float]:
        now = time.perf_counter()
        seconds = max(now - self._window_started, 1e-9)
        steps = self._steps_in_window
        wait = self._wait_secs - self._wait_at_window
        self._train_secs += seconds
        self._train_steps += steps
        self._window_started, self._steps_in_window = now, 0
        self._wait_at_window = self._wait_secs
        flops = self._task.flops_per_step * steps / seconds
        return {
            "tokens_per_sec": self._task.tokens_per_step * steps / seconds,
            "model_flops_per_sec": flops,
            "share_of_peak": flops / self._peak,
            "input_wait_share": wait / seconds,
            "secs_per_step": seconds / max(steps, 1),
        }

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes validation metrics; their time does not count as training."""
        self.settle()
        self._last_validation = {name: float(value) for name, value in metrics.items()}
        self._log.write(step, {f"valid_{n}": v for n, v in self._last_validation.items()})
        self._window_started = time.perf_counter()
        self._steps_in_window = 0
        self._wait_at_window = self._wait_secs

    def summary(self) -> dict[str, Any]:
        """Returns what the manifest records."""
        seconds = max(self._train_secs, 1e-9)
        return {
            "validation": self._last_validation,
            "secs_per_step": self._train_secs / max(self._train_steps, 1),
            "tokens_per_sec": self._task.tokens_per_step * self._train_steps / seconds,
            "share_of_peak": (self._task.flops_per_step * self._train_steps / seconds / self._peak),
            "input_wait_share": self._wait_secs / seconds if self._train_steps else 0.0,
            "model_flops": self._task.flops_per_step * self._stop_step,
        }

    def close(self) -> None:
        """Closes bar and log."""
        self._bar.close()
        self._log.close()
