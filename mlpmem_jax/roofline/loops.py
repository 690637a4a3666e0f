"""How often the bodies of loops run."""

import re

from mlpmem_jax.roofline.hlo import Computation, Instruction, Program

_KNOWN = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"(\d+)"')
_PASSES_ON = (
    "copy",
    "bitcast",
    "reshape",
    "convert",
    "copy-start",
    "copy-done",
    "optimization-barrier",
)


def trip_count(program: Program, caller: Computation, loop: Instruction) -> int | None:
    """Returns how often a `while` runs its body; None where the program does not say.

    XLA writes the count beside some loops; for others (all of the TPU's) it follows from
    the condition `counter < limit`, the counter's first value and its increment.
    """
    known = _KNOWN.search(loop.attributes)
    if known:
        return int(known[1])
    condition = program.computations[loop.role("condition")]
    compared = _comparison(program, condition)
    if compared is None:
        return None
    counter, limit, direction = compared
    first = _carried(program, caller, loop, counter)
    last = limit if isinstance(limit, int) else _carried(program, caller, loop, limit[0])
    step = _increment(program, program.computations[loop.role("body")], counter)
    if first is None or last is None or not step:
        return None
    if direction in ("LE", "GE"):
        last += 1 if direction == "LE" else -1
    return max(0, -(-(last - first) // step))


def _comparison(
    program: Program, condition: Computation
) -> tuple[int, int | list[int], str] | None:
    """Returns the counter's place in the carry, the limit (or its place), the direction."""
    sides, direction = _compare_of(program, condition, condition.root)
    if direction is None:
        return None
    left, right = sides
    if isinstance(left, int) and isinstance(right, list):  # limit > counter
        flipped = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}
        left, right, direction = right, left, flipped.get(direction, direction)
    if not isinstance(left, list) or right is None or direction not in ("LT", "LE", "GT", "GE"):
        return None
    return left[0], right, direction


Side = int | list[int] | None  # a constant, or [place in the carry]


def _compare_of(
    program: Program, computation: Computation, root: Instruction
) -> tuple[tuple[Side, Side], str | None]:
    table = program.tables[computation.name]
    if root.opcode in ("fusion", "call") and root.called:
        inner = program.computations[root.called[0]]
        sides, direction = _compare_of(program, inner, inner.root)
        arguments = [_side(table, name) for name in root.operands]
        # Inside, [n] means the n-th argument.
        outer = [arguments[side[0]] if isinstance(side, list) else side for side in sides]
        return (outer[0], outer[1]), direction
    if root.opcode != "compare":
        return (None, None), None
    found = re.search(r"direction=(\w+)", root.attributes)
    left, right = (_side(table, name) for name in root.operands)
    return (left, right), found[1] if found else None


def _side(table: dict[str, Instruction], name: str) -> Side:
    instruction = _origin(table, name)
    if instruction.opcode == "constant":
        return _integer(instruction)
    if instruction.opcode == "get-tuple-element":
        return [_index(instruction)]
    if instruction.opcode == "parameter":
        return [int(instruction.attributes)]
    return None


def _origin(table: dict[str, Instruction], name: str) -> Instruction:
    """Follows what only passes a value on."""
    instruction = table[name]
    while instruction.opcode in _PASSES_ON and instruction.operands:
        instruction = table[instruction.operands[0]]
    return instruction


def _carried(program: Program, caller: Computation, loop: Instruction, place: int) -> int | None:
    """Returns the first value of an element of a loop's carry, if it is a constant."""
    table = program.tables[caller.name]
    carry = _origin(table, loop.operands[0])
    if carry.opcode != "tuple":
        return None
    value = _origin(table, carry.operands[place])
    return _integer(value) if value.opcode == "constant" else None


def _increment(program: Program, body: Computation, place: int) -> int | None:
    table = program.tables[body.name]
    root = _origin(table, body.root.name)
    if root.opcode != "tuple":
        return None
    return _addend(program, table, _origin(table, root.operands[place]), place)


def _addend(
    program: Program, table: dict[str, Instruction], update: Instruction, place: int
) -> int | None:
    if update.opcode in ("fusion", "call") and update.called:
        inner = program.computations[update.called[0]]
        inside = program.tables[inner.name]
        sides = [_side(table, name) for name in update.operands]
        added = _origin(inside, inner.root.name)
        if added.opcode != "add":
            return None
        values = [_side(inside, name) for name in added.operands]
        constants: list[Side] = [
            sides[value[0]] if isinstance(value, list) else value for value in values
        ]
    elif update.opcode == "add":
        constants = [_side(table, name) for name in update.operands]
    else:
        return None
    if [place] not in constants:
        return None
    return next((value for value in constants if isinstance(value, int)), None)


def _integer(constant: Instruction) -> int | None:
    text = constant.attributes.strip()
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _index(element: Instruction) -> int:
    found = re.search(r"index=(\d+)", element.attributes)
    assert found
    return int(found[1])
