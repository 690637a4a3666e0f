"""Targets in Arrow files, as the official code writes them; read in order, and checked.

Suffixes: M rows of a batch, E entries (a token and its probability) of all its rows.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlpmem_jax.errors import UserError
from mlpmem_jax.failures import reason_of

# Each probability is rounded to float16 by itself.
_SUM_TOLERANCE = 2e-3
_COLUMNS = {
    "id_cnt": "int32",
    "token_id": "list<int32>",
    "prob": "list<float16>",
    "label": "int32",
}


class ArrowBatch(NamedTuple):
    """Rows that stand together.

    Attributes:
        count_M: Entries of each row.
        id_E: Tokens, of one row after the other.
        prob_E: float32 probabilities, descending in each row.
        label_M: The token that follows.
    """

    count_M: np.ndarray
    id_E: np.ndarray
    prob_E: np.ndarray
    label_M: np.ndarray


class ArrowFiles:
    """The files of one split.

    Args:
        path: A file, or a directory whose `*.arrow` are read by name.
        key: The key that names it, for messages.

    Raises:
        UserError: There are none, or pyarrow is missing.
    """

    def __init__(self, path: str, key: str):
        self.files = arrow_files(path)
        self._given = f"{key}={path}"
        self._arrow = _package(self._given)

    def check(self) -> None:
        """Compares the columns of every file.

        Raises:
            UserError: A file cannot be read, or has other columns.
        """
        for file in self.files:
            next(self._tables(file), None)

    def num_rows(self) -> int:
        """Returns the rows of all files.

        Raises:
            UserError: A file cannot be read, or has other columns.
        """
        return sum(table.num_rows for file in self.files for table in self._tables(file))

    def batches(self, vocab_size: int) -> Iterator[ArrowBatch]:
        """Yields the rows in order.

        Args:
            vocab_size: V of the tokenizer.

        Raises:
            UserError: A file is damaged, or a row is no distribution over the vocabulary.
        """
        first = 0
        for file in self.files:
            for table in self._tables(file, validated=True):
                batch = _taken(table)
                if (mistake := _mistake(batch, vocab_size)) is not None:
                    row, what = mistake
                    raise self.mistake(f"row {first + row} {what}")
                yield batch
                first += len(batch.label_M)

    def _tables(self, file: Path, *, validated: bool = False) -> Iterator[Any]:
        arrow = self._arrow
        try:
            with arrow.memory_map(os.fspath(file)) as source:
                if source.read(6) == b"ARROW1":
                    source.seek(0)
                    opened = arrow.ipc.open_file(source)
                    read = (opened.get_batch(n) for n in range(opened.num_record_batches))
                else:
                    source.seek(0)
                    opened = arrow.ipc.open_stream(source)
                    read = iter(opened)
                self._check_columns(file, opened.schema)
                for batch in read:
                    batch.validate(full=validated)
                    yield batch
        except (arrow.ArrowException, OSError) as error:
            reason = reason_of(error) if isinstance(error, OSError) else str(error)
            raise self.mistake(
                f"{file.name} cannot be read as Arrow, it may be cut off ({reason})"
            ) from None

    def _check_columns(self, file: Path, schema: Any) -> None:
        arrow = self._arrow
        types = {
            "id_cnt": arrow.int32(),
            "token_id": arrow.list_(arrow.int32()),
            "prob": arrow.list_(arrow.float16()),
            "label": arrow.int32(),
        }
        found = {name: schema.field(name).type for name in schema.names}
        if any(found.get(name) != wanted for name, wanted in types.items()):
            has = ", ".join(f"{name} {kind}" for name, kind in found.items())
            needs = ", ".join(f"{name} {kind}" for name, kind in _COLUMNS.items())
            raise self.mistake(f"{file.name} has the columns {has}; needed are {needs}")

    def mistake(self, what: str) -> UserError:
        """Returns the error that says what is wrong with the files."""
        return UserError(f"{self._given}: {what}")


def arrow_files(path: str) -> list[Path]:
    """Returns the files of one split, in the order of their rows.

    Args:
        path: A file, or a directory whose `*.arrow` are read by name.

    Raises:
        UserError: There are none.
    """
    place = Path(path).expanduser()
    files = sorted(place.glob("*.arrow")) if place.is_dir() else [place]
    if not files:
        raise UserError(f"{path}: the directory has no *.arrow files with targets")
    if not place.exists():
        raise UserError(f"{path}: no such file or directory with targets")
    return files


def _taken(table: Any) -> ArrowBatch:
    """Returns the arrays of a record batch; a row that is missing has no entries."""
    id_, prob = table.column("token_id"), table.column("prob")
    counts = [np.asarray(column.value_lengths().fill_null(0)) for column in (id_, prob)]
    given_M = np.asarray(table.column("id_cnt").fill_null(-1))
    # Where lengths disagree the row has no length that could be right.
    count_M = np.where((counts[0] == counts[1]) & (counts[0] == given_M), given_M, -1)
    return ArrowBatch(
        count_M,
        np.asarray(id_.flatten().fill_null(-1)),
        np.asarray(prob.flatten()).astype(np.float32),
        np.asarray(table.column("label").fill_null(-1)),
    )


def _mistake(batch: ArrowBatch, vocab_size: int) -> tuple[int, str] | None:
    """Returns the first row that is wrong, and what is wrong with it; None: all are right."""
    if (batch.count_M < 0).any():
        row = int(np.flatnonzero(batch.count_M < 0)[0])
        return row, "has another number of tokens or probabilities than its id_cnt"
    row_E = np.repeat(np.arange(len(batch.count_M)), batch.count_M)
    outside = np.flatnonzero((batch.id_E < 0) | (batch.id_E >= vocab_size))
    if outside.size:
        token = batch.id_E[outside[0]]
        return int(row_E[outside[0]]), f"has token {token}; the vocabulary has {vocab_size:,}"
    same_row_E = row_E[1:] == row_E[:-1]
    # NaN fails every comparison.
    rising = np.flatnonzero(same_row_E & ~(batch.prob_E[1:] <= batch.prob_E[:-1]))
    if rising.size:
        return int(row_E[rising[0]]), "has probabilities that are not in descending order"
    sum_M = np.bincount(row_E, weights=batch.prob_E, minlength=len(batch.count_M))
    negative_M = np.bincount(row_E, weights=batch.prob_E < 0, minlength=len(batch.count_M)) > 0
    wrong = np.flatnonzero(negative_M | ~(np.abs(sum_M - 1) <= _SUM_TOLERANCE))
    if wrong.size:
        row = int(wrong[0])
        return row, f"has probabilities that sum to {sum_M[row]:.4g}, or negative ones; 1 is needed"
    packed_E = np.sort(row_E.astype(np.int64) * vocab_size + batch.id_E)
    twice = np.flatnonzero(packed_E[1:] == packed_E[:-1])
    if twice.size:
        row, token = divmod(int(packed_E[twice[0]]), vocab_size)
        return row, f"has token {token} twice"
    return None


def _package(given: str) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise UserError(
            f"{given}: Arrow files require the package pyarrow "
            "(pip install -r requirements-arrow.txt)"
        ) from None
    return pyarrow
