"""The main table as text and CSV, from the dictionaries of `compare.json` and `measured.json`."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlpmem_jax.evaluation.lines import (
    NOTHING,
    VERDICT_COLUMNS,
    correction_note,
    interval_columns,
    quality_cells,
    quality_titles,
    seeds_cell,
    seeds_text,
    size_cells,
    size_titles,
    weights_cell,
    weights_column,
)
from mlpmem_jax.evaluation.metrics import QUALITY
from mlpmem_jax.evaluation.table import (
    DASH,
    bracket_text,
    cluster_word,
    csv_text,
    level_text,
    note_lines,
    number,
    render,
    share_text,
    test_line,
)
from mlpmem_jax.pipeline.forecast import duration
from mlpmem_jax.retrieval.temperature import temperature_notes
from mlpmem_jax.studies.tables.ledger import TEACHER

Results = Mapping[str, Any]

_OF_DOCUMENT = ("tokens", "words", "bytes", "cluster")
_PURPOSES = ("pretrain", TEACHER, "embed", "index", "search", "train")
ROW_COLUMNS = (
    "row", "label", "seed",
    "test_nats", "test_low", "test_high", "test_min", "test_max", "test_std",
    "difference", "difference_low", "difference_high", "difference_min", "difference_max",
    "gain_recovered", "gain_recovered_low", "gain_recovered_high",
    "token_perplexity", "word_perplexity", "bits_per_byte",
    "valid_nats", "valid_low", "valid_high", "weights", "trained_weight", "temperature",
    "parameters", "non_embedding_parameters",
    "flops", "network_flops", *(f"flops_{purpose}" for purpose in _PURPOSES),
    "seconds", "steps", "recall", "recall_of_targets",
)  # fmt: skip
PAIR_COLUMNS = (
    "row", "against", "seed", "difference", "low", "high", "min", "max", *VERDICT_COLUMNS,
    "without_largest", "without_largest_low", "without_largest_high",
    "without_largest_significant",
)  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def mean_cost(measured: Results, key: str) -> dict[str, Any]:
    """Returns what a row cost and how large it is, the mean over seeds."""
    seeds = list(measured["rows"][key].values())
    flops = {
        purpose: _mean([one["cost"]["flops_by_purpose"].get(purpose, 0.0) for one in seeds])
        for purpose in _PURPOSES
    }
    temperatures = [one["temperature"] for one in seeds if one["temperature"] is not None]
    return {
        "parameters": round(_mean([one["parameters"] for one in seeds])),
        "non_embedding_parameters": round(_mean([o["non_embedding_parameters"] for o in seeds])),
        "flops": sum(flops.values()),
        "network_flops": _mean([one["cost"]["network_flops"] for one in seeds]),
        "flops_by_purpose": flops,
        "seconds": _mean([one["cost"]["seconds"] for one in seeds]),
        "temperature": _mean(temperatures) if temperatures else None,
        "trained_weight": None
        if seeds[0]["trained_weight"] is None
        else _mean([one["trained_weight"] for one in seeds]),
    }


def as_text(results: Results, measured: Results) -> str:
    """Returns what is shown in the terminal."""
    rows = results["rows"]
    level = level_text(results)
    test = results["test"]
    quality_header = [
        "", "test\nnats", f"{level}\ninterval", "over\nseeds", *quality_titles(level),
        "kNN gain\nrecovered",
    ]  # fmt: skip
    cost_header = [
        "", *size_titles("*"), "training\nflops", "of which\nnetworks", "wall\ntime",
    ]  # fmt: skip
    return "\n".join(
        [
            f"{test_line(test)}, effective sample size {test['effective_sample_size']:.1f}, "
            f"{seeds_text(results)}",
            render(quality_header, [_quality(row) for row in rows]),
            render(cost_header, [_cost(row, mean_cost(measured, row["key"])) for row in rows]),
            *note_lines(_notes(results, measured)),
            *_verdicts(results),
            *_carried_by_one(results),
        ]
    )


def _quality(row: Results) -> list[str]:
    nats = row["test_nats"]
    return [
        row["label"],
        number(nats["value"], 3),
        bracket_text(nats["low"], nats["high"], 3),
        seeds_cell(row),
        *quality_cells(row),
        _share_cell(row.get("gain_recovered")),
    ]


def _share_cell(share: Results | None) -> str:
    if not share:
        return DASH
    bracket = bracket_text(share["low"], share["high"], 0, "%")
    return f"{share_text(share['value'], 0)} {bracket}".rstrip()


def _cost(row: Results, cost: Results) -> list[str]:
    trained = cost["trained_weight"]
    shown = DASH if trained is None else f"{number(trained, 3)} (trained)"
    weights = weights_cell(row["weights"]) or shown
    return [
        row["label"],
        *size_cells(row["valid_nats"]["value"], weights, cost),
        f"{cost['flops']:.3g}",
        f"{cost['network_flops']:.3g}",
        duration(cost["seconds"]),
    ]


def _notes(results: Results, measured: Results) -> list[str]:
    peak = measured["peak_flops"] / 1e9
    recalls = [
        one["recall"]
        for row in measured["rows"].values()
        for one in row.values()
        if one.get("recall") is not None
    ]
    return [
        *(
            [f"the index finds {share_text(_mean(recalls))} of test rows' neighbours"]
            if recalls
            else []
        ),
        "training flops count everything that a row was made from, teacher, embedding, index and "
        f"search included; what is no network counts seconds × {peak:.0f} GFLOP/s, the measured "
        "peak of this CPU",
        *results["notes"],
        *bound_notes(measured),
        correction_note(len(results["pairs"]), level_text(results)),
    ]


def bound_notes(measured: Results) -> list[str]:
    """Returns warnings about rows whose τ reached an end of the range that was tried."""
    return [
        f"{note} (row {key}, seed {seed})"
        for key, row in measured["rows"].items()
        for seed, one in row.items()
        if one["temperature"] is not None
        for note in temperature_notes(one["temperature"], one["temperature_at_bound"])
    ]


def _verdicts(results: Results) -> list[str]:
    """Says which differences between rows are not significant."""
    labels = {row["key"]: row["label"] for row in results["rows"]}
    open_pairs = [pair for pair in results["pairs"] if not pair["significant"]]
    if not open_pairs:
        return ["every difference between two rows is significant"]
    lines = ["not significant (interval, then the range over seeds):"]
    for pair in open_pairs:
        text = (
            f"  {labels[pair['row']]} against {labels[pair['against']]}: "
            f"{number(pair['value'], 3, sign=True)} {bracket_text(pair['low'], pair['high'], 3)}"
        )
        spread = pair["spread"]
        if len(pair["by_seed"]) > 1 and spread["min"] is not None:
            low, high = (number(spread[end], 3, sign=True) for end in ("min", "max"))
            text += f", {low} … {high}"
        if pair["significant_alone"]:
            text += f", corrected p = {number(pair['corrected_p'], 3)}"
        lines.append(text)
    return lines


def _carried_by_one(results: Results) -> list[str]:
    """Says which verdicts would be others without the largest cluster of test documents."""
    labels = {row["key"]: row["label"] for row in results["rows"]}
    lines = []
    for pair in results["pairs"]:
        less = pair["without_largest"]
        if less["low"] is None or _verdict(pair) == _verdict(less):
            continue
        lines.append(
            f"  {labels[pair['row']]} against {labels[pair['against']]}: "
            f"{number(less['value'], 3, sign=True)} {bracket_text(less['low'], less['high'], 3)} "
            f"for {number(pair['value'], 3, sign=True)}"
        )
    if not lines:
        return []
    test = results["test"]
    share, what = share_text(test["largest_cluster_share"]), cluster_word(test)
    return [f"different without the largest test {what} ({share} of the tokens):", *lines]


def _verdict(pair: Results) -> int:
    """Returns the sign of a difference, 0 where it is not significant."""
    if not pair["significant"]:
        return 0
    return 1 if pair["value"] > 0 else -1


def rows_csv(results: Results, measured: Results) -> str:
    """Returns one line a row and seed, and one for the mean (seed "mean")."""
    return csv_text(ROW_COLUMNS, _flat_rows(results, measured))


def _flat_rows(results: Results, measured: Results) -> Iterable[dict[str, Any]]:
    for row in results["rows"]:
        mean = mean_cost(measured, row["key"])
        yield _flat_row(row, "mean", row) | _flat_cost(mean)
        for seed, found in row["by_seed"].items():
            one = measured["rows"][row["key"]][seed]
            about = {name: one[name] for name in ("recall", "recall_of_targets")}
            about["steps"] = " ".join(f"{name}:{steps}" for name, steps in one["steps"].items())
            yield _flat_row(row, seed, found) | _flat_cost(one | one["cost"]) | about


def _flat_row(row: Results, seed: str, found: Results) -> dict[str, Any]:
    flat: dict[str, Any] = {"row": row["key"], "label": row["label"], "seed": seed}
    flat |= {name: found[name] for name in QUALITY}
    flat["weights"] = weights_column(found["weights"])
    for name, ends in (
        ("test_nats", "test"),
        ("valid_nats", "valid"),
        ("difference", ""),
        ("gain_recovered", ""),
    ):
        one = found.get(name) or NOTHING
        flat |= interval_columns(name, one, ends=ends)
    if seed == "mean":
        spread = row["spread"]
        flat |= {f"test_{end}": spread["test_nats"][end] for end in ("min", "max", "std")}
        if "difference" in spread:
            flat |= {f"difference_{end}": spread["difference"][end] for end in ("min", "max")}
    return flat


def _flat_cost(cost: Results) -> dict[str, Any]:
    names = (
        "temperature", "trained_weight", "parameters", "non_embedding_parameters", "flops",
        "network_flops", "seconds",
    )  # fmt: skip
    by_purpose = {f"flops_{p}": cost["flops_by_purpose"].get(p, 0.0) for p in _PURPOSES}
    return {name: cost[name] for name in names} | by_purpose


def pairs_csv(results: Results) -> str:
    """Returns one line a pair of rows and seed, and one for the mean (seed "mean")."""
    lines = []
    for pair in results["pairs"]:
        names = {"row": pair["row"], "against": pair["against"]}
        mean = {"difference": pair["value"], "low": pair["low"], "high": pair["high"]}
        ends = {end: pair["spread"][end] for end in ("min", "max")}
        less = pair["without_largest"]
        other = interval_columns("without_largest", less)
        other["without_largest_significant"] = less["significant"]
        verdict = {name: pair[name] for name in VERDICT_COLUMNS}
        lines.append(names | {"seed": "mean"} | verdict | mean | ends | other)
        for seed, one in pair["by_seed"].items():
            each = {"difference": one["value"], "low": one["low"], "high": one["high"]}
            lines.append(names | {"seed": seed} | each)
    return csv_text(PAIR_COLUMNS, lines)


def documents_csv(documents: Results) -> str:
    """Returns tokens and nats of each document, a line a split, seed and document."""
    lines = []
    rows: list[str] = []
    for split, found in documents.items():
        rows = list(found["nats"])
        seeds = list(found["nats"][rows[0]])
        for seed in seeds:
            for place in range(len(found["tokens"])):
                line = {"split": split, "seed": seed, "document": place}
                line |= {name: found[name][place] for name in _OF_DOCUMENT}
                lines.append(line | {row: found["nats"][row][seed][place] for row in rows})
    return csv_text(("split", "seed", "document", *_OF_DOCUMENT, *rows), lines)
