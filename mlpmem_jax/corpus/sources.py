"""Where text comes from: which files a configuration names, and how each is read.

A *part* is one source with its files in a fixed order; the parts together are the corpus.
An *item* is a file, a JSONL record or a dataset row: text that arrives in blocks.
"""

import dataclasses
import glob
import hashlib
import itertools
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

from mlpmem_jax.config.data import CorpusConfig, Source
from mlpmem_jax.corpus.files import ends_of, read_text
from mlpmem_jax.datastore.files import is_local, unreachable
from mlpmem_jax.datastore.layout import SPLITS, Split
from mlpmem_jax.errors import UserError

_NOT_STDLIB = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)
_LISTING_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class Part:
    """One source of the corpus.

    Attributes:
        key: Its place in the configuration, for messages.
        source: Its configuration.
        files: Paths, in reading order; a Hugging Face dataset has one entry, its name.
        names: What the listing calls the files.
        split: The split that all its documents belong to; None draws it by content.
    """

    key: str
    source: Source
    files: tuple[str, ...]
    names: tuple[str, ...]
    split: Split | None = None

    def items(self, file: int, first: int = 0) -> Iterator[tuple[str, Iterable[str]]]:
        """Yields the items of a file from number `first` on: a label and blocks of text.

        Raises:
            UserError: A file or record is not what the configuration says; it is named.
        """
        path = self.files[file]
        if self.source.source == "jsonl":
            yield from _records(path, self.source.field, self.key, first)
        elif self.source.source == "huggingface":
            yield from _dataset_rows(self.source, self.key, first)
        elif first == 0:
            yield path, read_text(path)


def find_parts(corpus: CorpusConfig) -> tuple[Part, ...]:
    """Lists the files of every source.

    Raises:
        UserError: One line for each pattern that matches nothing and each unreadable path.
    """
    mistakes: list[str] = []
    explicit: list[tuple[Split, tuple[str, ...]]] = [
        (split, getattr(corpus, split).paths) for split in SPLITS if getattr(corpus, split).paths
    ]
    parts = []
    for split, patterns in explicit:
        files = _expand(patterns, f"corpus.{split}.paths", mistakes)
        parts.append(Part(f"corpus.{split}", corpus, files, files, split))
    if explicit and corpus.paths:
        mistakes.append(
            f"corpus.paths={list(corpus.paths)} is not read when corpus.train.paths, "
            "corpus.valid.paths and corpus.test.paths are given: drop one or the other"
        )
    if not explicit:
        parts.append(_part("corpus", corpus, None, mistakes))
    for number, source in enumerate(corpus.more):
        # Beside explicit splits, further sources are more to train on.
        parts.append(
            _part(f"corpus.more.{number}", source, "train" if explicit else None, mistakes)
        )
    for one, other in itertools.combinations(parts[: len(explicit)], 2):
        shared = sorted(set(one.files) & set(other.files))
        if shared:
            mistakes.append(
                f"{one.key}.paths and {other.key}.paths both hold {shared[0]}"
                + (f" and {len(shared) - 1} more" if len(shared) > 1 else "")
            )
    if mistakes:
        raise UserError(list(dict.fromkeys(mistakes)))
    return tuple(parts)


def _part(key: str, source: Source, split: Split | None, mistakes: list[str]) -> Part:
    if source.source == "stdlib":
        root = sysconfig.get_paths()["stdlib"]
        names = tuple(_stdlib_names(root))
        return Part(key, source, tuple(os.path.join(root, name) for name in names), names, split)
    if source.source == "huggingface":
        _import_datasets(key)
        name = ":".join((source.dataset or "", source.dataset_config or "", source.dataset_split))
        return Part(key, source, (name,), (name,), split)
    files = _expand(source.paths, f"{key}.paths", mistakes)
    return Part(key, source, files, files, split)


def _stdlib_names(root: str) -> Iterator[str]:
    """Yields the Python files of a standard library, without tests and installed packages."""
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_STDLIB]
        relative = os.path.relpath(folder, root)
        names += [os.path.normpath(os.path.join(relative, f)) for f in files if f.endswith(".py")]
    yield from sorted(names, key=lambda name: name.split(os.sep))


