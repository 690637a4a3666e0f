"""Artifacts by content: beside each other, shared by work directories, removed, moved."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mlpmem_jax as mm
from mlpmem_jax.__main__ import main
from mlpmem_jax.config.load import load_config
from mlpmem_jax.config.schema import Config
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.resolve import resolved
from mlpmem_jax.store.run_record import RUNS, RunRecord
from tests.pipeline import tokenizing
from tests.pipeline.conftest import TINY
from tests.pipeline.tokenizing import files_of

ROOT = Path(__file__).resolve().parents[2]
SHORTER = "train.num_steps=4"
DISPATCHED = "mlpmem_jax.training.monitor.Monitor.dispatched"


def _main(command: str, workdir: Path | str, *more: str) -> int:
    return main([command, "--config", str(TINY), "--workdir", str(workdir), *more])


def _artifacts(workdir: Path | str, *overrides: str) -> Artifacts:
    return Artifacts(resolved(load_config(TINY, overrides, {"workdir": str(workdir)})))


def _tree(folder: Path) -> dict[str, bytes]:
    """All files of a store but the names of the work directories that use it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and RUNS not in path.parts
    }


def _made(output: str) -> list[str]:
    """Roles of the artifacts that were made, in their order."""
    return re.findall(r"^(.+) \(\w{8}\): making", output, re.M)


def _table(run: Artifacts) -> bytes:
    return bytes((run.results.path / "evaluate.json").read_bytes())


@pytest.fixture
def run(tiny_run: Config, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(tiny_run.workdir, tmp_path / "run"))


def test_two_settings_lie_beside_each_other(run: Path, capsys: pytest.CaptureFixture[str]):
    first, second = _artifacts(run), _artifacts(run, SHORTER)
    before, table = _tree(run / "artifacts"), files_of(first.results)
    capsys.readouterr()
    assert _main("run", run, SHORTER) == 0
    shown = capsys.readouterr().out
    assert _made(shown) == ["memory", "results/evaluate"]
    assert shown.count(": complete (") == 11
    assert second.memory.relative != first.memory.relative
    assert second.memory.load().made_from == first.memory.load().made_from
    after = _tree(run / "artifacts")
    assert before.items() <= after.items() and files_of(first.results) == table
    new = {"/".join(name.split("/")[:2]) for name in after.keys() - before.keys()}
    assert new == {second.memory.relative}
    # And back: nothing is made, and commands without overrides mean the first again.
    assert RunRecord.read(run).roles["memory"] == second.memory.relative
    assert _main("run", run) == 0
    assert not _made(capsys.readouterr().out)
    assert RunRecord.read(run).roles["memory"] == first.memory.relative
    assert _tree(run / "artifacts") == after


@pytest.mark.parametrize(
    ("command", "override", "role", "maker", "difference"),
    [
        ("pretrain", "tokenizer.vocab_size=290", "tokens", "tokenize",
         "tokenizer.vocab_size=300, now 290"),
        ("embed", "pretrain.num_steps=6", "decoder", "pretrain", "pretrain.num_steps=8, now 6"),
        ("index", "datastore.key.layer=0.5", "datastore/train", "embed",
         "datastore.key.layer=1.0, now 0.5"),
        ("retrieve", "retrieval.num_leaves=7", "index", "index",
         'retrieval.num_leaves="auto", now 7'),
        ("train", "targets.num_tokens=4", "targets/train", "retrieve",
         "targets.num_tokens=8, now 4"),
        ("evaluate", "memory.num_layers=3", "memory", "train", "memory.num_layers=2, now 3"),
    ],
)  # fmt: skip
def test_missing_inputs_are_named_with_the_nearest(
    tiny_run: Config,
    capsys: pytest.CaptureFixture[str],
    command: str,
    override: str,
    role: str,
    maker: str,
    difference: str,
):
    run, workdir = Artifacts(tiny_run), Path(tiny_run.workdir)
    there = {"datastore/train": run.datastore("train"), "targets/train": run.targets("train")}
    nearest = there.get(role) or getattr(run, role)
    before = _tree(workdir)
    assert _main(command, workdir, override) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        rf"error: {workdir}/artifacts/{nearest.kind}/\w{{16}}: {role} does not exist; make it with "
        rf"the command `{maker}` \(the nearest is {nearest.path.name[:8]}: {re.escape(difference)}"
        r"\)",
        line,
    )
    assert _tree(workdir) == before


