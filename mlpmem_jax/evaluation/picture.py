"""The results as a picture, drawn from the dictionary of `evaluate.json` alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlpmem_jax.evaluation import style
from mlpmem_jax.evaluation.evaluate_table import JOINT_DECODER, rows_of
from mlpmem_jax.evaluation.style import COLORS
from mlpmem_jax.evaluation.table import level_text, number

_DECODERS = ("decoder", JOINT_DECODER)


def draw(results: Mapping[str, Any]) -> bytes:
    """Draws test scores, the λ curves and the gain by document.

    Returns:
        A PNG.
    """
    figure = style.new_figure(13.5, 4.6)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.15, 1.0, 1.0))
    for axes in (left, middle, right):
        style.plain(axes)
    rows = rows_of(results)
    reference = results["systems"]["decoder"]["test_nats"]
    draw_rows(left, rows, [COLORS[row["key"]] for row in rows], reference)
    style.title(left, "Test", f"bars: {level_text(results)} interval of the paired difference")
    _draw_weights(middle, results)
    _draw_documents(right, results)
    return style.as_png(figure)


def draw_rows(
    axes: Any, rows: Sequence[Mapping[str, Any]], colors: Sequence[str], reference: float
) -> None:
    """Draws test nats of rows: mean, every seed, interval of the difference to the decoder.

    Args:
        axes: Where.
        rows: As of `statistics.Table`.
        colors: Of each row.
        reference: Nats of the decoder.
    """
    axes.axvline(reference, color=COLORS["decoder"], linewidth=1, linestyle=style.DASHED)
    for height, (row, color) in enumerate(zip(rows, colors, strict=True)):
        nats = row["test_nats"]["value"]
        if nats is None:  # A label has no probability left.
            nats = np.nan
        axes.plot([reference, nats], [height, height], color=color, linewidth=6, alpha=0.16,
                  solid_capstyle="butt")  # fmt: skip
        difference = row.get("difference")
        if difference and difference["low"] is not None:
            ends = [reference + difference["low"], reference + difference["high"]]
            axes.plot(ends, [height, height], color=color, linewidth=2.2)
            axes.plot(ends, [height, height], "|", color=color, markersize=11, markeredgewidth=2)
        seeds = [one["test_nats"]["value"] for one in row["by_seed"].values()]
        if len(seeds) > 1:
            axes.plot(seeds, [height + 0.26] * len(seeds), "o", color=color, markersize=3.2,
                      alpha=0.75, markeredgewidth=0)  # fmt: skip
        axes.plot([nats], [height], "o", color=color, markersize=8, markeredgecolor="white")
        shown = number(difference["value"], 3, sign=True) if difference else ""
        axes.annotate(
            number(nats, 3), (1, height), (10, 0), xycoords=("axes fraction", "data"),
            textcoords="offset points", va="center", fontsize=10, color=color,
            fontweight="bold", annotation_clip=False,
        )  # fmt: skip
        axes.annotate(
            shown, (1, height), (52, 0), xycoords=("axes fraction", "data"),
            textcoords="offset points", va="center", fontsize=9.5, color=color,
            annotation_clip=False,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=10.5)
    for tick, color in zip(axes.get_yticklabels(), colors, strict=True):
        tick.set_color(color)
        tick.set_fontweight("bold")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.06)
    style.axis_labels(axes, "test nats per token (lower is better)")


def _draw_weights(axes: Any, results: Mapping[str, Any]) -> None:
    """Validation nats against λ, with the minimum of each curve."""
    weights = results["curves"]["interpolation"]
    for key in ("knn", "memory"):
        system = results["systems"][key]
        curve = [np.nan if nats is None else nats for nats in results["curves"][key]]
        axes.plot(weights, curve, color=COLORS[key], linewidth=2, label=system["label"])
        axes.plot(
            [system["interpolation"]], [system["valid_nats"]], "o", color=COLORS[key],
            markersize=7, markeredgecolor="white", zorder=5, clip_on=False,
        )  # fmt: skip
        axes.annotate(
            f"λ = {system['interpolation']:.2f}",
            (system["interpolation"], system["valid_nats"]),
            (0, -15),
            textcoords="offset points",
            ha=_alignment(system["interpolation"]),
            fontsize=9,
            color=COLORS[key],
        )
    systems = results["systems"]
    decoders = {key: systems[key]["valid_nats"] for key in _DECODERS if key in systems}
    best = min(system["valid_nats"] for system in systems.values())
    worst = max(decoders.values())
    span = max(worst - best, 1e-3)
    for key, nats in decoders.items():
        axes.axhline(nats, color=COLORS[key], linewidth=1, linestyle=style.DASHED)
    axes.set_ylim(best - 0.22 * span, worst + 0.35 * span)
    axes.set_xlim(0, 1)
    style.axis_labels(axes, "weight λ of the kNN distribution or the memory")
    style.legend(axes, size=9, place="upper center")
    each = "the decoder of each" if JOINT_DECODER in systems else "the decoder"
    style.title(axes, "Validation", f"nats per token; dashed: {each} (λ = 0)")


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
    base, knn, memory = (
        np.asarray(documents[name], np.float64) for name in ("decoder", "knn", "memory")
    )
    knn, memory = ((base - nats) / tokens for nats in (knn, memory))
    shown = np.isfinite(knn) & np.isfinite(memory)
    tokens, knn, memory = tokens[shown], knn[shown], memory[shown]
    if not len(tokens):
        return
    area = 6 + 90 * tokens / tokens.max()
    axes.axhline(0, color=style.LINE, linewidth=0.8)
    axes.axvline(0, color=style.LINE, linewidth=0.8)
    axes.scatter(
        knn, memory, s=area, color=COLORS["memory"], alpha=0.45, linewidth=0.4, edgecolor="white"
    )
    # A few tiny documents must not decide the scale.
    both = np.concatenate([knn, memory])
    low, high = np.quantile(both, [0.01, 0.99])
    margin = 0.08 * max(high - low, 1e-3)
    limits = (min(low, 0) - margin, max(high, 0) + margin)
    axes.set_xlim(limits)
    axes.set_ylim(limits)
    axes.plot(limits, limits, color=style.INK, linewidth=0.8, linestyle=(0, (1, 2)))
    share = results["systems"]["memory"]["gain_recovered"]
    if share is not None:
        line = np.asarray(limits)
        axes.plot(line, share * line, color=COLORS["memory"], linewidth=1.6)
        low_share = results["systems"]["memory"]["gain_recovered_low"]
        high_share = results["systems"]["memory"]["gain_recovered_high"]
        text = f"{100 * share:.0f} % of the gain recovered"
        if low_share is not None:
            text += f"\n[{100 * low_share:.0f}, {100 * high_share:.0f}]"
        axes.annotate(
            text, (0.04, 0.95), xycoords="axes fraction", va="top", fontsize=10,
            fontweight="bold", color=COLORS["memory"],
        )  # fmt: skip
    style.axis_labels(
        axes, "gain of the kNN-LM, nats per token", "gain of the memory, nats per token"
    )
    style.title(
        axes, "Test, document by document", "area: tokens; dotted: all of the gain recovered"
    )
