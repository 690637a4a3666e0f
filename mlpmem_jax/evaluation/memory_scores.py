"""What the memory gives a split's labels, trained alone or together with the decoder.

Suffixes: N rows of the split.
"""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from mlpmem_jax.config.schema import Config
from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.evaluation.joint_lm import score_joint
from mlpmem_jax.evaluation.memory_lm import MemoryScores, score_memory
from mlpmem_jax.input.rows import StoredRows
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.store.array_specs import Split
from mlpmem_jax.store.layout import Layout


@dataclasses.dataclass(frozen=True)
class Remembered:
    """Log-probabilities of labels.

    Attributes:
        logprob_N: float32 log p_MEM(label).
        decoder_N: float32 log p_LM(label) of a decoder that was trained with the memory;
            None: the run's decoder, whose are stored.
        weight: λ as it was trained, of each row where it is a gate's; None: to be chosen.
        diagnostics: Means against the kNN targets, where they were read.
    """

    logprob_N: np.ndarray
    decoder_N: np.ndarray | None
    weight: np.ndarray | float | None
    diagnostics: Mapping[str, float]


def remember(
    config: Config, split: Split, decoder: Decoder, memory: Memory, mesh: jax.sharding.Mesh
) -> Remembered:
    """Scores a split: from stored inputs, or, trained together, by running both networks."""
    if config.train.mode == "joint":
        tokens = TokenSplit.open(Layout(config).tokens, split)
        joint = score_joint(config, decoder, memory, tokens, mesh)
        weight = _weight(config, joint.gate_N)
        return Remembered(joint.memory_N, joint.decoder_N, weight, {})
    # There are targets of validation rows; those of test rows are never made.
    stored = score_stored(config, split, decoder, memory, mesh, with_targets=split == "valid")
    weight = _weight(config, stored.gate_N)
    return Remembered(stored.logprob_N, None, weight, stored.diagnostics)


def score_stored(
    config: Config,
    split: Split,
    decoder: Decoder | None,
    memory: Memory,
    mesh: jax.sharding.Mesh,
    *,
    with_targets: bool,
) -> MemoryScores:
    """Scores the stored inputs of a split.

    Args:
        config: The whole configuration.
        split: Which.
        decoder: As in `score_memory`.
        memory: The memory.
        mesh: Devices.
        with_targets: Whether the kNN targets are read too, for diagnostics.
    """
    layout = Layout(config)
    source = StoredRows(
        layout.datastore(split),
        config.datastore.chunk_rows,
        TokenSplit.open(layout.tokens, split).separator_id,
        config.memory.num_read_tokens,
        targets=layout.targets(split) if with_targets else None,
        batch_size=config.evaluate.batch_size,
    )
    chunk_tokens = config.train.loss_chunk_tokens
    return score_memory(memory, decoder, source, mesh, chunk_tokens=chunk_tokens)


def _weight(config: Config, gate_N: np.ndarray | None) -> np.ndarray | float | None:
    """Returns λ as the networks were trained with it; None: it is to be chosen."""
    return config.trained_interpolation if gate_N is None else gate_N
