"""Reads the text of a compiled XLA program: computations, instructions, shapes.

`compiled.as_text()` is the only description of the scheduled, partitioned program that
JAX gives on every backend. Shapes in it are those of one device.
"""

import math
import re
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

_BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16,
    "f16": 16, "bf16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64,
    "c64": 64, "c128": 128,
}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](\{[^{}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_COMMENT = re.compile(r"/\*.*?\*/")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|async_computation)=%([\w.\-]+)")
_CONTINUES = ('"', "}}")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


class Shape(NamedTuple):
    """One array.

    Attributes:
        dtype: XLA's name of the type.
        dims: Sizes.
        in_memory: Whether it lies in the device's main memory (not in an on-chip buffer).
    """

    dtype: str
    dims: tuple[int, ...]
    in_memory: bool

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes, tiles not padded."""
        bits = _BITS.get(self.dtype, 8 if self.dtype.startswith("f8") else 0)
        return -(-self.size * bits // 8)


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
        name: Unique in its computation.
        opcode: For example "fusion".
        shapes: Arrays of the result; a tuple has several.
        attributes: The rest of the line.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it calls."""
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        names = _CALLED.findall(self.attributes)
        return (*names, *(_NAME.findall(branches[1]) if branches else ()))

    def role(self, name: str) -> str:
        """Returns the computation of one role, for example the `body` of a loop."""
        found = re.search(rf"\b{name}=%([\w.\-]+)", self.attributes)
        assert found, f"{self.name} has no {name}"
        return found[1]

    @property
    def source(self) -> str:
        """Where it comes from, as JAX names it; else its own name."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else self.name

    @property
    def bytes(self) -> int:
        """Bytes of the result."""
        return sum(shape.bytes for shape in self.shapes)


class Computation(NamedTuple):
    """A list of instructions, in the order in which they run."""

    name: str
    instructions: tuple[Instruction, ...]
    root: Instruction

    @property
    def by_name(self) -> dict[str, Instruction]:
        """Instructions by name."""
        return {each.name: each for each in self.instructions}


class Program:
    """A compiled program.

    Attributes:
        computations: By name.
        entry: The one that runs first.
    """

    def __init__(self, text: str):
        """Reads `compiled.as_text()`."""
        self.computations: dict[str, Computation] = {}
        self.entry: Computation
        name, is_entry = "", False
        lines: list[str] = []
        for line in _logical_lines(text):
            if line.endswith("{") and not line.startswith((" ", "HloModule")):
                found = _NAME.search(line) or re.search(r"(?:ENTRY )?([\w.\-]+)", line)
                assert found
                name, lines, is_entry = found[1], [], line.startswith("ENTRY")
            elif line.startswith("}") and name:
                computation = _computation(name, lines)
                self.computations[name] = computation
                if is_entry:
                    self.entry = computation
                name = ""
            elif name and " = " in line:
                lines.append(line)

    @cached_property
    def tables(self) -> dict[str, dict[str, Instruction]]:
        """Instructions by name, of each computation."""
        return {name: each.by_name for name, each in self.computations.items()}


def _logical_lines(text: str) -> Iterator[str]:
    """Yields lines; the attributes of kernels may hold line breaks."""
    held = ""
    for line in text.splitlines():
        if held and line.startswith(_CONTINUES):
            held += line
            continue
        if held:
            yield held
        held = line
    if held:
        yield held


def _computation(name: str, lines: list[str]) -> Computation:
    instructions = []
    root: Instruction | None = None
    for line in lines:
        instruction = _instruction(line)
        instructions.append(instruction)
        if line.lstrip().startswith("ROOT "):
            root = instruction
    return Computation(name, tuple(instructions), root or instructions[-1])


def _instruction(line: str) -> Instruction:
    left, right = line.split(" = ", 1)
    name = left.strip().removeprefix("ROOT ").lstrip("%")
    right = _COMMENT.sub("", right)
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    shapes = tuple(_shapes(right[:end]))
    rest = right[end:].lstrip()
    open_at = rest.index("(")
    close_at = _closing(rest, open_at)
    inside = rest[open_at + 1 : close_at]
    opcode = rest[:open_at]
    # A constant's value stands where others have operands.
    attributes = rest[close_at + 1 :] if opcode not in ("constant", "parameter") else inside
    return Instruction(name, opcode, shapes, tuple(_NAME.findall(inside)), attributes)


def _shapes(text: str) -> list[Shape]:
    shapes = []
    for dtype, dims, layout in _SHAPE.findall(text):
        if dtype in ("token", "opaque"):
            continue
        sizes = tuple(int(size) for size in dims.split(",") if size)
        space = re.search(r"S\((\d+)\)", layout)
        shapes.append(Shape(dtype, sizes, space is None or space[1] == "0"))
    return shapes


def _closing(text: str, start: int) -> int:
    """Returns the place of the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        if text[place] == "(":
            depth += 1
        elif text[place] == ")":
            depth -= 1
            if depth == 0:
                return place
    raise AssertionError(f"unbalanced: {text[:120]}")
