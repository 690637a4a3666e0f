"""Which files patterns name: each once, brackets as they are written, one split a file."""

import gzip
import os
from pathlib import Path

import pytest

from mlpmem_jax.config.data import CorpusConfig
from mlpmem_jax.corpus.sources import find_parts
from mlpmem_jax.corpus.stream import Corpus
from mlpmem_jax.errors import UserError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """80 files in `d`, of which `d/loop` is a link to `d` itself."""
    monkeypatch.chdir(tmp_path)
    for number in range(80):
        path = tmp_path / "d" / str(number % 4) / f"{number:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"document {number}")
    (tmp_path / "d" / "loop").symlink_to(".")
    return tmp_path


def files(*paths: str, **config: object) -> list[str]:
    parts = find_parts(CorpusConfig(source="text", paths=paths, **config))  # type: ignore[arg-type]
    return [path for part in parts for path in part.files]


def test_links_that_lead_round_in_circles(folder: Path) -> None:
    found = files("d/**/*.txt")
    assert found == sorted(str(path) for path in Path("d").glob("[0-3]/*.txt"))
    assert len(found) == 80
    # Two links of this kind have 2 ** 40 ways before the system stops them.
    (folder / "d" / "1" / "other").symlink_to("..")
    (folder / "d" / "2" / "again").symlink_to("../1")
    assert files("d/**/*.txt") == files("**/*.txt") == found
    assert files("d/**") == found


def test_every_name_of_a_file_is_one_file(folder: Path) -> None:
    (folder / "d" / "a-link.txt").symlink_to("0/00.txt")
    os.link("d/0/04.txt", "d/0/99.txt")
    (folder / "e").symlink_to("d")
    parts = find_parts(
        CorpusConfig(
            source="text",
            paths=["d/0/*.txt", "d/a-link.txt", str(folder / "d/0/08.txt"), "e/0/08.txt"],
            more=[{"source": "text", "paths": ["d/*/0*.txt", "d/1/01.txt"]}],
        )
    )
    first, more = parts
    assert first.files == tuple(f"d/0/{number:02}.txt" for number in range(0, 80, 4))
    # The link, the hard link, and 08.txt by its absolute path and through a folder's link.
    assert first.num_other_names == 4
    assert all("/0/" not in path for path in more.files) and "d/1/01.txt" in more.files
    corpus = Corpus(CorpusConfig(source="text", paths=["d/0/00.txt", "d/a-link.txt"]))
    assert [piece.text for piece in corpus.pieces()] == ["document 0"]
    assert corpus.notes() == ["corpus: 1 further names of files left out: each is read once"]


@pytest.mark.parametrize(
    ("paths", "num_names", "num_copies"),
    [
        (["d/0/00.txt", "d/0/00.txt"], 1, 0),
        (["d/0/00.txt", "./d/0/00.txt", "d//0/../0/00.txt"], 1, 0),
        (["d/0/00.*", "d/*/00.txt", "d/**/00.txt"], 1, 0),
        (["d/0/00.txt", "{folder}/d/0/00.txt"], 2, 0),
        (["link.txt", "./link.txt", "d/0/00.txt", "folder/0/00.txt"], 3, 0),
        (["hard.txt", "d/0/00.txt", "link.txt"], 3, 0),
        (["copy.txt", "d/0/00.txt", "./copy.txt"], 1, 1),
        (["copy.txt.gz", "copy.txt", "mark.txt", "d/0/00.txt"], 1, 3),
    ],
)
def test_a_text_is_read_once_and_that_is_said_once(
    folder: Path, paths: list[str], num_names: int, num_copies: int
) -> None:
    """Other spellings of one name say nothing, other names are a note, copies are counted."""
    content = (folder / "d/0/00.txt").read_bytes()
    (folder / "link.txt").symlink_to("d/0/00.txt")
    (folder / "folder").symlink_to("d")
    os.link("d/0/00.txt", "hard.txt")
    (folder / "copy.txt").write_bytes(content)
    (folder / "copy.txt.gz").write_bytes(gzip.compress(content))
    (folder / "mark.txt").write_bytes("\ufeff".encode() + content)
    named = [path.format(folder=folder) for path in paths]
    corpus = Corpus(CorpusConfig(source="text", paths=named))
    assert [piece.text for piece in corpus.pieces()] == ["document 0"]
    others = num_names - 1
    note = f"corpus: {others} further names of files left out: each is read once"
    assert corpus.notes() == [note] * bool(others)
    assert corpus.position.left_out.get("duplicate_documents", 0) == num_copies


