"""What one instruction costs: operations of matrix products, bytes from and to memory.

XLA's own `cost_analysis` counts bodies of loops once and is not kept by all backends, so
both numbers are taken from the program's text. Inside a fusion intermediate results cost no
memory; an array that is only sliced there costs its slices.
"""

import math
import re

from mlpmem_jax.roofline.hlo import Computation, Instruction, Program, Shape

# Neither compute nor touch memory.
FREE = frozenset(
    (
        "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all",
        "partition-id", "replica-id", "add-dependency", "optimization-barrier", "domain",
    )
)  # fmt: skip
# Transfers that go on while other instructions run, until a `-done` waits for them.
TRANSFERS = ("copy-start", "slice-start")
# Matrix products of splash attention: scores and values; the backward pass has scores and their
# gradients in both kernels, then the queries' gradient in one, the keys' and values' in the other.
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
_ATTENTION = re.compile(r"splash_mha_(fwd|dq|dkv)")
_TILE = re.compile(r'block_q(?:_dq|_dkv)?\\*": (\d+)')
_PASSES_ON = ("bitcast", "reshape", "copy", "convert", "transpose")
# Which operand is written into the first one, in place.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}


class Costs:
    """Costs of the instructions of one program."""

    def __init__(self, program: Program):
        self._program = program

    def flops(self, computation: Computation, instruction: Instruction) -> float:
        """Returns operations of matrix products, those inside fusions included."""
        table = self._program.tables[computation.name]
        if instruction.opcode == "dot":
            return _dot_flops(instruction, table)
        if instruction.opcode == "convolution":
            return _convolution_flops(instruction, table)
        if instruction.opcode == "fusion" or instruction.opcode.startswith("async-start"):
            inner = self._program.computations[instruction.called[0]]
            return sum(self.flops(inner, each) for each in inner.instructions)
        if instruction.opcode == "custom-call":
            return _kernel_flops(instruction, table) or _library_flops(instruction, table)
        return 0.0

    def memory_bytes(self, computation: Computation, instruction: Instruction) -> int:
        """Returns bytes read from and written to the device's main memory."""
        table = self._program.tables[computation.name]
        opcode = instruction.opcode
        if opcode in FREE or opcode.endswith("-done"):
            return 0
        if opcode == "custom-call" and "AllocateBuffer" in instruction.attributes:
            return 0
        operands = [table[name] for name in instruction.operands if name in table]
        if opcode == "copy-start":  # (destination, source, context)
            return sum(shape.bytes for shape in instruction.shapes[:2] if shape.in_memory)
        if opcode == "slice-start":  # ((source), destination, context): it reads only the slice
            source, destination = instruction.shapes[:2]
            return destination.bytes * (source.in_memory + destination.in_memory)
        if opcode in ("dynamic-slice", "gather", "slice"):
            return 2 * _in_memory(instruction.shapes)
        if opcode == "dynamic-update-slice":
            return 2 * _in_memory(operands[1].shapes)
        if opcode == "scatter":
            return 3 * _in_memory(operands[-1].shapes)
        if opcode == "fusion":
            return self._fusion_bytes(instruction, operands)
        return _in_memory(instruction.shapes) + sum(_in_memory(each.shapes) for each in operands)

    def _fusion_bytes(self, fusion: Instruction, operands: list[Instruction]) -> int:
        inner = self._program.computations[fusion.called[0]]
        parameters = {
            int(each.attributes): each for each in inner.instructions if each.opcode == "parameter"
        }
        read = 0
        for number, operand in enumerate(operands):
            whole = _in_memory(operand.shapes)
            if whole and number in parameters:
                whole = min(whole, self._read(inner, parameters[number].name, whole))
            read += whole
        return read + self._written(inner, fusion.shapes)

    def _read(self, computation: Computation, name: str, whole: int) -> int:
        """Returns the bytes that a computation reads of one of its values."""
        total = 0
        for user in computation.instructions:
            if name not in user.operands:
                continue
            place = user.operands.index(name)
            if user.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
                total += user.bytes
            elif user.opcode in _UPDATES and place == 0:
                continue
            elif user.opcode == "fusion":
                inner = self._program.computations[user.called[0]]
                parameter = next(
                    each
                    for each in inner.instructions
                    if each.opcode == "parameter" and int(each.attributes) == place
                )
                total += self._read(inner, parameter.name, whole)
            elif user.opcode in _PASSES_ON and user is not computation.root:
                total += self._read(computation, user.name, whole)
            else:
                return whole
        return total

    def _written(self, inner: Computation, shapes: tuple[Shape, ...]) -> int:
        """Returns the bytes that a fusion writes; an update in place writes the update."""
        table = self._program.tables[inner.name]
        root = inner.root
        parts = [table[name] for name in root.operands] if root.opcode == "tuple" else [root]
        if len(parts) != len(shapes):
            return _in_memory(shapes)
        total = 0
        for part, shape in zip(parts, shapes, strict=True):
            if not shape.in_memory:
                continue
            while part.opcode in _PASSES_ON:
                part = table[part.operands[0]]
            update = _update_of(part, table)
            total += shape.bytes if update is None else update.bytes
        return total


