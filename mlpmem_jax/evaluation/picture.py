"""The results as a picture, drawn from the dictionary of `evaluate.json` alone."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlpmem_jax.evaluation.table import number

_COLORS = {"decoder": "#5b6470", "knn": "#c7782a", "memory": "#1f6f8b"}
_INK = "#22272e"
_GRID = "#d9dde2"


def draw(results: Mapping[str, Any]) -> bytes:
    """Draws test scores, the λ curves and the gain by document.

    Args:
        results: What `evaluate.json` holds.

    Returns:
        A PNG.
    """
    # Imported here, without pyplot: no display, no global state, and fast commands.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.15, 1.0, 1.0))
    for axes in (left, middle, right):
        _plain(axes)
    _draw_scores(left, results)
    _draw_weights(middle, results)
    _draw_documents(right, results)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9aa2ab")
    axes.tick_params(colors=_INK, labelsize=9, color="#9aa2ab")
    axes.grid(color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)


def _title(axes: Any, title: str, subtitle: str) -> None:
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=_INK, pad=20)
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=9, color="#5b6470")


def _draw_scores(axes: Any, results: Mapping[str, Any]) -> None:
    """Test nats of each system, with the interval of its difference to the decoder."""
    systems = results["systems"]
    reference = systems["decoder"]["test_nats"]
    axes.axvline(reference, color=_COLORS["decoder"], linewidth=1, linestyle=(0, (4, 3)))
    for height, (key, system) in enumerate(systems.items()):
        nats, color = system["test_nats"], _COLORS[key]
        axes.plot([reference, nats], [height, height], color=color, linewidth=5, alpha=0.25)
        low, high = system["difference_low"], system["difference_high"]
        if low is not None:
            ends = [reference + low, reference + high]
            axes.plot(ends, [height, height], color=color, linewidth=2.2)
            axes.plot(ends, [height, height], "|", color=color, markersize=12, markeredgewidth=2)
        axes.plot([nats], [height], "o", color=color, markersize=8)
        text = f"{system['label']}   {number(nats, 3)}"
        if key != "decoder":
            text += f"   ({number(system['difference_nats'], 3, sign=True)})"
        axes.annotate(
            text, (0.0, height), (2, 14), xycoords=("axes fraction", "data"),
            textcoords="offset points", fontsize=10, color=color, fontweight="bold",
        )  # fmt: skip
    axes.set_ylim(len(systems) - 0.55, -0.65)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.08)
    axes.set_xlabel("nats per token (lower is better)", fontsize=9.5, color=_INK)
    level = f"{100 * results['confidence']:g} %"
    _title(axes, "Test", f"bars: {level} interval of the paired difference, over documents")


def _draw_weights(axes: Any, results: Mapping[str, Any]) -> None:
    """Validation nats against λ, with the minimum of each curve."""
    weights = results["curves"]["interpolation"]
    for key in ("knn", "memory"):
        system = results["systems"][key]
        curve = [np.nan if nats is None else nats for nats in results["curves"][key]]
        axes.plot(weights, curve, color=_COLORS[key], linewidth=2, label=system["label"])
        axes.plot(
            [system["interpolation"]], [system["valid_nats"]], "o", color=_COLORS[key],
            markersize=7, markeredgecolor="white", zorder=5, clip_on=False,
        )  # fmt: skip
        axes.annotate(
            f"λ = {system['interpolation']:.2f}",
            (system["interpolation"], system["valid_nats"]),
            (0, -15),
            textcoords="offset points",
            ha=_alignment(system["interpolation"]),
            fontsize=9,
            color=_COLORS[key],
        )
    decoder = results["systems"]["decoder"]["valid_nats"]
    best = min(system["valid_nats"] for system in results["systems"].values())
    span = max(decoder - best, 1e-3)
    axes.axhline(decoder, color=_COLORS["decoder"], linewidth=1, linestyle=(0, (4, 3)))
    axes.set_ylim(best - 0.22 * span, decoder + 0.35 * span)
    axes.set_xlim(0, 1)
    axes.set_xlabel("weight λ of the kNN distribution or the memory", fontsize=9.5, color=_INK)
    axes.legend(frameon=False, fontsize=9, loc="upper center", labelcolor=_INK)
    _title(axes, "Validation", "nats per token while λ goes from the decoder (0) to 1")


def _alignment(weight: float) -> str:
    """Keeps the text of a point near the end of the axis inside."""
    if weight < 0.1:
        return "left"
    return "right" if weight > 0.9 else "center"


def _draw_documents(axes: Any, results: Mapping[str, Any]) -> None:
    """Each test document: what the memory gains against what the kNN-LM gains."""
    documents = results["documents"]
    tokens = np.asarray(documents["tokens"], np.float64)
    if not len(tokens):
        return
    base = np.asarray(documents["decoder"])
    knn = (base - np.asarray(documents["knn"])) / tokens
    memory = (base - np.asarray(documents["memory"])) / tokens
    area = 6 + 90 * tokens / tokens.max()
    axes.axhline(0, color="#9aa2ab", linewidth=0.8)
    axes.axvline(0, color="#9aa2ab", linewidth=0.8)
    axes.scatter(
        knn, memory, s=area, color=_COLORS["memory"], alpha=0.45, linewidth=0.4, edgecolor="white"
    )
    # A few tiny documents must not decide the scale.
    both = np.concatenate([knn, memory])
    low, high = np.quantile(both, [0.01, 0.99])
    margin = 0.08 * max(high - low, 1e-3)
    limits = (min(low, 0) - margin, max(high, 0) + margin)
    axes.set_xlim(limits)
    axes.set_ylim(limits)
    axes.plot(limits, limits, color=_INK, linewidth=0.8, linestyle=(0, (1, 2)))
    share = results["systems"]["memory"]["gain_recovered"]
    if share is not None:
        line = np.asarray(limits)
        axes.plot(line, share * line, color=_COLORS["knn"], linewidth=1.6)
        low_share = results["systems"]["memory"]["gain_recovered_low"]
        high_share = results["systems"]["memory"]["gain_recovered_high"]
        text = f"{100 * share:.0f} % of the gain recovered"
        if low_share is not None:
            text += f"\n[{100 * low_share:.0f}, {100 * high_share:.0f}]"
        axes.annotate(
            text, (0.04, 0.95), xycoords="axes fraction", va="top", fontsize=10,
            fontweight="bold", color=_COLORS["knn"],
        )  # fmt: skip
    axes.set_xlabel("gain of the kNN-LM, nats per token", fontsize=9.5, color=_INK)
    axes.set_ylabel("gain of the memory, nats per token", fontsize=9.5, color=_INK)
    _title(axes, "Test, document by document", "area: tokens; dotted: all of the gain recovered")
