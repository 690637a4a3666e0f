"""The main table as a picture, drawn from what its files hold."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlpmem_jax.evaluation import style
from mlpmem_jax.evaluation.lines import seeds_text
from mlpmem_jax.evaluation.picture import draw_rows
from mlpmem_jax.evaluation.style import COLORS
from mlpmem_jax.evaluation.table import level_text
from mlpmem_jax.studies.tables.report import mean_cost

Results = Mapping[str, Any]

# Families of rows, by the kinds of their parts.
_COLORS = {
    **COLORS,
    "ensemble": "#8a6d3b",
    "memory and knn": "#6b4f9e",
    "joint": "#3d7d44",
}


def color_of(row: Results) -> str:
    """Returns the colour of a row's family."""
    kinds = [part.split("-")[0] for part in row["parts"]]
    if "joint" in kinds:
        return _COLORS["joint"]
    if "memory" in kinds or "mixture" in kinds:
        return _COLORS["memory and knn" if "knn" in kinds else "memory"]
    if "knn" in kinds:
        return _COLORS["knn"]
    return _COLORS["ensemble" if len(kinds) > 1 else "decoder"]


def draw(results: Results, measured: Results) -> bytes:
    """Draws test nats of each row, and what they cost.

    Returns:
        A PNG.
    """
    rows = [row for row in results["rows"] if row["test_nats"]["value"] is not None]
    figure = style.wide_figure(14.5, 2.0 + 0.5 * len(rows))
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1.0))
    for axes in (left, right):
        style.plain(axes)
    decoder = next(row for row in rows if row["key"] == results["reference"])
    reference = decoder["test_nats"]["value"]
    draw_rows(left, rows, [color_of(row) for row in rows], reference)
    several = "; dots: seeds" if len(results["seeds"]) > 1 else ""
    about = f"bars: {level_text(results)} interval of the difference to the decoder{several}"
    style.wide_title(left, f"Test, {seeds_text(results)}", about)
    _draw_costs(right, rows, measured, reference)
    return style.as_png(figure)


def _draw_costs(axes: Any, rows: Sequence[Results], measured: Results, reference: float) -> None:
    """Test nats against all that a row cost to make; area: parameters."""
    costs = [mean_cost(measured, row["key"]) for row in rows]
    largest = max(cost["parameters"] for cost in costs)
    # A logarithmic axis has no zero: an imported decoder stands at its left edge.
    least = min((cost["flops"] for cost in costs if cost["flops"] > 0), default=1.0)
    points = []
    for row, cost in zip(rows, costs, strict=True):
        nats, color = row["test_nats"]["value"], color_of(row)
        area = 25 + 150 * cost["parameters"] / largest
        flops, marker = (cost["flops"], "o") if cost["flops"] > 0 else (least / 2, "<")
        axes.scatter([flops], [nats], s=area, color=color, alpha=0.85, linewidth=0.8,
                     edgecolor="white", zorder=4, marker=marker)  # fmt: skip
        points.append((flops, nats, row["label"], color))
    flops = [point[0] for point in points]
    _log_ticks(axes, max(flops) / min(flops))
    axes.set_xlim(min(flops) / 1.2, max(flops) * 1.2)
    axes.margins(y=0.08)
    axes.axhline(reference, color=_COLORS["decoder"], linewidth=1, linestyle=style.DASHED, zorder=1)
    flops_label = "training flops, teacher, embedding and search included"
    style.axis_labels(axes, flops_label, "test nats per token")
    about = "area: parameters used at inference; a kNN-LM keeps its datastore besides"
    if any(cost["flops"] == 0 for cost in costs):
        about = "area: parameters used at inference; triangle: imported, trained elsewhere"
    style.wide_title(axes, "What it costs", about)
    style.label_points(axes, points)


def _log_ticks(axes: Any, ratio: float) -> None:
    """Makes the horizontal axis logarithmic, with ticks that do not touch."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if ratio < 30 else (1.0,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}".replace("+", "")))
