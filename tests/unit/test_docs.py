"""Commands in README.md and docs/: each parses, and its configuration loads."""

import functools
import math
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from mlpmem_jax.__main__ import main, parse
from mlpmem_jax.parallel.mesh import mesh_sizes
from tests.conftest import ROOT
from tests.doc_pages import (
    LAUNCH,
    OTHERS,
    PAGES,
    arguments_of,
    command_lines,
    fenced,
    without_variables,
)

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
    """Finds the YAML files that pages ask the reader to write, by their names."""
    [tutorial] = fenced(ROOT / "docs" / "tutorial.md", "yaml")
    [growing] = fenced(ROOT / "docs" / "growing.md", "yaml")
    pretrained = "\n".join(fenced(ROOT / "docs" / "pretrained.md", "yaml"))  # With its table.
    # A tiny decoder in place of the reader's.
    golden = ROOT / "tests" / "unit" / "golden" / "pretrained" / "llama-tied"
    model = shutil.copytree(golden, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}", encoding="utf-8")
    pretrained = pretrained.replace("models/SmolLM2-135M", str(model)).replace("512", "64")
    files = {"first.yaml": tutorial, "growing.yaml": growing, "own-decoder.yaml": pretrained}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return {name: str(tmp_path / name) for name in files}


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


LAUNCHED = [
    case for case in ALL if case.values[0][:2] == LAUNCH and len(case.values[0]) > 2
    and case.values[0][2].startswith("--")
]  # fmt: skip


@pytest.mark.parametrize("words", LAUNCHED)
def test_flags_of_the_launcher_are_known(words, at_root):
    """`--dry-run` of the launcher, before COMMAND: prints and runs nothing."""
    place = 4 if words[2] == "--target" else 2
    given = [*words[:place], "--dry-run", *words[place:]]
    done = subprocess.run(given, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def num_devices(words: list[str], variables: str) -> int | None:
    """Returns the devices that a command line asks for, where it does."""
    line = " ".join([variables, *words])
    counts = (
        r"--processes (\d+) --devices-per-process (\d+)",
        r"--nodes (\d+) --gpus-per-node (\d+)",
        r"(device_count)=(\d+)",
    )
    for pattern in counts:
        if found := re.search(pattern, line):
            return math.prod(int(number) for number in found.groups() if number.isdigit())
    return None


def on_devices() -> Iterator[tuple[list[str], int]]:
    for page in PAGES:
        for words in command_lines(page):
            known = without_variables(words)
            count = num_devices(known, words[0])
            if count is not None and arguments_of(known) is not None:
                yield known, count


def test_batches_fit_the_devices_that_a_command_asks_for(at_root):
    found = list(on_devices())
    assert len(found) >= 3
    for words, count in found:
        _, config, _ = parse(arguments_of(words))
        data, fsdp, _ = mesh_sizes(config.mesh, count)
        for size in (config.pretrain.batch_size, config.train.batch_size):
            assert size % (data * fsdp) == 0, words


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


def without_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


@functools.cache
def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(page), re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page)):
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


def test_every_requirements_file_is_listed_and_an_extra():
    page = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
    table = page.split("## Optional packages")[1].split("\n## ")[0]
    listed = re.findall(r"`requirements-(\w+)\.txt`", "".join(re.findall(r"^\|.*", table, re.M)))
    shipped = [path.stem.removeprefix("requirements-") for path in ROOT.glob("requirements-*.txt")]
    assert sorted(listed) == sorted(shipped)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["tool"]["setuptools"]["dynamic"]["optional-dependencies"]
    assert sorted(extras) == sorted(set(shipped) - {"docs"})
    for name, source in extras.items():
        assert source == {"file": [f"requirements-{name}.txt"]}


def test_files_that_the_pages_name_exist():
    """Of design and contributing: a file that was moved is found here."""
    for name in ("design.md", "contributing.md"):
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        for path in re.findall(r"`((?:mlpmem_jax|tests|configs|launch|benchmarks)/[\w/.]+)`", text):
            assert (ROOT / path).exists(), path
        for path in re.findall(r"`([a-z_]+/[\w/]+\.py)`", text):
            assert any((ROOT / top / path).exists() for top in ("", "mlpmem_jax")), path


def test_answers_of_the_readers_test_are_where_it_says():
    """Each name that an answer gives is defined in a file that it names."""
    page = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    table = page.split("## A reader's test")[1].split("\n## ")[0]
    rows = [line.split("|")[2] for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 20
    for answer in rows:
        words = re.findall("`([^`]+)`", answer)
        files = [ROOT / "mlpmem_jax" / w.removeprefix("mlpmem_jax/") for w in words if ".py" in w]
        assert files and all(file.is_file() for file in files), answer
        texts = [file.read_text(encoding="utf-8") for file in files]
        for name in (word for word in words if re.fullmatch(r"[A-Za-z_]\w*", word)):
            defined = rf"(?m)^\s*(?:def|class) {name}\b|^{name}\b"
            assert any(re.search(defined, text) for text in texts), (name, answer)


def test_output_of_the_quickstart_is_that_of_the_readme():
    [shown] = fenced(ROOT / "docs" / "quickstart.md", "text")
    assert shown in (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
