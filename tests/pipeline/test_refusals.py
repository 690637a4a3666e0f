"""What is refused, with one line for each mistake, before anything is computed or written."""

import json
import shutil
import sys
from pathlib import Path

import jax
import pytest
from etils import epath

from mlpmem_jax.__main__ import main
from mlpmem_jax.config.load import load_config
from mlpmem_jax.config.schema import Config
from mlpmem_jax.pipeline.compile import _checked
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.resolve import resolved
from mlpmem_jax.retrieval import engine
from mlpmem_jax.store.contents import foreign_file
from tests.pipeline.conftest import TINY


def _start(command: str, workdir: Path | str, *overrides: str) -> int:
    return main([command, "--config", str(TINY), "--workdir", str(workdir), *overrides])


def _errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]


def _artifacts(workdir: Path, *overrides: str) -> Artifacts:
    return Artifacts(resolved(load_config(TINY, overrides, {"workdir": str(workdir)})))


def _path(workdir: Path, role: str) -> Path:
    """Returns where an artifact lies, or will lie, for example "targets/valid"."""
    name, *split = role.split("/")
    artifact = getattr(_artifacts(workdir), name)
    return Path((artifact(*split) if split else artifact).path)


def _times(workdir: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}


@pytest.fixture
def copied_run(tiny_run: Config, tmp_path: Path) -> Path:
    """A finished run that may be changed."""
    return shutil.copytree(tiny_run.workdir, tmp_path / "run")


def test_mistakes_of_all_stages_are_reported_in_one_start(tmp_path, capsys, monkeypatch):
    """One of the text, one of the devices, one of the installation."""
    monkeypatch.setattr(engine, "is_approximate_installed", lambda: False)
    overrides = (
        "corpus.source=text", f"corpus.paths=['{tmp_path}/*.none']", "retrieval.engine=scann",
        "pretrain.batch_size=7", "train.batch_size=9", "datastore.batch_size=5",
    )  # fmt: skip
    mesh = jax.make_mesh((2, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices() * 2)
    monkeypatch.setattr("mlpmem_jax.parallel.mesh.make_mesh", lambda config: mesh)
    assert _start("run", tmp_path / "run", *overrides) == 2
    errors = _errors(capsys)
    expected = (
        "*.none", "pretrain.batch_size=7", "train.batch_size=9", "datastore.batch_size=5",
        "retrieval.engine=scann",
    )  # fmt: skip
    assert len(errors) == len(expected)
    for words in expected:
        assert sum(words in line for line in errors) == 1
    assert not (tmp_path / "run").exists()


def test_more_neighbours_than_rows_cost_no_training(tmp_path, capsys):
    """How many rows there are is known once there are tokens."""
    wanted = ("retrieval.engine=exact", "retrieval.num_neighbors=900000")
    assert _start("run", tmp_path / "run", *wanted) == 2
    (line,) = _errors(capsys)
    assert "retrieval.num_neighbors=900000" in line and "other rows" in line
    made = {path.name for path in (tmp_path / "run").iterdir()}
    assert made == {"config.yaml", "run.json", "text-digests.json", "artifacts"}
    kinds = {path.name for path in (tmp_path / "run" / "artifacts").iterdir()}
    assert kinds == {".runs", "tokenizer", "tokens"}


def test_a_missing_package_is_noticed_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "scann", None)
    assert _start("run", tmp_path / "run", "retrieval.engine=scann") == 2
    (line,) = _errors(capsys)
    assert "retrieval.engine=scann" in line and "retrieval.engine=routed" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "key", "before", "now"),
    [("tokenize", "tokenizer.vocab_size", 300, 320), ("pretrain", "pretrain.num_steps", 8, 4)],
)
def test_another_tokenizer_or_decoder_is_made_beside_the_old_one(
    copied_run: Path, capsys, command: str, key: str, before: int, now: int
):
    """What was made from the old one goes on being used with it, and with nothing else."""
    files, changed = _times(copied_run / "artifacts"), f"{key}={now}"
    assert _start(command, copied_run, changed) == 0
    capsys.readouterr()
    assert _start("generate", copied_run, changed) == 2
    (line,) = _errors(capsys)
    nearest = _artifacts(copied_run).memory.path.name[:8]
    assert f"{_artifacts(copied_run, changed).memory.path}: the memory is not trained yet" in line
    assert f"(the nearest is {nearest}: {key}={before}, now {now})" in line
    assert _start("generate", copied_run) == 0
    left = _times(copied_run / "artifacts")
    assert {path: left[path] for path in files if path.is_file()} == {
        path: time for path, time in files.items() if path.is_file()
    }


