"""The table of one run as text, CSV and one sentence.

Everything is made from the dictionaries of `results/*/evaluate.json` and `measured.json`,
so it can be made again without running anything.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mlpmem_jax.evaluation.evaluate_table import rows_of
from mlpmem_jax.evaluation.lines import quality_cells, quality_titles, size_cells, size_titles
from mlpmem_jax.evaluation.table import (
    bracket_text,
    csv_text,
    display_width,
    level_text,
    note_lines,
    number,
    paragraph,
    render,
    share_text,
    test_line,
)
from mlpmem_jax.units import human_bytes

Results = Mapping[str, Any]

# Names of the CSV's columns, in order: each is a key of a system or of its cost.
COLUMNS = (
    "system",
    "test_nats",
    "difference_nats",
    "difference_low",
    "difference_high",
    "token_perplexity",
    "word_perplexity",
    "bits_per_byte",
    "gain_recovered",
    "gain_recovered_low",
    "gain_recovered_high",
    "valid_nats",
    "interpolation",
    "temperature",
    "parameters",
    "non_embedding_parameters",
    "parameter_bytes",
    "datastore_bytes",
    "stored_bytes",
    "ms_per_token",
)


def as_csv(results: Results, measured: Results) -> str:
    """Returns the table as CSV, numbers in full."""
    rows = [
        {name: system.get(name) for name in COLUMNS}
        | {"system": system["label"], "ms_per_token": _milliseconds(measured, key)}
        for key, system in results["systems"].items()
    ]
    return csv_text(COLUMNS, rows)


def _milliseconds(measured: Results, key: str) -> float | None:
    found: float | None = measured.get("latency_ms", {}).get(key, {}).get("p50")
    return found


def as_text(results: Results, measured: Results) -> str:
    """Returns what is shown in the terminal: quality, cost, time, and the sentence."""
    rows, level = rows_of(results), level_text(results)
    quality = [
        [
            row["label"],
            number(row["test_nats"]["value"], 3),
            *quality_cells(row),
            share_text(row["gain_recovered"]["value"]),
            _share_interval(row),
        ]
        for row in rows
    ]
    cost = [
        [
            row["label"],
            *size_cells(row["valid_nats"], number(row["interpolation"], 3), row),
            human_bytes(row["stored_bytes"]),
            number(_milliseconds(measured, row["key"]), 2),
        ]
        for row in rows
    ]
    share_titles = ["kNN gain\nrecovered", f"{level}\ninterval"]
    cost_titles = ["", *size_titles(), "stored for\ninference", "ms per\ntoken"]
    return "\n".join(
        [
            test_line(results["test"]),
            render(["", "nats per\ntoken", *quality_titles(level), *share_titles], quality),
            render(cost_titles, cost),
            *_texts(results),
            *_remarks(results, measured),
            "",
            *paragraph(sentence(results)),
        ]
    )


def _texts(results: Results) -> list[str]:
    """Returns the table of texts that were appended and the first one, where there are any."""
    texts = results.get("texts", ())
    if not texts:
        return []
    labels = [f"{found['label']}\nnats" for found in results["systems"].values()]
    rows = [
        [
            one["text"],
            *(number(one["nats"][key], 3) for key in results["systems"]),
            f"{one['tokens']:,}",
            f"{one['documents']:,}",
        ]
        for one in texts
    ]
    return [render(["", *labels, "tokens", "docu-\nments"], rows)]


def _share_interval(row: Results) -> str:
    """Returns the interval of a share; where it has none and should, a note says why."""
    share, difference = row["gain_recovered"], row["difference"]
    bracket = bracket_text(share["low"], share["high"], 1, "%")
    wanted = share["value"] not in (None, 1.0) and difference["low"] is not None
    return "undefined" if wanted and not bracket else bracket


def _remarks(results: Results, measured: Mapping[str, Any]) -> list[str]:
    lines = []
    retrieval = results["retrieval"]
    if retrieval.get("recall") is not None:
        name = "targets" if retrieval.get("of_targets") else "neighbours"
        lines.append(
            f"{name}: {retrieval['engine']} engine, K = {retrieval['num_neighbors']}, "
            f"recall {retrieval['recall']:.4f}"
        )
    sample = retrieval.get("exact_sample")
    if sample is not None:
        costs = sample["costs_nats"]
        bracket = bracket_text(costs["low"], costs["high"], 4)
        lines.append(
            f"kNN-LM: recall {sample['recall']:.4f} on {sample['rows']:,} test rows; exact search "
            f"would gain {number(costs['value'], 4)} nats {bracket}".rstrip()
        )
    seconds = measured.get("seconds", {})
    if seconds:
        parts = [f"{name} {value:.0f} s" for name, value in seconds.items()]
        lines += _wrapped(f"time: {sum(seconds.values()):.0f} s = ", parts)
    return lines + note_lines(results["notes"])


def _wrapped(start: str, parts: Sequence[str], width: int = 100) -> list[str]:
    """Joins parts by plus signs, in lines of at most `width` columns."""
    lines = [start + parts[0]]
    for part in parts[1:]:
        if display_width(f"{lines[-1]} + {part}") <= width:
            lines[-1] += f" + {part}"
        else:
            lines.append(f"  + {part}")
    return lines


def sentence(results: Results) -> str:
    """Says in one sentence what came out."""
    memory = results["systems"]["memory"]
    low, high = memory["difference_low"], memory["difference_high"]
    gain = -memory["difference_nats"]
    level = level_text(results)
    nothing = memory["interpolation"] == 0 and memory["difference_nats"] == 0
    if nothing and memory["interpolation_source"] == "validation":
        return "On validation the memory got no weight (λ = 0): on test it changes nothing."
    # Trained jointly, the memory has a decoder of its own beside it.
    decoder = "the decoder" + " before joint training" * ("joint_decoder" in results["systems"])
    better = f"better than {decoder} by {number(gain, 3)} nats per token"
    worse = f"worse than {decoder} by {number(-gain, 3)} nats per token"
    if low is None:
        verdict = f"is {better if gain >= 0 else worse} (no interval)"
    elif high < 0:
        verdict = f"is {better} ({level} interval {bracket_text(-high, -low, 3)})"
    elif low > 0:
        verdict = f"is {worse} ({level} interval {bracket_text(low, high, 3)})"
    else:
        verdict = (
            f"is not significantly different from {decoder} "
            f"({level} interval of the gain {bracket_text(-high, -low, 3)} nats per token)"
        )
    text = f"On test, decoder + memory {verdict}"
    share = memory["gain_recovered"]
    if share is None:
        return text + "; the kNN-LM gains nothing here, so there is nothing to recover."
    text += f" and recovers {share_text(share)} of what the explicit kNN-LM gains"
    bracket = bracket_text(memory["gain_recovered_low"], memory["gain_recovered_high"], 1, "%")
    return text + (f" {bracket}." if bracket else ".")
