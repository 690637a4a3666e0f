"""What a memory gives a split's labels, from the stored inputs.

Suffixes: B windows, L rows of a window, N rows of the split, D input width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from mlpmem_jax.input.feed import Batch, Feed
from mlpmem_jax.input.rows import StoredRows
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.parallel.sharding import replicated
from mlpmem_jax.training.losses import means, memory_loss, token_logprob


@dataclasses.dataclass(frozen=True)
class Remembered:
    """What a memory says about a split, trained alone or together with its decoder.

    Attributes:
        logprob_N: float32 log p_MEM(label).
        decoder_N: float32 log p_LM(label) of a decoder that was trained with the memory;
            None: the run's decoder, whose are stored.
        weight: λ as it was trained, of each row where it is a gate's; None: to be chosen.
        diagnostics: Means over scored rows against the kNN targets, where they were read:
            cross-entropy, KL, agreement on the most probable token.
    """

    logprob_N: np.ndarray
    decoder_N: np.ndarray | None
    weight: np.ndarray | float | None
    diagnostics: Mapping[str, float]


def score_memory(
    memory: Memory,
    decoder: Decoder | None,
    source: StoredRows,
    mesh: jax.sharding.Mesh,
    *,
    chunk_tokens: int,
    weight: float | None = None,
) -> Remembered:
    """Runs the memory over a split.

    Args:
        memory: A trained memory.
        decoder: The decoder whose head or embeddings the memory reads (`reads_decoder`); None
            where it reads neither.
        source: Rows of the split, in order.
        mesh: Devices; a batch's windows are spread over them.
        chunk_tokens: Rows on a device whose logits exist at the same time.
        weight: λ that a memory without a gate was trained with; None: it is to be chosen.
    """
    assert source.batch_size is not None
    graphdef, state = nnx.split(memory)
    tables = (None, None) if decoder is None else (decoder.head_VD(), decoder.embedding[...])
    has_gate = memory.config.has_gate

    def score(state: Any, tables: Any, batch: Batch) -> tuple[Any, dict[str, jax.Array]]:
        network: Any = nnx.merge(graphdef, state)
        head_VD, table_VD = tables
        input_BLX = network.inputs(batch["input"], batch.get("recent"), table_VD)
        hidden_BLE = network.hidden(input_BLX)
        head_VE = network.head_VE(head_VD)
        rows = {} if not has_gate else {"gate": network.interpolation(input_BLX)}
        rows["logprob"] = token_logprob(
            hidden_BLE,
            head_VE,
            batch["label"],
            vocab_size=memory.vocab_size,
            chunk_tokens=chunk_tokens,
        )
        if not source.has_targets:
            return rows, {}
        _, sums = memory_loss(
            hidden_BLE,
            head_VE,
            batch,
            1.0,
            vocab_size=memory.vocab_size,
            chunk_tokens=chunk_tokens,
        )
        return rows, sums

    # Every process gets the whole result: each computes the same table.
    jitted = jax.jit(score, out_shardings=replicated(mesh))
    num_batches = source.num_windows // source.batch_size
    feed = Feed(
        source,
        mesh,
        batch_size=source.batch_size,
        seed=0,
        steps=range(num_batches),
        shuffled=False,
    )
    parts: dict[str, list[np.ndarray]] = {}
    total: dict[str, Any] = {}
    with jax.set_mesh(mesh):
        for batch in feed:
            rows, sums = jax.device_get(jitted(state, tables, batch))
            for name, array_BL in rows.items():
                parts.setdefault(name, []).append(array_BL.reshape(-1))
            total = {name: total.get(name, 0.0) + float(value) for name, value in sums.items()}
    diagnostics = {name: float(value) for name, value in means(total).items() if name != "loss"}
    whole = {name: np.concatenate(part)[: source.num_rows] for name, part in parts.items()}
    return Remembered(whole["logprob"], None, whole.get("gate", weight), diagnostics)
