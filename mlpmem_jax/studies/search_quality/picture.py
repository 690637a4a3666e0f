"""What approximate search costs, drawn from the dictionary of `search-quality.json` alone."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlpmem_jax.evaluation import style
from mlpmem_jax.evaluation.style import COLORS
from mlpmem_jax.evaluation.table import level_text
from mlpmem_jax.studies.search_quality.table import LABELS

Results = Mapping[str, Any]


def draw(results: Results) -> bytes:
    """Draws nats against recall and against KL, and speed against recall; returns a PNG."""
    figure = style.new_figure(15.0, 5.0)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.25, 1.0, 0.9))
    for axes in (left, middle, right):
        style.plain(axes)
    _draw_nats(left, results)
    _draw_loss(middle, results)
    _draw_speed(right, results)
    return style.as_png(figure)


def _draw_nats(axes: Any, results: Results) -> None:
    """Test nats of kNN-LM and memory against recall; intervals of the paired difference."""
    decoder = results["decoder_test_nats"]
    axes.axhline(decoder, color=COLORS["decoder"], linewidth=1, linestyle=style.DASHED)
    axes.annotate(
        "decoder", (0.01, decoder), (0, 4), xycoords=("axes fraction", "data"),
        textcoords="offset points", fontsize=9, color=style.QUIET,
    )  # fmt: skip
    ordered = sorted(results["settings"], key=lambda one: one["recall"])
    recall = [one["recall"] for one in ordered]
    for system, label in LABELS.items():
        nats = [one[system]["test_nats"] for one in ordered]
        axes.plot(recall, nats, "o-", color=COLORS[system], linewidth=2, markersize=7, label=label)
        for place, one in zip(recall, ordered, strict=True):
            against = one[system]["against_decoder"]
            if against["low"] is not None:
                ends = [decoder + against["low"], decoder + against["high"]]
                axes.plot([place, place], ends, color=COLORS[system], linewidth=2, alpha=0.35)
    _recall_axis(axes)
    style.legend(axes)
    style.axis_labels(axes, f"recall@{results['num_neighbors']}", "test nats per token")
    level = level_text(results)
    style.title(axes, "What it costs", f"bars: {level} interval of the difference to the decoder")


def _draw_loss(axes: Any, results: Results) -> None:
    """What is lost against exact search, by how far the distributions are from exact ones."""
    ordered = sorted(results["settings"], key=lambda one: one["skew_kl"])
    axes.axhline(0, color=style.QUIET, linewidth=0.8)
    for offset, (system, label) in zip((-1, 1), LABELS.items(), strict=True):
        for number_, one in enumerate(ordered):
            against = one[system]["against_exact"]
            if against is None:
                continue
            place = number_ + 0.12 * offset
            if against["low"] is not None:
                ends = [against["low"], against["high"]]
                axes.plot([place, place], ends, color=COLORS[system], linewidth=2.2, alpha=0.5)
            axes.plot(
                [place], [against["nats"]], "o", color=COLORS[system], markersize=7,
                label=label if number_ == 0 else None,
            )  # fmt: skip
    names = [f"{one['name']}\n{one['recall']:.3f}\n{one['skew_kl']:.3f}" for one in ordered]
    axes.set_xticks(np.arange(len(ordered)), names, fontsize=8.3)
    axes.set_xlim(-0.5, len(ordered) - 0.5)
    axes.grid(visible=False, axis="x")
    style.axis_labels(
        axes,
        "setting, its recall, KL from the exact distribution (nats)",
        "test nats per token, above exact search",
    )
    style.title(
        axes, "Against exact search", "bars: interval of the difference, paired over documents"
    )


def _draw_speed(axes: Any, results: Results) -> None:
    ordered = sorted(results["settings"], key=lambda one: one["recall"])
    for number_, one in enumerate(ordered):
        if not one["queries_per_sec"]:
            continue
        color = COLORS[one["engine"]]
        axes.plot([one["recall"]], [one["queries_per_sec"]], "o", color=color, markersize=8)
        axes.annotate(
            one["name"], (one["recall"], one["queries_per_sec"]), (0, -16 if number_ % 2 else 9),
            textcoords="offset points", ha="right" if one["recall"] > 0.9 else "center",
            fontsize=9, color=color,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.margins(y=0.15)
    _recall_axis(axes)
    style.axis_labels(axes, f"recall@{results['num_neighbors']}", "queries per second")
    style.title(axes, "What it saves", "search of every training row")


def _recall_axis(axes: Any) -> None:
    low, _ = axes.get_xlim()
    span = 1 - max(0.0, low)
    axes.set_xlim(1 - 1.08 * span, 1 + 0.04 * span)
