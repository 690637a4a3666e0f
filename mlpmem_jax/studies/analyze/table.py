"""The analysis as tables for the terminal and as CSV, from `analyze.json` alone."""

from collections.abc import Iterator, Mapping
from typing import Any

from mlpmem_jax.evaluation.table import (
    bracket_text,
    csv_text,
    level_text,
    note_lines,
    number,
    render,
    share_text,
    tokens_text,
)

Results = Mapping[str, Any]

COLUMNS = (
    "table",
    "group",
    "system",
    "quantity",
    "value",
    "low",
    "high",
    "tokens",
)
NAMES = {"decoder": "decoder", "knn": "kNN", "memory": "memory", "mixture": "decoder + memory"}


def as_csv(results: Results) -> str:
    """Returns every number, one a line: table, group, system, quantity, value, interval."""
    return csv_text(COLUMNS, _lines(results))


def _lines(results: Results) -> Iterator[dict[str, Any]]:
    tables = [("all", [results["all"]]), ("frequency", results["frequency"])]
    tables += [(f"{one['n']}-gram", one["groups"]) for one in results["ngrams"]]
    for table, groups in tables:
        for group in groups:
            about = {"table": table, "group": group["label"], "tokens": group["tokens"]}
            yield about | {
                "system": "decoder",
                "quantity": "nats",
                "value": group["decoder_nats"],
            }
            for system in results["labels"]:
                one = group[system]
                yield about | {
                    "system": system,
                    "quantity": "gain",
                    "value": one["gain"],
                    "low": one["gain_low"],
                    "high": one["gain_high"],
                }
                yield about | {
                    "system": system,
                    "quantity": "contribution",
                    "value": one["contribution"],
                }
    sharp = results["sharpness"]
    for system, one in sharp["systems"].items():
        about = {"table": "sharpness", "system": system, "tokens": sharp["rows"]}
        for quantity in ("mean_tokens", "median_tokens"):
            for mass, value in zip(sharp["masses"], one[quantity], strict=True):
                yield about | {"group": f"mass {mass:g}", "quantity": quantity, "value": value}
        for step, value in zip(sharp["steps"], one["mean_mass"], strict=True):
            yield about | {"group": f"top {step}", "quantity": "mean_mass", "value": value}
        for quantity in ("label_top1", "knn_top1", "kl_from_knn", "entropy"):
            yield about | {
                "quantity": quantity,
                "value": one[quantity],
                "low": one[f"{quantity}_low"],
                "high": one[f"{quantity}_high"],
            }


def as_text(results: Results) -> str:
    """Returns what is shown in the terminal."""
    test, sharp = results["test"], results["sharpness"]
    return "\n".join(
        [
            f"{tokens_text(test)}; gains over the decoder in nats per token",
            "label n ×: it occurs n times in the training text; n-gram seen: it occurs there",
            _gain_table(results),
            f"sharpness: {sharp['rows']:,} test tokens",
            _sharpness_table(results),
            _agreement_table(results),
            *note_lines(results["notes"]),
            "",
            *_sentences(results),
        ]
    )


def _gain_table(results: Results) -> str:
    level = level_text(results)
    header = ["", "share of\ntokens", "decoder\nnats"]
    for label in results["labels"].values():
        header += [f"{label}\ngain", f"{level}\ninterval"]
    rows = [_gain_row("all tokens", results["all"], results)]
    rows += [
        _gain_row(f"label {group['label']} ×", group, results) for group in results["frequency"]
    ]
    for one in results["ngrams"]:
        rows += [
            _gain_row(f"{one['n']}-gram {group['label']}", group, results)
            for group in reversed(one["groups"])
        ]
    return render(header, rows)


def _gain_row(name: str, group: Results, results: Results) -> list[str]:
    cells = [name, share_text(group["token_share"]), number(group["decoder_nats"], 3)]
    for system in results["labels"]:
        one = group[system]
        cells += [
            number(one["gain"], 3, sign=True),
            bracket_text(one["gain_low"], one["gain_high"], 3),
        ]
    return cells


def _sharpness_table(results: Results) -> str:
    sharp = results["sharpness"]
    header = ["tokens that hold\nmean (median)", *(f"{100 * m:g} %" for m in sharp["masses"])]
    rows = [
        [
            NAMES[system],
            *(
                f"{number(mean, 1)} ({number(median, 0)})"
                for mean, median in zip(one["mean_tokens"], one["median_tokens"], strict=True)
            ),
        ]
        for system, one in sharp["systems"].items()
    ]
    return render(header, rows)


def _agreement_table(results: Results) -> str:
    level = f"{level_text(results)}\ninterval"
    header = ["", "top-1 is\nthe label", level, "top-1 as\nkNN", level, "KL from\nkNN", level]
    rows = []
    for system, one in results["sharpness"]["systems"].items():
        row = [NAMES[system]]
        for key, scale in (("label_top1", 100), ("knn_top1", 100), ("kl_from_knn", 1)):
            digits = 1 if scale == 100 else 3
            values = [one[key], one[f"{key}_low"], one[f"{key}_high"]]
            if system == "knn" and key != "label_top1":  # Of itself: nothing to say.
                values = [None, None, None]
            value, low, high = (None if v is None else scale * v for v in values)
            unit = " %" if scale == 100 and value is not None else ""
            row += [number(value, digits) + unit, bracket_text(low, high, digits)]
        rows.append(row)
    return render(header, rows)


def _sentences(results: Results) -> Iterator[str]:
    """Says where most of the memory's gain comes from."""
    whole = results["all"]["memory"]["contribution"]
    if whole <= 0:
        yield "The memory gains nothing on this test split."
        return
    for one in results["ngrams"]:
        unseen, seen = one["groups"]
        if unseen["tokens"] and seen["tokens"]:
            yield (
                f"{one['n']}-grams seen in training are {share_text(seen['token_share'])} of the "
                f"tokens and bring {share_text(seen['memory']['contribution'] / whole)} of the "
                "memory's gain."
            )
