"""The decoder over a split: keys, inputs, labels and log-probabilities of every row.

TensorStore writes finished shards in the background.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from mlpmem_jax.console import progress, say
from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.embedding.blocks import EmbeddingSettings, by_window, computed_rows
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.parallel.preemption import Preempted, preempted, stopping_where_asked
from mlpmem_jax.parallel.sharing import dealt, owners, process_index
from mlpmem_jax.store.array_specs import ArraySpec
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.shards import ShardWriter
from mlpmem_jax.training.losses import token_logprob
from mlpmem_jax.units import human_bytes

LOSS_CHUNK_TOKENS = 1024

EmbedStep = functools.partial[dict[str, jax.Array]]  # takes a batch


def make_embed_step(
    decoder: Decoder, settings: EmbeddingSettings, dtypes: Mapping[str, np.dtype[Any]]
) -> EmbedStep:
    """Returns the jitted forward pass: arrays of windows [B, W] to arrays of rows [B, R, …].

    Only the R scored columns of a window go through the output head and leave the devices,
    cast to the storage dtype of each array that is wanted. Blocks that none of them needs do not
    run.
    """
    graphdef, weights = nnx.split(decoder)
    states_of = {name: site for name, site in settings.states.items() if name in dtypes}
    wanted = tuple(dict.fromkeys(states_of.values()))

    @jax.jit
    def embed(weights: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        model = nnx.merge(graphdef, weights)
        final_BWD, states = model.hidden(
            batch["token"], batch.get("segment"), sites=wanted, final="logprob" in dtypes
        )
        scored = settings.scored_columns(batch["offset"])
        label_BR = scored(batch["label"])
        rows = {"label": label_BR} | {
            name: scored(states[site]) for name, site in states_of.items()
        }
        if final_BWD is not None:
            rows["logprob"] = token_logprob(
                scored(final_BWD),
                model.head_VD(),
                label_BR,
                vocab_size=model.vocab_size,
                chunk_tokens=LOSS_CHUNK_TOKENS,
            )
        stored = {name: rows[name].astype(dtype) for name, dtype in dtypes.items()}
        return {name: by_window(array) for name, array in stored.items()}

    return functools.partial(embed, weights)


def dtypes_of(specs: Mapping[str, ArraySpec]) -> dict[str, np.dtype[Any]]:
    """Returns the storage dtype of each array."""
    return {name: np.dtype(spec.dtype) for name, spec in specs.items()}


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

    Returns:
        The arrays as the manifest describes them.

    Raises:
        RunFailed: A state is not finite in its storage dtype.
        OSError: The disk is full; finished shards stay.
        Preempted: The machine is about to go; finished shards stay.
    """
    plan = settings.plan(tokens.num_rows)
    writer = ShardWriter(artifact.path, specs, tokens.num_rows)
    missing = writer.missing_shards()
    owner_B = owners(mesh, settings.batch_size)
    parts = [(shard, plan.shard_blocks(shard, writer.shard_rows)) for shard in missing]
    own_P = np.flatnonzero(owner_B == process_index())
    step = make_embed_step(decoder, settings, dtypes_of(specs))
    if missing:
        say(f"{description}: {human_bytes(writer.missing_bytes())} to be stored")
    bar = progress(tokens.num_rows, "row", description)
    bar.update(tokens.num_rows - writer.count_rows(missing))
    with jax.set_mesh(mesh), stopping_where_asked():
        batches = dealt(parts, owner_B)
        for computed in computed_rows(step, plan, tokens, batches, mesh, own_P=own_P):
            for row, arrays in computed.blocks:
                writer.put(row, arrays)
            bar.update(computed.num_rows)
            if preempted():
                writer.flush()
                raise Preempted(f"{description}: finished shards are kept")
    bar.close()
    return writer.close()
