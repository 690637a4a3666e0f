"""Cost against rows as a picture, drawn from the dictionary of `cost.json` alone."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlpmem_jax.evaluation import style
from mlpmem_jax.evaluation.style import COLORS
from mlpmem_jax.evaluation.table import bracket_text, number
from mlpmem_jax.units import short_number

Results = Mapping[str, Any]


def draw(results: Results) -> bytes:
    """Draws time, throughput, bytes and, where measured, quality; returns a PNG."""
    has_quality = "quality" in results
    num_lines = 3 if has_quality else 2
    figure = style.new_figure(14.0, 4.3 * num_lines)
    grid = figure.add_gridspec(num_lines, 2, hspace=0.08, wspace=0.06)
    places = [figure.add_subplot(grid[row, column]) for row in range(2) for column in range(2)]
    if has_quality:
        places.append(figure.add_subplot(grid[2, :]))
    for axes in places:
        style.plain(axes)
    machine, protocol = results["machine"], results["protocol"]
    where = f"{machine['devices']} × {machine['device_kind']}, {machine['cores']} cores"
    _draw(places[0], results, "token_ms_p50", "token_ms_p95", "milliseconds")
    style.title(places[0], "Time per token", f"median; shaded up to the 95th percentile; {where}")
    _draw(places[1], results, "first_ms_p50", "first_ms_p95", "milliseconds")
    after = f"after a prompt of {protocol['prompt_tokens']} tokens; median to 95th percentile"
    style.title(places[1], "Time to the first token", after)
    _draw(places[2], results, "tokens_per_sec", None, "tokens per second")
    style.title(places[2], "Throughput", f"{protocol['batch_size']} texts continued together")
    _draw(places[3], results, "bytes", None, "bytes")
    style.title(
        places[3], "What must be kept", "weights; for a kNN-LM labels too, and keys or index"
    )
    if has_quality:
        _draw_quality(places[4], results)
    return style.as_png(figure)


def _draw(axes: Any, results: Results, main: str, upper: str | None, unit: str) -> None:
    rows = np.asarray(results["rows"], np.float64)
    ends = []
    for system, one in results["systems"].items():
        color = COLORS[system]
        value = np.asarray(one[main], np.float64)
        if upper:
            axes.fill_between(rows, value, one[upper], color=color, alpha=0.13, linewidth=0)
        dashes = (0, (4, 2)) if system == "decoder" else "solid"
        axes.plot(rows, value, "o", color=color, markersize=5, linestyle=dashes, linewidth=2)
        slope = one["slopes"][main]
        words = f"{results['labels'][system]}\nslope {number(slope['slope'], 3, sign=True)}"
        if slope["low"] is not None:
            words += f" {bracket_text(slope['low'], slope['high'], 3)}"
        ends.append((rows[-1], float(value[-1]), words, color))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(rows[0] / 1.15, rows[-1] * 1.15)
    axes.set_xticks(rows, [short_number(value) for value in rows], fontsize=8.5)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: short_number(value, "kMGT"))
    style.axis_labels(axes, "rows of the datastore", unit)
    style.label_points(axes, ends, gap=27.0)


def _draw_quality(axes: Any, results: Results) -> None:
    quality = results["quality"]
    rows = np.asarray([one["rows"] for one in quality["sizes"]], np.float64)
    for name, label in quality["labels"].items():
        nats = [one["test_nats"][name] for one in quality["sizes"]]
        axes.plot(rows, nats, "o-", color=COLORS[name], linewidth=2, markersize=6, label=label)
        if name == "decoder":
            continue
        for place, one in zip(rows, quality["sizes"], strict=True):
            low, high = one["interval"][name]
            if low is not None:
                base = one["test_nats"]["decoder"]
                ends = [base + low, base + high]
                axes.plot([place, place], ends, color=COLORS[name], alpha=0.5, linewidth=2)
    axes.set_xscale("log", base=2)
    axes.set_xticks(rows, [short_number(value) for value in rows], fontsize=8.5)
    axes.minorticks_off()
    style.legend(axes)
    style.axis_labels(axes, "rows of the datastore", "test nats per token")
    style.title(
        axes,
        "Quality at fixed memory size",
        "a memory trained on each part; bars: interval of the difference to the decoder",
    )
