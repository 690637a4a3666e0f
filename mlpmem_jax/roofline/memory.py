"""Whether a compiled step fits its devices, and what takes the room."""

import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax

from mlpmem_jax.parallel.chips import chip_of
from mlpmem_jax.roofline.costs import FREE
from mlpmem_jax.roofline.hlo import Program

NUM_LARGEST = 8
# Their results are arrays that others made.
_PASSING = (
    "while", "conditional", "call", "copy-done", "slice-start", "slice-done", "async-done",
    "async-update",
)  # fmt: skip
_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_USED = re.compile(r"Used ([\d.]+)([KMGTB]?) of ([\d.]+)([KMGTB]?) (?:hbm|memory)")
# Said where temporaries alone are too many, before anything is laid out.
_TEMPORARIES = re.compile(
    r"HLO temporaries \(([\d.]+)([KMGTB]?)\) exceeds available HBM \(([\d.]+)([KMGTB]?)\)"
)
_ALLOCATION = re.compile(r"^\s*\d+\. Size: ([\d.]+)([KMGTB]?)\s*$", re.MULTILINE)
_OPERATOR = re.compile(r'op_name="([^"]*)"')
_SHAPE = re.compile(r"Shape: (\S+)")


class Buffer(NamedTuple):
    """One array on one device."""

    name: str
    bytes: int


class Memory(NamedTuple):
    """Bytes of a step on each device.

    Attributes:
        arguments: What it is given.
        temporaries: What it needs while it runs.
        outputs: What it returns.
        aliased: Outputs that take the place of arguments.
        code: The program.
        total: All of it; None where the compiler gave up and told no sum.
        capacity: What a device has; None: not known.
        largest: The largest buffers: those that the compiler names where it refused the step,
            else the largest arguments, and then the largest results of instructions.
    """

    arguments: int | None
    temporaries: int | None
    outputs: int | None
    aliased: int | None
    code: int | None
    total: int | None
    capacity: int | None
    largest: tuple[Buffer, ...]

    @property
    def fits(self) -> bool:
        """Whether the step fits; where the capacity is not known it is taken to."""
        if self.total is None:
            return False
        return self.capacity is None or self.total <= self.capacity


def capacity_of(device: jax.Device, num_devices: int, wanted: int | str) -> int | None:
    """Returns the memory of a device in bytes.

    Args:
        device: One of the mesh.
        num_devices: Devices of the mesh (on CPU they share the machine's memory).
        wanted: `compile.memory_bytes`.
    """
    if not isinstance(wanted, str):
        return wanted
    if device.platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // num_devices
    chip = chip_of(device.device_kind)
    if device.platform != "tpu":  # Products of one name come with several sizes.
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            return int(stats["bytes_limit"])
    return None if chip is None else chip.memory_bytes


def memory_of(
    compiled: jax.stages.Compiled,
    program: Program,
    arguments: Mapping[str, Any],
    capacity: int | None,
) -> Memory:
    """Reads what the compiler planned.

    Args:
        compiled: The step.
        program: Its text, as read.
        arguments: Shapes and shardings of its arguments, by name.
        capacity: Memory of a device; None: not known.
    """
    stats: Any = compiled.memory_analysis()
    parts = {
        "arguments": int(stats.argument_size_in_bytes),
        "temporaries": int(stats.temp_size_in_bytes),
        "outputs": int(stats.output_size_in_bytes),
        "aliased": int(stats.alias_size_in_bytes),
        "code": int(stats.generated_code_size_in_bytes),
    }
    return Memory(
        **parts,
        total=sum(parts.values()) - 2 * parts["aliased"],
        capacity=capacity,
        largest=_largest(_arguments(arguments)) + _largest(_results(program)),
    )


def refused(
    error: BaseException, arguments: Mapping[str, Any], capacity: int | None
) -> Memory | None:
    """Returns what a compiler says that gave up for lack of memory; None: another error.

    Args:
        error: What it raised.
        arguments: Shapes and shardings of the step's arguments, by name: named as the largest
            buffers where the compiler names none.
        capacity: Memory of a device; None: not known.
    """
    message = str(error)
    used = _USED.search(message) or _TEMPORARIES.search(message)
    if "RESOURCE_EXHAUSTED" not in message and not used:
        return None
    held = _arguments(arguments)
    total = temporaries = None
    if used:
        needed = _bytes(used[1], used[2])
        if _USED.search(message):
            total = needed
        else:
            temporaries, total = needed, needed + sum(buffer.bytes for buffer in held)
        capacity = min(capacity or math.inf, _bytes(used[3], used[4]))  # type: ignore[assignment]
    largest = tuple(_allocations(message)) or _largest(held)
    return Memory(None, temporaries, None, None, None, total, capacity, largest)


def _allocations(message: str) -> list[Buffer]:
    places = list(_ALLOCATION.finditer(message))
    buffers = []
    for number, place in enumerate(places):
        end = places[number + 1].start() if number + 1 < len(places) else len(message)
        about = message[place.end() : end]
        operator, shape = _OPERATOR.search(about), _SHAPE.search(about)
        words = [found[1] for found in (shape, operator) if found]
        buffers.append(Buffer(" ".join(words) or "unnamed", _bytes(place[1], place[2])))
    return buffers[:NUM_LARGEST]


def _largest(buffers: Iterable[Buffer]) -> tuple[Buffer, ...]:
    return tuple(sorted(buffers, key=lambda each: -each.bytes)[:NUM_LARGEST])


def _results(program: Program) -> list[Buffer]:
    """Returns what instructions leave in memory, each kind of array once.

    Inside fusions nothing lies in memory; what a loop carries is the result of another.
    """
    inside = {
        name
        for computation in program.computations.values()
        for each in computation.instructions
        if each.opcode == "fusion"
        for name in each.called
    }
    found: dict[str, int] = {}
    for name, computation in program.computations.items():
        for each in computation.instructions if name not in inside else ():
            if each.opcode in FREE or each.opcode in _PASSING:
                continue
            for shape in each.shapes:
                if shape.in_memory:
                    words = f"{each.source} {shape.dtype}{list(shape.dims)}"
                    found[words] = max(found.get(words, 0), shape.bytes)
    return [Buffer(name, size) for name, size in found.items()]


def _arguments(arguments: Mapping[str, Any]) -> list[Buffer]:
    buffers = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(dict(arguments)):
        shape = leaf.sharding.shard_shape(leaf.shape)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        held = f"{leaf.dtype}{list(shape)} of {list(leaf.shape)}"
        buffers.append(Buffer(f"{name} {held}", math.prod(shape) * leaf.dtype.itemsize))
    return buffers


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])
