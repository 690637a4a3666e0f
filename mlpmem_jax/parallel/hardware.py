"""What a machine has to give: memory of devices and of the host, free disk."""

import contextlib
import dataclasses
import os
import shutil
from pathlib import Path

from etils import epath

from mlpmem_jax.errors import UserError
from mlpmem_jax.parallel.chips import chip_of
from mlpmem_jax.units import human_bytes

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices and hosts of a run, as one process sees them.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        kind: The devices' kind, for messages.
        num_processes: Processes of the run, each on a host of its own.
        device_bytes: Memory of one device; None: not known, or the host's (CPU).
        host_bytes: Memory of the host that can be had; None: not known.
        disk_bytes: Free space for the work directory; None: not known (buckets).
    """

    platform: str
    kind: str
    num_devices: int
    local_devices: int
    num_processes: int
    device_bytes: int | None
    host_bytes: int | None
    disk_bytes: int | None

    def has(self) -> dict[str, int | str]:
        """Returns what there is, for `--dry-run`."""
        devices = f"{self.num_devices} × {self.kind}"
        memory = {
            "bytes of each device": self.device_bytes,
            "bytes of host memory": self.host_bytes,
            "bytes of free disk": self.disk_bytes,
        }
        known = {name: size for name, size in memory.items() if size is not None}
        return {"devices": devices, **known}


def this_machine(workdir: str) -> Machine:
    """Returns what the devices of the run, this host and its disk have."""
    import jax

    device = jax.local_devices()[0]
    return Machine(
        platform=device.platform,
        kind=device.device_kind,
        num_devices=jax.device_count(),
        local_devices=jax.local_device_count(),
        num_processes=jax.process_count(),
        device_bytes=device_memory(device),
        host_bytes=host_memory(),
        disk_bytes=free_disk(workdir),
    )


def device_memory(device: object) -> int | None:
    """Returns what a device lets XLA have; None: not known, or it is the host's memory."""
    if getattr(device, "platform", "cpu") == "cpu":
        return None
    stats = None
    with contextlib.suppress(Exception):  # Each plugin has its own way not to know.
        stats = device.memory_stats()  # type: ignore[attr-defined]
    if stats and stats.get("bytes_limit"):
        return int(stats["bytes_limit"])
    chip = chip_of(str(getattr(device, "device_kind", "")))
    return None if chip is None else chip.memory_bytes


def host_memory() -> int | None:
    """Returns the memory that this process can have without swapping; None: not known.

    What the machine has available and what the limits of a container leave, whichever is less;
    what the process holds already counts, since it can be freed.
    """
    own = _field(Path("/proc/self/status"), "VmRSS:")
    available = _field(Path("/proc/meminfo"), "MemAvailable:")
    if available is None:
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (OSError, ValueError):
            return None
    return min([available + (own or 0), *_container_limits(own or 0)])


def free_disk(workdir: str) -> int | None:
    """Returns the free bytes where a work directory lies or will lie; None: not known."""
    if "://" in workdir:
        return None
    existing = os.path.abspath(workdir)
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    return shutil.disk_usage(existing).free


def bytes_under(path: epath.Path) -> int:
    """Returns the size of the local files below a directory, 0 where there is none."""
    total = 0
    if "://" not in os.fspath(path):
        for folder, _, files in os.walk(path):
            for name in files:
                with contextlib.suppress(OSError):
                    total += os.stat(os.path.join(folder, name)).st_size
    return total


def check_host_memory(needed_bytes: int, what: str, way_out: str) -> None:
    """Refuses to begin what will not fit into the host's memory.

    Args:
        needed_bytes: What it takes.
        what: What it is, for the message.
        way_out: What to change.

    Raises:
        UserError: Fewer bytes are free than needed.
    """
    available = host_memory()
    if available is not None and needed_bytes > available:
        raise UserError(
            f"{what} needs {human_bytes(needed_bytes)} of memory and "
            f"{human_bytes(available)} are free: {way_out}"
        )


def _field(file: Path, name: str) -> int | None:
    """Returns a field of a /proc file in bytes."""
    try:
        lines = file.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def _container_limits(own_bytes: int) -> list[int]:
    """Returns what each limit on this process's control groups leaves it (versions 1 and 2)."""
    try:
        lines = _OWN_CGROUP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = _CGROUPS, ("memory.max", "memory.current", "file")
        elif "memory" in controllers.split(","):
            root = _CGROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")
        else:
            continue
        # A container may see the path that the host gives it, below a root that is its own.
        group = root / path.strip("/")
        for place in (group, *group.parents):
            if place.is_relative_to(root):
                found = _left_by(place, *names, own_bytes)
                left += [] if found is None else [found]
    return left


def _left_by(group: Path, limit: str, usage: str, cache: str, own_bytes: int) -> int | None:
    """Returns what a group's limit leaves beside what others in it hold; caches can be freed."""
    try:
        most = int((group / limit).read_text())  # "max" is none.
        used = int((group / usage).read_text())
        stat = (group / "memory.stat").read_text().split()
        cached = int(stat[stat.index(cache) + 1])
    except (OSError, ValueError, IndexError):
        return None
    return max(0, most - max(0, used - cached - own_bytes))
