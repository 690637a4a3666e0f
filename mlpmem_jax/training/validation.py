"""Validation during training: fixed batches of the validation split."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from mlpmem_jax.input.feed import Batch, Feed, WindowSource
from mlpmem_jax.training.losses import means


class Validator:
    """Sums metrics over the same batches each time.

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
            source: Windows of the validation split.
            mesh: Devices.
            batch_size: Windows in a batch.
            num_batches: Batches at most; fewer if they cover the split.
            sums: (network state, frozen arrays, batch) to summed metrics; jitted here.
        """
        self._source = source
        self._mesh = mesh
        self._batch_size = batch_size
        # Whole batches only, or the first windows of a wrapped batch would count twice.
        self._num_batches = max(1, min(num_batches, source.num_windows // batch_size))
        self._sums = jax.jit(sums)

    def __call__(self, network: Any, frozen: Any) -> dict[str, float]:
        """Returns the mean of each metric."""
        feed = Feed(
            self._source,
            self._mesh,
            batch_size=self._batch_size,
            seed=0,
            steps=range(self._num_batches),
            shuffled=False,
        )
        total: dict[str, Any] = {}
        for batch in feed:
            sums = jax.device_get(dict(self._sums(network, frozen, batch)))
            total = {name: total.get(name, 0) + value for name, value in sums.items()}
        return {name: float(value) for name, value in means(total).items()}
