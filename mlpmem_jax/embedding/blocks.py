"""The loop of all commands that run a decoder over a split: windows in, rows of blocks out.

While the devices compute a batch, the host takes the results of the one before.

Suffixes: B windows of a batch, W tokens of a window, R rows that a window scores, P positions of
a batch.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mlpmem_jax.config.data import DatastoreConfig
from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.corpus.windows import EmbeddingPlan
from mlpmem_jax.input.feed import local_positions, to_devices
from mlpmem_jax.models.decoder import Site
from mlpmem_jax.parallel.sharding import constrain
from mlpmem_jax.parallel.sharing import dealt, local_rows, whole

T = TypeVar("T")
BlockStep = Callable[[Mapping[str, jax.Array]], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class EmbeddingSettings:
    """How rows are made.

    Attributes:
        states: Name of an array ("key", "input") to the state that it holds.
        within: Whether attention stays within documents.
        window_tokens: Tokens that the decoder reads at once, W.
        stride_tokens: Rows that a window scores, R.
        batch_size: Windows embedded at once, over all devices.
    """

    states: Mapping[str, Site]
    within: bool
    window_tokens: int
    stride_tokens: int
    batch_size: int

    @classmethod
    def of(
        cls,
        store: DatastoreConfig,
        num_layers: int,
        *,
        within: bool,
        window_tokens: int,
        stride_tokens: int,
        names: Iterable[str] = (),
    ) -> "EmbeddingSettings":
        """Returns the settings of a datastore.

        Args:
            store: Its sites and batches.
            num_layers: Blocks of the decoder.
            within: Whether attention stays within documents.
            window_tokens: W.
            stride_tokens: R.
            names: Arrays that are stored, or otherwise wanted.
        """
        sites = {name: getattr(store, name) for name in ("key", "input") if name in names}
        states = {name: Site.of(site, num_layers) for name, site in sites.items()}
        return cls(states, within, window_tokens, stride_tokens, store.batch_size)

    def plan(self, num_rows: int) -> EmbeddingPlan:
        """Returns the windows of a split of this many rows."""
        return EmbeddingPlan(num_rows, self.window_tokens, self.stride_tokens, self.within)

    def scored_columns(self, offset_B: jax.Array) -> Callable[[jax.Array], jax.Array]:
        """Returns a function that takes, of arrays [B, W, …], the R columns that a window scores.

        Args:
            offset_B: First of those columns in each window.
        """
        offset_R = jnp.arange(self.stride_tokens, dtype=jnp.int32)
        column_BR = jnp.minimum(offset_B[:, None] + offset_R, self.window_tokens - 1)

        def scored(array_BW: jax.Array) -> jax.Array:
            index = column_BR.reshape(*column_BR.shape, *(1,) * (array_BW.ndim - 2))
            return jnp.take_along_axis(array_BW, index, axis=1)

        return scored


class ComputedRows(NamedTuple):
    """Rows of a batch of blocks.

    Attributes:
        num_rows: Rows that all processes take of this batch.
        blocks: For each block that this process takes, its first row and the arrays of its rows.
    """

    num_rows: int
    blocks: list[tuple[int, dict[str, np.ndarray]]]


def computed_rows(
    step: BlockStep,
    plan: EmbeddingPlan,
    tokens: TokenSplit,
    batches: Iterable[np.ndarray],
    mesh: jax.sharding.Mesh,
    *,
    own_P: np.ndarray | None = None,
    num_recent: int = 0,
) -> Iterator[ComputedRows]:
    """Yields the rows of blocks on the host, batch by batch.

    Args:
        step: Jitted; arrays of windows [B, W, …] to arrays of rows [B, R, …].
        batches: Numbers of blocks, int64 [B] each; negative: none.
        mesh: Devices; the caller has set it.
        own_P: Positions of a batch that this process takes, on its own devices; None: every
            process takes all.
        num_recent: Recent tokens that `step` reads of each token; 0: none.
    """

    def dispatched(number_B: np.ndarray) -> tuple[np.ndarray, dict[str, jax.Array]]:
        position_P = local_positions(mesh, len(number_B))
        local = plan.read(tokens, np.maximum(number_B[position_P], 0), num_recent)
        return number_B, step(to_devices(local, mesh, position_P, len(number_B)))

    for number_B, rows in _one_behind(map(dispatched, batches)):
        own_B = number_B if own_P is None else number_B[own_P]
        host = {
            name: whole(array) if own_P is None else local_rows(array, own_P)
            for name, array in rows.items()
        }
        taken = np.flatnonzero(own_B >= 0)
        part = plan.blocks(own_B[taken])
        blocks = [
            (int(row), {name: array[place, :count] for name, array in host.items()})
            for place, row, count in zip(taken, part.row, part.count, strict=True)
        ]
        yield ComputedRows(int(plan.blocks(number_B[number_B >= 0]).count.sum()), blocks)


def in_batches(blocks: Sequence[int], batch_size: int) -> list[np.ndarray]:
    """Cuts block numbers into batches of one size, int64 [B]; the last is filled with -1."""
    return dealt([(0, blocks)], np.zeros(batch_size, np.int64))


def by_window(array_BX: jax.Array) -> jax.Array:
    """Lays rows out as the windows are: each process can then take its own."""
    return constrain(array_BX, "batch", *(None,) * (array_BX.ndim - 1))


def _one_behind(items: Iterable[T]) -> Iterator[T]:
    """Yields items once the next is there: on devices both are under way then."""
    return (one for one, _ in itertools.pairwise(itertools.chain(items, [None])) if one is not None)
