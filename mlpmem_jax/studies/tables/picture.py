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
    several = "; dots below: each seed" if len(results["seeds"]) > 1 else ""
    about = f"bars: {level_text(results)} interval of the paired difference to the decoder{several}"
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
    axes.figure.draw_without_rendering()
    _label_points(axes, points)


def _log_ticks(axes: Any, ratio: float) -> None:
    """Makes the horizontal axis logarithmic, with ticks that do not touch."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if ratio < 30 else (1.0,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}".replace("+", "")))


def _label_points(
    axes: Any, points: Sequence[tuple[float, float, str, str]], gap: float = 14.0
) -> None:
    """Writes the labels beside the axes, each at the height of its point or near it.

    Args:
        axes: Where, its limits final.
        points: x, y, label and color of each.
        gap: Least distance of two labels, in points.
    """
    scale = 72.0 / axes.figure.dpi
    low, high = (edge * scale for edge in axes.get_window_extent().intervaly)
    heights = [y * scale for _, y in axes.transData.transform([(x, y) for x, y, *_ in points])]
    for (x, y, label, color), height in zip(points, _apart(heights, gap, low, high), strict=True):
        axes.annotate(
            label, (x, y), (1.04, (height - low) / (high - low)), textcoords="axes fraction",
            va="center", fontsize=9, color=color, annotation_clip=False, zorder=3,
            arrowprops={
                "arrowstyle": "-", "color": color, "linewidth": 0.6, "alpha": 0.5,
                "relpos": (0, 0.5), "shrinkA": 2, "shrinkB": 4,
            },
        )  # fmt: skip


def _apart(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Moves heights apart until neighbours have a gap, as little as that takes.

    Args:
        heights: What is wanted.
        gap: Least distance.
        low: Where none may lie below, if they all fit.
        high: Where none may lie above, if they all fit.
    """
    order = sorted(range(len(heights)), key=lambda place: heights[place])
    # Groups of neighbours that touch share one shift: the mean of what each would want.
    groups: list[list[int]] = []
    for place in order:
        groups.append([place])
        while len(groups) > 1 and _start(groups[-1], heights, gap, low, high) < (
            _start(groups[-2], heights, gap, low, high) + gap * len(groups[-2])
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    moved = list(heights)
    for group in groups:
        start = _start(group, heights, gap, low, high)
        for step, place in enumerate(group):
            moved[place] = start + gap * step
    return moved


def _start(
    group: Sequence[int], heights: Sequence[float], gap: float, low: float, high: float
) -> float:
    """Returns the height of the lowest of a group whose members are a gap apart."""
    start = sum(heights[place] - gap * step for step, place in enumerate(group)) / len(group)
    return max(low, min(start, high - gap * (len(group) - 1)))
