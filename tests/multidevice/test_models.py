"""Networks and losses on meshes of eight simulated devices equal one device."""

import pytest

pytestmark = pytest.mark.multidevice


@pytest.mark.parametrize("check", ["decoder", "memory", "joint", "sizes"])
def test_equal_to_one_device(on_eight_devices, check):
    assert on_eight_devices("models_script.py", check).strip().endswith("ok")
