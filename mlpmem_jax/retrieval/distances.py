"""Exact squared distances of given rows, the definition that every engine is held to."""

import numpy as np

_TILE_BYTES = 1 << 18  # Differences that fit a core's cache.


def squared_distances(query_QD: np.ndarray, key_ND: np.ndarray, row_QC: np.ndarray) -> np.ndarray:
    """Returns float32 [Q, C]: ‖key_row − query‖², by differences, so without cancellation.

    Args:
        query_QD: float32 queries.
        key_ND: Keys, any float dtype.
        row_QC: Integer rows of `key_ND`.
    """
    num_queries, num_rows = row_QC.shape
    width = query_QD.shape[1]
    out_QC = np.empty((num_queries, num_rows), np.float32)
    tile = max(1, _TILE_BYTES // max(1, 4 * width * num_rows))
    for start in range(0, num_queries, tile):
        part = slice(start, start + tile)
        difference = key_ND[row_QC[part]].astype(np.float32, copy=False)
        difference -= query_QD[part, None, :]
        flat = difference.reshape(-1, width)
        out_QC[part] = np.einsum("md,md->m", flat, flat).reshape(-1, num_rows)
    return out_QC
