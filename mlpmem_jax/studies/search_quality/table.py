"""What approximate search costs, as tables and CSV, from `search-quality.json` alone."""

from collections.abc import Iterator, Mapping
from typing import Any

from mlpmem_jax.evaluation.table import (
    bracket_text,
    csv_text,
    level_text,
    note_lines,
    number,
    render,
    tokens_text,
)

Results = Mapping[str, Any]

PLAIN = (
    "name", "engine", "num_leaves", "num_leaves_to_search", "num_reorder", "cells",
    "cells_to_search", "index_secs", "search_secs", "queries_per_sec", "recall", "skew_kl",
    "missed_mass", "top1",
)  # fmt: skip
OF_SYSTEM = ("interpolation", "valid_nats", "test_nats")
AGAINST = ("against_decoder", "against_exact")
LABELS = {"knn": "+ kNN-LM", "memory": "+ memory"}


def as_csv(results: Results) -> str:
    """Returns one line a setting, numbers in full."""
    rows = list(_rows(results))
    return csv_text(list(rows[0]), rows)


def _rows(results: Results) -> Iterator[dict[str, Any]]:
    for setting in results["settings"]:
        row = {name: setting.get(name) for name in PLAIN}
        for system in LABELS:
            one = setting[system]
            row |= {f"{system}_{name}": one[name] for name in OF_SYSTEM}
            for against in AGAINST:
                for bound in ("nats", "low", "high"):
                    value = one[against][bound] if one[against] else None
                    row[f"{system}_{against}_{bound}"] = value
        row["knn_temperature"] = setting["knn"]["temperature"]
        yield row


def as_text(results: Results) -> str:
    """Returns what is shown in the terminal."""
    test = results["test"]
    return "\n".join(
        [
            f"search: K = {results['num_neighbors']}; recall and KL on "
            f"{results['sample_rows']:,} training rows",
            _search_table(results),
            f"{tokens_text(test)}; decoder "
            f"{number(results['decoder_test_nats'], 4)} nats per token",
            _nats_table(results),
            *note_lines(results["notes"]),
        ]
    )


def _search_table(results: Results) -> str:
    header = [
        "", "visited\n(leaves, cells)", "candi-\ndates", "recall", "KL from\nexact", "missed\nmass",
        "same\ntop-1", "queries\nper s", "index\ns", "search\ns",
    ]  # fmt: skip
    rows = []
    for one in results["settings"]:
        of_cells = one["engine"] == "routed"
        kinds = ("cells_to_search", "cells") if of_cells else ("num_leaves_to_search", "num_leaves")
        visited, parts = (one.get(kind) for kind in kinds)
        rows.append(
            [
                one["name"],
                number(None, 0) if visited is None else f"{visited} of {parts}",
                number(one["num_reorder"], 0),
                number(one["recall"], 4),
                number(one["skew_kl"], 4),
                number(one["missed_mass"], 4),
                number(one["top1"], 3),
                number(one["queries_per_sec"], 0),
                number(one["index_secs"], 1),
                number(one["search_secs"], 1),
            ]
        )
    return render(header, rows)


def _nats_table(results: Results) -> str:
    level = f"{level_text(results)}\ninterval"
    header = [""]
    for label in LABELS.values():
        header += [f"{label}\ntest nats", "against\nexact", level]
    rows = []
    for setting in results["settings"]:
        row = [setting["name"]]
        for system in LABELS:
            one = setting[system]
            row.append(number(one["test_nats"], 4))
            against = one["against_exact"]
            if against is None or setting["name"] == results["reference"]:
                row += [number(None, 0), ""]
            else:
                row += [
                    number(against["nats"], 4, sign=True),
                    bracket_text(against["low"], against["high"], 4),
                ]
        rows.append(row)
    return render(header, rows)
