"""Test nats by epoch: best epoch, what is lost after it; text, CSV and picture."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlpmem_jax.evaluation import style
from mlpmem_jax.evaluation.draws import Family
from mlpmem_jax.evaluation.lines import (
    VERDICT_COLUMNS,
    correction_note,
    interval_columns,
    score_columns,
    weights_cell,
)
from mlpmem_jax.evaluation.style import COLORS
from mlpmem_jax.evaluation.table import (
    DASH,
    bracket_text,
    csv_text,
    level_text,
    note_lines,
    number,
    paragraph,
    render,
)

Results = Mapping[str, Any]

LABELS = {
    "decoder": "decoder trained on",
    "memory": "decoder + memory",
    "memory_alone": "memory alone",
}
_COLORS = {**COLORS, "memory_alone": "#7fb0c2"}
_COLUMNS = (
    "network", "epoch", "step", "seed", "test_nats", "test_low", "test_high", "valid_nats",
    "weight", "after_best", "after_best_low", "after_best_high",
)  # fmt: skip


def row_key(network: str, epoch: int) -> str:
    """Returns the key of the row of one network after one epoch."""
    return f"{network}_epoch_{epoch:03d}"


def by_epoch(results: Results, steps: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Orders the rows of a table by network and epoch, and finds the best.

    Args:
        results: What `statistics.summarise` returned for rows named by `row_key`.
        steps: For each network, the step at the end of each epoch.

    Returns:
        For each network its epochs; the best, chosen on validation (mean over seeds), beside
        the one that test would choose; and how many test nats the last has more than the best,
        with the paired interval.
    """
    rows = {row["key"]: row for row in results["rows"]}
    pairs = {(pair["row"], pair["against"]): pair for pair in results["pairs"]}
    chosen_epochs = best_epochs(results["rows"], steps, "valid")
    on_test = best_epochs(results["rows"], steps, "test")
    networks = {}
    for network, ends in steps.items():
        epochs = [
            {"epoch": epoch, "step": step, **_of_row(rows[row_key(network, epoch)])}
            for epoch, step in enumerate(ends, 1)
        ]
        last, chosen = len(epochs), chosen_epochs[network]
        lost = pairs.get((row_key(network, last), row_key(network, chosen)))
        for one in epochs:
            one["after_best"] = _difference(pairs, network, one["epoch"], chosen)
        networks[network] = {
            "label": LABELS[network],
            "epochs": epochs,
            "best_epoch": chosen,
            "best_epoch_on_test": on_test[network],
            "lost_after_best": lost
            and {k: lost[k] for k in ("value", "low", "high", *VERDICT_COLUMNS)},
        }
    return networks


def best_epochs(
    rows: Sequence[Results], steps: Mapping[str, Sequence[int]], split: str
) -> dict[str, int]:
    """Returns the epoch, from 1, at which each network has the fewest nats on a split."""
    nats = {row["key"]: row[f"{split}_nats"]["value"] for row in rows}
    return {
        network: min(
            range(1, len(ends) + 1),
            key=lambda epoch: (_or_inf(nats[row_key(network, epoch)]), epoch),
        )
        for network, ends in steps.items()
    }


def _or_inf(value: float | None) -> float:
    return math.inf if value is None else value


def last_against_best(steps: Mapping[str, Sequence[int]]) -> Family:
    """Returns the pairs that are compared: each network's last epoch and its best."""

    def family(rows: Sequence[Results]) -> set[tuple[str, str]]:
        best = best_epochs(rows, steps, "valid")
        return {
            (row_key(network, len(ends)), row_key(network, best[network]))
            for network, ends in steps.items()
            if best[network] < len(ends)
        }

    return family


def _of_row(row: Results) -> dict[str, Any]:
    names = ("test_nats", "valid_nats", "weights", "spread", "by_seed")
    return {name: row[name] for name in names}


def _difference(
    pairs: Mapping[tuple[str, str], Results], network: str, epoch: int, best: int
) -> dict[str, Any]:
    """Returns how many nats more an epoch has than the best one, with its interval."""
    if epoch == best:
        return {"value": 0.0, "low": 0.0, "high": 0.0}
    this, that = row_key(network, epoch), row_key(network, best)
    if (this, that) in pairs:
        pair = pairs[this, that]
        return {name: pair[name] for name in ("value", "low", "high")}
    pair = pairs[that, this]
    swapped = {"value": pair["value"], "low": pair["high"], "high": pair["low"]}
    return {name: None if value is None else -value for name, value in swapped.items()}


