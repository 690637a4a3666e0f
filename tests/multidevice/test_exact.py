"""Eight simulated devices find the neighbours that one device finds."""

import pytest


@pytest.mark.multidevice
def test_neighbours_do_not_depend_on_the_mesh(on_eight_devices):
    assert on_eight_devices("search_on_meshes.py").count("equal:") == 9
