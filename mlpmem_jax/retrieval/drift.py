"""How far a decoder has moved from the datastore: do its neighbours still agree?

Suffixes: Q sampled rows, D key width.
"""

import jax
import numpy as np

from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.embedding.blocks import EmbeddingSettings, computed_rows, in_batches
from mlpmem_jax.embedding.embed import make_embed_step
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.stored_array import StoredArray

SAMPLE_ROWS = 8192
NEIGHBORS = 10


def neighbor_agreement(
    decoder: Decoder,
    tokens: TokenSplit,
    rows: Artifact,
    settings: EmbeddingSettings,
    seed: int,
    mesh: jax.sharding.Mesh,
) -> float:
    """Returns the share of nearest neighbours that are the same as with the stored keys.

    Both searches run within one sample of about 8192 rows (whole embedding blocks, the same
    windows as when they were stored): what is compared is the geometry, not the search.

    Args:
        decoder: The decoder of now.
        rows: Its datastore, which is compared with.
        settings: How its keys were made.
    """
    plan = settings.plan(tokens.num_rows)
    wanted = min(plan.num_blocks, max(1, SAMPLE_ROWS // settings.stride_tokens))
    chosen = np.random.default_rng(seed).choice(plan.num_blocks, wanted, replace=False)
    blocks = sorted(int(block) for block in chosen)
    stored = StoredArray(rows, "key")
    step = make_embed_step(decoder, settings, {"key": stored.dtype})
    old: list[np.ndarray] = []
    new: list[np.ndarray] = []
    with jax.set_mesh(mesh):
        batches = in_batches(blocks, settings.batch_size)
        for computed in computed_rows(step, plan, tokens, batches, mesh):
            for row, arrays in computed.blocks:
                new.append(arrays["key"])
                old.append(stored.read(row, row + len(new[-1])))
    return overlap(np.concatenate(old), np.concatenate(new), NEIGHBORS)


def overlap(old_QD: np.ndarray, new_QD: np.ndarray, num_neighbors: int) -> float:
    """Returns the mean share of each row's nearest rows that both key sets agree on.

    Args:
        old_QD: Keys before.
        new_QD: Keys of the same rows now.
        num_neighbors: Neighbours compared, the row itself excluded.
    """
    count = min(num_neighbors, len(old_QD) - 1)
    if count < 1:
        return 1.0
    nearest = [_nearest(keys.astype(np.float32), count) for keys in (old_QD, new_QD)]
    same = [len(np.intersect1d(a, b)) for a, b in zip(*nearest, strict=True)]
    return float(np.mean(same) / count)


def _nearest(key_QD: np.ndarray, count: int, part: int = 1024) -> np.ndarray:
    """Returns the `count` nearest other rows of each row, unordered, int [Q, count]."""
    square_Q = np.einsum("qd,qd->q", key_QD, key_QD)
    found = []
    for start in range(0, len(key_QD), part):
        chunk = key_QD[start : start + part]
        distance = square_Q[None, :] - 2 * chunk @ key_QD.T
        rows = np.arange(len(chunk))
        distance[rows, start + rows] = np.inf
        found.append(np.argpartition(distance, count - 1, axis=1)[:, :count])
    return np.concatenate(found)
