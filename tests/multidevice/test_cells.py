"""K-means on a mesh of eight simulated devices."""

import pytest


@pytest.mark.multidevice
def test_centroids_on_meshes_are_those_of_one_device(on_eight_devices):
    assert on_eight_devices("cells_script.py").count("equal: ") == 2
