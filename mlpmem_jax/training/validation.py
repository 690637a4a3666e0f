"""Validation during training: fixed batches of windows from the whole validation split."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from mlpmem_jax.input.feed import Batch, Feed
from mlpmem_jax.input.windows import WindowSource
from mlpmem_jax.training.losses import means

# Arrays of a batch by which tokens count; zero in windows that only fill the last batch.
_WEIGHTS = ("weight", "lm_weight")


def validation_windows(num_windows: int, most: int) -> np.ndarray:
    """Returns the windows that training is validated on, int64 ascending, none twice.

    All of them where they are at most `most`; else one drawn from each of `most` equal parts of
    the split. The draw does not depend on the run's seed, so that runs can be compared.
    """
    if num_windows <= most:
        return np.arange(num_windows, dtype=np.int64)
    bound = np.arange(most + 1, dtype=np.int64) * num_windows // most
    return np.random.default_rng(0).integers(bound[:-1], bound[1:])


class WholeBatches:
    """Some windows of a source, filled up to whole batches with windows of no weight."""

    def __init__(self, source: WindowSource, window_N: np.ndarray, batch_size: int):
        self._source = source
        self._window_N = window_N
        self.num_windows = -(-len(window_N) // batch_size) * batch_size

    def read(self, windows: np.ndarray) -> dict[str, np.ndarray]:
        """Reads windows by their place among those that were chosen (int64 [B])."""
        counts_B = windows < len(self._window_N)
        batch = self._source.read(self._window_N[np.minimum(windows, len(self._window_N) - 1)])
        for name in _WEIGHTS:
            if name in batch:
                weight = batch[name]
                batch[name] = weight * counts_B.reshape(-1, *(1,) * (weight.ndim - 1))
        return batch


class Validator:
    """Sums metrics over the same windows each time, each of them once.

    The batches are read anew each time: a validation split need not fit in memory.
    """

    def __init__(
        self,
        source: WindowSource,
        mesh: jax.sharding.Mesh,
        *,
        batch_size: int,
        num_batches: int,
        sums: Callable[[Any, Any, Batch], Mapping[str, jax.Array]],
    ):
        """Prepares.

        Args:
            num_batches: Batches at most; fewer if they cover the split.
            sums: (network state, frozen arrays, batch) to summed metrics; jitted here.
        """
        window_N = validation_windows(source.num_windows, num_batches * batch_size)
        self._source = WholeBatches(source, window_N, batch_size)
        self._mesh = mesh
        self._batch_size = batch_size
        self._sums = jax.jit(sums)

    def __call__(self, network: Any, frozen: Any) -> dict[str, float]:
        """Returns the mean of each metric."""
        feed = Feed(
            self._source,
            self._mesh,
            batch_size=self._batch_size,
            seed=0,
            steps=range(self._source.num_windows // self._batch_size),
            shuffled=False,
        )
        total: dict[str, Any] = {}
        for batch in feed:
            sums = jax.device_get(dict(self._sums(network, frozen, batch)))
            total = {name: total.get(name, 0) + value for name, value in sums.items()}
        return {name: float(value) for name, value in means(total).items()}
