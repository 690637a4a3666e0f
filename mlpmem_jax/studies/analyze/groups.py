"""Gains over the decoder in groups of tokens, with intervals over clusters of documents.

Suffixes: N rows of a split, D documents, C clusters, G groups, M sums (tokens and gains by group).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlpmem_jax.evaluation.metrics import DocumentCounts
from mlpmem_jax.stats.bootstrap import bootstrap_sums, interval


def gains_by_group(
    counts: DocumentCounts,
    group_N: np.ndarray,
    labels: Sequence[str],
    decoder_N: np.ndarray,
    system_N: Mapping[str, np.ndarray],
    *,
    bootstrap_samples: int,
    confidence: float,
    seed: int,
) -> list[dict[str, Any]]:
    """Compares systems with the decoder in each group of tokens.

    Args:
        group_N: Group of each row, below len(labels); −1 in none.
        decoder_N: log p of the label by the decoder.
        system_N: log p of the label by each other system.
        bootstrap_samples: Draws of clusters; the same in every group.

    Returns:
        For each group its tokens, the decoder's nats per token, and for each system the gain
        in nats per token of the group with its interval (none where a draw has no token of
        the group), and the contribution: the gain summed over the group, per token of the
        whole split, so that contributions add up to the gain of all groups together.
    """
    num_groups, num_documents = len(labels), len(counts.tokens_D)
    used_N = counts.scored_N & (group_N >= 0)
    cell = counts.document_N[used_N] * num_groups + group_N[used_N]

    def by_group(values_N: np.ndarray | None) -> np.ndarray:
        weights = None if values_N is None else values_N[used_N].astype(np.float64)
        sums = np.bincount(cell, weights, minlength=num_documents * num_groups)
        return sums.reshape(num_documents, num_groups).astype(np.float64)

    token_DG, decoder_DG = by_group(None), -by_group(decoder_N)
    gain_DG = {name: by_group(value - decoder_N) for name, value in system_N.items()}
    values_DM = np.concatenate([token_DG, *gain_DG.values()], axis=1)
    values_CM = counts.by_cluster(values_DM)
    sums_RM = bootstrap_sums(values_CM, bootstrap_samples, seed)
    clusters_G = np.count_nonzero(values_CM[:, :num_groups], axis=0)
    all_tokens = int(counts.tokens_D.sum())
    groups = []
    for place, label in enumerate(labels):
        tokens = int(token_DG[:, place].sum())
        group: dict[str, Any] = {
            "label": label,
            "tokens": tokens,
            "token_share": tokens / all_tokens,
            "documents": int(np.count_nonzero(token_DG[:, place])),
            "decoder_nats": _ratio(decoder_DG[:, place].sum(), tokens),
        }
        for number, (name, values_DG) in enumerate(gain_DG.items(), start=1):
            column = number * num_groups + place

            def gain(sums: np.ndarray, column: int = column, place: int = place) -> np.ndarray:
                return np.asarray(sums[..., column] / sums[..., place])

            found = interval(gain, sums_RM, confidence) if clusters_G[place] > 1 else None
            total = float(values_DG[:, place].sum())
            group[name] = {
                "gain": _ratio(total, tokens),
                "gain_low": found.low if found else None,
                "gain_high": found.high if found else None,
                "contribution": total / all_tokens,
            }
        groups.append(group)
    return groups


def _ratio(total: float, count: int) -> float | None:
    return float(total) / count if count else None
