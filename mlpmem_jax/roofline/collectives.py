"""Collectives of a compiled program: who takes part, what crosses the links, how long."""

import math
import re
from typing import NamedTuple

import jax
import numpy as np

from mlpmem_jax.parallel.chips import Chip
from mlpmem_jax.roofline.hlo import Instruction

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip

_EXPLICIT = re.compile(r"replica_groups=\{(\{[0-9,{} ]*\})\}")
_IOTA = re.compile(r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:,?\s*device_ids=\(([0-9,]+)\))?\s*\{([^}]*)\}"
)
_AXIS = re.compile(r"'?([\w.\-]+)'?=(\d+)")
_USED_AXIS = re.compile(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[0-9,{} ]*\})\}")


def kind_of(instruction: Instruction) -> str | None:
    """Returns the collective that an instruction is or starts, without "-start"."""
    name = instruction.opcode.removesuffix("-start")
    return name if name in KINDS else None


def group_of(instruction: Instruction, num_devices: int) -> tuple[int, ...]:
    """Returns the devices of the first group, as places in the mesh's flat order.

    All devices where the text does not say, or in a form that is not known.
    """
    text = instruction.attributes
    everyone = tuple(range(num_devices))
    pairs = _PAIRS.search(text)
    if pairs:
        found = [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),\s*(\d+)\}", pairs[1])]
        # Some keep what they have; the others decide how long it takes.
        moving = (pair for pair in found if pair[0] != pair[1])
        return next(moving, found[0][:1] if found else everyone)
    explicit = _EXPLICIT.search(text)
    if explicit:
        first = re.search(r"\{([0-9, ]*)\}", explicit[1])
        members = tuple(int(each) for each in first[1].split(",") if each) if first else ()
        return members or everyone
    iota = _IOTA.search(text)
    if iota:
        shape, sizes = _numbers(iota[1]), _numbers(iota[2])
        devices = np.arange(math.prod(sizes)).reshape(sizes)
        if iota[3]:
            devices = devices.transpose(_numbers(iota[3]))
        return tuple(int(each) for each in devices.reshape(shape)[0])
    mesh = _MESH.search(text)
    if mesh:
        return _mesh_group(mesh[1], mesh[2], mesh[3])
    return everyone


def _mesh_group(axes: str, order: str | None, used: str) -> tuple[int, ...]:
    sizes = {name: int(size) for name, size in _AXIS.findall(axes)}
    dims: list[tuple[str, int, int]] = []  # axis, number of the part, size
    taken: list[int] = []
    parts: dict[str, list[tuple[int, bool]]] = {
        name: [(size, False)] for name, size in sizes.items()
    }
    for name, before, size in _USED_AXIS.findall(used):
        if not size:
            parts[name] = [(sizes[name], True)]
            continue
        after = sizes[name] // (int(before) * int(size))
        parts[name] = [(int(before), False), (int(size), True), (after, False)]
    for name, split in parts.items():
        for number, (size, is_used) in enumerate(split):
            if is_used:
                taken.append(len(dims))
            dims.append((name, number, size))
    total = math.prod(sizes.values())
    ids = np.asarray(_numbers(order)) if order else np.arange(total)
    grid = ids.reshape([size for *_, size in dims])
    rest = [n for n in range(len(dims)) if n not in taken]
    members = math.prod(dims[n][2] for n in taken)
    return tuple(int(each) for each in grid.transpose(rest + taken).reshape(-1, members)[0])


def _numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",") if each]


class Traffic(NamedTuple):
    """One collective, on one device.

    Attributes:
        kind: For example "all-gather".
        axes: Mesh axes over which the group extends, joined by "+".
        group_size: Devices that take part.
        bytes: The whole array: what is gathered, reduced or exchanged.
        wire_bytes: What each device sends, by the ring algorithm.
        secs: How long that takes over the links; NaN where they are not known.
    """

    kind: str
    axes: str
    group_size: int
    bytes: int
    wire_bytes: float
    secs: float


class Fabric:
    """The links between the devices of a mesh."""

    def __init__(self, mesh: jax.sharding.Mesh, chip: Chip | None):
        self._chip = chip
        self._axes = mesh.axis_names
        self._sizes = tuple(mesh.shape.values())
        self._devices = list(mesh.devices.flat)
        self.num_devices = len(self._devices)
        coords = [getattr(device, "coords", None) for device in self._devices]
        self._coords = np.asarray(coords) if None not in coords else None
        self._torus = (
            None if self._coords is None else self._coords.max(0) - self._coords.min(0) + 1
        )

    def traffic(self, instruction: Instruction, input_bytes: int) -> Traffic:
        """Returns what a collective moves.

        Args:
            instruction: The collective, or what starts it.
            input_bytes: Bytes of its operands on a device.
        """
        kind = kind_of(instruction)
        assert kind
        group = group_of(instruction, self.num_devices)
        size = len(group)
        output = _output_bytes(instruction)
        share = (size - 1) / size if size else 0.0
        if kind == "all-reduce":
            whole, wire = output, 2 * share * output
        elif kind == "reduce-scatter":
            whole, wire = input_bytes, share * input_bytes
        elif kind in ("all-to-all", "ragged-all-to-all"):
            # On a ring a piece travels a quarter of the ring; through a switch, directly.
            on_ring = self._chip is not None and self._chip.torus_dims > 0
            whole, wire = output, output * (max(1.0, size / 4) if on_ring else share)
        elif kind == "all-gather":
            whole, wire = output, share * output
        else:
            whole, wire = output, float(output)
        if size < 2:
            wire = 0.0
        speed = self._bandwidth(group)
        if kind == "collective-permute" and self._chip and self._chip.torus_dims:
            speed = min(speed, self._chip.link_bandwidth)  # one neighbour, one way
        secs = 0.0 if not wire else wire / speed if speed else math.nan
        return Traffic(kind, self._spanned(group), size, whole, wire, secs)

    def _bandwidth(self, group: tuple[int, ...]) -> float:
        """Returns the bytes a second that a device of a group can send; 0: not known."""
        chip = self._chip
        if chip is None or len(group) < 2:
            return 0.0
        devices = [self._devices[place] for place in group if place < len(self._devices)]
        slices = {getattr(device, "slice_index", 0) or 0 for device in devices}
        if len(slices) > 1:
            return chip.network_bandwidth
        if chip.torus_dims == 0:
            hosts = {device.process_index for device in devices}
            return chip.link_bandwidth if len(hosts) == 1 else chip.network_bandwidth
        if self._coords is None or self._torus is None:
            return chip.link_bandwidth
        corners = self._coords[list(group)]
        total = 0.0
        for dim, whole in enumerate(self._torus):
            spanned = len(set(corners[:, dim].tolist()))
            if spanned > 1:
                is_ring = spanned == whole and whole % chip.wraps_at == 0
                total += chip.link_bandwidth * (2 if is_ring else 1)
        return total

    def _spanned(self, group: tuple[int, ...]) -> str:
        places = np.unravel_index([p for p in group if p < self.num_devices], self._sizes)
        names = [name for name, at in zip(self._axes, places, strict=True) if len(set(at)) > 1]
        return "+".join(names) or "none"


def _output_bytes(instruction: Instruction) -> int:
    """Bytes of the result; what starts a gather or a permute also returns its operands."""
    shapes = instruction.shapes
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        arrays = [shape for shape in shapes if shape.dims or shape.dtype not in ("u32", "s32")]
        return sum(shape.bytes for shape in arrays[len(arrays) // 2 :])
    return sum(shape.bytes for shape in shapes)
