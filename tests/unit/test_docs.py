"""Commands in README.md and docs/: each parses, and its configuration loads."""

import functools
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from mlpmem_jax.__main__ import main, parse
from mlpmem_jax.commands import COMMANDS
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LAUNCH = ["bash", "launch/run.sh"]
MODULE = [".venv/bin/python", "-m", "mlpmem_jax"]
# What stands for something else on a page.
PLACEHOLDERS = {"FILE": "configs/tiny.yaml", "COMMAND": "run"}
# Programs of others, which the pages name and tests do not run.
OTHERS = ("xpk", "python3", ".venv-docs/bin/python", ".venv-docs/bin/mkdocs")


def fenced(page: Path, *languages: str) -> Iterator[str]:
    """Yields the text of fenced blocks."""
    text = page.read_text(encoding="utf-8")
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S):
        if language in languages:
            yield block


def command_lines(page: Path) -> list[list[str]]:
    """Returns the words of every command on a page, `&&` and comments taken away."""
    lines = []
    for language in ("bash", "console"):
        for block in fenced(page, language):
            text = block.replace("\\\n", " ")
            if language == "console":
                text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("$ "))
            for line in text.splitlines():
                words = shlex.split(line, comments=True)
                while "&&" in words:
                    lines.append(words[: words.index("&&")])
                    words = words[words.index("&&") + 1 :]
                lines += [words] if words else []
    return lines


def without_variables(words: list[str]) -> list[str]:
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return [PLACEHOLDERS.get(word, word) for word in words]


def arguments_of(words: list[str]) -> list[str] | None:
    """Returns what a command line gives to `mlpmem_jax`; None: it starts something else."""
    if words[:3] == MODULE:
        return words[3:]
    if words[:2] != LAUNCH:
        return None
    words = words[2:]
    place = next((k for k, word in enumerate(words) if word in COMMANDS), None)
    if place is not None:
        return words[place:]
    # The launcher's own flags, and then the quickstart.
    words = words[2:] if words[:1] == ["--with"] else words
    return ["run", *([] if "--config" in words else ["--config", "configs/quickstart.yaml"]), *words]


ALL = [
    pytest.param(without_variables(words), id=f"{page.relative_to(ROOT)}-{number}-{words[-1][:30]}")
    for page in PAGES
    for number, words in enumerate(command_lines(page))
]


@pytest.fixture
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def own_files(at_root, tmp_path):
    """Finds the YAML files that a page asks the reader to write: `first.yaml`."""
    [tutorial] = fenced(ROOT / "docs" / "tutorial.md", "yaml")
    (tmp_path / "first.yaml").write_text(tutorial, encoding="utf-8")
    return {"first.yaml": str(tmp_path / "first.yaml")}


def test_there_are_commands():
    assert len(ALL) > 40
    assert sum(arguments_of(case.values[0]) is not None for case in ALL) > 30


@pytest.mark.parametrize("words", ALL)
def test_command_parses_and_its_configuration_loads(words, own_files):
    """Of the package's commands; of others, the files that they name are there."""
    arguments = arguments_of(words)
    if arguments is not None and "decodr.num_layers=2" not in arguments:
        parse([own_files.get(word, word) for word in arguments])
    elif words[:2] == [".venv/bin/python", "-m"]:
        module = words[2]
        if module.startswith("benchmarks."):
            assert (ROOT / f"{module.replace('.', '/')}.py").exists()
        if module.startswith("mlpmem_jax."):
            assert (ROOT / f"{module.replace('.', '/')}.py").exists()
        if "-r" in words:
            assert (ROOT / words[words.index("-r") + 1]).exists()
    elif words[0] == "bash":
        assert (ROOT / words[1]).exists()
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
    elif words[0] != ".ci/run":
        assert words[0] in OTHERS, f"unknown program {words[0]}"


LAUNCHED = [case for case in ALL if case.values[0][:2] == LAUNCH and "-" in case.values[0][2][:1]]


@pytest.mark.parametrize("words", LAUNCHED)
def test_flags_of_the_launcher_are_known(words, at_root):
    """`--dry-run` of the launcher, before COMMAND: prints and runs nothing."""
    place = 4 if words[2] == "--target" else 2
    given = [*words[:place], "--dry-run", *words[place:]]
    done = subprocess.run(given, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def shown_errors() -> Iterator[tuple[list[str], str]]:
    for page in PAGES:
        for block in fenced(page, "console"):
            first, _, rest = block.partition("\n")
            if rest.startswith("error: "):
                yield shlex.split(first.removeprefix("$ ")), rest


def test_errors_on_the_pages_are_those_of_the_program(at_root, capsys):
    shown = list(shown_errors())
    assert shown
    for words, output in shown:
        assert main(arguments_of(words)) == 2
        assert capsys.readouterr().err == output


@functools.cache
def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), target


def test_every_page_is_in_the_site():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"[\w/-]+\.md", yaml.dump(yaml.safe_load(text)["nav"]))
    pages = {str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]}
    assert set(listed) == pages
    assert len(listed) == len(pages)


def test_every_shipped_configuration_is_listed():
    page = (ROOT / "docs" / "configs.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(configs/\w+\.yaml)` \|", page, re.M)
    shipped = [str(path.relative_to(ROOT)) for path in (ROOT / "configs").glob("*.yaml")]
    assert sorted(listed) == sorted(shipped)


def test_files_that_the_pages_name_exist():
    """Of design and contributing: a file that was moved is found here."""
    for name in ("design.md", "contributing.md"):
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        for path in re.findall(r"`((?:mlpmem_jax|tests|configs|launch|benchmarks)/[\w/.]+)`", text):
            assert (ROOT / path).exists(), path
        for path in re.findall(r"`([a-z_]+/[\w/]+\.py)`", text):
            assert any((ROOT / top / path).exists() for top in ("", "mlpmem_jax")), path


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
