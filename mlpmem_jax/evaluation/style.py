"""How pictures look, and how they become PNGs. The commands' pictures share it."""

import io
from collections.abc import Sequence
from typing import Any

COLORS = {
    "decoder": "#5b6470",
    "knn": "#c7782a",
    "memory": "#1f6f8b",
    "mixture": "#7d4f9e",
    "joint_decoder": "#7a8c3c",
    "exact": "#c7782a",  # the kNN-LM's engine, unless said otherwise
    "scann": "#a33b3b",
}
INK = "#22272e"
QUIET = "#5b6470"
LINE = "#9aa2ab"
GRID = "#d9dde2"
# Of lines that others are held against.
DASHED = (0, (4, 3))


def new_figure(width: float, height: float, **paddings: Any) -> Any:
    """Returns a figure (inches) without pyplot: no display, no global state.

    Args:
        paddings: What matplotlib's constrained layout keeps free (w_pad, h_pad, wspace).
    """
    # Imported here: commands that draw nothing start faster.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(**paddings)
    figure = Figure(figsize=(width, height), dpi=150, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def wide_figure(width: float, height: float) -> Any:
    """Returns a figure with room between its columns."""
    return new_figure(width, height, w_pad=0.12, h_pad=0.08, wspace=0.03)


def as_png(figure: Any) -> bytes:
    """Returns a figure as PNG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def plain(axes: Any) -> None:
    """Gives axes the common look."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.tick_params(colors=INK, labelsize=9, color=LINE, which="both")
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)


def title(axes: Any, text: str, subtitle: str) -> None:
    """Writes a title and, smaller, what is shown."""
    _heading(axes, text, size=11.5, pad=20)
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=9, color=QUIET)


def wide_title(axes: Any, text: str, subtitle: str) -> None:
    """Does as `title`; the subtitle is as far from the axes however high they are."""
    _heading(axes, text, size=12, pad=22)
    axes.annotate(
        subtitle, (0, 1), (0, 7), xycoords="axes fraction", textcoords="offset points",
        fontsize=9, color=QUIET,
    )  # fmt: skip


def _heading(axes: Any, text: str, size: float, pad: float) -> None:
    axes.set_title(text, loc="left", fontsize=size, fontweight="bold", color=INK, pad=pad)


def axis_labels(axes: Any, x: str = "", y: str = "") -> None:
    """Names the axes."""
    axes.set_xlabel(x, fontsize=9.5, color=INK)
    axes.set_ylabel(y, fontsize=9.5, color=INK)


def legend(axes: Any, size: float = 9.5, place: str = "best") -> None:
    """Explains the lines that have a label."""
    axes.legend(frameon=False, fontsize=size, loc=place, labelcolor=INK)


def halo() -> list[Any]:
    """Returns a white rim for text that lies on lines."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=3, foreground="white")]


def label_points(
    axes: Any, points: Sequence[tuple[float, float, str, str]], gap: float = 14.0
) -> None:
    """Writes labels beside axes whose limits are final, each at the height of its point or near.

    Args:
        axes: Where.
        points: x, y, label and color of each.
        gap: Least distance of two labels, in points.
    """
    axes.figure.draw_without_rendering()
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
