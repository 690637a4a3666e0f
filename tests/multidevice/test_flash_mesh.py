"""Fused attention is the same on eight simulated devices as on one."""

import pytest


@pytest.mark.multidevice
@pytest.mark.parametrize(
    ("mesh", "heads", "groups"),
    [((2, 2, 2), 4, 2), ((1, 2, 4), 4, 2)],  # the second: fewer groups than the axis has devices
)
def test_equals_plain_attention(on_eight_devices, mesh, heads, groups):
    on_eight_devices("flash_script.py", *map(str, (*mesh, heads, groups)))
