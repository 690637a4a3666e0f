"""What each row of a table gains or loses: on two kinds of text in its test split, or by document.

    .venv/bin/python -m benchmarks.row_losses DOCUMENTS --first 17
    .venv/bin/python -m benchmarks.row_losses DOCUMENTS --unit document

DOCUMENTS is documents.csv of a table, runs/adapt/results/compare-…/documents.csv.

--first is how many files of test, in the order of their paths, are of the first kind (of
configs/adapt.yaml: Python's source); the others are of the second. --unit document is for text
whose files hold many documents of equal rank. Printed are nats per token, the mean over seeds, and
the difference from the decoder (or --against another row) with a 95 % interval over units.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

NOT_ROWS = ("split", "seed", "document", "tokens", "words", "bytes", "cluster")
NUM_DRAWS = 4000


def sums_by(unit: str, lines: Sequence[dict[str, str]], rows: Sequence[str]) -> np.ndarray:
    """Returns [units, 1 + rows]: tokens and the nats of each row, summed over seeds."""
    sums = np.zeros((1 + max(int(line[unit]) for line in lines), 1 + len(rows)))
    for line in lines:
        sums[int(line[unit])] += [float(line[name]) for name in ("tokens", *rows)]
    return sums


def per_token(sums: np.ndarray) -> np.ndarray:
    """Returns [..., rows]: nats per token of sums over units, [..., 1 + rows]."""
    return sums[..., 1:] / sums[..., :1]


def report(sums: np.ndarray, rows: Sequence[str], kind: str, against: str) -> None:
    """Prints the rows for the units of one kind."""
    base = rows.index(against)
    draw = np.random.default_rng(0).integers(0, len(sums), (NUM_DRAWS, len(sums)))
    drawn = per_token(sums[draw].sum(1))
    nats = per_token(sums.sum(0))
    low, high = np.percentile(drawn - drawn[:, [base]], (2.5, 97.5), axis=0)
    for place, name in enumerate(rows):
        change = nats[place] - nats[base]
        interval = f"[{low[place]:+.3f}, {high[place]:+.3f}]"
        print(f"{kind:8}{name:20}{nats[place]:8.3f}{change:+9.3f}  {interval}")


def main() -> None:
    """Prints every kind of text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("documents", type=Path, help="documents.csv of a table")
    parser.add_argument("--first", type=int, help="units of the first kind; without it, all")
    parser.add_argument("--unit", choices=("cluster", "document"), default="cluster")
    parser.add_argument("--against", default="decoder", help="the row that differences are from")
    flags = parser.parse_args()
    with open(flags.documents, newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["split"] == "test"]
    rows = [name for name in lines[0] if name not in NOT_ROWS]
    sums = sums_by(flags.unit, lines, rows)
    if flags.first is None:
        report(sums, rows, "all", flags.against)
        return
    report(sums[: flags.first], rows, "first", flags.against)
    report(sums[flags.first :], rows, "second", flags.against)


if __name__ == "__main__":
    main()
