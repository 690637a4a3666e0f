"""What the memory gives a split's labels, trained alone or together with the decoder.

Suffixes: N rows of the split.
"""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from mlpmem_jax.evaluation.joint_lm import TokenWindows, score_joint
from mlpmem_jax.evaluation.memory_lm import score_memory
from mlpmem_jax.input.rows import StoredRows
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.models.memory import Memory


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
    decoder: Decoder,
    memory: Memory,
    inputs: StoredRows | TokenWindows,
    mesh: jax.sharding.Mesh,
    *,
    chunk_tokens: int,
    weight: float | None,
) -> Remembered:
    """Scores a split: from stored inputs, or, trained together, by running both networks.

    Args:
        decoder: The decoder that the memory reads.
        memory: The memory.
        inputs: Rows of the split in order, or its windows where both networks run.
        mesh: Devices.
        chunk_tokens: Rows on a device whose logits exist at the same time.
        weight: λ that a memory without a gate was trained with; None: it is to be chosen.
    """
    if isinstance(inputs, TokenWindows):
        joint = score_joint(decoder, memory, inputs, mesh, chunk_tokens=chunk_tokens)
        trained = weight if joint.gate_N is None else joint.gate_N
        return Remembered(joint.memory_N, joint.decoder_N, trained, {})
    stored = score_memory(memory, decoder, inputs, mesh, chunk_tokens=chunk_tokens)
    trained = weight if stored.gate_N is None else stored.gate_N
    return Remembered(stored.logprob_N, None, trained, stored.diagnostics)