def _update_of(writer: Instruction, table: dict[str, Instruction]) -> Instruction | None:
    """Returns what an instruction writes into an array that exists; None: it writes all of it."""
    place = _UPDATES.get(writer.opcode)
    if place is None or (writer.opcode == "scatter" and len(writer.operands) != 3):
        return None
    into = table[writer.operands[0]]
    while into.opcode in _PASSES_ON:
        into = table[into.operands[0]]
    return table[writer.operands[place]] if into.opcode == "parameter" else None


def _in_memory(shapes: tuple[Shape, ...]) -> int:
    return sum(shape.bytes for shape in shapes if shape.in_memory)


def _dot_flops(dot: Instruction, table: dict[str, Instruction]) -> float:
    left = table[dot.operands[0]].shapes[0]
    found = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", dot.attributes)
    dims = [int(dim) for dim in found[1].split(",") if dim] if found else []
    return 2.0 * dot.shapes[0].size * math.prod(left.dims[dim] for dim in dims)


def _convolution_flops(instruction: Instruction, table: dict[str, Instruction]) -> float:
    """Counts multiply-adds of a convolution that do not meet padding or holes.

    TPUs compute matrix products as convolutions; batch dimensions become windows of which
    most positions are holes, so counting the window's size would be far too much.
    """
    found = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", instruction.attributes)
    assert found, instruction.name
    left, right = (table[name].shapes[0] for name in instruction.operands[:2])
    out = instruction.shapes[0]
    left_labels, right_labels, out_labels = found.groups()
    window = _window(instruction.attributes)
    spatial = [label for label in out_labels if label.isdigit()]
    pairs = 1
    for label in spatial:
        options = {name: values[int(label)] for name, values in window.items()}
        pairs *= _valid_pairs(
            left.dims[left_labels.index(label)],
            right.dims[right_labels.index(label)],
            out.dims[out_labels.index(label)],
            options,
        )
    batch, features = (out.dims[out_labels.index(label)] for label in "bf")
    contracted = right.dims[right_labels.index("i")]
    return 2.0 * batch * features * contracted * pairs


def _window(attributes: str) -> dict[str, list[tuple[int, int]]]:
    """Returns stride, padding and dilations of each spatial dimension."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=") for part in found[1].split()) if found else {}
    num_dims = fields["size"].count("x") + 1 if "size" in fields else 0

    def values(name: str, default: int) -> list[tuple[int, int]]:
        if name not in fields:
            return [(default, default)] * num_dims
        pairs = [part.split("_") for part in fields[name].split("x")]
        return [(int(pair[0]), int(pair[-1])) for pair in pairs]

    return {
        "stride": values("stride", 1),
        "pad": values("pad", 0),
        "lhs_dilate": values("lhs_dilate", 1),
        "rhs_dilate": values("rhs_dilate", 1),
    }


def _valid_pairs(left: int, right: int, out: int, options: dict[str, tuple[int, int]]) -> int:
    """Counts (output position, window position) pairs that meet an element of the input."""
    stride, pad = options["stride"][0], options["pad"][0]
    hole, spread = options["lhs_dilate"][0], options["rhs_dilate"][0]
    if right == 1 and stride == hole == 1 and pad == 0:
        return min(out, left)
    count = 0
    for position in range(out):
        for element in range(right):
            place, rest = divmod(position * stride + element * spread - pad, hole)
            count += rest == 0 and 0 <= place < left
    return count


def _kernel_flops(call: Instruction, table: dict[str, Instruction]) -> float:
    """Operations of the fused attention of models/flash.py, in the tiles that it computes."""
    found = _ATTENTION.match(call.name)
    tile = _TILE.search(call.attributes)
    if not found or not tile:
        return 0.0
    queries = next(
        shape
        for name in call.operands
        for shape in table[name].shapes
        if len(shape.dims) >= 3 and "f" in shape.dtype
    )
    *lead, length, width = queries.dims
    pairs = length * (length + int(tile[1])) / 2  # on and below the diagonal
    return 2.0 * _PRODUCTS[found[1]] * math.prod(lead) * width * pairs


def _library_flops(call: Instruction, table: dict[str, Instruction]) -> float:
    """Operations of a matrix product that XLA hands to a library (GPU: cuBLAS)."""
    if "matmul" not in call.attributes and "gemm" not in call.attributes:
        return 0.0
    found = re.search(r'"lhs_contracting_dimensions":\[([0-9",]*)\]', call.attributes)
    if not found or not call.operands:
        return 0.0
    left = table[call.operands[0]].shapes[0]
    dims = [int(dim) for dim in re.findall(r"\d+", found[1])]
    return 2.0 * call.shapes[0].size * math.prod(left.dims[dim] for dim in dims)
