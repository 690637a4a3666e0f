"""K-means and the assignment of keys over eight devices, against one device."""

from unittest import mock

import numpy as np

from mlpmem_jax.config.networks import MeshConfig
from mlpmem_jax.parallel.mesh import make_mesh, single_device_mesh
from mlpmem_jax.retrieval import groups
from mlpmem_jax.retrieval.cells import Assigner, train_centroids


def main() -> None:
    """Compares; exits with a traceback where something differs."""
    generator = np.random.default_rng(0)
    centre = generator.normal(size=(12, 16))
    key = centre[generator.integers(0, 12, 2500)] + 0.3 * generator.normal(size=(2500, 16))
    key = key.astype(np.float32)
    key[:700] = key[0]  # Centroids that no row is nearest to.
    sample = generator.permutation(key)[:1003]
    one = train_centroids(sample, 21, single_device_mesh())
    for data, fsdp, tensor in ((8, 1, 1), (2, 2, 2)):
        mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
        found = train_centroids(sample, 21, mesh)
        np.testing.assert_allclose(found, one, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(found, train_centroids(sample, 21, mesh))
        cells = Assigner(one, mesh)(key)
        np.testing.assert_array_equal(cells, Assigner(one, single_device_mesh())(key))
        with mock.patch.object(groups, "_AROUND", 8):  # Eight cells around each of 16 groups.
            alone, shared = (groups.train(sample, 21, on) for on in (single_device_mesh(), mesh))
        assert len(alone.group_GD) == 16
        np.testing.assert_allclose(shared.centroid_CD, alone.centroid_CD, rtol=1e-3, atol=1e-3)
        given = groups.assigner(alone, mesh)(key)
        np.testing.assert_array_equal(given, groups.assigner(alone, single_device_mesh())(key))
        print(f"equal: {data}x{fsdp}x{tensor}")


if __name__ == "__main__":
    main()
