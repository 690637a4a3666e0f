"""The memory's log-probabilities of a split's labels, from the stored inputs.

Suffixes: B windows, L rows of a window, N rows of the split, D input width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from mlpmem_jax.input.feed import Batch, Feed
from mlpmem_jax.input.rows import RecentReader, RowReader, TargetReader, compare_labels
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.parallel.sharding import replicated
from mlpmem_jax.store.layout import Layout, Split
from mlpmem_jax.training.losses import means, memory_loss, token_logprob


class SplitRows:
    """Windows of a split's rows in order, each row once, in whole batches.

    What lies behind the last row is zero, and its weight is.
    """

    def __init__(
        self,
        layout: Layout,
        split: Split,
        length: int,
        batch_size: int,
        separator: int,
        *,
        num_recent: int,
        with_targets: bool,
    ):
        """Opens the arrays.

        Args:
            layout: Where they are.
            split: Which split.
            length: Rows in a window.
            batch_size: Windows in a batch.
            separator: Label that is not scored.
            num_recent: Recent tokens that the memory reads; 0: none.
            with_targets: Whether to read the kNN targets too.
        """
        self._length = length
        self.batch_size = batch_size
        self.has_targets = with_targets
        self._separator = separator
        self._artifact = layout.datastore(split)
        self._rows = RowReader(self._artifact, {"input": layout.input_array(), "label": "label"})
        self._recent = RecentReader(self._artifact, num_recent, separator)
        self._targets = TargetReader(layout, split) if with_targets else None
        self.num_rows = self._rows.num_rows

    @property
    def num_windows(self) -> int:
        """Windows of the batches that cover every row."""
        rows = self._length * self.batch_size
        return -(-self.num_rows // rows) * self.batch_size

    def read(self, windows: np.ndarray) -> dict[str, np.ndarray]:
        """Reads windows (int64 [B])."""
        starts = np.asarray(windows, np.int64) * self._length
        inside = np.minimum(starts, self.num_rows)
        pending = self._rows.start(inside, self._length)
        recent = self._recent.start(inside, self._length)
        target_rows = self._targets.start(inside, self._length) if self._targets else None
        rows = pending.result() | recent.result()
        exists = starts[:, None] + np.arange(self._length) < self.num_rows
        scored = exists & (rows["label"] != self._separator)
        rows["weight"] = scored.astype(np.float32)
        if self._targets and target_rows:
            targets = target_rows.result()
            names = f"{self._artifact.path} and {self._targets.artifact.path}"
            compare_labels(rows["label"], targets["target_label"], starts, names)
            rows |= TargetReader.prepared(targets)
        return rows


@dataclasses.dataclass(frozen=True)
class MemoryScores:
    """What the memory says about a split.

    Attributes:
        logprob_N: log p_MEM(label), float32.
        gate_N: λ that the memory's gate gives, float32; None: it has no gate.
        diagnostics: Means over scored rows against the kNN targets, where they were read:
            cross-entropy, KL, agreement on the most probable token. Empty without targets.
    """

    logprob_N: np.ndarray
    gate_N: np.ndarray | None
    diagnostics: Mapping[str, float]


def score_memory(
    memory: Memory,
    decoder: Decoder | None,
    source: SplitRows,
    mesh: jax.sharding.Mesh,
    *,
    chunk_tokens: int,
) -> MemoryScores:
    """Runs the memory over a split.

    Args:
        memory: A trained memory.
        decoder: The decoder whose head or embeddings the memory reads (`reads_decoder`); None
            where it reads neither.
        source: Rows of the split.
        mesh: Devices; a batch's windows are spread over them.
        chunk_tokens: Rows on a device whose logits exist at the same time.
    """
    graphdef, state = nnx.split(memory)
    tables = (None, None) if decoder is None else (decoder.head_VD(), decoder.embedding[...])
    has_gate = memory.config.gate == "learned"

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
            batch["label"],
            batch["weight"],
            batch["target_id"],
            batch["target_prob"],
            batch["target_mass"],
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
    return MemoryScores(whole["logprob"], whole.get("gate"), diagnostics)