def _expand(patterns: Iterable[str], key: str, mistakes: list[str]) -> tuple[str, ...]:
    """Returns the files that paths and globs name, each once, sorted."""
    found: set[str] = set()
    for pattern in dict.fromkeys(patterns):
        expanded = os.path.expanduser(pattern)
        try:
            paths = _match(expanded)
        except UserError as error:
            mistakes.append(f"{key}: {pattern!r} {error}")
            continue
        if paths:
            found.update(paths)
        elif is_local(expanded) and os.path.isdir(expanded):
            mistakes.append(
                f"{key}: {pattern!r} is a directory; name its files, for example "
                f"{os.path.join(pattern, '**', '*.txt')!r}"
            )
        elif glob.has_magic(pattern):
            mistakes.append(f"{key}: {pattern!r} matches no file")
        else:
            mistakes.append(f"{key}: {pattern!r} does not exist")
    return tuple(sorted(found))


def _match(pattern: str) -> list[str]:
    """Returns the files that a path or glob names.

    Raises:
        UserError: What cannot be matched about the pattern, or why its bucket cannot be read.
    """
    if not is_local(pattern):
        return _match_in_bucket(pattern)
    # A file may be called like a pattern: `notes[1].txt`.
    paths = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
    return [os.path.normpath(path) for path in paths if os.path.isfile(path)]


def _match_in_bucket(pattern: str) -> list[str]:
    if "**" in pattern:
        raise UserError("uses ** on a remote path; write out its folders")
    scheme, _, rest = pattern.partition("://")
    bucket, _, inside = rest.partition("/")
    path = epath.Path(pattern)
    try:
        if glob.has_magic(pattern):
            found = epath.Path(f"{scheme}://{bucket}").glob(inside)
            return [os.fspath(one) for one in found if not one.is_dir()]
        exists, is_folder = path.exists(), path.is_dir()
    # Each of the drivers has errors of its own: HTTP, credentials, sockets.
    except Exception as error:
        raise UserError(unreachable(error)) from None
    if is_folder:
        example = os.path.join(pattern, "*.txt")
        raise UserError(f"is a directory; name its files, for example {example!r}")
    return [pattern] if exists else []


def listing_of(parts: Iterable[Part]) -> dict[str, Any]:
    """Returns a digest of the files by name, size and both ends, and their number and bytes.

    It is cheap, so that every start can notice that the text has changed. What a Hugging
    Face dataset holds is not looked at, only its name.
    """
    digest, num_files, num_bytes = hashlib.blake2b(digest_size=8), 0, 0
    for part in parts:
        for path, name in zip(part.files, part.names, strict=True):
            size, ends = (
                (0, b"") if part.source.source == "huggingface" else ends_of(path, _LISTING_BYTES)
            )
            digest.update(json.dumps([part.key, name, size]).encode() + ends)
            num_files, num_bytes = num_files + 1, num_bytes + size
    return {"digest": digest.hexdigest(), "files": num_files, "bytes": num_bytes}


def _records(path: str, field: str, key: str, first: int) -> Iterator[tuple[str, Iterable[str]]]:
    for number, line in enumerate(_lines(read_text(path))):
        if number < first:
            continue
        label = f"{path}, line {number + 1}"
        if not line.strip():
            yield label, ()
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{label}: no JSON ({error})") from None
        if not isinstance(record, dict):
            raise UserError(f"{label}: a JSON {type(record).__name__}, not an object with fields")
        yield label, (_text_of(record, field, label, key),)


def _lines(blocks: Iterable[str]) -> Iterator[str]:
    held: list[str] = []
    for block in blocks:
        first, *others = block.split("\n")
        held.append(first)
        for line in others:
            yield "".join(held)
            held = [line]
    if any(held):
        yield "".join(held)


def _text_of(record: Any, field: str, label: str, key: str) -> str:
    if field not in record:
        raise UserError(
            f"{label}: no field {field!r} ({key}.field); it has {', '.join(map(repr, record))}"
        )
    text = record[field]
    if not isinstance(text, str):
        raise UserError(
            f"{label}: field {field!r} ({key}.field) holds {type(text).__name__}, not a string"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{label}: field {field!r} is no valid Unicode ({error.reason})") from None
    return text


def _import_datasets(key: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{key}.source=huggingface needs the package datasets, which is not installed: "
            "pip install -r requirements-huggingface.txt"
        ) from None
    return datasets


def _dataset_rows(source: Source, key: str, first: int) -> Iterator[tuple[str, Iterable[str]]]:
    datasets = _import_datasets(key)
    assert source.dataset is not None
    try:
        rows = datasets.load_dataset(
            source.dataset, source.dataset_config, split=source.dataset_split, streaming=True
        )
    except Exception as error:
        # The hub's client raises many kinds, none of its own.
        raise UserError(f"{key}.dataset={source.dataset}: {error}".splitlines()[0]) from error
    for number, row in enumerate(rows.skip(first) if first else rows, first):
        label = f"{source.dataset}, row {number}"
        yield label, (_text_of(row, source.field, label, key),)
