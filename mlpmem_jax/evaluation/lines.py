"""Lines that the tables of several commands share: cells for the terminal, columns of CSV."""

from collections.abc import Iterable, Mapping
from typing import Any

from mlpmem_jax.evaluation.table import DASH, bracket_text, count_text, number

Results = Mapping[str, Any]
NOTHING = dict.fromkeys(("value", "low", "high"))  # A number that is not defined.

# Of a pair: the verdict, the one without a correction, and what corrects it.
VERDICT_COLUMNS = (
    "significant", "significant_alone", "corrected_low", "corrected_high", "corrected_p",
)  # fmt: skip


def quality_titles(level: str) -> list[str]:
    """Returns the titles of `quality_cells`, for intervals of a level."""
    interval = f"{level}\ninterval"
    return ["against\ndecoder", interval, "token\nPPL", "word\nPPL", "bits per\nbyte"]


def quality_cells(row: Results) -> list[str]:
    """Returns a row's difference to the decoder, its interval, perplexities, bits per byte."""
    difference = row.get("difference") or NOTHING
    return [
        number(difference["value"], 3, sign=True),
        bracket_text(difference["low"], difference["high"], 3),
        number(row["token_perplexity"], 2),
        number(row["word_perplexity"], 1),
        number(row["bits_per_byte"], 4),
    ]


def size_titles(mark: str = "") -> list[str]:
    """Returns the titles of `size_cells`; a mark refers to a note about λ and τ."""
    chosen = [f"weight\nλ{mark}", f"temper-\nature τ{mark}"]
    return ["valid\nnats", *chosen, "para-\nmeters", "without\nembedding"]


def size_cells(valid_nats: float | None, weights: str, row: Results) -> list[str]:
    """Returns nats of validation, what was chosen there, and the parameters of a row."""
    return [
        number(valid_nats, 3),
        weights,
        number(row["temperature"], 3),
        count_text(row["parameters"]),
        count_text(row["non_embedding_parameters"]),
    ]


def correction_note(compared: int, level: str) -> str:
    """Returns the note that says when a difference is called significant.

    Args:
        compared: How many differences verdicts are given on.
        level: Of the intervals, as text.
    """
    if compared == 1:
        return f"significant: the {level} interval excludes 0 and all seeds agree in sign"
    return (
        f"significant: the {level} interval excludes 0, also corrected for {compared} comparisons "
        "(largest |t| of the bootstrap), and all seeds agree in sign; intervals shown are not "
        "corrected"
    )


def score_columns(seed: str, found: Results) -> dict[str, Any]:
    """Returns the CSV columns that say how good a row is.

    Args:
        seed: One, or "mean".
        found: Numbers of this seed, or of the mean over seeds.
    """
    return {
        "seed": seed,
        **interval_columns("test_nats", found["test_nats"], ends="test"),
        "valid_nats": found["valid_nats"]["value"],
        "weight": weights_column(found["weights"]),
    }


def interval_columns(name: str, found: Results, ends: str = "") -> dict[str, Any]:
    """Returns the CSV columns of a number and of the ends of its interval.

    Args:
        name: Column of the number.
        found: Its value, low and high.
        ends: What the columns of the ends begin with; "": the name.
    """
    ends = ends or name
    return {name: found["value"], f"{ends}_low": found["low"], f"{ends}_high": found["high"]}


def weights_column(weights: Iterable[float]) -> str:
    """Returns weights for a column of CSV."""
    return " ".join(f"{weight:.6f}" for weight in weights)


def weights_cell(weights: Iterable[float]) -> str:
    """Returns weights for people; empty where nothing is mixed."""
    return " + ".join(number(weight, 3) for weight in weights)


def seeds_text(results: Results) -> str:
    """Returns what the numbers of a table are over."""
    seeds = results["seeds"]
    return f"mean of {len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"


def seeds_cell(row: Results) -> str:
    """Returns the range of a row's test nats over seeds, or a dash where there is one seed."""
    if len(row["by_seed"]) < 2:
        return DASH
    spread = row["spread"]["test_nats"]
    return f"{number(spread['min'], 3)}…{number(spread['max'], 3)}"
