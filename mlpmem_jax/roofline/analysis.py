"""Compiles a step for a topology and reports on it."""

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

import jax

from mlpmem_jax.config.compile import CompileConfig
from mlpmem_jax.parallel.chips import chip_of
from mlpmem_jax.roofline.collectives import Fabric
from mlpmem_jax.roofline.hlo import Program
from mlpmem_jax.roofline.memory import Memory, capacity_of, memory_of, refused
from mlpmem_jax.roofline.report import SCHEMA, as_json
from mlpmem_jax.roofline.schedule import COMPUTE, INTERCONNECT, MEMORY, Simulator, by_kind

_NUM_HEAVIEST = 16


@dataclasses.dataclass(frozen=True)
class LoweredStep:
    """One step, ready to be compiled.

    Attributes:
        lowered: What JAX lowered.
        arguments: Shapes and shardings of what the step is given, by name.
        model_flops: Operations that the networks need for it, by formula.
        num_tokens: Tokens (or rows) that it handles, over all devices.
        inner_trips: Rounds of loops whose number is decided while they run.
    """

    lowered: jax.stages.Lowered
    arguments: Mapping[str, Any]
    model_flops: float
    num_tokens: int
    inner_trips: int = 1


def analyse(step: LoweredStep, mesh: jax.sharding.Mesh, settings: CompileConfig) -> dict[str, Any]:
    """Compiles a step.

    Args:
        step: Lowered on the mesh.
        mesh: Devices, which need not exist.

    Returns:
        The report, JSON-ready; "roofline" and "flops" are None where the compiler refused
        the step for lack of memory.
    """
    device = mesh.devices.flat[0]
    capacity = capacity_of(device, mesh.size, settings.memory_bytes)
    started = time.perf_counter()
    compiled: jax.stages.Compiled | None = None
    try:
        compiled = step.lowered.compile()
        program = Program(compiled.as_text() or "")
        memory = memory_of(compiled, program, step.arguments, capacity)
    except jax.errors.JaxRuntimeError as error:
        found = refused(error, step.arguments, capacity)
        if found is None:
            raise
        memory = found
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "step": settings.step,
        "topology": settings.topology,
        "devices": {"count": mesh.size, "kind": device.device_kind},
        "mesh": dict(mesh.shape),
        "tokens": step.num_tokens,
        "compile_secs": round(time.perf_counter() - started, 1),
        "jax": jax.__version__,
        "memory": _memory(memory),
        "flops": {"model": step.model_flops},
        "roofline": None,
    }
    if compiled is not None:
        report |= _performance(step, compiled, program, mesh)
    result: dict[str, Any] = as_json(report)
    return result


def _memory(memory: Memory) -> dict[str, Any]:
    buffers = [{"name": each.name, "bytes": each.bytes} for each in memory.largest]
    return memory._asdict() | {"fits": memory.fits, "largest": buffers}


def _performance(
    step: LoweredStep, compiled: jax.stages.Compiled, program: Program, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    device = mesh.devices.flat[0]
    chip = chip_of(device.device_kind)
    total = Simulator(program, chip, Fabric(mesh, chip), step.inner_trips).total()
    peak, bandwidth = (chip.flops, chip.memory_bandwidth) if chip else (math.nan, math.nan)
    bound = max(total.bound_secs, key=lambda name: total.bound_secs[name])
    heaviest = sorted(total.heaviest.items(), key=lambda item: -item[1])[:_NUM_HEAVIEST]
    analysis: Any = compiled.cost_analysis() or {}
    return {
        "flops": {
            "model": step.model_flops,
            "compiled": total.flops * mesh.size,
            "cost_analysis_a_device_loops_once": analysis.get("flops"),
        },
        "memory_traffic_bytes": total.memory_bytes,
        "collectives": by_kind(total.collectives),
        "unknown_loops": total.unknown_loops,
        "inner_trips": step.inner_trips,
        "roofline": {
            "compute_secs": total.flops / peak,
            "memory_secs": total.memory_bytes / bandwidth,
            "interconnect_secs": total.link_secs if chip else math.nan,
            "secs": total.secs,
            "bound_secs": {n: total.bound_secs[n] for n in (COMPUTE, MEMORY, INTERCONNECT)},
            "bound": bound if chip else None,
            "share_of_peak": step.model_flops / (mesh.size * peak * total.secs)
            if total.secs
            else math.nan,
            "tokens_per_sec": step.num_tokens / total.secs if total.secs else math.nan,
        },
        "heaviest": [
            {"source": source, "bound": bound, "secs": secs} for (bound, source), secs in heaviest
        ],
    }
