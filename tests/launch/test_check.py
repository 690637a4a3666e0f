"""`mlpmem_jax.launching --check`: what is refused before a launcher sends a command away."""

from pathlib import Path

import pytest

from mlpmem_jax.launching import main
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.run_record import RunRecord
from tests.conftest import ROOT

TINY = str(ROOT / "configs" / "tiny.yaml")


def _check(workdir, command, *arguments, shares_files=True):
    flags = ["--check", *(["--shares-files"] if shares_files else [])]
    return main([*flags, command, "--config", TINY, "--workdir", str(workdir), *arguments])


@pytest.mark.parametrize(
    ("command", "arguments", "missing"),
    [
        ("pretrain", [], ["tokens"]),
        ("embed", [], ["tokens", "decoder"]),
        ("evaluate", [], ["tokens", "index", "neighbors/test", "memory"]),
        ("generate", [], ["tokenizer", "memory"]),
        ("generate", ["--without-memory"], ["tokenizer", "decoder"]),
    ],
)
def test_missing_inputs_are_named_with_their_commands(
    tmp_path: Path, capsys, command, arguments, missing
):
    workdir = tmp_path / "run"
    # The text may lie on the machines alone: what is missing are artifacts.
    arguments = [*arguments, "corpus.source=text", "corpus.paths=['/not/here/*.txt']"]
    assert _check(workdir, command, *arguments) == 2
    told = capsys.readouterr().err
    for role in missing:
        assert (
            f"error: {command} needs {role}: {workdir}/run.json names no {role} artifact; "
            "make it with the command `"
        ) in told
    assert "/not/here" not in told
    assert not workdir.exists()
    # On a machine of its own, a local path says nothing.
    assert _check(workdir, command, *arguments, shares_files=False) == 0
    assert capsys.readouterr().err == ""


def _made(workdir: Path, role: str, number: str = "a1") -> Artifact:
    """A finished artifact of some settings, with its role in run.json."""
    kind = role.split("/")[0]
    artifact = Artifact(workdir / "artifacts", f"{kind}/{number}", kind)
    artifact.begin({})
    artifact.finish()
    RunRecord.update(workdir, None, {role: artifact.relative}, {})
    return artifact


def test_inputs_go_by_the_roles_of_the_run_directory(tmp_path: Path, capsys):
    """Which artifact a command reads depends on the devices there; here it is that of its role."""
    workdir = tmp_path / "run"
    _made(workdir, "tokens")
    assert _check(workdir, "embed") == 2
    told = capsys.readouterr().err
    assert "embed needs decoder: " in told and "needs tokens" not in told
    decoder = _made(workdir, "decoder")
    assert _check(workdir, "embed") == 0
    (decoder.path / "manifest.json").unlink()
    assert _check(workdir, "embed") == 2
    assert (
        f"error: {decoder.path}: decoder does not exist; make it with the command `pretrain`"
        in (capsys.readouterr().err)
    )


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
