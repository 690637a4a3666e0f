"""Generation on a mesh of eight simulated devices draws what one device draws; slots too."""

import pytest


@pytest.mark.multidevice
def test_equals_one_device(on_eight_devices):
    on_eight_devices("generate_script.py")
