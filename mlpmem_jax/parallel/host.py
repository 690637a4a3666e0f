"""Settings of the process that make XLA on CPU faster."""

import ctypes
import glob
import platform

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_MMAP_THRESHOLD_BYTES = 1 << 30
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*")
_NEVER_TRIM_BYTES = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Makes malloc keep large freed blocks instead of returning them to the kernel.

    XLA on CPU allocates the temporaries of a step anew each time. By default glibc maps and
    unmaps them, and a fifth of a small training step is spent on page faults. One arena is
    part of it: other arenas cannot hold blocks above 64 MB. Call it before JAX starts
    threads. The environment variable GLIBC_TUNABLES=glibc.malloc.hugetlb=1 (set before the
    process starts) adds huge pages to it.

    Hosts of accelerators are left alone: their steps do not run here, and one arena would
    slow down many reading threads.

    Returns:
        Whether the settings were accepted; always False without glibc.
    """
    if platform.libc_ver()[0] != "glibc" or any(glob.glob(path) for path in _ACCELERATORS):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = (
        (_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES),
        (_M_TRIM_THRESHOLD, _NEVER_TRIM_BYTES),
        (_M_ARENA_MAX, 1),
    )
    accepted = [mallopt(name, value) == 1 for name, value in settings]
    return all(accepted)
