"""How pictures look, and how they become PNGs. The commands' pictures share it."""

import io
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
        width: Of the figure.
        height: Of the figure.
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
