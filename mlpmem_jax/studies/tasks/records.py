"""Records of the package's own tasks: read from files, in the fields that each is published with.

`load` is what the task files name as their data set. It needs the package datasets, which comes
with lm_eval; everything else here needs nothing.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlpmem_jax.errors import UserError
from mlpmem_jax.failures import reason_of
from mlpmem_jax.studies.tasks import classification, questions

Record = Mapping[str, Any]
_ENDINGS = ("jsonl", "json", "csv", "tsv")


class Source(NamedTuple):
    """Where the records of a task come from.

    Attributes:
        docs: Turns a record into what is evaluated: nothing, one, or several.
        hub: Data set, configuration and split on the Hugging Face Hub; None: files alone.
    """

    docs: Callable[[Record], Sequence[Record]]
    hub: tuple[str, str | None, str] | None = None


SOURCES: dict[str, Source] = {
    "nq": Source(questions.nq, ("nq_open", None, "validation")),
    "hotpotqa": Source(questions.nq, ("hotpot_qa", "distractor", "validation")),
    "triviaqa": Source(questions.open_question),
    "webqa": Source(questions.open_question),
    "truthfulqa": Source(
        questions.truthful, ("truthfulqa/truthful_qa", "generation", "validation")
    ),
    "halueval_qa": Source(questions.halueval_qa),
    "halueval_dialogue": Source(questions.halueval_dialogue),
    "halueval_summarization": Source(questions.halueval_summarization),
    "strategyqa": Source(questions.strategy),
    **{name: Source(docs) for name, docs in classification.DOCS.items()},
}


def load(name: str, data_path: str | None = None, **metadata: Any) -> dict[str, Any]:
    """Returns the data set of a task: one split, `test`.

    Args:
        name: Of the records.
        data_path: Directory with NAME.jsonl, NAME.json, NAME.csv or NAME.tsv; None, or without such
            a file: the Hub, for those that are there in this form.
        metadata: What else the harness passes; not used.

    Raises:
        UserError: A file is missing, or a record lacks a field.
    """
    import datasets

    source = SOURCES[name]
    file = _file(name, data_path)
    if file is not None:
        records: Iterable[Record] = read_records(file)
    elif source.hub is not None:
        path, configuration, split = source.hub
        records = datasets.load_dataset(path, configuration, split=split)
    else:
        where = "tasks.data_path is not set" if data_path is None else f"{data_path} has none"
        raise UserError(
            f"the task reads {name}.jsonl (or .json, .csv, .tsv), and {where}; "
            "docs/paper-evaluation.md says where its records are and which fields they have"
        )
    docs = list(_docs(source, records, str(file or name)))
    if not docs:
        raise UserError(f"{file or name}: holds no record that can be evaluated")
    return {"test": datasets.Dataset.from_list(docs)}


def _file(name: str, data_path: str | None) -> Path | None:
    if data_path is None:
        return None
    files = [Path(data_path) / f"{name}.{ending}" for ending in _ENDINGS]
    return next((file for file in files if file.is_file()), None)


def _docs(source: Source, records: Iterable[Record], where: str) -> Iterator[dict[str, Any]]:
    for number, record in enumerate(records, start=1):
        try:
            found = source.docs(record)
        except KeyError as error:
            raise UserError(f"{where}: record {number} has no field {error}") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{where}: record {number} cannot be used ({error})") from None
        yield from map(dict, found)


def read_records(file: Path) -> list[Record]:
    """Reads JSON lines, a JSON list, CSV with a header, or tab-separated label and text.

    Raises:
        UserError: It cannot be read, or is no such file.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({reason_of(error)})") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: is not UTF-8 text") from None
    if file.suffix == ".csv":
        return list(csv.DictReader(text.splitlines(keepends=True)))
    if file.suffix == ".tsv":
        lines = [line.split("\t", 1) for line in text.splitlines() if "\t" in line]
        return [{"level": level, "text": rest} for level, rest in lines]
    if text.lstrip().startswith("["):
        records = _parsed(text, str(file))
    else:
        numbered = enumerate(text.split("\n"), start=1)
        records = [_parsed(line, f"{file}: line {n}") for n, line in numbered if line.strip()]
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise UserError(f"{file}: record {number} is no JSON object")
    return list(records)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: is no JSON ({error})") from None
