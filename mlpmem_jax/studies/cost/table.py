"""Cost against rows as tables for the terminal and as CSV, from `cost.json` alone."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlpmem_jax.evaluation.table import (
    bracket_text,
    csv_text,
    level_text,
    note_lines,
    number,
    render,
)
from mlpmem_jax.units import human_bytes, short_number

Results = Mapping[str, Any]

QUANTITIES = {
    "token_ms_p50": "ms per token, p50",
    "token_ms_p95": "ms per token, p95",
    "search_ms_p50": "of which search, p50",
    "first_ms_p50": "ms to first token, p50",
    "first_ms_p95": "ms to first token, p95",
    "tokens_per_sec": "tokens per second",
    "bytes": "bytes",
}
COLUMNS = (
    "system", "rows", *QUANTITIES, "recall", "test_nats", "difference_low", "difference_high",
    "weight", "temperature", "quantity", "slope", "low", "high", "above_decoder",
    "above_decoder_low", "above_decoder_high",
)  # fmt: skip
# An interval around 0 inside of ± this is called flat: 2^0.05 is 3.5 % for each doubling.
FLAT = 0.05


def as_csv(results: Results) -> str:
    """Returns one line for each system and size, and one with the slopes of each system."""
    return csv_text(COLUMNS, _lines(results))


def _lines(results: Results) -> Iterator[dict[str, Any]]:
    for system, one in results["systems"].items():
        for place, rows in enumerate(results["rows"]):
            line = {name: one[name][place] for name in QUANTITIES}
            recall = results["recall"][place] if system == "scann" else None
            yield {"system": system, "rows": rows, **line, "recall": recall}
        for quantity, slope in one["slopes"].items():
            above = one["slopes_above_decoder"].get(quantity)
            line = {"system": system, "quantity": quantity, **slope}
            if above:
                line["above_decoder"] = above["slope"]
                line |= {f"above_decoder_{end}": above[end] for end in ("low", "high")}
            yield line
    for one in results.get("quality", {}).get("sizes", []):
        for system, nats in one["test_nats"].items():
            low, high = one["interval"][system]
            yield {
                "system": system,
                "rows": one["rows"],
                "test_nats": nats,
                "difference_low": low,
                "difference_high": high,
                "weight": one["interpolation"][system],
                "temperature": one["temperature"] if system == "knn" else None,
            }


def as_text(results: Results) -> str:
    """Returns what is shown in the terminal."""
    machine, protocol = results["machine"], results["protocol"]
    blocks = [
        f"{machine['devices']} × {machine['device_kind']} ({machine['platform']}), "
        f"{machine['cores_allowed'] or machine['cores']} cores; one text at a time, "
        f"{protocol['rounds']} rounds of {protocol['num_tokens']} tokens",
        _size_table(results, "token_ms_p50", "token_ms_p95", "ms per token: median (95th %)"),
        _size_table(
            results,
            "first_ms_p50",
            "first_ms_p95",
            f"ms to the first token after {protocol['prompt_tokens']}: median (95th %)",
        ),
        _size_table(
            results, "tokens_per_sec", None, f"tokens per second, {protocol['batch_size']} texts"
        ),
        _size_table(results, "bytes", None, "bytes kept"),
        *_recall_line(results),
        _slope_table(results),
        *_quality_table(results),
        *note_lines([*results["notes"], *results.get("quality", {}).get("notes", [])]),
        "",
        *textwrap.wrap(" ".join(_sentences(results)), 100),
    ]
    return "\n".join(blocks)


def _size_table(results: Results, main: str, second: str | None, title: str) -> str:
    rows = []
    for system, one in results["systems"].items():
        cells = [results["labels"][system]]
        for place in range(len(results["rows"])):
            value = one[main][place]
            if main == "bytes":
                cells.append(human_bytes(value))
            elif second:
                cells.append(f"{_figures(value)} ({_figures(one[second][place])})")
            else:
                cells.append(_figures(value))
        rows.append(cells)
    columns = _columns_that_fit(rows, results["rows"])
    header = [title.split(": ")[0] + ("\n" + title.split(": ")[1] if ": " in title else "")]
    header += [short_number(results["rows"][place]) + "\nrows" for place in columns]
    return render(header, [[row[0], *(row[1 + place] for place in columns)] for row in rows])


def _columns_that_fit(rows: Sequence[Sequence[str]], sizes: Sequence[int]) -> list[int]:
    """Leaves out sizes in the middle where the table would be wider than 100 columns."""
    columns = list(range(len(sizes)))
    widest = max(len(cell) for row in rows for cell in row[1:])
    room = max(2, (100 - 34) // (widest + 2))
    if len(columns) <= room:
        return columns
    return sorted({round(n * (len(columns) - 1) / (room - 1)) for n in range(room)})


def _recall_line(results: Results) -> list[str]:
    found = [
        f"{number(recall, 3)} at {short_number(rows)}"
        for rows, recall in zip(results["rows"], results["recall"], strict=True)
        if recall is not None
    ]
    return textwrap.wrap(f"recall of ScaNN: {', '.join(found)} rows", 100) if found else []


def _slope_table(results: Results) -> str:
    level = level_text(results)
    wanted = ("token_ms_p50", "search_ms_p50", "first_ms_p50", "tokens_per_sec", "bytes")
    rows = []
    for system, one in results["systems"].items():
        for quantity in wanted:
            slope = one["slopes"].get(quantity)
            if slope is None:
                continue
            name = results["labels"][system] if quantity == wanted[0] else ""
            above = one["slopes_above_decoder"].get(quantity)
            rows.append(
                [
                    name,
                    QUANTITIES[quantity].removesuffix(", p50"),
                    *_slope_cells(slope),
                    *(_slope_cells(above) if above else (number(None, 3), "")),
                ]
            )
    header = [
        "slope against rows\n(both log)", "median", "slope", f"{level}\ninterval",
        "above the\ndecoder's", f"{level}\ninterval",
    ]  # fmt: skip
    return render(header, rows)


def _slope_cells(slope: Mapping[str, Any]) -> list[str]:
    ends = [slope[end] for end in ("slope", "low", "high") if slope[end] is not None]
    # Slopes of 1 and more are noise: digits of it would widen the table.
    largest = max(map(abs, ends))
    digits = 1 if largest >= 10 else 2 if largest >= 1 else 3
    shown = "" if slope["low"] is None else bracket_text(slope["low"], slope["high"], digits)
    return [number(slope["slope"], digits, sign=True), shown]


def _quality_table(results: Results) -> list[str]:
    quality = results.get("quality")
    if not quality:
        return []
    header = [
        "test nats per token",
        *(short_number(one["rows"]) + "\nrows" for one in quality["sizes"]),
    ]
    rows = [
        [label, *(number(one["test_nats"][name], 3) for one in quality["sizes"])]
        for name, label in quality["labels"].items()
    ]
    return [render(header, rows)]


def _sentences(results: Results) -> Iterator[str]:
    """Says whether the memory's time depends on the rows more than the decoder's, which cannot."""
    shown = []
    for system, name in (("memory", "slopes"), ("decoder", "slopes")):
        shown.append(" ".join(_slope_cells(results["systems"][system][name]["token_ms_p50"])))
    above = results["systems"]["memory"]["slopes_above_decoder"]["token_ms_p50"]
    widest = max(abs(above["low"]), abs(above["high"]))
    if not above["low"] <= 0 <= above["high"]:
        verdict = "not flat by this measurement"
    elif widest <= FLAT:
        verdict = "flat"
    else:
        verdict = f"not told from flat, but differences up to {widest:.2f} are not excluded"
    yield (
        f"Time per token of decoder + memory against rows: slope {shown[0]}; of the decoder alone, "
        f"which is the clock's: {shown[1]}; difference {' '.join(_slope_cells(above))}: {verdict}."
    )


def _figures(value: float | None) -> str:
    """Returns three figures."""
    if value is None:
        return number(None, 0)
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"
