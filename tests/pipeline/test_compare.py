"""The commands that make many runs, on a tiny corpus: from text to table, and once again."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlpmem_jax.__main__ import main
from mlpmem_jax.config.load import load_config
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.refresh import Phases, refresh_stages
from mlpmem_jax.stats.mixing import solve
from mlpmem_jax.store.array_specs import Split
from mlpmem_jax.store.arrays import open_array, read_rows
from mlpmem_jax.studies.compare import command as compare
from mlpmem_jax.studies.tables.part_scores import Part
from mlpmem_jax.studies.tables.rows import planned_row
from mlpmem_jax.studies.tables.seed_plan import SeedPlan
from mlpmem_jax.studies.tables.variants import Variant
from tests.pipeline.conftest import TINY

HERE = Path(__file__).resolve().parent
SAVE = "mlpmem_jax.training.checkpoint.Checkpoints.save"
FINISH = "mlpmem_jax.store.manifest.Artifact.finish"
# As small as networks go: what is tested is the machinery.
SMALL = (
    "corpus.max_bytes=80_000", "decoder.num_layers=1", "decoder.width=16", "memory.width=16",
    "memory.num_layers=1", "pretrain.num_steps=4", "train.num_steps=4",
    "pretrain.eval_interval_steps=4", "train.eval_interval_steps=4", "datastore.batch_size=64",
    "compare.seeds=[0,3]", "compare.rows=[knn,memory,longer,memory_knn]",
    "compare.extra_flops=networks",
    "compare.recipes=[{name: continued, label: 'joint, from both', overrides: [train.mode=joint, "
    "train.memory_start=checkpoint, train.num_steps=2, train.refresh_interval_steps=1, "
    "train.decoder_optimizer.warmup_steps=1]}, {name: taught, teacher: wide}]",
    "compare.teachers=[{name: wide, overrides: [decoder.width=24]}]",
)  # fmt: skip


def run(command: str, workdir: Path, *overrides: str) -> int:
    arguments = ["--config", str(TINY), "--workdir", str(workdir), *SMALL, *overrides]
    return main([command, *arguments])


# The shared runs train a dozen networks: two minutes here, more where cores are shared.
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a finished `compare`."""
    workdir = tmp_path_factory.mktemp("compare") / "run"
    assert run("compare", workdir) == 0
    return workdir


def _report(workdir: Path, command: str = "compare") -> Path:
    """The only finished report of a command."""
    (file,) = (workdir / "results").glob(f"{command}-*/manifest.json")
    return file.parent


def json_of(workdir: Path, name: str) -> dict:
    return json.loads((_report(workdir) / name).read_text())


def _results(workdir: Path) -> dict:
    return json_of(workdir, "compare.json")


def _plan(workdir: Path, seed: int = 0) -> SeedPlan:
    """What the rows of a seed are made from."""
    return SeedPlan(load_config(TINY, SMALL, {"workdir": str(workdir)}), seed)


def _variant(workdir: Path, row: str) -> Variant:
    """How the network of a row of one's own is made, for seed 0."""
    found = planned_row(_plan(workdir), row)
    assert found is not None
    return found.parts[-1].variant


def _role(line: str) -> str:
    """The role that a line of the log begins with, "ROLE (ID): …"."""
    return line.split(" (")[0]


