"""The tutorial and the Python examples of docs/, run as a reader runs them."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpmem_jax.__main__ import main
from mlpmem_jax.config.schema import Config
from tests.conftest import ROOT
from tests.doc_pages import arguments_of, command_lines, fenced
from tests.pipeline import changing

DOCS = ROOT / "docs"
QUICKSTART = 'load_config("configs/quickstart.yaml")'
OPENED = 'open_run("runs/quickstart")'


def _run(block: str, config: Config, names: dict[str, Any]) -> dict[str, Any]:
    """Runs an example on a finished tiny run in place of the quickstart's."""
    tiny = f'load_config("configs/tiny.yaml", (), {{"workdir": {config.workdir!r}}})'
    text = block.replace(QUICKSTART, tiny)
    text = text.replace(OPENED, f"open_run({config.workdir!r})")
    text = text.replace("/path/to/runs/quickstart", config.workdir)
    exec(compile(text, "example", "exec"), names)
    return names


def test_the_api_gives_log_probabilities_text_and_arrays(
    tiny_run: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(ROOT)
    score, generate, arrays = fenced(DOCS / "api.md", "python")
    assert OPENED in score
    names = _run(score, tiny_run, {})
    lines = capsys.readouterr().out.splitlines()
    assert float(lines[0]) == names["run"].results()["systems"]["memory"]["test_nats"]
    scores = names["scores"]
    logprobs = [float(line.split()[-1]) for line in lines[1:-1]]
    np.testing.assert_allclose(logprobs, scores.logprob_T, atol=1e-3)
    # An untrained network is near the uniform distribution of its 300 tokens.
    assert scores.nats / len(logprobs) == pytest.approx(np.log(300), abs=1.5)
    _run(generate, tiny_run, names)
    assert capsys.readouterr().out.startswith("def read_file(path):")
    _run(arrays, tiny_run, names)
    assert capsys.readouterr().out.splitlines()[-1] == "32 2"


def test_arrays_are_read_in_two_ways(
    tiny_run: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(ROOT)
    shown = []
    for block in fenced(DOCS / "artifacts.md", "python"):
        _run(block, tiny_run, {})
        shown.append(capsys.readouterr().out.splitlines()[-1])
    shapes = [re.match(r"\((\d+), 32\)", line) for line in shown]
    assert len(shown) == 2
    assert all(shapes)
    assert shown[0] == shown[1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_corpus_grows_and_shrinks_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every command of the page in its order, on texts at the places that the page names."""
    [configuration] = fenced(DOCS / "growing.md", "yaml")
    (tmp_path / "growing.yaml").write_text(configuration, encoding="utf-8")
    changing.write_documents(tmp_path / "base", range(40))
    for number, file in enumerate(changing.write_documents(tmp_path / "new", range(100, 104))):
        file.rename(file.with_name(f"text-{number}.txt"))
    changing.write_documents(tmp_path / "held-out", range(110, 113))
    monkeypatch.chdir(tmp_path)
    ran = []
    for words in command_lines(DOCS / "growing.md"):
        arguments = arguments_of(words)
        if arguments is None:  # What measures the costs that the page states.
            assert words[2] == "benchmarks.append"
            continue
        assert main(arguments) == 0, words
        ran.append(arguments[0])
    assert ran.count("append") == 2 and {"remove", "compact", "evaluate"} <= set(ran)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_tutorial_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Every command of the page in its order, on the text that the page names."""
    monkeypatch.chdir(ROOT)
    [configuration] = fenced(DOCS / "tutorial.md", "yaml")
    file, workdir = tmp_path / "first.yaml", tmp_path / "run"
    file.write_text(configuration, encoding="utf-8")
    ran = []
    for words in command_lines(DOCS / "tutorial.md"):
        arguments = arguments_of(words)
        assert arguments is not None
        given = [str(file) if word == "first.yaml" else word for word in arguments]
        assert main([*given, "--workdir", str(workdir)]) == 0, words
        ran.append(arguments[0])
    assert ran[:2] == ["run", "tokenize"]
    assert {"pretrain", "embed", "index", "retrieve", "train", "evaluate", "generate"} <= set(ran)
    # The walk-through of own text has the same configuration: what is there is reused.
    steps = [words for words in command_lines(DOCS / "own-text.md") if "first.yaml" in words]
    for words in steps:
        given = [str(file) if word == "first.yaml" else word for word in arguments_of(words) or ()]
        assert main([*given, "--workdir", str(workdir)]) == 0, words
    assert len(steps) == 4
    # Of the run, and of the memory that the last page of it changes.
    assert len(list((workdir / "results").glob("evaluate-*/evaluate.json"))) == 2
    assert "\nThe memory" in capsys.readouterr().out
