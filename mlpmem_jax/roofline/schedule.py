"""Runs a compiled program on paper: a roofline that follows the compiler's own schedule.

Instructions run one after another, each as long as its matrix products at the chip's peak
or its bytes at the memory's bandwidth, whichever is longer. Transfers overlap with others
only where the program shows it: between an asynchronous start and its end, or inside one
fused instruction. Latencies, vector units and the host are left out: this is a lower bound.
"""

import dataclasses
import math
from collections.abc import Mapping

from mlpmem_jax.parallel.chips import Chip
from mlpmem_jax.roofline.collectives import Fabric, Traffic, kind_of
from mlpmem_jax.roofline.costs import FREE, TRANSFERS, Costs
from mlpmem_jax.roofline.hlo import Computation, Instruction, Program
from mlpmem_jax.roofline.loops import trip_count

COMPUTE, MEMORY, INTERCONNECT = "compute", "memory", "interconnect"


@dataclasses.dataclass
class Total:
    """What a computation costs, loops unrolled.

    Attributes:
        bound_secs: That time by what it waits for.
        flops: Operations of matrix products.
        memory_bytes: Bytes from and to memory.
        link_secs: Time of all collectives, overlapped or not.
        collectives: Number of times that each kind of collective runs.
        heaviest: Seconds by source of the instruction.
        unknown_loops: Loops whose number of rounds the program does not say.
    """

    secs: float = 0.0
    bound_secs: dict[str, float] = dataclasses.field(
        default_factory=lambda: {COMPUTE: 0.0, MEMORY: 0.0, INTERCONNECT: 0.0}
    )
    flops: float = 0.0
    memory_bytes: float = 0.0
    link_secs: float = 0.0
    collectives: dict[Traffic, int] = dataclasses.field(default_factory=dict)
    heaviest: dict[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    unknown_loops: int = 0

    def add(self, other: "Total", times: int) -> None:
        """Adds what runs `times` times."""
        self.secs += times * other.secs
        self.flops += times * other.flops
        self.memory_bytes += times * other.memory_bytes
        self.link_secs += times * other.link_secs
        self.unknown_loops += other.unknown_loops
        for name, secs in other.bound_secs.items():
            self.bound_secs[name] += times * secs
        for traffic, count in other.collectives.items():
            self.collectives[traffic] = self.collectives.get(traffic, 0) + times * count
        for source, secs in other.heaviest.items():
            self.heaviest[source] = self.heaviest.get(source, 0.0) + times * secs

    def spend(self, bound: str, source: str, secs: float) -> None:
        """Lets time pass."""
        self.secs += secs
        self.bound_secs[bound] += secs
        key = (bound, source)
        self.heaviest[key] = self.heaviest.get(key, 0.0) + secs


class Simulator:
    """Times the computations of one program."""

    def __init__(self, program: Program, chip: Chip | None, fabric: Fabric, unknown_trips: int = 1):
        """Prepares.

        Args:
            chip: Its devices; None: times are NaN, counts are still right.
            fabric: Their links.
            unknown_trips: Rounds of loops whose number is decided while they run.
        """
        self._program = program
        self._costs = Costs(program)
        self._fabric = fabric
        self._unknown_trips = unknown_trips
        self._peak = chip.flops if chip else math.nan
        self._bandwidth = chip.memory_bandwidth if chip else math.nan
        self._done: dict[str, Total] = {}

    def total(self) -> Total:
        """Returns what the whole program costs."""
        return self._run(self._program.entry)

    def _run(self, computation: Computation) -> Total:
        if computation.name not in self._done:
            self._done[computation.name] = self._simulate(computation)
        return self._done[computation.name]

    def _simulate(self, computation: Computation) -> Total:
        total = Total()
        links_free = copies_free = 0.0  # when the last transfer under way ends
        pending: dict[str, tuple[float, str]] = {}
        for each in computation.instructions:
            opcode = each.opcode
            if opcode in FREE:
                continue
            if opcode in ("while", "call", "conditional"):
                self._nested(computation, each, total)
                continue
            if opcode.endswith(("-done", "-update")) and each.operands:
                ready, bound = pending.get(each.operands[0], (0.0, MEMORY))
                if opcode.endswith("-update"):
                    pending[each.name] = (ready, bound)
                elif ready > total.secs:
                    total.spend(bound, each.source, ready - total.secs)
                continue
            flops = self._costs.flops(computation, each)
            moved = self._costs.memory_bytes(computation, each)
            total.flops += flops
            total.memory_bytes += moved
            link_secs = self._collectives(computation, each, total)
            total.link_secs += link_secs
            starts = opcode.endswith("-start")
            if opcode in TRANSFERS:
                copies_free = max(copies_free, total.secs) + moved / self._bandwidth
                pending[each.name] = (copies_free, MEMORY)
                continue
            if starts and link_secs:
                links_free = max(links_free, total.secs) + link_secs
                pending[each.name] = (links_free, INTERCONNECT)
                continue
            is_collective = kind_of(each) is not None
            self._spend(
                each,
                total,
                0.0 if is_collective else flops,
                0 if is_collective else moved,
                link_secs,
                links_free,
            )
            if link_secs:
                links_free = total.secs
        self._at_least(total)
        return total

    def _spend(
        self,
        each: Instruction,
        total: Total,
        flops: float,
        moved: int,
        link_secs: float,
        links_free: float,
    ) -> None:
        """Lets one instruction run; a collective first waits for the one before."""
        parts = {COMPUTE: flops / self._peak, MEMORY: moved / self._bandwidth}
        if link_secs:
            parts[INTERCONNECT] = max(links_free - total.secs, 0.0) + link_secs
        bound = max(parts, key=lambda name: parts[name])
        total.spend(bound, each.source, parts[bound])

    def _at_least(self, total: Total) -> None:
        """Overlapped transfers share one memory and one set of links."""
        for bound, secs in (
            (MEMORY, total.memory_bytes / self._bandwidth),
            (INTERCONNECT, total.link_secs),
        ):
            if secs > total.secs:
                total.spend(bound, "transfers that overlap with nothing else", secs - total.secs)

    def _nested(self, computation: Computation, each: Instruction, total: Total) -> None:
        if each.opcode == "while":
            trips = trip_count(self._program, computation, each)
            if trips is None:
                total.unknown_loops += 1
                trips = self._unknown_trips
            for role in ("condition", "body"):
                total.add(self._run(self._program.computations[each.role(role)]), trips)
            return
        inner = [self._run(self._program.computations[name]) for name in each.called]
        if inner:  # Of the branches of a condition the longest one counts.
            total.add(max(inner, key=lambda one: (one.secs, one.flops)), 1)

    def _collectives(self, computation: Computation, each: Instruction, total: Total) -> float:
        """Counts the collectives that an instruction is, starts or contains; returns seconds."""
        table = self._program.tables[computation.name]
        if kind_of(each):
            given = sum(table[name].bytes for name in each.operands if name in table)
            traffic = self._fabric.traffic(each, given)
            total.collectives[traffic] = total.collectives.get(traffic, 0) + 1
            return traffic.secs
        if each.opcode not in ("fusion", "async-start"):
            return 0.0
        return sum(self._inside(name, total) for name in each.called)

    def _inside(self, name: str, total: Total) -> float:
        inner = self._program.computations[name]
        secs = 0.0
        for each in inner.instructions:
            # The TPU fuses an all-reduce with the slice that each device keeps of it.
            if each.opcode == "all-reduce" and "all-reduce-scatter" in name:
                each = each._replace(opcode="reduce-scatter")
            secs += self._collectives(inner, each, total)
        return secs


def by_kind(collectives: Mapping[Traffic, int]) -> list[dict[str, object]]:
    """Sums collectives by kind and mesh axes, the longest first."""
    sums: dict[tuple[str, str, int], dict[str, float]] = {}
    for traffic, count in collectives.items():
        key = (traffic.kind, traffic.axes, traffic.group_size)
        row = sums.setdefault(key, {"count": 0, "bytes": 0, "wire_bytes": 0, "secs": 0.0})
        row["count"] += count
        row["bytes"] += count * traffic.bytes
        row["wire_bytes"] += count * traffic.wire_bytes
        row["secs"] += count * traffic.secs
    rows = [
        {"kind": kind, "axes": axes, "devices": size, **values}
        for (kind, axes, size), values in sums.items()
    ]
    return sorted(rows, key=lambda row: -float(row["wire_bytes"]))  # type: ignore[arg-type]