def as_text(results: Results) -> str:
    """Returns the table for the terminal, and one sentence a network."""
    level = level_text(results)
    blocks = []
    for network in results["networks"].values():
        rows = [
            [
                f"epoch {one['epoch']}",
                f"{one['step']:,}",
                number(one["test_nats"]["value"], 3),
                bracket_text(one["test_nats"]["low"], one["test_nats"]["high"], 3),
                number(one["after_best"]["value"], 3, sign=True),
                bracket_text(one["after_best"]["low"], one["after_best"]["high"], 3),
                number(one["valid_nats"]["value"], 3),
                weights_cell(one["weights"]) or DASH,
            ]
            for one in network["epochs"]
        ]
        header = [
            network["label"], "step", "test\nnats", f"{level}\ninterval", "against\nbest",
            f"{level}\ninterval", "valid\nnats", "weight\nλ*",
        ]  # fmt: skip
        blocks += [render(header, rows), *paragraph(sentence(network, level)), ""]
    networks = results["networks"].values()
    compared = sum(network["best_epoch"] < len(network["epochs"]) for network in networks)
    said = [correction_note(compared, level)] if compared else []
    return "\n".join([*blocks, *note_lines([*results["notes"], *said])])


def sentence(network: Results, level: str) -> str:
    """Says when a network is best and what is lost after that."""
    best, last = network["best_epoch"], len(network["epochs"])
    label = network["label"]
    if best == last:
        return (
            f"{label}: best on validation after the last epoch ({last}; test would choose "
            f"{network['best_epoch_on_test']}): no overfitting within {last} epochs."
        )
    lost = network["lost_after_best"]
    interval = bracket_text(lost["low"], lost["high"], 3)
    sure = "" if lost["significant"] else ", not significant"
    return (
        f"{label}: best on validation after epoch {best} of {last} (test would choose "
        f"{network['best_epoch_on_test']}); {number(lost['value'], 3)} test nats are lost after it "
        f"({level} interval {interval}{sure})."
    )


def as_csv(results: Results) -> str:
    """Returns one line a network, epoch and seed, and one for the mean (seed "mean")."""
    return csv_text(_COLUMNS, _csv_lines(results))


def _csv_lines(results: Results) -> Iterator[dict[str, Any]]:
    for name, network in results["networks"].items():
        for one in network["epochs"]:
            start = {"network": name, "epoch": one["epoch"], "step": one["step"]}
            after_best = interval_columns("after_best", one["after_best"])
            yield start | score_columns("mean", one) | after_best
            for seed, found in one["by_seed"].items():
                yield start | score_columns(seed, found)


def draw(results: Results) -> bytes:
    """Draws test nats by epoch, and what is lost against the best; returns a PNG."""
    figure = style.wide_figure(13.0, 4.8)
    left, right = figure.subplots(1, 2)
    level = level_text(results)
    for axes in (left, right):
        style.plain(axes)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for name, network in results["networks"].items():
        color = _COLORS[name]
        epochs = [one["epoch"] for one in network["epochs"]]
        for seed in results["seeds"] if len(results["seeds"]) > 1 else ():
            each = [one["by_seed"][str(seed)]["test_nats"]["value"] for one in network["epochs"]]
            left.plot(epochs, each, color=color, linewidth=0.8, alpha=0.4)
        nats = [one["test_nats"]["value"] for one in network["epochs"]]
        valid = [one["valid_nats"]["value"] for one in network["epochs"]]
        left.plot(epochs, nats, "o-", color=color, linewidth=2, markersize=5,
                  markeredgecolor="white", label=network["label"])  # fmt: skip
        left.plot(epochs, valid, color=color, linewidth=1.1, linestyle=(0, (3, 2)))
        best = network["best_epoch"] - 1
        left.plot([epochs[best]], [nats[best]], "o", color="none", markersize=13,
                  markeredgecolor=color, markeredgewidth=1.5)  # fmt: skip
        _draw_loss(right, network, epochs, color)
    reference = results["reference_nats"]
    left.axhline(reference, color=style.INK, linewidth=0.9, linestyle=(0, (1, 2)),
                 label="decoder as configured")  # fmt: skip
    style.legend(left, size=8.5)
    right.axhline(0, color=style.LINE, linewidth=0.8)
    epochs_label = "epochs over the training text"
    style.axis_labels(left, epochs_label, "nats per token")
    style.axis_labels(right, epochs_label, "test nats above the epoch that validation chooses")
    about = "dashed: validation; rings: the epoch that validation chooses"
    style.wide_title(left, "Test and validation by epoch", about)
    about = f"band: {level} interval of the paired difference"
    style.wide_title(right, "What is lost", about)
    return style.as_png(figure)


def _draw_loss(axes: Any, network: Results, epochs: Sequence[int], color: str) -> None:
    after = [one["after_best"] for one in network["epochs"]]
    axes.plot(epochs, [one["value"] for one in after], "o-", color=color, linewidth=2,
              markersize=5, markeredgecolor="white", label=network["label"])  # fmt: skip
    if all(one["low"] is not None for one in after):
        low, high = ([one[end] for one in after] for end in ("low", "high"))
        axes.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)
    style.legend(axes, size=8.5)
