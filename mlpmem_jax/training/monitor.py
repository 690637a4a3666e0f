"""Watches a training run: metrics of the step before, the bar, the finite-loss check."""

import math
import time
from collections.abc import Collection, Mapping
from typing import Any

import jax
from etils import epath

from mlpmem_jax.config.stages import TrainingConfig
from mlpmem_jax.console import progress, say
from mlpmem_jax.errors import RunFailed
from mlpmem_jax.training.checkpoint import Checkpoints
from mlpmem_jax.training.flops import peak_flops
from mlpmem_jax.training.metrics import metrics_log
from mlpmem_jax.training.task import WindowTask

_MUST_BE_FINITE = ("loss", "grad_norm", "update_norm")


class _Clock:
    """Steps, their time, and waits for batches since the last record, and altogether.

    It runs from the end of the first step on: that one includes compiling.

    Attributes:
        compile_secs: From the start to the moment when the first step was dispatched, less
            the wait for its batch; None: not yet.
        total_steps: Steps that were timed.
        total_secs: Their time.
        total_wait_secs: How much of it was spent waiting for batches.
    """

    def __init__(self) -> None:
        self.compile_secs: float | None = None
        self.total_secs = self.total_wait_secs = 0.0
        self.total_steps = 0
        self._created = time.perf_counter()
        self._running_since: float | None = None
        self._begun = False
        self._feed_wait_secs = self._waited_before = 0.0
        self._steps, self._secs, self._wait_secs = 0, 0.0, 0.0

    def dispatched(self, feed_wait_secs: float) -> None:
        """Notes that a step was dispatched, and all that its feed has made it wait so far."""
        self._feed_wait_secs = feed_wait_secs
        if self.compile_secs is None:
            self.compile_secs = max(time.perf_counter() - self._created - feed_wait_secs, 0.0)

    def finished(self) -> None:
        """Notes that a step has finished."""
        if self._begun:
            self._steps += 1
        else:
            self._begun = True
            self.resume()

    def begin_anew(self) -> None:
        """Runs again from the end of the next step on."""
        self.pause()
        self._begun = False

    def pause(self) -> None:
        """What passes from now on is not training."""
        if self._running_since is not None:
            self._secs += time.perf_counter() - self._running_since
            self._wait_secs += self._feed_wait_secs - self._waited_before
            self._running_since = None

    def resume(self) -> None:
        """Runs on, if the first step has finished."""
        if self._begun:
            self._running_since = time.perf_counter()
            self._waited_before = self._feed_wait_secs

    def lap(self) -> tuple[int, float, float]:
        """Returns steps, seconds, and seconds of waiting since the last lap."""
        self.pause()
        lap = self._steps, self._secs, self._wait_secs
        self.total_steps += lap[0]
        self.total_secs += lap[1]
        self.total_wait_secs += lap[2]
        self._steps, self._secs, self._wait_secs = 0, 0.0, 0.0
        self.resume()
        return lap


def _advice(optimizer: str, bad: Collection[str]) -> str:
    """Returns which keys to look at, by which of the numbers are not finite."""
    if "loss" not in bad and "grad_norm" not in bad:
        return (
            f"the gradient is finite, what the optimiser makes of it is not: look at {optimizer}."
            "epsilon, learning_rate and weight_decay"
        )
    return f"likely causes: {optimizer}.learning_rate or clip_norm too high, warmup_steps too low"


