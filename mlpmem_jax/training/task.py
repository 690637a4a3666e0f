"""What the training tasks share: windows in batches, and the same sums on validation."""

import abc
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from mlpmem_jax.config.stages import TrainingConfig
from mlpmem_jax.input.feed import Batch, Feed
from mlpmem_jax.input.windows import WindowsOf, WindowSource
from mlpmem_jax.training.state import TrainState, structure
from mlpmem_jax.training.step import LossParts
from mlpmem_jax.training.validation import Validator


class WindowTask(abc.ABC):
    """A network trained on windows of the training split.

    Attributes:
        name: The section of the configuration, for metrics and messages.
        frozen: Arrays that the loss reads and nothing changes.
        build: Makes the network.
        source: Windows of the training split.
        tokens_per_step: Tokens (or rows) in a global batch.
        flops_per_step: Model flops of a step, forward and backward.
    """

    name: str
    frozen: Any = ()
    flops_per_step: float

    def __init__(
        self,
        settings: TrainingConfig,
        mesh: jax.sharding.Mesh,
        build: Callable[[nnx.Rngs], nnx.Module],
        *,
        train: WindowSource,
        valid: WindowSource,
        window_tokens: int,
        seed: int,
        mix_windows: int = 1,
        windows_of: WindowsOf | None = None,
    ):
        """Prepares feeds.

        Args:
            settings: The section of the configuration.
            build: Makes the network.
            train: Windows of the training split.
            valid: Windows of the validation split.
            window_tokens: Tokens (or rows) in a window.
            mix_windows: Windows whose rows are dealt out together.
            windows_of: Global record numbers to windows; None: all windows in a drawn order.
        """
        self.build = build
        self.tokens_per_step = settings.batch_size * window_tokens
        self._settings = settings
        self._mesh = mesh
        self.source = train
        self._seed = seed
        self._mix_windows = mix_windows
        self._windows_of = windows_of
        self._graphdef = structure(build)
        self._validator = Validator(
            valid,
            mesh,
            batch_size=settings.batch_size,
            num_batches=settings.eval_batches,
            sums=self._validation_sums,
        )

    def flops_of(self, steps: range) -> float:
        """Returns the model flops of some steps."""
        return len(steps) * self.flops_per_step

    @abc.abstractmethod
    def loss(self, model: Any, frozen: Any, batch: Batch, step: jax.Array) -> LossParts:
        """Returns sums over a batch: loss, weight, and metrics."""

    def continued(self, abstract: TrainState) -> TrainState | None:
        """Returns the state of the run that this one goes on from; None: there is none."""
        return None

    def prepare(self, state: TrainState) -> TrainState:
        """Returns a fresh state with what it needs from data or from other networks."""
        return state

    def finish(self, state: TrainState) -> tuple[TrainState, Mapping[str, float]]:
        """Returns the state with what is set once training is over, and metrics of that."""
        return state, {}

    def feed(self, steps: range) -> Feed:
        """Returns the training batches of some steps."""
        return Feed(
            self.source,
            self._mesh,
            batch_size=self._settings.batch_size,
            seed=self._seed,
            steps=steps,
            prefetch=self._settings.prefetch_batches,
            mix_windows=self._mix_windows,
            windows_of=self._windows_of,
        )

    def _validation_sums(self, network: Any, frozen: Any, batch: Batch) -> Mapping[str, Any]:
        params, fixed, step = network
        return self.loss(nnx.merge(self._graphdef, params, fixed), frozen, batch, step).sums

    def validate(self, state: TrainState) -> dict[str, float]:
        """Returns the means of the loss's metrics on validation windows."""
        return self._validator((state.params, state.fixed, state.step), self.frozen)
