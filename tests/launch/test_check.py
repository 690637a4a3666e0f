"""`mlpmem_jax.launching --check`: what is refused before a launcher sends a command away."""

from pathlib import Path

import pytest

from mlpmem_jax.launching import main
from tests.conftest import ROOT

TINY = str(ROOT / "configs" / "tiny.yaml")


def _check(workdir, command, *arguments, shares_files=True):
    flags = ["--check", *(["--shares-files"] if shares_files else [])]
    return main([*flags, command, "--config", TINY, "--workdir", str(workdir), *arguments])


@pytest.mark.parametrize(
    ("command", "arguments", "missing"),
    [
        ("pretrain", [], ["tokens"]),
        ("embed", [], ["tokens", "decoder/base"]),
        ("evaluate", [], ["tokens", "index/base", "neighbors/base/test", "memory/base"]),
        ("generate", [], ["tokenizer", "memory/base"]),
        ("generate", ["--without-memory"], ["tokenizer", "decoder/base"]),
    ],
)
def test_missing_inputs_are_named_with_their_commands(
    tmp_path: Path, capsys, command, arguments, missing
):
    workdir = tmp_path / "run"
    assert _check(workdir, command, *arguments) == 2
    told = capsys.readouterr().err
    for name in missing:
        assert f"error: {workdir}/{name}: does not exist; make it with the command" in told
    assert not workdir.exists()
    # On a machine of its own, a local path says nothing.
    assert _check(workdir, command, *arguments, shares_files=False) == 0
    assert capsys.readouterr().err == ""


def test_what_the_command_makes_itself_is_not_missing(tmp_path: Path, capsys):
    assert _check(tmp_path / "run", "run") == 0
    assert capsys.readouterr().err == ""


def test_texts_that_are_not_there(tmp_path: Path, capsys):
    text = ["corpus.source=text", f"corpus.paths=['{tmp_path}/*.txt']"]
    for command in ("tokenize", "run"):
        assert _check(tmp_path / "run", command, *text) == 2
        assert f"'{tmp_path}/*.txt' matches no file" in capsys.readouterr().err
    (tmp_path / "one.txt").write_text("text")
    assert _check(tmp_path / "run", "run", *text) == 0


def test_a_bucket_that_is_not_reached_from_here_is_no_mistake(tmp_path: Path, capsys, monkeypatch):
    from mlpmem_jax import launching
    from mlpmem_jax.errors import ConfigError

    def refuse(*_):
        raise ConfigError("workdir=gs://one/run: no credentials")

    monkeypatch.setattr(launching, "check_reachable", refuse)
    assert _check("gs://one/run", "pretrain", shares_files=False) == 0
    told = capsys.readouterr().err
    assert told == (
        "launch: the inputs of pretrain are not checked here: workdir=gs://one/run: "
        "no credentials\n"
    )
