"""What `compile` finds out, as JSON and as a table."""

import math
from collections.abc import Mapping
from typing import Any

from mlpmem_jax.evaluation.table import render
from mlpmem_jax.units import human_bytes

SCHEMA = 1
_SHOWN = 10


def as_json(value: Any) -> Any:
    """Returns a value in which what is not a number is null, as JSON wants it."""
    if isinstance(value, Mapping):
        return {name: as_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_text(report: Mapping[str, Any]) -> str:
    """Returns the report for a terminal."""
    parts = [_heading(report), _memory(report["memory"])]
    if report["roofline"]:
        parts += [_roofline(report), _collectives(report["collectives"]), _heaviest(report)]
    return "\n".join(part for part in parts if part)


def verdict(report: Mapping[str, Any]) -> str:
    """Returns one sentence: does it fit, and how fast can it be."""
    memory, line = report["memory"], report["roofline"]
    if not memory["fits"]:
        need, room = memory["total"], memory["capacity"]
        sizes = "" if need is None else f": a device needs {human_bytes(need)}"
        if room is not None:
            sizes += f", of {human_bytes(room)}" if sizes else f" in {human_bytes(room)} a device"
        return (
            f"does not fit{sizes}; raise "
            "mesh.fsdp or mesh.tensor, lower the batch size or loss_chunk_tokens, or set remat"
        )
    if line["share_of_peak"] is None:
        return "fits; this device's speed is not in the table, so there is no estimate of time"
    return (
        f"fits; at most {100 * line['share_of_peak']:.1f} % of peak, bound by {line['bound']} "
        f"({line['tokens_per_sec']:,.0f} tokens/s over all devices)"
    )


def _heading(report: Mapping[str, Any]) -> str:
    devices = report["devices"]
    mesh = " × ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    return (
        f"{report['step']} on {report['topology']}: {devices['count']} × {devices['kind']}, "
        f"mesh {mesh}, {report['tokens']:,} tokens a step; compiled in "
        f"{report['compile_secs']:.0f} s"
    )


def _memory(memory: Mapping[str, Any]) -> str:
    shown = ["arguments", "temporaries", "outputs", "aliased", "code", "total", "capacity"]
    header = ["bytes of a device", *shown, "fits"]
    row = ["", *(_bytes(memory[name]) for name in shown), "yes" if memory["fits"] else "NO"]
    lines = [render(header, [row])]
    if not memory["fits"]:
        lines += ["largest buffers:"]
        lines += [f"  {_bytes(each['bytes']):>10}  {each['name']}" for each in memory["largest"]]
    return "\n".join(lines)


def _bytes(value: float | None) -> str:
    return "–" if value is None else human_bytes(value)


def _roofline(report: Mapping[str, Any]) -> str:
    flops, line = report["flops"], report["roofline"]
    rows = [
        ["model flops, all devices (by formula)", f"{flops['model']:.4g}"],
        ["matrix products compiled, all devices", f"{flops['compiled']:.4g}"],
        ["bytes from and to memory, a device", human_bytes(report["memory_traffic_bytes"])],
    ]
    if line["secs"] is not None:
        rows += [
            ["compute alone", _secs(line["compute_secs"])],
            ["memory alone", _secs(line["memory_secs"])],
            ["interconnect alone", _secs(line["interconnect_secs"])],
            ["estimate of a step, overlap only as compiled", _secs(line["secs"])],
            *([f"  of which bound by {name}", _secs(s)] for name, s in line["bound_secs"].items()),
            ["share of peak at most", f"{100 * line['share_of_peak']:.1f} %"],
        ]
    if report["unknown_loops"]:
        rows.append([f"loops counted as {report['inner_trips']} rounds", report["unknown_loops"]])
    return render(["", "roofline"], [[name, str(value)] for name, value in rows])


def _collectives(collectives: list[Mapping[str, Any]]) -> str:
    rows = [
        [
            each["kind"], each["axes"], str(each["devices"]), f"{each['count']:,}",
            human_bytes(each["bytes"]), human_bytes(each["wire_bytes"]), _secs(each["secs"]),
        ]
        for each in collectives[:_SHOWN]
    ]  # fmt: skip
    header = ["collective", "over", "devices", "times", "bytes", "sent by a device", "time"]
    return render(header, rows) if rows else "no collectives"


def _heaviest(report: Mapping[str, Any]) -> str:
    if not report["heaviest"] or report["heaviest"][0]["secs"] is None:
        return ""
    rows = [
        [each["source"][-70:], each["bound"], _secs(each["secs"])]
        for each in report["heaviest"][:_SHOWN]
    ]
    return render(["takes longest", "bound by", "time"], rows)


def _secs(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f} s" if value >= 1 else f"{1000 * value:.3f} ms"
