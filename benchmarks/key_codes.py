"""Whether rotating keys helps ScaNN's codes: recall of the candidates that the codes choose.

    .venv/bin/python -m benchmarks.key_codes [--datastore runs/NAME/artifacts/datastore/ID]
        [--rows 250000] [--neighbors 128] [--only raw pca]

Reads the first keys of a datastore; without one, makes up clustered keys whose variance falls with
the square of the direction's number, in a random basis. Each variant transforms keys and queries,
codes the keys, visits all leaves, and compares the R best by codes with the raw keys exactly.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from etils import epath

from mlpmem_jax.console import quiet_libraries, say
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.retrieval import approximate, recall
from mlpmem_jax.retrieval.distances import squared_distances
from mlpmem_jax.retrieval.engine import ArrayKeys
from mlpmem_jax.retrieval.exact import ExactEngine
from mlpmem_jax.retrieval.merge import drop_own_row, sort_neighbors
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.stored_array import StoredArray

_WIDTH, _CENTRES = 128, 500
_CANDIDATES = (2, 4, 8, 16)  # Times K + 1.
_LEADING = 32

Transform = Callable[[np.ndarray], np.ndarray]


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--datastore", type=Path)
    parser.add_argument("--rows", type=int, default=250_000)
    parser.add_argument("--neighbors", type=int, default=128)
    parser.add_argument("--only", nargs="+", default=[])
    return parser.parse_args()


def _keys(flags: argparse.Namespace) -> np.ndarray:
    if flags.datastore is not None:
        path = flags.datastore
        artifact = Artifact(epath.Path(path.parents[1]), f"datastore/{path.name}", "datastore")
        store = StoredArray(artifact, "key")
        return store.read(0, min(flags.rows, store.shape[0])).astype(np.float32)
    generator = np.random.default_rng(0)
    scale_D = 1.0 / (1 + np.arange(_WIDTH))
    basis_DD, _ = np.linalg.qr(generator.normal(size=(_WIDTH, _WIDTH)))
    centre_CD = generator.normal(size=(_CENTRES, _WIDTH)) * scale_D
    key_ND = centre_CD[generator.integers(0, _CENTRES, flags.rows)]
    key_ND += 0.7 * generator.normal(size=key_ND.shape) * scale_D
    shift_D = 3 * generator.normal(size=_WIDTH)  # A common part, as states have.
    return ((key_ND + shift_D) @ basis_DD.T).astype(np.float32)


def _variants(key_ND: np.ndarray) -> Iterator[tuple[str, Transform, int]]:
    """Yields names, transforms of keys and queries, and dimensions per block."""
    width, step = key_ND.shape[1], max(1, len(key_ND) // 50_000)
    mean_D = key_ND.mean(axis=0, dtype=np.float64)
    variance_D, axis_DD = np.linalg.eigh(np.cov(key_ND[::step] - mean_D, rowvar=False))
    variance_D, axis_DD = np.maximum(variance_D[::-1], 1e-12), axis_DD[:, ::-1]
    shares = np.cumsum(variance_D) / variance_D.sum()
    shown = ", ".join(f"{n} {shares[n - 1]:.3f}" for n in (1, 4, 8, 16, 32))
    say(f"{len(key_ND):,} keys of width {width}; share of variance in leading directions: {shown}")
    random_DD, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(width, width)))

    def by(axis_DE: np.ndarray) -> Transform:
        return lambda key_ND: ((key_ND - mean_D) @ axis_DE).astype(np.float32)

    yield "raw", lambda key_ND: key_ND, 2
    yield "raw, 1 a block", lambda key_ND: key_ND, 1
    yield "random rotation", by(random_DD), 2
    yield "pca", by(axis_DD), 2
    yield "pca, dealt", by(axis_DD[:, _dealt(np.log(variance_D))]), 2
    yield f"pca, {_LEADING} leading, 1 a block", by(axis_DD[:, :_LEADING]), 1


def _dealt(log_variance_D: np.ndarray) -> list[int]:
    """Returns directions so that the variances of each pair have nearly the same product (OPQ)."""
    pairs: list[list[int]] = [[] for _ in range(len(log_variance_D) // 2)]
    total_P = np.zeros(len(pairs))
    for direction, log_variance in enumerate(log_variance_D - log_variance_D.min()):
        place = min((p for p, held in enumerate(pairs) if len(held) < 2), key=total_P.__getitem__)
        pairs[place].append(direction)
        total_P[place] += log_variance
    return [direction for pair in pairs for direction in pair]


def _recalls(
    key_ND: np.ndarray, sample: recall.Sample, transform: Transform, dims_per_block: int
) -> list[float]:
    """Returns the recall with each number of candidates, all leaves visited."""
    scann, leaves = approximate._import(), math.isqrt(len(key_ND))
    wanted = [times * (sample.num_neighbors + 1) for times in _CANDIDATES]
    coded_ND = np.ascontiguousarray(transform(key_ND))
    builder = scann.scann_ops_pybind.builder(coded_ND, wanted[-1], "squared_l2")
    builder = builder.set_n_training_threads(2).tree(
        leaves, leaves, training_sample_size=50 * leaves, random_init=False
    )
    with approximate._quiet():
        searcher = builder.score_ah(dims_per_block, training_sample_size=50_000).build()
    row_QR, _ = searcher.search_batched_parallel(transform(sample.query_QD))
    row_QR = row_QR.astype(np.int64)
    distance_QR = squared_distances(sample.query_QD, key_ND, row_QR)
    found = []
    for count in wanted:
        nearest = sort_neighbors(distance_QR[:, :count], row_QR[:, :count])
        found.append(recall.recall(drop_own_row(nearest, sample.row_Q), sample.truth))
    return found


def main() -> None:
    flags = _parsed()
    quiet_libraries()
    key_ND = _keys(flags)
    keys = ArrayKeys(key_ND)
    exact = ExactEngine(keys, single_device_mesh(), 65536)
    sample = recall.draw_sample(keys, exact.search, 1024, flags.neighbors, (0, 1))
    for name, transform, dims_per_block in _variants(key_ND):
        if flags.only and not any(name.startswith(one) for one in flags.only):
            continue
        started = time.monotonic()
        recalls = _recalls(key_ND, sample, transform, dims_per_block)
        shown = ", ".join(
            f"{times * (flags.neighbors + 1)}: {one:.3f}"
            for times, one in zip(_CANDIDATES, recalls, strict=True)
        )
        say(f"{name:<28} recall by candidates {shown} ({time.monotonic() - started:.0f} s)")


if __name__ == "__main__":
    main()