def test_a_file_of_records_may_be_read_for_two_fields(folder: Path) -> None:
    (folder / "x.jsonl").write_text('{"question": "why", "answer": "so"}\n')
    source = {"source": "jsonl", "paths": ["x.jsonl"]}
    more = [{**source, "field": "answer"}, {**source, "field": "question"}]
    corpus = Corpus(CorpusConfig(**source, field="question", more=more))  # type: ignore[arg-type]
    assert [piece.text for piece in corpus.pieces()] == ["why", "so"]


@pytest.mark.parametrize("name", ["absolute", "link", "hard link", "more"])
def test_a_file_belongs_to_one_split(folder: Path, name: str) -> None:
    tested = {
        "absolute": str(folder / "d/0/00.txt"),
        "link": "link.txt",
        "hard link": "hard.txt",
        "more": "d/1/01.txt",
    }[name]
    (folder / "link.txt").symlink_to("d/0/00.txt")
    os.link("d/0/00.txt", "hard.txt")
    given = {
        "train": {"paths": ["d/0/*.txt"]},
        "valid": {"paths": ["d/2/*.txt"]},
        "test": {"paths": [tested]},
    }
    more = [{"source": "text", "paths": ["d/1/*.txt"]}] if name == "more" else []
    with pytest.raises(UserError) as caught:
        find_parts(CorpusConfig(source="text", **given, more=more))  # type: ignore[arg-type]
    (message,) = caught.value.messages
    other = "corpus.more.0.paths 'd/1/*.txt'" if more else "corpus.train.paths 'd/0/*.txt'"
    assert message.startswith(f"{other} and corpus.test.paths {tested!r} both hold ")
    assert "d/0/00.txt" in message or "d/1/01.txt" in message


def test_what_exists_as_it_is_written_is_no_pattern(folder: Path) -> None:
    for name in ("exp[1]/a.txt", "exp[1]/b[2].txt", "exp1/c.txt", "exp[1]/x/d.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    assert files("exp[1]/a.txt") == files("exp[1]/a*") == files("exp[[]1]/a*") == ["exp[1]/a.txt"]
    assert files("exp[1]/b[2].txt") == ["exp[1]/b[2].txt"]
    assert files("exp[1]/**/*.txt") == ["exp[1]/a.txt", "exp[1]/b[2].txt", "exp[1]/x/d.txt"]
    # Another folder has such a name, this one has not: here it is a pattern.
    assert files("exp[12]/*.txt") == ["exp1/c.txt"]


def test_a_pattern_with_a_bracket_that_matches_nothing_says_how_it_is_written(folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        files("run[3]/*.txt", "none/*.txt", "d", "/dev/null")
    assert list(caught.value.messages) == [
        "corpus.paths: 'run[3]/*.txt' matches no file (a bracket that is part of a name is written "
        "[[]: 'run[[]3]/*.txt')",
        "corpus.paths: 'none/*.txt' matches no file",
        "corpus.paths: 'd' is a directory; name its files, for example 'd/**/*.txt'",
        "corpus.paths: '/dev/null' is no regular file",
    ]


def test_patterns_are_those_of_the_shell(folder: Path) -> None:
    for name in ("d/.hidden/h.txt", "d/.dot.txt", "d/0/sub.d/z.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "d" / "nowhere.txt").symlink_to("gone")
    assert files("d/*/sub.?/[x-z].txt") == ["d/0/sub.d/z.txt"]
    assert files("d/.*.txt") == ["d/.dot.txt"]
    assert files("d/.hidden/*") == ["d/.hidden/h.txt"]
    assert len(files("d/**/*.txt")) == 81
    assert files(f"{folder}/./d/../d/0/00.t*") == [f"{folder}/d/0/00.txt"]
