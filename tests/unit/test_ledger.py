"""Costs of rows by the manifests of fake runs, and forecasts by their measured rates."""

from pathlib import Path

import pytest

from mlpmem_jax.config.load import changed_config
from mlpmem_jax.config.schema import Config
from mlpmem_jax.pipeline import recipes
from mlpmem_jax.pipeline.forecast import Expected, Forecaster, duration
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.studies.tables.ledger import Ledger


def _finished(
    store: Path,
    relative: str,
    made_from: dict[str, str],
    recipe: dict[str, object] | None = None,
    **measured: float,
) -> str:
    artifact = Artifact(store, relative, relative.split("/")[0], recipe=recipe)
    artifact.begin(made_from)
    return artifact.finish(measured=measured).fingerprint


@pytest.fixture
def fake_run(tiny_config: Config) -> Path:
    """Manifests of a student and a teacher; seconds are powers of two, so sums tell apart."""
    store = Path(Artifacts(tiny_config).store)
    text = {"tokens/text": _finished(store, "tokens/text", {}, seconds=1000.0)}
    decoders = {
        name: _finished(
            store,
            f"decoder/{name}",
            text,
            seconds=spent,
            model_flops=spent * 10,
        )
        for name, spent in (("student", 1.0), ("teacher", 2.0))
    }
    stores = {
        name: _finished(
            store,
            f"datastore/{name}/train",
            {**text, f"decoder/{name}": decoders[name]},
            seconds=spent,
            model_flops=spent * 10,
        )
        for name, spent in (("student", 4.0), ("teacher", 8.0))
    }
    index = _finished(
        store, "index/teacher", {"datastore/teacher/train": stores["teacher"]}, seconds=16.0
    )
    targets = _finished(store, "targets/teacher/train", {"index/teacher": index}, seconds=32.0)
    _finished(
        store,
        "memory/student",
        {
            **text,
            "decoder/student": decoders["student"],
            "datastore/student/train": stores["student"],
            "targets/teacher/train": targets,
        },
        seconds=64.0,
        model_flops=640.0,
    )
    return store


def test_costs_count_everything_once_and_the_teacher_apart(fake_run: Path):
    ledger = Ledger(fake_run, peak_flops=3.0)
    cost = ledger.cost(["decoder/student", "memory/student"], ["decoder/student"])
    assert cost.seconds == {
        "pretrain": 1.0, "embed": 4.0, "teacher": 2.0 + 8.0 + 16.0 + 32.0, "train": 64.0,
    }  # fmt: skip
    assert cost.flops["teacher"] == 20.0 + 80.0 + 3.0 * (16.0 + 32.0)
    assert cost.network_flops == 10.0 * (1 + 2 + 4 + 8 + 64)
    assert cost.total_flops == cost.network_flops + 3.0 * 48.0
    alone = ledger.cost(["decoder/student"], ["decoder/student"])
    assert alone.total_flops == 10.0 and alone.total_seconds == 1.0


def test_one_pass_makes_keys_and_what_the_memory_reads(fake_run: Path, tiny_config: Config):
    overrides = {"base": {}, "deeper": {"datastore.input.layer": 1.0}}
    overrides["rounded"] = overrides["deeper"] | {"datastore.dtype": "bfloat16"}
    made_from = dict(Artifact(fake_run, "datastore/student/train", "datastore").load().made_from)
    for name, more in overrides.items():
        recipe = recipes.datastore(changed_config(tiny_config, more))
        store = f"datastore/{name}/train"
        _finished(fake_run, store, made_from, recipe, seconds=4.0, model_flops=40.0)
        # Targets are those of the base: its keys were searched.
        sources = {"decoder/student": "", "datastore/base/train": "", store: ""}
        _finished(fake_run, f"memory/{name}", sources, seconds=64.0, model_flops=640.0)
    ledger = Ledger(fake_run, peak_flops=3.0)
    spent = {
        name: ledger.cost([f"memory/{name}"], ["decoder/student"]).seconds["embed"]
        for name in overrides
    }
    assert spent == {"base": 4.0, "deeper": 4.0, "rounded": 8.0}


@pytest.mark.parametrize("train", [{"alpha": 0.0}, {"alpha": 0.4, "memory_weight": 0.0}])
def test_targets_that_the_loss_does_not_use_cost_nothing(fake_run: Path, train: dict[str, float]):
    made_from = {"decoder/student": "", "datastore/student/train": "", "targets/teacher/train": ""}
    recipe: dict[str, object] = {"train": train}
    _finished(fake_run, "memory/ce", made_from, recipe, seconds=64.0, model_flops=640.0)
    ledger = Ledger(fake_run, peak_flops=3.0)
    cost = ledger.cost(["decoder/student", "memory/ce"], ["decoder/student"])
    assert cost.seconds == {"pretrain": 1.0, "embed": 4.0, "train": 64.0}


def test_what_is_made_anew_from_the_rows_own_decoder_is_no_teachers(fake_run: Path):
    phase = {"decoder/student": "", "targets/teacher/train": ""}
    _finished(fake_run, "joint/a.phase-0", phase, seconds=128.0, model_flops=1.0)
    half_way = {"joint/a.phase-0": ""}
    _finished(fake_run, "decoder/a.refresh-0", half_way, seconds=256.0, model_flops=0.0)
    _finished(fake_run, "targets/a.refresh-0/train", {"decoder/a.refresh-0": ""}, seconds=512.0)
    last = {"joint/a.phase-0": "", "targets/a.refresh-0/train": ""}
    _finished(fake_run, "joint/a", last, seconds=1024.0, model_flops=1.0)
    cost = Ledger(fake_run, peak_flops=3.0).cost(["joint/a"], ["decoder/student"])
    assert cost.seconds["search"] == 512.0 and cost.seconds["train"] == 128.0 + 1024.0
    assert cost.seconds["teacher"] == 2.0 + 8.0 + 16.0 + 32.0
    assert cost.seconds["pretrain"] == 1.0 + 256.0 and cost.flops["pretrain"] == 10.0


def test_forecasts_use_measured_rates(fake_run: Path):
    def expected(name: str, split: str | None = None, **estimate: float) -> Expected:
        artifact = Artifact(
            fake_run, name, name.split("/")[0], recipe={"split": split, "targets": {}}
        )
        return Expected(artifact, {k.replace("_", " "): value for k, value in estimate.items()})

    forecaster = Forecaster(fake_run, 1e9, {"train": 8000, "valid": 10, "test": 10}, 4)
    known = [expected("decoder/student"), expected("memory/student")]
    todo = [
        *known,
        expected("decoder/new", model_flops=500.0),
        expected("targets/new", "train"),
    ]
    found = forecaster.forecast(todo)
    assert (found.num_artifacts, found.num_missing, found.flops) == (4, 2, 500.0)
    start = 4.0
    assert found.seconds["decoder"] == pytest.approx(500.0 / 10.0 + start)
    assert found.seconds["targets"] == pytest.approx(2.0 + start)
    before = Forecaster(fake_run, 1e9, None, 4).forecast([expected("index/new")])
    assert before.unknown == ("index",)


def test_durations():
    assert [duration(s) for s in (3, 600, 12_000)] == ["3 s", "10 min", "3 h 20 min"]
