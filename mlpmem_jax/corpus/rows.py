"""Rows of a Hugging Face dataset, streamed; a broken connection is taken up again."""

from collections.abc import Iterator
from typing import Any

from mlpmem_jax.config.data import Source
from mlpmem_jax.corpus.records import Item, field_of
from mlpmem_jax.corpus.retries import MOST_CHARS, MOST_RETRIES, is_passing, wait_or_raise
from mlpmem_jax.errors import UserError
from mlpmem_jax.failures import first_line, import_package


def import_datasets(key: str) -> Any:
    """Returns the package `datasets`.

    Raises:
        UserError: It is not installed.
    """
    what = f"{key}.source=huggingface"
    return import_package("datasets", what, "requirements-huggingface.txt")


def dataset_rows(source: Source, key: str, first: int) -> Iterator[Item]:
    """Yields the rows of a dataset from number `first` on.

    Raises:
        UserError: There is no such dataset, or it cannot be read.
        TryAgain: The connection broke and stays broken.
    """
    number, failures = first, 0
    while True:
        try:
            for row in _stream(source, key, number):
                label = f"{source.dataset}, row {number}"
                failures = 0
                yield field_of(row, source.field, label, key)
                number += 1
            return
        except UserError:
            raise
        # The hub's client and what it reads with raise many kinds.
        except Exception as error:
            failures += 1
            name = f"{key}.dataset={source.dataset}"
            if number == 0 and (failures > MOST_RETRIES or not is_passing(error)):
                # Rather a name or a proxy is wrong than the connection.
                raise UserError(f"{name}: {first_line(error, MOST_CHARS)}") from error
            wait_or_raise(error, failures, f"{name}, row {number}")


def _stream(source: Source, key: str, first: int) -> Any:
    assert source.dataset is not None
    rows = import_datasets(key).load_dataset(
        source.dataset, source.dataset_config, split=source.dataset_split, streaming=True
    )
    return rows.skip(first) if first else rows
