"""Where text comes from: which files a configuration names, and how each is read.

A *part* is one source with its files in a fixed order; the parts together are the corpus.
An *item* is a file, a JSONL record or a dataset row: text that arrives in blocks.
"""

import dataclasses
import functools
import os
import sysconfig
from collections.abc import Iterator, Sequence

from mlpmem_jax.config.data import CorpusConfig, Source
from mlpmem_jax.corpus.file_patterns import Identity, Match, match
from mlpmem_jax.corpus.files import read_text
from mlpmem_jax.corpus.records import Item, records_of
from mlpmem_jax.corpus.rows import dataset_rows, import_datasets
from mlpmem_jax.errors import UserError
from mlpmem_jax.store.array_specs import Split

# A text that several splits hold belongs to the one that is read first.
READING_ORDER: tuple[Split, ...] = ("test", "valid", "train")
_NOT_STDLIB = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)


@dataclasses.dataclass(frozen=True)
class Part:
    """One source of the corpus.

    Attributes:
        key: Its place in the configuration, for messages.
        source: Its configuration.
        files: Paths, in reading order; a Hugging Face dataset has one entry, its name.
        split: The split that all its documents belong to; None draws it by content.
        num_other_names: Further names of its files, under which they are not read again.
    """

    key: str
    source: Source
    files: tuple[str, ...]
    split: Split | None = None
    num_other_names: int = 0

    @property
    def is_dataset(self) -> bool:
        """Whether it is a Hugging Face dataset and not files."""
        return self.source.source == "huggingface"

    def items(self, file: int, first: int = 0) -> Iterator[Item]:
        """Yields the items of a file from number `first` on: what reads each, or what is wrong.

        Raises:
            UserError: The file or dataset cannot be read.
            TryAgain: A connection broke.
        """
        path = self.files[file]
        if self.source.source == "jsonl":
            yield from records_of(path, self.source.field, self.key, first)
        elif self.is_dataset:
            yield from dataset_rows(self.source, self.key, first)
        elif first == 0:
            yield functools.partial(read_text, path)


def find_parts(corpus: CorpusConfig) -> tuple[Part, ...]:
    """Lists the files of every source in reading order, each file once.

    Raises:
        UserError: One line for each pattern that matches nothing, each unreadable path and each
            two patterns that put a file into different splits.
    """
    finder = _Finder()
    explicit = [split for split in READING_ORDER if getattr(corpus, split).paths]
    for split in explicit:
        finder.add_files(f"corpus.{split}", corpus, getattr(corpus, split).paths, split)
    if explicit and corpus.paths:
        finder.mistakes.append(
            f"corpus.paths={list(corpus.paths)} is not read when corpus.train.paths, "
            "corpus.valid.paths and corpus.test.paths are given: drop one or the other"
        )
    if not explicit:
        finder.add("corpus", corpus, None)
    for number, source in enumerate(corpus.more):
        # Beside explicit splits, further sources are more to train on.
        finder.add(f"corpus.more.{number}", source, "train" if explicit else None)
    finder.refuse()
    return tuple(finder.parts)


class _Finder:
    """Finds the files of one source after the other, and knows those that it has found."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.mistakes: list[str] = []
        # The first to name a file: its split, the pattern, and the path.
        self._owners: dict[Identity, tuple[Split | None, str, str]] = {}
        # A file of records may be read for one field and again for another.
        self._readings: set[tuple[Identity, str, str]] = set()
        self._shared: dict[tuple[str, str], list[str]] = {}

    def add(self, key: str, source: Source, split: Split | None) -> None:
        """Adds a source of any kind."""
        if source.source == "stdlib":
            root, found = stdlib_files()
            files = tuple(os.path.join(root, name) for name in found)
            self.parts.append(Part(key, source, files, split))
        elif source.source == "huggingface":
            import_datasets(key)
            names = (source.dataset or "", source.dataset_config or "", source.dataset_split)
            self.parts.append(Part(key, source, (":".join(names),), split))
        else:
            self.add_files(key, source, source.paths, split)

    def add_files(
        self, key: str, source: Source, patterns: Sequence[str], split: Split | None
    ) -> None:
        """Adds the files that patterns name, those left out that are there already."""
        files, num_other_names = [], 0
        for one in match(patterns, f"{key}.paths", self.mistakes):
            named = f"{key}.paths {one.pattern!r}"
            owner = self._owners.setdefault(one.identity, (split, named, one.path))
            reading = (one.identity, source.source, source.field)
            if owner[0] != split:
                self._share(owner[1:], named, one)
            elif reading in self._readings:
                num_other_names += one.num_names
            else:
                self._readings.add(reading)
                files.append(one.path)
                num_other_names += one.num_names - 1
        self.parts.append(Part(key, source, tuple(files), split, num_other_names))

    def _share(self, owner: tuple[str, str], named: str, one: Match) -> None:
        other, path = owner
        shown = path if path == one.path else f"{path} (also {one.path})"
        self._shared.setdefault((other, named), []).append(shown)

    def refuse(self) -> None:
        """Raises what was wrong, one line each."""
        for (one, other), paths in self._shared.items():
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            self.mistakes.append(
                f"{other} and {one} both hold {paths[0]}{more}: a file belongs to one split"
            )
        if self.mistakes:
            raise UserError(list(dict.fromkeys(self.mistakes)))


def stdlib_files() -> tuple[str, list[str]]:
    """Returns the standard library's directory and the Python files in it.

    Without tests and installed packages.
    """
    root = sysconfig.get_paths()["stdlib"]
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_STDLIB]
        relative = os.path.relpath(folder, root)
        names += [os.path.normpath(os.path.join(relative, f)) for f in files if f.endswith(".py")]
    return root, sorted(names, key=lambda one: one.split(os.sep))
