"""Sweeps of one key each: tables as text and CSV, and a picture for each sweep."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlpmem_jax.evaluation import style
from mlpmem_jax.evaluation.lines import (
    NOTHING,
    VERDICT_COLUMNS,
    correction_note,
    interval_columns,
    score_columns,
    seeds_cell,
    weights_cell,
)
from mlpmem_jax.evaluation.style import COLORS
from mlpmem_jax.evaluation.table import (
    bracket_text,
    count_text,
    csv_text,
    level_text,
    note_lines,
    number,
    render,
)
from mlpmem_jax.studies.tables.report import mean_cost

Results = Mapping[str, Any]

CONFIGURED = "configured"
_COLOR = COLORS["memory"]
# Values this far apart are drawn on a logarithmic axis.
_LOG_RATIO = 8.0
_COLUMNS = (
    "sweep", "key", "role", "row", "value", "seed", "test_nats", "test_low", "test_high",
    "test_min", "test_max", "test_std", "difference", "difference_low", "difference_high",
    "significant", "significant_alone", "corrected_low", "corrected_high", "corrected_p",
    "valid_nats", "weight", "parameters", "flops", "seconds",
)  # fmt: skip


def value_text(value: Any) -> str:
    """Returns a value of a key as it is written in an override."""
    return "null" if value is None else str(value)


def sweep_results(results: Results, points: Sequence[tuple[Any, str]]) -> dict[str, Any]:
    """Orders the rows of one sweep by value.

    Args:
        results: What `statistics.summarise` returned, the configured model its reference.
        points: Each value and the key of its row.

    Returns:
        The points, the configured model, and the decoder alone.
    """
    rows = {row["key"]: row for row in results["rows"]}
    pairs = {(pair["row"], pair["against"]): pair for pair in results["pairs"]}
    names = ("test_nats", "valid_nats", "weights", "spread", "difference", "by_seed")

    def of(key: str) -> dict[str, Any]:
        row = rows[key]
        found = {name: row[name] for name in names if name in row}
        pair = pairs.get((key, CONFIGURED), {})
        return {"row": key, **found, **{name: pair.get(name) for name in VERDICT_COLUMNS}}

    return {
        "points": [{"value": value, **of(key)} for value, key in points],
        "configured": of(CONFIGURED),
        "decoder": of("decoder"),
        "notes": results["notes"],
    }


def against_configured(rows: Sequence[Results]) -> set[tuple[str, str]]:
    """Returns the pairs that are compared: each value against the configured one."""
    others = {row["key"] for row in rows} - {CONFIGURED, "decoder"}
    return {(key, CONFIGURED) for key in others}


def as_text(results: Results, measured: Results) -> str:
    """Returns a table a sweep."""
    level = level_text(results)
    blocks = []
    for place, sweep in enumerate(results["sweeps"]):
        costs = measured["sweeps"][place]
        header = [
            sweep["title"], "test\nnats", f"{level}\ninterval", "over\nseeds",
            "against\nconfigured", f"{level}\ninterval", "valid\nnats", "weight\nλ*",
            "para-\nmeters", "training\nflops",
        ]  # fmt: skip
        blocks.append(render(header, [_cells(point, costs) for point in sweep["points"]]))
        configured, decoder = sweep["configured"]["test_nats"], sweep["decoder"]["test_nats"]
        blocks.append(
            f"as configured {number(configured['value'], 3)}, its decoder alone "
            f"{number(decoder['value'], 3)}; * not significant against the configured one"
        )
        blocks.append("")
    notes = dict.fromkeys(note for sweep in results["sweeps"] for note in sweep["notes"])
    compared = sum(len(sweep["points"]) for sweep in results["sweeps"])
    return "\n".join([*blocks, *note_lines([*notes, correction_note(compared, level)])])


def _cells(point: Results, costs: Results) -> list[str]:
    nats, difference = point["test_nats"], point["difference"]
    cost = mean_cost(costs, point["row"])
    mark = "" if point["significant"] or difference["value"] == 0 else " *"
    return [
        value_text(point["value"]),
        number(nats["value"], 3),
        bracket_text(nats["low"], nats["high"], 3),
        seeds_cell(point),
        number(difference["value"], 3, sign=True) + mark,
        bracket_text(difference["low"], difference["high"], 3),
        number(point["valid_nats"]["value"], 3),
        weights_cell(point["weights"]),
        count_text(cost["parameters"]),
        f"{cost['flops']:.3g}",
    ]


def as_csv(results: Results, measured: Results) -> str:
    """Returns one line a sweep, value and seed, and one for the mean (seed "mean")."""
    return csv_text(_COLUMNS, _csv_lines(results, measured))


def _csv_lines(results: Results, measured: Results) -> Iterator[dict[str, Any]]:
    for place, sweep in enumerate(results["sweeps"]):
        for point in (sweep["decoder"], sweep["configured"], *sweep["points"]):
            cost = mean_cost(measured["sweeps"][place], point["row"])
            start = {"sweep": place, "key": sweep["key"], "role": sweep["role"]}
            start["row"] = point["row"]
            start["value"] = value_text(point["value"]) if "value" in point else None
            mean = {f"test_{end}": value for end, value in point["spread"]["test_nats"].items()}
            mean |= {name: cost[name] for name in ("parameters", "flops", "seconds")}
            if point["row"] != CONFIGURED:
                mean |= {name: point[name] for name in VERDICT_COLUMNS}
            yield start | _score_columns("mean", point) | mean
            for seed, found in point["by_seed"].items():
                yield start | _score_columns(seed, found)


def _score_columns(seed: str, found: Results) -> dict[str, Any]:
    difference = interval_columns("difference", found.get("difference", NOTHING))
    return score_columns(seed, found) | difference


def draw(results: Results, sweep: Results) -> bytes:
    """Draws one sweep: nats against the value; returns a PNG."""
    figure = style.wide_figure(7.6, 4.6)
    axes = figure.subplots()
    style.plain(axes)
    points = sweep["points"]
    places, is_number = _places(axes, [point["value"] for point in points])
    configured = sweep["configured"]["test_nats"]["value"]
    nats = [point["test_nats"]["value"] for point in points]
    ends = [
        (configured + point["difference"]["low"], configured + point["difference"]["high"])
        for point in points
        if point["difference"]["low"] is not None
    ]
    axes.plot(places, nats, "o-" if is_number else "o", color=_COLOR, linewidth=2, markersize=7,
              markeredgecolor="white", zorder=4)  # fmt: skip
    if len(ends) == len(places):
        for place, (low, high) in zip(places, ends, strict=True):
            axes.plot([place, place], [low, high], color=_COLOR, linewidth=1.6, zorder=3)
            axes.plot([place, place], [low, high], "_", color=_COLOR, markersize=9,
                      markeredgewidth=1.6, zorder=3)  # fmt: skip
    drawn: list[float] = []
    for seed in results["seeds"] if len(results["seeds"]) > 1 else ():
        each = [point["by_seed"][str(seed)]["test_nats"]["value"] for point in points]
        drawn += each
        axes.plot(places, each, "o", color=_COLOR, markersize=3, alpha=0.5, zorder=2)
    for place, value, following in zip(places, nats, [*nats[1:], nats[-1]], strict=True):
        above = not is_number or following <= value  # Where the line to the next does not go.
        offset = (8, 6 if above else -14)
        axes.annotate(
            number(value, 3), (place, value), offset, textcoords="offset points", fontsize=8.5,
            color=style.INK, zorder=5, path_effects=style.halo(),
        )  # fmt: skip
    axes.axhline(configured, color=_COLOR, linewidth=1, linestyle=style.DASHED, alpha=0.7)
    shown = [*nats, *(end for pair in ends for end in pair), *drawn, configured]
    span = max(max(shown) - min(shown), 1e-4)
    axes.set_ylim(min(shown) - 0.15 * span, max(shown) + 0.25 * span)
    style.axis_labels(axes, y="test nats per token, decoder + memory")
    decoder = sweep["decoder"]["test_nats"]["value"]
    level = level_text(results)
    style.wide_title(
        axes,
        sweep["title"],
        f"dashed: as configured; bars: {level} interval of the paired difference to it; "
        f"decoder alone {number(decoder, 3)}",
    )
    return style.as_png(figure)


def _places(axes: Any, values: Sequence[Any]) -> tuple[list[float], bool]:
    """Returns where values lie on the axis, and whether they are numbers; sets the ticks."""
    is_number = all(isinstance(value, int | float) for value in values)
    if not is_number:
        places = [float(place) for place in range(len(values))]
        axes.set_xticks(places, [value_text(value) for value in values])
        axes.set_xlim(-0.6, len(values) - 0.4)
        return places, False
    places = [float(value) for value in values]
    if min(places) > 0 and max(places) / min(places) >= _LOG_RATIO:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(places, [value_text(value) for value in values])
    axes.margins(x=0.1)
    return places, True