class Monitor:
    """Reads the metrics of step n−1 while step n runs, so that nothing waits for them."""

    def __init__(
        self,
        task: WindowTask,
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
        self._log = metrics_log(directory, start_step)
        self._bar = progress(stop_step, "step", task.name, initial=start_step)
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None
        # NaN for an accelerator that the table does not know: no share is better than a wrong one.
        peak = peak_flops(jax.local_devices()[0])
        self._peak = math.nan if peak is None else peak * jax.device_count()
        self._exceeded_peak = False
        self._clock = _Clock()
        self._compiling_logged = False
        self._last_validation: dict[str, float] = {}

    def dispatched(self, step: int, metrics: Mapping[str, jax.Array], wait_secs: float) -> None:
        """Takes the metrics of a step that has just been dispatched."""
        self._clock.dispatched(wait_secs)
        self.settle()
        self._pending = (step, metrics)
        self._checkpoints.poll()
        self._log.poll()

    def flush(self) -> None:
        """Sends what was logged to where it is kept, beside the checkpoint of this step."""
        self._log.flush()

    def pause(self) -> None:
        """Waits as `settle`; what follows, until `validation`, is not the time of training."""
        self.settle()
        self._clock.pause()

    def settle(self) -> None:
        """Waits for the last dispatched step and reads its metrics."""
        if self._pending is None:
            return
        (step, on_device), self._pending = self._pending, None
        metrics = {name: float(value) for name, value in jax.device_get(dict(on_device)).items()}
        self._refuse_non_finite(step, metrics)
        self._clock.finished()
        if step % self._config.log_interval_steps == 0 or step == self._stop_step:
            metrics |= self._speed(step)
            self._log.write(step, metrics)
            self._bar.set_postfix({"loss": f"{metrics['loss']:.4f}"}, refresh=False)
        self._bar.update(1)

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
            f"{self._task.name}: {name} is {value} at step {step} ({kept}); "
            + _advice(f"{self._task.name}.optimizer", bad)
        )

    def _speed(self, step: int) -> dict[str, float]:
        """Returns what steps took since the last record; nothing where none was timed."""
        speed = {}
        if self._clock.compile_secs is not None and not self._compiling_logged:
            speed["compile_secs"] = self._clock.compile_secs
            self._compiling_logged = True
        steps, seconds, wait = self._clock.lap()
        if steps == 0:
            return speed
        flops = self._task.flops_of(range(step - steps, step)) / seconds
        return speed | {
            "tokens_per_sec": self._task.tokens_per_step * steps / seconds,
            "model_flops_per_sec": flops,
            "share_of_peak": self._share_of_peak(flops),
            "input_wait_share": wait / seconds,
            "secs_per_step": seconds / steps,
        }

    def _share_of_peak(self, flops_per_sec: float) -> float:
        """Returns the share, at most 1: what is reached is a lower bound of the peak."""
        if flops_per_sec > self._peak:
            if not self._exceeded_peak:
                say(
                    f"note: {self._task.name} runs at {flops_per_sec:.3g} flop/s, more than the "
                    f"devices' peak as measured or listed ({self._peak:.3g}): the machine was busy "
                    "at the start, or the figure is low; share_of_peak is of the higher rate"
                )
            self._peak, self._exceeded_peak = flops_per_sec, True
        return flops_per_sec / self._peak

    def compiles(self) -> None:
        """Waits likewise; the next step is compiled first, and is not timed."""
        self.settle()
        self._clock.begin_anew()

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes validation metrics, measured after `pause`."""
        self._last_validation = {name: float(value) for name, value in metrics.items()}
        self._log.write(step, {f"valid_{n}": v for n, v in self._last_validation.items()})
        self._clock.resume()

    def summary(self, steps: range) -> dict[str, Any]:
        """Returns what the manifest records of a run of these steps, restarts included."""
        clock = self._clock
        seconds = max(clock.total_secs, 1e-9)
        timed = range(steps.stop - clock.total_steps, steps.stop)
        return {
            "steps": len(steps),
            "validation": self._last_validation,
            "compile_secs": clock.compile_secs or 0.0,
            "secs_per_step": clock.total_secs / max(clock.total_steps, 1),
            "tokens_per_sec": self._task.tokens_per_step * clock.total_steps / seconds,
            "share_of_peak": self._share_of_peak(self._task.flops_of(timed) / seconds),
            "input_wait_share": clock.total_wait_secs / max(clock.total_secs, 1e-9),
            "model_flops": self._task.flops_of(steps),
        }

    def close(self) -> None:
        """Closes bar and log."""
        self._bar.close()
        self._log.close()