def test_where_there_is_nothing_none_is_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert _main("pretrain", tmp_path / "none") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("tokens does not exist; make it with the command `tokenize`")
    assert not (tmp_path / "none").exists()


def test_two_work_directories_share_a_store(
    tiny_run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    store = tmp_path / "store"
    shutil.copytree(f"{tiny_run.workdir}/artifacts", store, ignore=lambda *_: [RUNS])
    shared = (f"store={store}", SHORTER)
    one, two = tmp_path / "one", tmp_path / "two"
    capsys.readouterr()
    assert _main("run", one, *shared) == 0
    assert _made(capsys.readouterr().out) == ["memory", "results/evaluate"]
    before = _tree(store)
    assert _main("run", two, *shared) == 0
    assert _made(capsys.readouterr().out) == ["results/evaluate"]
    assert _tree(store) == before
    runs = [_artifacts(workdir, *shared) for workdir in (one, two)]
    assert _table(runs[0]) == _table(runs[1])
    assert runs[0].results.load().fingerprint == runs[1].results.load().fingerprint
    assert not any((workdir / "artifacts").exists() for workdir in (one, two))
    assert mm.open_run(two).results() == mm.open_run(one).results()
    assert _main("artifacts", two, *shared) == 0
    shown = capsys.readouterr().out
    (line,) = re.findall(rf"^  {runs[0].memory.relative} .*$", shown, re.M)
    assert line.endswith(f"{one}: memory; {two}: memory")


def test_a_work_directory_whose_store_holds_everything_is_registered(run: Path, tmp_path: Path):
    """Nothing is made for it, and yet it can be opened, and what it uses is kept."""
    other, store = tmp_path / "other", f"store={run}/artifacts"
    assert _main("train", other, store) == 0
    assert RunRecord.read(other).roles["memory"] == _artifacts(run).memory.relative
    assert mm.open_run(other).memory()
    assert _main("train", run, SHORTER) == 0
    before = _tree(run / "artifacts")
    assert _main("artifacts", run, "--remove-unused") == 0
    assert _tree(run / "artifacts") == before
    # It may only be out of sight; once it is forgotten, it uses nothing.
    shutil.rmtree(other)
    assert _main("artifacts", run, "--remove-unused") == 0
    assert _tree(run / "artifacts") == before
    for file in (run / "artifacts" / RUNS).iterdir():
        if str(other) in file.read_text():
            file.unlink()
    assert _main("artifacts", run, "--remove-unused") == 0
    assert not _artifacts(run).memory.path.exists()


def test_two_runs_at_the_same_time_make_each_artifact_once(tiny_run: Config, tmp_path: Path):
    store = tmp_path / "store"
    left_out = shutil.ignore_patterns(RUNS, "targets", "memory")
    shutil.copytree(f"{tiny_run.workdir}/artifacts", store, ignore=left_out)
    # Steps are slow, so that they meet.
    held = [str(ROOT / "tests" / "pipeline" / "killed.py"), DISPATCHED]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "KILLED_PACE": "2"}
    workdirs = [tmp_path / name for name in ("one", "two")]
    started = []
    for workdir in workdirs:
        arguments = ["run", "--config", str(TINY), "--workdir", str(workdir), f"store={store}"]
        command = [sys.executable, *held, "0", "after", *arguments]
        started.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    outputs = [process.communicate(timeout=500) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    made = [_made(output) for output, _ in outputs]
    assert sorted(made[0] + made[1]) == [
        "memory", "results/evaluate", "results/evaluate", "targets/train", "targets/valid",
    ]  # fmt: skip
    tables = [_table(_artifacts(workdir, f"store={store}")) for workdir in workdirs]
    assert tables[0] == tables[1] == _table(Artifacts(tiny_run))


def test_unused_artifacts_are_listed_and_removed(run: Path, capsys: pytest.CaptureFixture[str]):
    store, memory = run / "artifacts", _artifacts(run).memory
    assert _main("train", run, SHORTER) == 0
    before, unused = _tree(store), set(files_of(memory))
    roles = RunRecord.read(run).roles
    capsys.readouterr()

    def listed(*flags: str) -> dict[str, str]:
        assert _main("artifacts", run, *flags) == 0
        shown = capsys.readouterr().out
        return dict(re.findall(r"^  (\S+/\w{16}) .*?  (/.*|unused)$", shown, re.M))

    everything = listed()
    assert everything == {
        **{name: everything[name] for name in roles.values()},
        memory.relative: "unused",
    }
    for role, name in roles.items():
        assert f"{run}: {role}" in everything[name].split("; ")
    assert listed("--remove-unused", "--dry-run") == {memory.relative: "unused"}
    assert _tree(store) == before
    # Somebody else's file stops it, and nothing is removed.
    foreign = Path(memory.path) / "notes.txt"
    foreign.write_text("mine")
    assert _main("artifacts", run, "--remove-unused") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {foreign}: not written by this program")
    assert _tree(store) == {**before, f"{memory.relative}/notes.txt": b"mine"}
    foreign.unlink()
    assert listed("--remove-unused") == {memory.relative: "unused"}
    assert _tree(store) == {
        name: data for name, data in before.items() if not name.startswith(memory.relative)
    }
    assert unused and listed("--remove-unused") == {}


def test_what_a_used_artifact_is_made_from_is_used(run: Path, tmp_path: Path):
    """By another work directory, which names the memory alone."""
    store, made = run / "artifacts", _artifacts(run)
    known = RunRecord.read(run)
    (tmp_path / "other").mkdir()
    RunRecord.update(
        tmp_path / "other", str(store), {"memory": known.roles["memory"]}, known.sources
    )
    (run / "run.json").unlink()
    assert _main("artifacts", run, "--remove-unused") == 0
    left = {"/".join(Path(name).parts[:2]) for name in _tree(store)}
    gone = {made.datastore("test").relative, made.neighbors("test").relative}
    assert left == set(known.roles.values()) - gone


def test_a_damaged_record_of_another_work_directory_stops_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """What it uses is not known."""
    other = tmp_path / "other"
    assert _main("train", other, f"store={run}/artifacts") == 0
    assert _main("train", run, SHORTER) == 0
    record = other / "run.json"
    record.write_text(record.read_text().replace("memory", "memorx"))
    before = _tree(run / "artifacts")
    capsys.readouterr()
    assert _main("artifacts", run, "--remove-unused") == 2
    assert f"error: {record}: damaged" in capsys.readouterr().err
    assert _tree(run / "artifacts") == before


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[str, ...]]:
    """A run whose corpus is a folder of files, up to the memory; and its overrides."""
    folder = tmp_path_factory.mktemp("text")
    tokenizing.write_corpus(folder / "text")
    overrides = (
        "corpus.source=text", f"corpus.paths=[{folder}/text/*.txt]", "pretrain.num_steps=2",
        "pretrain.optimizer.warmup_steps=1", "train.num_steps=2", "train.optimizer.warmup_steps=1",
        "generate.interpolation=0.5",
    )  # fmt: skip
    for command in ("tokenize", "pretrain", "embed", "index", "retrieve", "train"):
        assert _main(command, folder / "run", *overrides) == 0
    return folder, overrides


