"""The decoder over a split: keys, inputs, labels and log-probabilities of every row.

While the devices compute a batch, the host takes the results of the one before, and
TensorStore writes finished shards in the background.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlpmem_jax.config.schema import Config
from mlpmem_jax.console import progress, say
from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.corpus.windows import EmbeddingPlan
from mlpmem_jax.input.feed import local_positions, to_devices
from mlpmem_jax.models.decoder import Decoder, Site
from mlpmem_jax.parallel.preemption import Preempted, preempted, stopping_where_asked
from mlpmem_jax.parallel.sharding import constrain
from mlpmem_jax.parallel.sharing import dealt, local_rows, owners, process_index
from mlpmem_jax.store.layout import ArraySpec
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.shards import ShardWriter
from mlpmem_jax.training.losses import token_logprob
from mlpmem_jax.units import human_bytes

LOSS_CHUNK_TOKENS = 1024

EmbedStep = functools.partial[dict[str, jax.Array]]  # takes a batch


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
    def of(cls, config: Config, names: Iterable[str]) -> "EmbeddingSettings":
        """Returns the settings of a configuration that stores arrays of these names."""
        store = config.datastore
        return cls(
            states={
                name: Site.of(getattr(store, name), config.decoder.num_layers)
                for name in ("key", "input")
                if name in names
            },
            within=config.attends_within,
            window_tokens=config.embedding_window_tokens,
            stride_tokens=config.embedding_stride_tokens,
            batch_size=store.batch_size,
        )


def make_embed_step(
    decoder: Decoder, settings: EmbeddingSettings, specs: Mapping[str, ArraySpec]
) -> EmbedStep:
    """Returns the jitted forward pass: arrays of windows [B, W] to arrays of rows [B, R, …].

    Only the R scored columns of a window go through the output head and leave the devices,
    cast to their storage dtypes.
    """
    graphdef, weights = nnx.split(decoder)
    wanted = tuple(dict.fromkeys(settings.states.values()))

    @jax.jit
    def embed(weights: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        model = nnx.merge(graphdef, weights)
        final_BWD, states = model.hidden(batch["token"], batch.get("segment"), sites=wanted)
        assert final_BWD is not None
        scored = scored_columns(batch["offset"], settings.window_tokens, settings.stride_tokens)
        label_BR = scored(batch["label"])
        rows = {name: scored(states[site]) for name, site in settings.states.items()}
        rows |= {
            "label": label_BR,
            "logprob": token_logprob(
                scored(final_BWD),
                model.head_VD(),
                label_BR,
                vocab_size=model.vocab_size,
                chunk_tokens=LOSS_CHUNK_TOKENS,
            ),
        }
        stored = {name: rows[name].astype(spec.dtype) for name, spec in specs.items()}
        return {name: by_window(array) for name, array in stored.items()}

    return functools.partial(embed, weights)


def by_window(array_BX: jax.Array) -> jax.Array:
    """Lays rows out as the windows are: each process can then take its own."""
    return constrain(array_BX, "batch", *(None,) * (array_BX.ndim - 1))


def scored_columns(
    offset_B: jax.Array, window_tokens: int, stride_tokens: int
) -> Callable[[jax.Array], jax.Array]:
    """Returns a function that takes, of arrays [B, W, …], the columns that a window scores.

    Args:
        offset_B: First of those columns in each window.
        window_tokens: W.
        stride_tokens: R, how many they are.
    """
    offset_R = jnp.arange(stride_tokens, dtype=jnp.int32)
    column_BR = jnp.minimum(offset_B[:, None] + offset_R, window_tokens - 1)

    def scored(array_BW: jax.Array) -> jax.Array:
        index = column_BR.reshape(*column_BR.shape, *(1,) * (array_BW.ndim - 2))
        return jnp.take_along_axis(array_BW, index, axis=1)

    return scored


def embed_split(
    decoder: Decoder,
    tokens: TokenSplit,
    artifact: Artifact,
    specs: Mapping[str, ArraySpec],
    settings: EmbeddingSettings,
    mesh: jax.sharding.Mesh,
    description: str,
) -> dict[str, Any]:
    """Embeds the shards of a split that are not on disk yet.

    Every shard is written by one process: it gets the windows of its own shards at those
    positions of a batch that its devices hold.

    Args:
        decoder: On the mesh.
        tokens: The split.
        artifact: Where the arrays go.
        specs: What is stored.
        settings: How.
        mesh: Devices.
        description: For the progress bar.

    Returns:
        The arrays as the manifest describes them.

    Raises:
        RunFailed: A state is not finite in its storage dtype.
        OSError: The disk is full; finished shards stay.
        Preempted: The machine is about to go; finished shards stay.
    """
    plan = EmbeddingPlan(
        tokens.num_rows, settings.window_tokens, settings.stride_tokens, settings.within
    )
    writer = ShardWriter(artifact.path, specs, tokens.num_rows)
    missing = writer.missing_shards()
    owner_B = owners(mesh, settings.batch_size)
    parts = [(shard, plan.shard_blocks(shard, writer.shard_rows)) for shard in missing]
    own_P = np.flatnonzero(owner_B == process_index())
    step = make_embed_step(decoder, settings, specs)
    if missing:
        say(f"{description}: {human_bytes(writer.missing_bytes())} to be stored")
    bar = progress(tokens.num_rows, "row", description)
    bar.update(tokens.num_rows - writer.count_rows(missing))
    with jax.set_mesh(mesh), stopping_where_asked():
        for number_B, rows in computed_blocks(step, plan, tokens, dealt(parts, owner_B), mesh):
            host = {name: local_rows(array, own_P) for name, array in rows.items()}
            for place, number in enumerate(number_B[own_P]):
                if number >= 0:
                    block = plan.blocks(number[None])
                    row, count = int(block.row[0]), int(block.count[0])
                    writer.put(row, {name: host[name][place, :count] for name in host})
            bar.update(int(plan.blocks(number_B[number_B >= 0]).count.sum()))
            if preempted():
                writer.flush()
                raise Preempted(f"{description}: finished shards are kept")
    bar.close()
    return writer.close()


def computed_blocks(
    step: Callable[[Mapping[str, jax.Array]], dict[str, jax.Array]],
    plan: EmbeddingPlan,
    tokens: TokenSplit,
    batches: Iterable[np.ndarray],
    mesh: jax.sharding.Mesh,
    *,
    num_recent: int = 0,
) -> Iterator[tuple[np.ndarray, dict[str, jax.Array]]]:
    """Yields block numbers with their rows, one batch behind what is being computed.

    Args:
        step: Jitted; arrays of windows to arrays of rows.
        plan: The windows.
        tokens: The split.
        batches: Numbers of blocks, int64 [B]; negative: none, and its rows mean nothing.
        mesh: Devices.
        num_recent: Recent tokens that `step` reads of each token; 0: none.
    """
    before: tuple[np.ndarray, dict[str, jax.Array]] | None = None
    for number_B in batches:
        position_P = local_positions(mesh, len(number_B))
        local = plan.read(tokens, np.maximum(number_B[position_P], 0), num_recent)
        batch = to_devices(local, mesh, position_P, len(number_B))
        dispatched = (number_B, step(batch))
        if before is not None:
            yield before
        before = dispatched
    if before is not None:
        yield before


def in_batches(blocks: Sequence[int], batch_size: int) -> list[np.ndarray]:
    """Cuts block numbers into batches of one size, int64 [B]; the last is filled with -1."""
    return dealt([(0, blocks)], np.zeros(batch_size, np.int64))
