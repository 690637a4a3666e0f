"""The gate of a trained memory, fitted to validation rows (memory.gate=fitted).

A gate that learns from training rows sees a memory that knows them, and gives it nearly all weight.

Suffixes: B windows, L rows of a window, N rows, X width of the memory's inputs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mlpmem_jax.console import say
from mlpmem_jax.errors import RunFailed
from mlpmem_jax.input.feed import Batch, Feed
from mlpmem_jax.input.windows import WindowSource
from mlpmem_jax.parallel.agreement import of_first
from mlpmem_jax.parallel.sharding import DATA, FSDP, replicated
from mlpmem_jax.stats.gating import Gate, GateRows, fit_gate
from mlpmem_jax.training.validation import WholeBatches, validation_windows

_MOST_VALUES = 1 << 26  # Of features: 256 MiB on each host.
_VALUES_AT_ONCE = 1 << 24  # Of features on each device, but for a mesh that needs more windows.

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
) -> Gate:
    """Runs a memory over validation rows and fits a gate to them.

    Args:
        outputs: (network, frozen arrays, batch) to features and log-probabilities; jitted here.
        arrays: Network and frozen arrays.
        source: Windows of the validation split, with `weight` and `logprob`.
        mesh: Devices.
        batch_size: Windows of a batch of training; no more are run at once.
        window_tokens: Rows in a window, L.
        num_features: X.
        floor: Smallest distance of λ from 0 and 1.

    Returns:
        The gate, the same in all processes.

    Raises:
        RunFailed: The memory's log-probabilities are not finite.
    """
    values = num_features * window_tokens
    shards = mesh.shape[DATA] * mesh.shape[FSDP]
    window_N = validation_windows(source.num_windows, max(1, _MOST_VALUES // values))
    most = min(_VALUES_AT_ONCE // values, len(window_N), batch_size)
    at_once = max(1, most // shards) * shards
    batches = WholeBatches(source, window_N, at_once)
    feed = Feed(
        batches,
        mesh,
        batch_size=at_once,
        seed=0,
        steps=range(batches.num_windows // at_once),
        shuffled=False,
    )

    def of_batch(network: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, ...]:
        return (*outputs(network, frozen, batch), batch["weight"] > 0)

    jitted = jax.jit(of_batch, out_shardings=replicated(mesh))
    parts: list[list[np.ndarray]] = []
    with jax.set_mesh(mesh):
        for batch in feed:
            # Reading waits: processes must not run different batches at the same time.
            *found, scored_BL = jax.device_get(jitted(*arrays, batch))
            parts.append([array[scored_BL] for array in found])
    return _of_first(parts, floor)


def _of_first(parts: list[list[np.ndarray]], floor: float) -> Gate:
    """Returns the gate that process 0 fits; the others fit too, and may round in another way."""
    rows = GateRows(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    parts.clear()
    try:
        gate = fit_gate(rows, floor)
        told = of_first(dataclasses.asdict(gate) | {"weight_X": gate.weight_X.tolist()})
    except ValueError as error:  # Of the same rows, in all processes.
        raise RunFailed(f"train: memory.gate=fitted: {error}") from error
    gate = Gate(**told | {"weight_X": np.asarray(told["weight_X"])})
    _say(gate, len(rows))
    return gate


def _say(gate: Gate, count: int) -> None:
    if np.isnan(gate.nats):
        say(f"train: one λ fitted to {count:,} validation rows, too few for a gate")
        return
    say(
        f"train: gate fitted to {count:,} validation rows (ridge {gate.ridge:g}): {gate.nats:.3f} "
        f"nats on left-out blocks of them, {gate.nats_one:.3f} with one λ"
    )