def test_a_moved_run_without_its_corpus_generates_and_opens(
    text_run: tuple[Path, tuple[str, ...]], capsys: pytest.CaptureFixture[str]
):
    folder, overrides = text_run
    capsys.readouterr()
    assert _main("generate", folder / "run", *overrides) == 0
    sample = capsys.readouterr().out
    moved = folder / "elsewhere" / "moved"
    moved.parent.mkdir()
    (folder / "run").rename(moved)
    shutil.rmtree(folder / "text")
    assert _main("generate", moved, *overrides) == 0
    assert capsys.readouterr().out == sample
    opened = mm.open_run(moved)
    assert opened.tokens("valid").num_tokens > 0
    assert opened.model().generate(["def "], 3)
    # Commands that read no text go on from what was made of it; what reads it says what is missing.
    for command in ("pretrain", "embed", "index", "retrieve", "train"):
        assert _main(command, moved, *overrides) == 0
    assert not _made(capsys.readouterr().out)
    assert _main("embed", moved, *overrides, "corpus.attention=within") == 2
    assert 'corpus.attention="across", now "within"' in capsys.readouterr().err
    assert _main("tokenize", moved, *overrides) == 2
    assert "corpus.paths: " in capsys.readouterr().err


def test_a_moved_run_opens_with_its_results(run: Path, tiny_run: Config, tmp_path: Path):
    moved = tmp_path / "elsewhere"
    run.rename(moved)
    assert mm.open_run(moved).results() == mm.open_run(tiny_run.workdir).results()