def test_a_memory_of_a_decoder_that_was_rebuilt_with_other_bits(copied_run: Path, capsys):
    run = _artifacts(copied_run)
    decoder, made = run.decoder, run.decoder.load()
    decoder.begin(made.made_from)
    now = decoder.finish(counts={**made.counts, "rebuilt": 1}, files=made.files).fingerprint
    assert _start("generate", copied_run) == 2
    (line,) = _errors(capsys)
    then_and_now = f'{decoder.relative}="{made.fingerprint}", now "{now}"'
    assert f"{run.results.path}: results/evaluate is stale" in line and then_and_now in line
    assert _start("generate", copied_run, "generate.interpolation=0.5") == 2
    (line,) = _errors(capsys)
    assert f"{run.memory.path}: memory was trained with another {decoder.path}" in line
    assert f"({made.fingerprint}, now {now}); rebuild it with `train --rebuild`" in line
    assert _start("run", copied_run) == 2
    (line,) = _errors(capsys)
    assert f"{run.datastore('train').path}: datastore/train is stale" in line
    assert then_and_now in line and "`embed --rebuild`" in line


def test_what_is_trained_again_to_the_same_bits_is_the_same(copied_run: Path, capsys):
    """Orbax writes times into files; what was made from the network is not stale."""
    run = _artifacts(copied_run)
    made, later = run.decoder.load(), _times(Path(run.memory.path))
    shutil.rmtree(run.decoder.path)
    assert _start("pretrain", copied_run) == 0
    again = run.decoder.load()
    assert again.files != made.files and again.created > made.created
    assert again.fingerprint == made.fingerprint and again.content == made.content
    capsys.readouterr()
    assert _start("run", copied_run) == 0
    assert ": making" not in capsys.readouterr().out
    assert _times(Path(run.memory.path)) == later


@pytest.mark.parametrize("kind", ["decoder", "memory"])
def test_a_flipped_byte_in_finished_weights(copied_run: Path, capsys, kind: str):
    """Orbax would restore it without a word."""
    checkpoints = _path(copied_run, kind) / "checkpoints"
    last = max(checkpoints.iterdir(), key=lambda path: int(path.name))
    files = [path for path in (last / "params").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert _start("generate", copied_run) == 2
    (line,) = _errors(capsys)
    assert str(largest) in line and "damaged" in line


def test_damaged_progress_of_tokenize_is_named(tmp_path, capsys):
    config_dir = tmp_path / "run"
    assert _start("tokenize", config_dir) == 0
    tokens = _path(config_dir, "tokens")
    (tokens / "manifest.json").rename(tokens / "building.json")
    (tokens / "progress.npz").write_bytes(b"PK\x03\x04 this is no archive")
    capsys.readouterr()
    assert _start("tokenize", config_dir) == 2
    (line,) = _errors(capsys)
    assert "progress.npz: damaged" in line and "--rebuild" in line


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="there is no /sys/kernel here")
def test_a_directory_that_nobody_may_write(capsys):
    """Permissions do not bind root; the kernel's own file system does."""
    assert _start("tokenize", "/sys/kernel/mlpmem-run") == 2
    (line,) = _errors(capsys)
    assert "/sys/kernel/mlpmem-run" in line


