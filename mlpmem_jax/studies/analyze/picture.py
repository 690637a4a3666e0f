"""The analysis as a picture, drawn from the dictionary of `analyze.json` alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlpmem_jax.evaluation import style
from mlpmem_jax.evaluation.style import COLORS
from mlpmem_jax.evaluation.table import level_text, number
from mlpmem_jax.studies.analyze.table import NAMES

Results = Mapping[str, Any]
_OFFSET = 0.13


def draw(results: Results) -> bytes:
    """Draws gains by frequency and by n-gram, and the sharpness; returns a PNG."""
    figure = style.new_figure(14.5, 9.2)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.35, 1.0), hspace=0.08, wspace=0.06)
    places = [figure.add_subplot(grid[row, column]) for row in range(2) for column in range(2)]
    for axes in places:
        style.plain(axes)
    _draw_frequency(places[0], results)
    _draw_ngrams(places[1], results)
    _draw_mass(places[2], results)
    _draw_agreement(places[3], results)
    return style.as_png(figure)


def _draw_gains(axes: Any, groups: Sequence[Results], results: Results) -> None:
    """Gains with their intervals, one place on the x axis for each group."""
    for sign, (system, label) in zip((-1, 1), results["labels"].items(), strict=True):
        place = np.arange(len(groups)) + sign * _OFFSET
        color = COLORS[system]
        gain = [_value(group[system]["gain"]) for group in groups]
        low = [_value(group[system]["gain_low"]) for group in groups]
        high = [_value(group[system]["gain_high"]) for group in groups]
        axes.vlines(place, low, high, color=color, linewidth=2.2, alpha=0.55)
        axes.plot(place, gain, "o", color=color, markersize=7, label=label, zorder=3)
    axes.axhline(0, color=COLORS["decoder"], linewidth=1, linestyle=style.DASHED)
    # A bin of a few tokens must not decide the scale.
    shown: list[float] = [
        group[system][key]
        for group in groups
        for system in results["labels"]
        for key in ("gain", "gain_low", "gain_high")
        if group["token_share"] > 0.002 and group[system][key] is not None
    ]
    bottom, top = min([0.0, *shown]), max([0.0, *shown])
    margin = 0.12 * max(top - bottom, 1e-3)
    axes.set_ylim(bottom - margin, top + 1.6 * margin)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.grid(visible=False, axis="x")


def _draw_frequency(axes: Any, results: Results) -> None:
    groups = [group for group in results["frequency"] if group["tokens"]]
    _draw_gains(axes, groups, results)
    _draw_shares(axes, [group["token_share"] for group in groups])
    names = [
        f"{group['label'].replace('–', '–' + chr(10))}\n{100 * group['token_share']:.1f} %"
        for group in groups
    ]
    axes.set_xticks(range(len(groups)), names, fontsize=8.5)
    style.legend(axes, place="upper right")
    style.axis_labels(
        axes,
        "times that the label token occurs in the training text, and share of test tokens",
        "gain over the decoder, nats per token",
    )
    level = level_text(results)
    about = f"bars: {level} interval over documents; bins under 0.2 % may lie outside"
    style.title(axes, "By frequency of the token", about)


def _draw_shares(axes: Any, shares: Sequence[float]) -> None:
    """Grey columns at the bottom: how many of the test tokens a group holds."""
    behind = axes.twinx()
    behind.bar(range(len(shares)), shares, width=0.8, color="#eceff2", zorder=0)
    behind.set_ylim(0, 3.2 * max([*shares, 1e-9]))
    behind.set_axis_off()
    axes.set_zorder(behind.get_zorder() + 1)
    axes.patch.set_visible(False)


def _draw_ngrams(axes: Any, results: Results) -> None:
    groups, names = [], []
    for one in results["ngrams"]:
        for group in reversed(one["groups"]):
            groups.append(group)
            names.append(f"{one['n']}-gram\n{group['label']}\n{100 * group['token_share']:.0f} %")
    if not groups:
        axes.set_axis_off()
        return
    _draw_gains(axes, groups, results)
    _draw_shares(axes, [group["token_share"] for group in groups])
    for place in range(2, len(groups), 2):
        axes.axvline(place - 0.5, color=style.LINE, linewidth=0.7, linestyle=(0, (1, 2)))
    axes.set_xticks(range(len(groups)), names, fontsize=8.5)
    style.axis_labels(axes, "", "gain over the decoder, nats per token")
    style.title(
        axes,
        "By whether context and label were seen",
        "n-gram: the n tokens that end with the label; seen: in the training text",
    )


def _draw_mass(axes: Any, results: Results) -> None:
    sharp = results["sharpness"]
    steps = np.asarray(sharp["steps"], np.float64)
    for system, one in sharp["systems"].items():
        mass = [_value(value) for value in one["mean_mass"]]
        # The mixture may lie on one of its parts (λ = 0 or 1): both stay visible.
        dashes = (0, (2, 2)) if system == "mixture" else "solid"
        axes.plot(steps, mass, color=COLORS[system], linewidth=2.2, linestyle=dashes)
    axes.set_xscale("log")
    axes.set_xlim(1, steps[-1])
    axes.set_ylim(0, 1.02)
    for mass in sharp["masses"]:
        axes.axhline(mass, color=style.LINE, linewidth=0.5, linestyle=(0, (1, 3)))
    lines = [f"mean tokens for {' / '.join(f'{100 * mass:g}' for mass in sharp['masses'])} %"]
    lines += [
        f"{NAMES[system]}: {' / '.join(map(_short, one['mean_tokens']))}"
        for system, one in sharp["systems"].items()
    ]
    colors = [style.QUIET, *(COLORS[system] for system in sharp["systems"])]
    for row, (line, color) in enumerate(zip(reversed(lines), reversed(colors), strict=True)):
        axes.annotate(
            line, (0.985, 0.05 + 0.065 * row), xycoords="axes fraction", ha="right",
            fontsize=9, color=color, fontweight="normal" if color == style.QUIET else "bold",
        )  # fmt: skip
    style.axis_labels(axes, "most probable tokens", "mean probability that they hold")
    style.title(axes, "How sharp the distributions are", f"mean over {sharp['rows']:,} test tokens")


def _draw_agreement(axes: Any, results: Results) -> None:
    """Top-1 agreement as bars; KL from the kNN distribution in words beside the names."""
    systems = results["sharpness"]["systems"]
    height = 0.36
    names = list(systems)
    for place, system in enumerate(names):
        one, color = systems[system], COLORS[system]
        bars = [("label_top1", -0.5, 1.0, "the label")]
        if system != "knn":
            bars.append(("knn_top1", 0.5, 0.45, "kNN's first"))
        for key, side, alpha, words in bars:
            value, y = one[key], place + side * height
            axes.barh(y, value, height * 0.92, color=color, alpha=alpha)
            if one[f"{key}_low"] is not None:
                axes.hlines(
                    y, one[f"{key}_low"], one[f"{key}_high"], color=style.INK, linewidth=1.4
                )
            end = max(value, one[f"{key}_high"] or 0)
            axes.annotate(
                f"{words} {100 * value:.1f} %", (end, y), (5, 0), textcoords="offset points",
                va="center", fontsize=9, color=style.INK,
            )  # fmt: skip
    labels = []
    for system in names:
        distance = systems[system]["kl_from_knn"]
        words = "" if system == "knn" or distance is None else f"\nKL from kNN {distance:.2f}"
        labels.append(NAMES[system] + words)
    axes.set_yticks(range(len(names)), labels, fontsize=9)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_xlim(0, 1.05)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    style.title(
        axes,
        "What the first choice agrees with",
        "share of test tokens; KL(kNN ‖ distribution) in nats, over all neighbours",
    )


def _short(count: float | None) -> str:
    return number(count, 0 if count is not None and count >= 100 else 1)


def _value(value: float | None) -> float:
    return float("nan") if value is None else float(value)