def _bits(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_rows_seeds_and_files(compared: Path):
    results = _results(compared)
    assert [row["key"] for row in results["rows"]] == [
        "decoder", "knn", "memory", "longer", "memory_knn", "continued", "taught",
    ]  # fmt: skip
    assert results["seeds"] == [0, 3]
    folder = _report(compared)
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    with open(folder / "compare.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["row"], line["seed"]) for line in lines[:3]] == [
        ("decoder", "mean"), ("decoder", "0"), ("decoder", "3"),
    ]  # fmt: skip
    assert float(lines[0]["test_nats"]) == pytest.approx(results["rows"][0]["test_nats"]["value"])
    with open(folder / "pairs.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 21 * 3


def test_a_table_of_other_rows_lies_beside_the_first(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """In a work directory of its own that shares the store; only what is new is made."""
    first, tables = _bits(_report(compared)), list((compared / "results").glob("compare-*"))
    one = ("compare.seeds=[0]", "compare.rows=[memory]", "compare.teachers=[]")
    rows = (*one, "compare.recipes=[{name: short, overrides: [train.num_steps=3]}]")
    store = f"store={compared / 'artifacts'}"
    other = tmp_path / "other"
    capsys.readouterr()
    assert run("compare", other, store, *rows, "--dry-run") == 0
    plan = capsys.readouterr().out
    assert re.search(r"memory \[seed 0\] \(\w+\) +complete; nothing to do", plan)
    assert re.search(r"memory \[seed 0, short\] \(\w+\) +will be made", plan)
    assert not other.exists()
    assert run("compare", other, store, *rows) == 0
    out = capsys.readouterr().out
    made = {_role(line) for line in out.splitlines() if line.endswith(": making")}
    short = "[seed 0, short]"
    assert made == {
        "machine", f"memory {short}", f"scores/memory/valid {short}", f"scores/memory/test {short}",
        "results/compare",
    }  # fmt: skip
    assert _report(other).name != _report(compared).name
    shared = {row["key"]: row for row in _results(compared)["rows"]}["memory"]["by_seed"]["0"]
    again = {row["key"]: row for row in _results(other)["rows"]}["memory"]["by_seed"]["0"]
    assert again["weights"] == shared["weights"]
    assert again["test_nats"] == shared["test_nats"]
    assert _bits(_report(compared)) == first
    assert list((compared / "results").glob("compare-*")) == tables


def test_rebuild_mends_a_damaged_table(compared: Path, capsys: pytest.CaptureFixture[str]):
    file = _report(compared) / "compare.json"
    whole = file.read_text()
    file.write_text(whole.replace("nats", "gnats", 1))
    capsys.readouterr()
    assert run("compare", compared) == 2
    assert "compare.json" in capsys.readouterr().err
    assert run("compare", compared, "--rebuild", "--dry-run") == 0
    plan = capsys.readouterr().out
    assert re.search(r"results/compare \(\w+\) +complete; will be made again", plan)
    assert re.search(r"memory \[seed 0\] \(\w+\) +complete; nothing to do", plan)
    assert run("compare", compared, "--rebuild") == 0
    assert file.read_text() == whole


def test_numbers_come_from_the_stored_scores(compared: Path):
    """Nats and weights again, from the arrays alone."""
    results = _results(compared)
    rows = {row["key"]: row for row in results["rows"]}

    def scores(part: Part, split: Split) -> np.ndarray:
        folder = part.scores(split).path
        label, logprob = (
            read_rows(store, 0, store.shape[0])
            for store in (open_array(folder / one) for one in ("label", "logprob"))
        )
        return logprob[label != 0].astype(np.float64)

    for seed in ("0", "3"):
        plan = _plan(compared, int(seed))
        base, memory = plan.decoder, Part("memory", plan.base)
        decoder_nats = -scores(base, "test").mean()
        found = rows["decoder"]["by_seed"][seed]["test_nats"]["value"]
        assert found == pytest.approx(decoder_nats, rel=1e-6)
        weight = solve(scores(memory, "valid"), scores(base, "valid")).weight
        assert rows["memory"]["by_seed"][seed]["weights"] == [pytest.approx(weight, abs=1e-6)]
        mixed = weight * np.exp(scores(memory, "test"))
        mixed += (1 - weight) * np.exp(scores(base, "test"))
        found = rows["memory"]["by_seed"][seed]["test_nats"]["value"]
        assert found == pytest.approx(-np.log(mixed).mean(), rel=1e-6)
    with open(_report(compared) / "documents.csv", newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["split"] == "test"]
    total = sum(float(line["memory"]) for line in lines if line["seed"] == "0")
    tokens = sum(int(line["tokens"]) for line in lines if line["seed"] == "0")
    found = rows["memory"]["by_seed"]["0"]["test_nats"]["value"]
    assert total / tokens == pytest.approx(found, rel=1e-5)


def test_the_longer_decoder_costs_what_decoder_and_memory_cost(compared: Path):
    measured = json_of(compared, "measured.json")
    for seed in ("0", "3"):
        longer = measured["rows"]["longer"][seed]["cost"]["network_flops"]
        memory = measured["rows"]["memory"][seed]["cost"]
        config = load_config(TINY, SMALL)
        step = measured["rows"]["decoder"][seed]["cost"]["flops"] / config.pretrain.num_steps
        assert abs(longer - memory["network_flops"]) <= 0.5 * step
        assert memory["flops"] > memory["network_flops"]  # Search counts seconds × peak.
        by_purpose = memory["flops_by_purpose"]
        assert set(by_purpose) == {"pretrain", "embed", "index", "search", "train"}
        assert sum(by_purpose.values()) == pytest.approx(memory["flops"])


def test_a_row_of_ones_own_goes_on_from_the_memory_and_is_charged_for_it(compared: Path):
    (row,) = (row for row in _results(compared)["rows"] if row["key"] == "continued")
    assert row["label"] == "joint, from both"
    measured = json_of(compared, "measured.json")
    variant, base = _variant(compared, "continued"), _plan(compared).base.run
    phases = [one.load() for one in variant.run.joint_phases]
    assert len(phases) == 2
    assert {base.decoder.relative, base.memory.relative} <= set(phases[0].made_from)
    memory = measured["rows"]["memory"]["0"]["cost"]["flops_by_purpose"]
    joint = measured["rows"]["continued"]["0"]["cost"]["flops_by_purpose"]
    added = joint.pop("train") - memory.pop("train")
    assert added == pytest.approx(sum(phase.measured["model_flops"] for phase in phases))
    # The targets that were made anew on the way count as the row's own.
    purposes = {"datastore": "embed", "index": "index", "neighbors": "search", "targets": "search"}
    stages = refresh_stages(Phases(variant.run), 0)
    made = [stage.artifact for stage in stages if stage.artifact.kind in purposes]
    assert {one.kind for one in made} == set(purposes)
    for one in made:
        spent = one.load().measured
        seconds_cost = spent["seconds"] * measured["peak_flops"]
        memory[purposes[one.kind]] += spent.get("model_flops", seconds_cost)
    assert joint == pytest.approx(memory)


def test_a_row_that_a_larger_decoder_teaches_is_charged_for_it(compared: Path):
    variant, base = _variant(compared, "taught"), _plan(compared).base.run
    wanted = {base.decoder.relative, variant.teacher.targets("train").relative}
    assert wanted <= set(variant.run.memory.load().made_from)
    measured = json_of(compared, "measured.json")
    taught = measured["rows"]["taught"]["0"]["cost"]["flops_by_purpose"]
    memory = measured["rows"]["memory"]["0"]["cost"]["flops_by_purpose"]
    decoder = variant.teacher.decoder.load()
    assert taught["teacher"] > decoder.measured["model_flops"] > memory["pretrain"]
    assert taught["train"] == memory["train"] and taught["pretrain"] == memory["pretrain"]


def test_tokens_are_shared_and_seeds_differ(compared: Path):
    (tokens,) = (compared / "artifacts" / "tokens").iterdir()
    assert {path.name for path in tokens.iterdir()} >= {"train", "valid", "test"}
    results = _results(compared)
    (memory,) = (row for row in results["rows"] if row["key"] == "memory")
    first, second = (one["test_nats"]["value"] for one in memory["by_seed"].values())
    assert first != second
    assert memory["spread"]["test_nats"]["max"] == max(first, second)


def test_a_second_start_makes_nothing(compared: Path, capsys: pytest.CaptureFixture[str]):
    before = {path: path.stat().st_mtime_ns for path in compared.rglob("*") if path.is_file()}
    assert run("compare", compared) == 0
    out = capsys.readouterr().out
    assert "making" not in out and "0 to be made" in out
    assert "against" in out and "+ memory + kNN-LM" in out
    after = {path: path.stat().st_mtime_ns for path in compared.rglob("*") if path.is_file()}
    assert after == before


# Where the process is killed, and the role of the artifact that is then begun and not finished.
KILLS = [
    (SAVE, 2, "after", "memory"),
    (FINISH, 3, "before", "scores"),
    (FINISH, 2, "before", "table"),
]


@pytest.mark.slow
def test_killed_while_it_trains_scores_and_writes_equals_uninterrupted(
    compared: Path, tmp_path: Path
):
    workdir = tmp_path / "run"
    few = ("compare.seeds=[0]", "compare.rows=[knn,memory]", "compare.recipes=[]")
    arguments = ["compare", "--config", str(TINY), "--workdir", str(workdir), *SMALL, *few]
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    config = load_config(TINY, [*SMALL, *few], {"workdir": str(workdir)})
    for function, number, when, role in KILLS:
        command = [sys.executable, str(HERE / "killed.py"), function, str(number), when]
        died = subprocess.run(
            [*command, *arguments], env=environment, capture_output=True, text=True, timeout=600
        )
        assert died.returncode == -signal.SIGKILL, (role, died.stdout, died.stderr)
        memory = planned_row(SeedPlan(config, 0), "memory").parts[1]
        begun = {
            "memory": lambda memory=memory: memory.run.memory,
            "scores": lambda memory=memory: memory.scores("test"),
            "table": lambda: compare.table_stage(Artifacts(config)).artifact,
        }[role]()
        assert (begun.path / "building.json").exists(), (role, died.stdout)
        assert not (begun.path / "manifest.json").exists(), role
    assert main(arguments) == 0
    whole = {row["key"]: row for row in _results(compared)["rows"]}
    for row in _results(workdir)["rows"]:
        assert row["by_seed"]["0"] == whole[row["key"]]["by_seed"]["0"]


def test_controls_are_sized_by_what_the_tokenizer_has_learned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Before there are tokens, all that is known of the vocabulary is its limit."""
    few = (
        "tokenizer.vocab_size=20_000", "compare.seeds=[0]", "compare.recipes=[]",
        "compare.teachers=[]", "compare.rows=[memory,equal_size]",
    )  # fmt: skip
    assert run("compare", tmp_path, *few) == 0
    with open(_report(tmp_path) / "compare.csv", newline="") as file:
        size = {row["row"]: int(row["parameters"]) for row in csv.DictReader(file)}
    assert size["equal_size"] == pytest.approx(size["memory"], rel=0.05)
    capsys.readouterr()
    assert run("compare", tmp_path, *few) == 0
    assert ": making" not in capsys.readouterr().out


def test_dry_run_says_what_it_will_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run("compare", tmp_path / "none", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "model flops" in out and "(estimated)" in out and "memory [seed 3]" in out
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_ablate_shares_what_does_not_depend_on_the_key(
    compared: Path, capsys: pytest.CaptureFixture[str]
):
    sweeps = (
        "[{key: train.alpha, values: [0.4, 1.0]}, {key: targets.num_tokens, values: [2]}, "
        "{key: datastore.input.layer, values: [0.5], role: model}]"
    )
    assert run("ablate", compared, "ablate.seeds=[0]", f"ablate.sweeps={sweeps}") == 0
    out = capsys.readouterr().out
    made = [_role(line) for line in out.splitlines() if line.endswith(": making")]
    layer = "[seed 0, datastore.input.layer = 0.5]"
    alpha, tokens = "[seed 0, train.alpha = 1.0]", "[seed 0, targets.num_tokens = 2]"
    assert sorted(made) == sorted(
        [
            *(f"memory {title}" for title in (alpha, tokens, layer)),
            *(f"targets/{split} {tokens}" for split in ("train", "valid")),
            *(f"datastore/{split} {layer}" for split in ("train", "valid", "test")),
            *(
                f"scores/memory/{split} {title}"
                for title in (alpha, tokens, layer)
                for split in ("valid", "test")
            ),
            "results/ablate",
        ]
    )
    folder = _report(compared, "ablate")
    results = json.loads((folder / "ablate.json").read_text())
    alpha = results["sweeps"][0]
    assert alpha["points"][0]["difference"]["value"] == 0  # As configured: the same artifacts.
    configured = alpha["configured"]["test_nats"]["value"]
    assert alpha["points"][1]["difference"]["value"] == pytest.approx(
        alpha["points"][1]["test_nats"]["value"] - configured
    )
    compared_rows = {row["key"]: row for row in _results(compared)["rows"]}
    seed = compared_rows["memory"]["by_seed"]["0"]
    assert configured == pytest.approx(seed["test_nats"]["value"])
    assert (folder / "ablate-1-targets.num_tokens.png").exists()


@pytest.mark.slow
def test_overfitting_by_epoch(compared: Path, capsys: pytest.CaptureFixture[str]):
    overrides = ("overfitting.decoder_epochs=2", "overfitting.memory_epochs=2")
    assert run("overfitting", compared, *overrides) == 0
    folder = _report(compared, "overfitting")
    networks = json.loads((folder / "overfitting.json").read_text())["networks"]
    assert list(networks) == ["decoder", "memory", "memory_alone"]
    for network in networks.values():
        nats = [one["test_nats"]["value"] for one in network["epochs"]]
        assert len(nats) == 2 and nats[0] != nats[1]
        valid = [one["valid_nats"]["value"] for one in network["epochs"]]
        assert network["best_epoch"] == int(np.argmin(valid)) + 1
        assert network["best_epoch_on_test"] == int(np.argmin(nats)) + 1
        best = network["epochs"][network["best_epoch"] - 1]
        assert best["after_best"]["value"] == 0
        lost = nats[-1] - best["test_nats"]["value"]
        assert network["epochs"][-1]["after_best"]["value"] == pytest.approx(lost)
    config = load_config(TINY, SMALL, {"workdir": str(compared)})
    num_rows = int(Artifacts(config).tokens.load().counts["train_tokens"]) - 1
    first = networks["decoder"]["epochs"][0]["step"]
    rows_per_step = config.pretrain.batch_size * config.pretrain_window_tokens
    assert abs(first * rows_per_step - num_rows) <= rows_per_step
    assert "best on validation after" in capsys.readouterr().out