def test_a_truncated_file_of_the_index_is_noticed(tiny_run: Config, tmp_path, monkeypatch):
    """A full disk cuts files short, and ScaNN does not say so."""
    pytest.importorskip("scann")
    from mlpmem_jax.errors import UserError
    from mlpmem_jax.retrieval import approximate
    from mlpmem_jax.retrieval.engine import StoredKeys

    config = tiny_run
    keys = StoredKeys(Artifacts(config).datastore("train"))
    written = approximate._check_written

    def cut(path, files, rows):
        largest = max(
            (Path(path / name) for name in files if name.endswith(".npy")),
            key=lambda file: file.stat().st_size,
        )
        with open(largest, "r+b") as file:
            file.truncate(largest.stat().st_size // 2)
        written(path, files, rows)

    monkeypatch.setattr(approximate, "_check_written", cut)
    with pytest.raises(UserError, match="could not be written whole; is the disk full"):
        for _ in approximate.build_shards(keys, Artifacts(config).index.path, config.retrieval):
            pass


def test_every_file_of_a_run_is_known(tiny_run: Config):
    """What no artifact may hold would stop a rebuild: a new file needs an entry in contents.py."""
    for file in Path(tiny_run.workdir).rglob("manifest.json"):
        kind = json.loads(file.read_text())["kind"]
        assert foreign_file(epath.Path(file.parent), kind) is None


@pytest.mark.parametrize("flags", [(), ("--rebuild",)])
@pytest.mark.parametrize(
    ("command", "role", "name"),
    [("tokenize", "tokens", "mine"), ("tokenize", "tokenizer", "tokenizer.json"),
     ("tokenize", "tokens", "train/token/c/0"), ("run", "decoder", "weights.bin"),
     ("run", "results", "evaluate.json"), ("run", "targets/valid", "temperature.json")],
)  # fmt: skip
def test_files_of_the_users_in_the_place_of_artifacts(tmp_path, capsys, command, role, name, flags):
    mine = _path(tmp_path / "run", role) / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert _start(command, tmp_path / "run", *flags) == 2
    (line,) = _errors(capsys)
    assert f"{mine}: not written by this program" in line
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == [mine]
    assert mine.read_text() == "mine"


@pytest.mark.parametrize(
    ("command", "role", "name"),
    [("pretrain", "decoder", "weights.bin"),
     ("embed", "datastore/test", "key/c/mine"),
     ("index", "index", "notes.txt"), ("retrieve", "targets/valid", "prob.npy"),
     ("train", "memory", "checkpoints/best"), ("evaluate", "results", "notes.csv")],
)  # fmt: skip
def test_files_of_the_users_within_artifacts_stop_a_rebuild(
    copied_run: Path, capsys, command: str, role: str, name: str
):
    mine = _path(copied_run, role) / name
    mine.write_text("mine")
    before = _times(copied_run)
    assert _start(command, copied_run, "--rebuild") == 2
    (line,) = _errors(capsys)
    assert f"{mine}: not written by this program" in line
    assert _times(copied_run) == before


def test_damage_upstream_is_found_before_targets_go(copied_run: Path, capsys):
    """Here in the decoder, which `embed --rebuild` reads: nothing of the datastore is touched."""
    last = _path(copied_run, "decoder") / "checkpoints" / "8"
    file = max((p for p in last.rglob("*") if p.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    before = _times(copied_run)
    assert _start("embed", copied_run, "--rebuild") == 2
    (line,) = _errors(capsys)
    assert f"{file}: damaged" in line and "`pretrain --rebuild`" in line
    assert _times(copied_run) == before


def test_a_report_of_compile_replaces_none_but_such(tmp_path, capsys):
    for text in ("mine", "{}", ""):
        mine = tmp_path / "report.json"
        mine.write_text(text)
        assert _start("compile", tmp_path / "run", "--output", str(mine)) == 2
        (line,) = _errors(capsys)
        assert f"--output {mine}: is there" in line
        assert mine.read_text() == text
    (tmp_path / "report.json").write_text('{"schema": 1, "topology": "local", "memory": {}}')
    assert _checked(str(mine)) == mine


@pytest.mark.parametrize("command", ["train", "run"])
def test_a_teacher_without_targets_costs_no_work(tiny_run, tmp_path, capsys, command):
    """Its own directory is such a teacher, too: nothing makes targets then."""
    for teacher in (tmp_path / "teacher", tmp_path / "run"):
        assert _start(command, tmp_path / "run", f"targets.workdir={teacher}") == 2
        (line,) = _errors(capsys)
        assert f"targets/train (targets.workdir={teacher}) does not exist" in line
        assert not (tmp_path / "run").exists()
    teacher = shutil.copytree(tiny_run.workdir, tmp_path / "teacher")
    targets = _artifacts(teacher).targets("train")
    targets.remove()
    assert _start(command, tmp_path / "run", f"targets.workdir={teacher}") == 2
    (line,) = _errors(capsys)
    assert f"{targets.path}: targets/train does not exist" in line
    assert not (tmp_path / "run").exists()


def test_what_is_not_stored_is_not_searched(tmp_path, capsys):
    """A teacher's targets do without keys; what searches says so before any work."""
    arrays = ("datastore.arrays=[input,label,logprob]", f"targets.workdir={tmp_path}/teacher")
    for command in ("index", "retrieve", "evaluate", "run"):
        assert _start(command, tmp_path / "run", *arrays) == 2
        assert any("lacks key, which index, retrieve" in line for line in _errors(capsys))
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("memory", [(), ("--without-memory",)])
@pytest.mark.parametrize("command", ["generate", "serve", "export"])
def test_a_dry_run_refuses_what_the_command_refuses(
    tiny_run: Config, tmp_path: Path, capsys, command: str, memory: tuple[str, ...]
):
    flags = memory
    if command == "export":
        flags = ("--output", str(tmp_path / "out"), "--what", "decoder" if memory else "model")
    found = []
    for more in ((), ("--dry-run",)):
        assert _start(command, tmp_path / "run", *flags, *more) == 2
        found.append(_errors(capsys))
    assert found[0] == found[1] and len(found[0]) == 1
    expected = "tokenizer does not exist" if memory else "the memory is not trained yet"
    assert expected in found[0][0]
    assert not list(tmp_path.iterdir())
    assert _start(command, tiny_run.workdir, *flags, "--dry-run") == 0
    assert "\nnothing to make\n" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
