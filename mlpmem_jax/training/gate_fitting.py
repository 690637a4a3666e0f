"""The gate of a trained memory, fitted to validation rows (memory.gate=fitted).

A gate that learns from training rows sees a memory that knows them, and trusts it everywhere.

Suffixes: B windows, L rows of a window, N rows, X width of the memory's inputs.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mlpmem_jax.console import say
from mlpmem_jax.input.feed import Batch, Feed
from mlpmem_jax.input.windows import WindowSource
from mlpmem_jax.parallel.sharding import replicated
from mlpmem_jax.stats.gating import Gate, GateRows, fit_gate
from mlpmem_jax.training.validation import WholeBatches, validation_windows

_MOST_VALUES = 1 << 26  # Of features: 256 MiB on each host.
_LEAST_ROWS = 256

# Of a batch: features [B, L, X], log p(label) of the memory and of the decoder [B, L].
Outputs = tuple[jax.Array, jax.Array, jax.Array]


def fitted_gate(
    outputs: Callable[[Any, Any, Batch], Outputs],
    arrays: tuple[Any, Any],
    source: WindowSource,
    mesh: jax.sharding.Mesh,
    *,
    batch_size: int,
    window_tokens: int,
    num_features: int,
    floor: float,
) -> Gate | None:
    """Runs a memory over validation rows and fits a gate to them.

    Args:
        outputs: (network, frozen arrays, batch) to features and log-probabilities; jitted here.
        arrays: Network and frozen arrays.
        source: Windows of the validation split, with `weight` and `logprob`.
        mesh: Devices.
        batch_size: Windows in a batch.
        window_tokens: Rows in a window, L.
        num_features: X.
        floor: Smallest distance of λ from 0 and 1.

    Returns:
        The gate, the same in all processes; None where the split has too few rows to fit one.
    """
    most = max(1, _MOST_VALUES // (num_features * window_tokens))
    window_N = validation_windows(source.num_windows, most)
    batches = WholeBatches(source, window_N, batch_size)
    feed = Feed(
        batches,
        mesh,
        batch_size=batch_size,
        seed=0,
        steps=range(batches.num_windows // batch_size),
        shuffled=False,
    )

    def of_batch(network: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, ...]:
        return (*outputs(network, frozen, batch), batch["weight"] > 0)

    # Every process gets all rows: each fits the same gate.
    jitted = jax.jit(of_batch, out_shardings=replicated(mesh))
    parts: list[list[np.ndarray]] = []
    with jax.set_mesh(mesh):
        for batch in feed:
            *found, scored_BL = jax.device_get(jitted(*arrays, batch))
            parts.append([array[scored_BL] for array in found])
    rows = GateRows(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    count = len(rows.memory_N)
    if count < _LEAST_ROWS:
        say(
            f"train: {count} scored rows of validation are too few to fit a gate "
            f"({_LEAST_ROWS} at least): it gives train.interpolation everywhere"
        )
        return None
    gate = fit_gate(rows, floor)
    say(
        f"train: gate fitted to {count:,} validation rows (ridge {gate.ridge:g}): {gate.nats:.3f} "
        f"nats on left-out blocks of them, {gate.nats_one:.3f} with one λ"
    )
    return gate
