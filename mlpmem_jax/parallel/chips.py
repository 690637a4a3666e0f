"""What one JAX device can do, by kind: the only table of hardware figures.

Sources: the vendors' data sheets and docs.cloud.google.com/tpu/docs (v4, v5e, v5p, v6e);
bandwidth of links: 0.9 of the data sheets' aggregate over the ports, in one direction, as
"How to Scale Your Model" (jax-ml.github.io/scaling-book) takes it.
"""

from typing import NamedTuple

_GIB = 1 << 30


class Chip(NamedTuple):
    """One device.

    Attributes:
        flops: Dense bfloat16 (V100 and T4: float16) operations a second.
        memory_bytes: Its memory; of products sold with several sizes the smallest.
        memory_bandwidth: Bytes a second from and to that memory.
        link_bandwidth: Bytes a second over one link of a torus, in one direction; for
            machines with a switch, a device's bandwidth into it, in one direction. 0: not
            known.
        torus_dims: Dimensions of the torus of links; 0: a switch joins the devices of a host.
        wraps_at: A torus dimension is a ring if its size is a multiple of this.
        network_bandwidth: Bytes a second and device between slices, or between hosts.
    """

    flops: float
    memory_bytes: int
    memory_bandwidth: float
    link_bandwidth: float = 0.0
    torus_dims: int = 0
    wraps_at: int = 1
    network_bandwidth: float = 0.0


# The first name that is part of the device's kind counts.
CHIPS = {
    "TPU v2": Chip(22.5e12, 8 * _GIB, 350e9),
    "TPU v3": Chip(61.5e12, 16 * _GIB, 450e9),
    "TPU v4 lite": Chip(138e12, 8 * _GIB, 614e9),
    "TPU v4": Chip(275e12, 32 * _GIB, 1228e9, 45e9, 3, 4, 6.25e9),
    "TPU v5 lite": Chip(197e12, 16 * _GIB, 819e9, 45e9, 2, 16, 3.1e9),
    "TPU v5e": Chip(197e12, 16 * _GIB, 819e9, 45e9, 2, 16, 3.1e9),
    "TPU v5p": Chip(459e12, 95 * _GIB, 2765e9, 90e9, 3, 4, 6.25e9),
    "TPU v5": Chip(459e12, 95 * _GIB, 2765e9, 90e9, 3, 4, 6.25e9),
    "TPU v6": Chip(918e12, 32 * _GIB, 1640e9, 90e9, 2, 16, 12.5e9),
    "TPU v7": Chip(1153.5e12, 96 * _GIB, 3690e9),
    "TPU7": Chip(1153.5e12, 96 * _GIB, 3690e9),
    "B200": Chip(2250e12, 180 * 10**9, 8000e9, 900e9, 0, 1, 50e9),
    "H200": Chip(989e12, 141 * 10**9, 4800e9, 450e9, 0, 1, 50e9),
    "H100 PCIe": Chip(756e12, 80 * 10**9, 2000e9, 64e9, 0, 1, 25e9),
    "H100": Chip(989e12, 80 * 10**9, 3350e9, 450e9, 0, 1, 50e9),
    "A100": Chip(312e12, 40 * 10**9, 1555e9, 300e9, 0, 1, 25e9),
    "L40S": Chip(362e12, 48 * 10**9, 864e9, 32e9, 0, 1, 12.5e9),
    "L4": Chip(121e12, 24 * 10**9, 300e9, 32e9, 0, 1, 12.5e9),
    "A10G": Chip(70e12, 24 * 10**9, 600e9, 32e9, 0, 1, 12.5e9),
    "V100": Chip(125e12, 16 * 10**9, 900e9, 150e9, 0, 1, 12.5e9),
    "T4": Chip(65e12, 16 * 10**9, 320e9, 16e9, 0, 1, 6e9),
}


def chip_of(kind: str) -> Chip | None:
    """Returns the figures of a device by its kind; None for one that is not in the table."""
    return next((chip for name, chip in CHIPS.items() if name in kind), None)
