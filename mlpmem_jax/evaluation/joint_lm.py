"""What jointly trained networks give the labels of a split: both run over its windows.

Suffixes: B windows, W tokens of a window, R rows that a window scores, N rows of the split.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from mlpmem_jax.console import progress
from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.embedding.blocks import EmbeddingSettings, computed_rows, in_batches
from mlpmem_jax.evaluation.memory_lm import Remembered
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.training.losses import token_logprob


def score_joint(
    decoder: Decoder,
    memory: Memory,
    tokens: TokenSplit,
    settings: EmbeddingSettings,
    mesh: jax.sharding.Mesh,
    *,
    chunk_tokens: int,
    weight: float | None,
) -> Remembered:
    """Runs decoder and memory over a split.

    Args:
        settings: The windows that `embed` uses, and the state "input" that the memory reads.
        chunk_tokens: Rows on a device whose logits exist at the same time.
        weight: λ that a memory without a gate was trained with; None: it is to be chosen.
    """
    plan, site = settings.plan(tokens.num_rows), settings.states["input"]
    num_recent = memory.config.num_read_tokens
    graphdef, state = nnx.split((decoder, memory))

    @jax.jit
    def score(state: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        decoder, memory = nnx.merge(graphdef, state)
        final_BWD, states = decoder.hidden(batch["token"], batch.get("segment"), sites=(site,))
        assert final_BWD is not None
        scored = settings.scored_columns(batch["offset"])
        label_BR = scored(batch["label"])
        recent_BRM = scored(batch["recent"]) if num_recent else None
        input_BRX = memory.inputs(scored(states[site]), recent_BRM, decoder.embedding[...])
        heads = {
            "decoder": (scored(final_BWD), decoder.head_VD()),
            "memory": (memory.hidden(input_BRX), memory.head_VE(decoder.head_VD())),
        }
        rows = {
            name: token_logprob(
                *head, label_BR, vocab_size=decoder.vocab_size, chunk_tokens=chunk_tokens
            )
            for name, head in heads.items()
        }
        if memory.config.has_gate:
            rows["gate"] = memory.interpolation(input_BRX)
        return rows

    found: dict[str, np.ndarray] = {}
    step = functools.partial(score, state)
    batches = in_batches(range(plan.num_blocks), settings.batch_size)
    with jax.set_mesh(mesh), progress(plan.num_rows, "row", f"score {tokens.split}") as bar:
        for computed in computed_rows(step, plan, tokens, batches, mesh, num_recent=num_recent):
            for row, arrays in computed.blocks:
                for name, array in arrays.items():
                    found_N = found.setdefault(name, np.zeros(plan.num_rows, np.float32))
                    found_N[row : row + len(array)] = array
            bar.update(computed.num_rows)
    return Remembered(found["memory"], found["decoder"], found.get("gate", weight), {})
