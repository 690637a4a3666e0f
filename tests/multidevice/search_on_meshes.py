"""Run by test_exact.py in a process of its own with eight simulated devices.

Searches the same keys on one device and on meshes of several, and prints a line for each.
"""

import numpy as np

from mlpmem_jax.config.networks import MeshConfig
from mlpmem_jax.parallel.mesh import make_mesh, single_device_mesh
from mlpmem_jax.retrieval.engine import ArrayKeys
from mlpmem_jax.retrieval.exact import ExactEngine
from mlpmem_jax.retrieval.merge import drop_own_row

BASE = 1 << 33
MESHES = ((2, 2, 2), (8, 1, 1), (1, 4, 2))
# Rows that eight devices share evenly, unevenly, and too few for all of them.
CASES = ((4096, 30), (3001, 30), (5, 9))


def main() -> None:
    """Compares; exits with a traceback where something differs."""
    generator = np.random.default_rng(0)
    for num_rows, count in CASES:
        key = generator.normal(size=(num_rows, 16)).astype(np.float32)
        key[num_rows // 2 : num_rows // 2 + 3] = key[0]  # Equal rows on different devices.
        own = np.arange(0, num_rows, max(1, num_rows // 50), dtype=np.int64)
        one = ExactEngine(ArrayKeys(key), single_device_mesh(), 256, first_row=BASE)
        expected = drop_own_row(one.search(key[own], count), own + BASE)
        first = own - own % 700  # Rows of a document: parts of several devices.
        skipped = np.stack([first, first + 700], axis=1) + BASE
        without = one.search_later(key[own], count, skipped)()
        for data, fsdp, tensor in MESHES:
            mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
            engine = ExactEngine(ArrayKeys(key), mesh, 256, first_row=BASE)
            found = drop_own_row(engine.search(key[own], count), own + BASE)
            np.testing.assert_array_equal(found.row_QK, expected.row_QK)
            np.testing.assert_allclose(
                found.distance_QK, expected.distance_QK, rtol=1e-5, atol=1e-6
            )
            assert not (found.row_QK == own[:, None] + BASE).any()
            found = engine.search_later(key[own], count, skipped)()
            np.testing.assert_array_equal(found.row_QK, without.row_QK)
            assert ((found.row_QK < skipped[:, :1]) | (found.row_QK >= skipped[:, 1:])).all()
            print(f"equal: {num_rows} rows on {data}x{fsdp}x{tensor}")


if __name__ == "__main__":
    main()
