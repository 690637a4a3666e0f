"""Variants share what does not depend on the changed key; ledger and forecast of fake runs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mlpmem_jax.config.load import changed_config
from mlpmem_jax.config.schema import Config
from mlpmem_jax.config.suite import RecipeConfig
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.pipeline import embed
from mlpmem_jax.pipeline.forecast import Expected, Forecaster, duration
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.store.checked_json import fingerprint_of
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.studies.ablate import command as ablate
from mlpmem_jax.studies.compare import command as compare
from mlpmem_jax.studies.tables.ledger import Ledger
from mlpmem_jax.studies.tables.rows import ROWS, SeedPlan, planned_row
from mlpmem_jax.studies.tables.variants import (
    base_variant,
    changed_variant,
    label_of,
    taught_variant,
)

NAMED = ("decoder", "datastore", "retrieval", "targets", "memory")


def renamed(config: Config) -> set[str]:
    return {name for name in NAMED if getattr(config, name).name != "seed-7"}


@pytest.mark.parametrize(
    ("key", "value", "fresh"),
    [
        ("train.alpha", 0.0, {"memory"}),
        ("memory.num_layers", 5, {"memory"}),
        ("targets.temperature", 3.0, {"targets", "memory"}),
        ("targets.num_tokens", 4, {"targets", "memory"}),
        ("retrieval.num_neighbors", 8, {"retrieval", "targets", "memory"}),
        ("datastore.input.layer", 1.0, {"datastore", "memory"}),
        ("datastore.input.site", "residual", {"datastore", "memory"}),
        ("datastore.key.layer", 0.5, set(NAMED) - {"decoder"}),
        ("pretrain.num_steps", 9, set(NAMED)),
        ("decoder.width", 64, set(NAMED)),
        ("train.log_interval_steps", 3, set()),
    ],
)
def test_only_what_depends_on_a_key_gets_a_new_name(
    tiny_config: Config, key: str, value: object, fresh: set[str]
):
    base = base_variant(tiny_config, 7)
    assert base.config.seed == 7 and renamed(base.config) == set()
    variant = changed_variant(base, {key: value}, "x")
    assert renamed(variant.config) == fresh
    for name in fresh:
        assert getattr(variant.config, name).name == "seed-7-x"
    # What its memory needs is either shared as it is or all its own: nothing is overwritten.
    shared = {stage.name: stage for stage in base.memory_stages()}
    for stage in variant.memory_stages():
        if stage.name in shared:
            assert stage.recipe == shared[stage.name].recipe
            assert [one.relative for one in stage.upstream] == [
                one.relative for one in shared[stage.name].upstream
            ]


def test_other_inputs_keep_the_targets(tiny_config: Config):
    base = base_variant(tiny_config, 7)
    variant = changed_variant(base, {"datastore.input.layer": 1.0}, "x")
    names = [stage.name for stage in variant.memory_stages()]
    assert "datastore/seed-7-x/train" in names and "targets/seed-7/train" in names
    assert "targets/seed-7-x/train" not in names
    (train,) = (stage for stage in variant.memory_stages() if stage.name == "memory/seed-7-x")
    sources = {one.relative for one in train.upstream}
    assert {"datastore/seed-7-x/train", "targets/seed-7/train"} <= sources


def test_other_inputs_and_other_targets_share_no_index(tiny_config: Config):
    """Targets are then made from the new datastore, and an index of the base would not be."""
    base = base_variant(tiny_config, 7)
    variant = changed_variant(base, {"datastore.input.layer": 1.0, "targets.num_tokens": 5}, "x")
    assert renamed(variant.config) == set(NAMED) - {"decoder"}
    made = {stage.name: stage for stage in variant.memory_stages()}
    assert not [name for name in made if name.startswith(("index/seed-7", "neighbors/seed-7"))
                and not name.split("/")[1].endswith("-x")]  # fmt: skip
    sources = {one.relative for one in made["index/seed-7-x"].origins()}
    assert "datastore/seed-7-x/train" in sources


def test_a_teacher_makes_targets_alone(tiny_config: Config):
    base = base_variant(tiny_config, 7)
    variant = taught_variant(base, {"decoder.width": 64}, "big")
    assert renamed(variant.config) == {"targets", "memory"}
    assert variant.config.decoder.width == 32 and variant.teacher.decoder.width == 64
    names = [stage.name for stage in variant.memory_stages()]
    assert {"decoder/seed-7", "decoder/seed-7-big", "targets/seed-7-big/train"} <= set(names)
    assert names[-1] == "memory/seed-7-big"
    assert "neighbors/seed-7-big/test" not in names


def test_joint_training_goes_on_from_the_memory_of_the_base(tiny_config: Config):
    base = base_variant(tiny_config, 7)
    variant = changed_variant(
        base,
        {"train.mode": "joint", "train.num_steps": 3},
        "x",
        texts=["train.memory_start=checkpoint", "train.decoder_optimizer.warmup_steps=1"],
    )
    assert renamed(variant.config) == set() and variant.config.joint_name == "seed-7-x"
    stages = {stage.name: stage for stage in variant.memory_stages()}
    shared = {stage.name: stage for stage in base.memory_stages()}
    assert set(stages) - set(shared) == {"joint/seed-7-x"}
    assert stages["memory/seed-7"].recipe == shared["memory/seed-7"].recipe
    sources = {one.relative for one in stages["joint/seed-7-x"].origins()}
    assert {"decoder/seed-7", "memory/seed-7"} <= sources


CONTINUED = (
    "train.mode=joint", "train.memory_start=checkpoint", "train.decoder_optimizer.warmup_steps=1",
)  # fmt: skip


def test_a_gate_can_be_put_on_the_memory_of_the_base(tiny_config: Config):
    base = base_variant(tiny_config, 7)
    texts = [*CONTINUED, "memory.gate=learned", "memory.gate_floor=0.1"]
    variant = changed_variant(base, {}, "x", texts=texts)
    assert variant.config.memory.gate == "learned" and variant.start == base.config
    assert variant.start.memory.gate == "none"


def test_joint_training_goes_on_from_what_a_teacher_taught(tiny_config: Config):
    taught = taught_variant(base_variant(tiny_config, 7), {"decoder.width": 64}, "big")
    variant = changed_variant(taught, {}, "x", texts=CONTINUED)
    assert variant.config.joint_name == "seed-7-big-x"
    names = [stage.name for stage in variant.memory_stages()]
    assert "memory/seed-7-big" in names and "memory/seed-7" not in names
    (joint,) = (stage for stage in variant.memory_stages() if stage.name == "joint/seed-7-big-x")
    sources = {one.relative for one in joint.origins()}
    assert {"decoder/seed-7", "memory/seed-7-big", "targets/seed-7-big/train"} <= sources


def test_with_a_teacher_the_decoder_of_a_row_stays(tiny_config: Config):
    taught = taught_variant(base_variant(tiny_config, 7), {"decoder.width": 64}, "big")
    with pytest.raises(ConfigError, match="with a teacher, only keys of memory and train"):
        changed_variant(taught, {"pretrain.num_steps": 3}, "x")


@pytest.mark.parametrize("other", ["pretrain.num_steps=3", "memory.num_layers=3"])
def test_joint_training_cannot_go_on_from_what_no_row_makes(tiny_config: Config, other: str):
    texts = [*CONTINUED, other]
    with pytest.raises(ConfigError, match="only keys of train and the gate different"):
        changed_variant(base_variant(tiny_config, 7), {}, "x", texts=texts)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("corpus.max_bytes", "corpus.max_bytes: cannot differ between the rows"),
        ("memory.name", "memory.name: cannot differ"),
        ("memory.widht", "memory.widht=3: unknown key; did you mean memory.width?"),
        ("memori.width", "unknown key"),
    ],
)
def test_keys_that_cannot_be_varied(tiny_config: Config, key: str, message: str):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        changed_variant(base_variant(tiny_config, 0), {key: 3}, "x")


def test_decoders_that_no_memory_reads_need_not_fit_one(make_config: Callable[..., Config]):
    config = make_config(
        "memory.head=tied",
        "memory.width=32",
        "datastore.input.layer=2",
        "memory.recent_tokens=9",
        "memory.ngram_orders=[2, 9]",
    )
    assert config.decoder.width == 32 and config.decoder.num_layers == 2
    plan = SeedPlan(config, 0)
    assert plan.of_equal_size().config.decoder.name == "seed-0-equal-size"
    assert plan.small_lm().config.decoder.name == "seed-0-small"
    wide = taught_variant(plan.base, {"decoder.width": 64}, "wide")
    assert wide.teacher.decoder.width == 64 and wide.config.memory.head == "tied"
    with pytest.raises(ConfigError, match=r"memory\.head=tied requires"):
        changed_variant(plan.base, {"decoder.width": 64}, "x")  # Its own memory reads it.
    short = ["decoder.context_tokens=16", "datastore.window_tokens=16"]
    recipe = RecipeConfig(name="short", parts="decoder", overrides=tuple(short))
    assert plan.changed(recipe).config.decoder.context_tokens == 16
    with pytest.raises(ConfigError, match=r"memory\.recent_tokens=9 is more than half"):
        plan.changed(recipe.model_copy(update={"parts": "all"}))


def test_rows_that_are_mixed_leave_joint_rows_as_they_are(make_config: Callable[..., Config]):
    joint = SeedPlan(make_config("train.mix_windows=4"), 0).joint("none", "joint")
    assert joint.variant.config.train_mix_windows == 1


def test_names_of_one_run_are_not_those_of_all_seeds(make_config: Callable[..., Config]):
    config = make_config("retrieval.exact_name=mine", "train.name=mine")
    names = [{stage.name for stage in base_variant(config, s).memory_stages()} for s in (0, 1)]
    assert not {name for name in names[0] & names[1] if not name.startswith("token")}
    with pytest.raises(ConfigError, match=r"retrieval\.exact_name: cannot differ"):
        changed_variant(base_variant(config, 0), {"retrieval.exact_name": "other"}, "x")


def test_tables_refuse_joint_training_without_lambda(tiny_config: Config):
    texts = ["train.mode=joint", "train.joint_weight=0", "train.decoder_optimizer.warmup_steps=2"]
    message = r"train\.joint_weight=0.* with train\.mode=joint"
    with pytest.raises(ConfigError, match=message):
        changed_variant(base_variant(tiny_config, 0), {}, "x", texts=texts)
    with pytest.raises(ConfigError, match=message):
        base_variant(changed_config(tiny_config, {}, texts), 0)


SWEEPS = "ablate.sweeps=[{key: train.interpolation, values: [0.3, 0.7], overrides: %s}]"


@pytest.mark.parametrize(
    "overrides",
    [
        (
            SWEEPS % f"[{', '.join(CONTINUED)}]",
        ),  # Ends in joint models; the memory is that of the base.
        (SWEEPS % "[train.alpha=0.3]", "train.joint_weight=0.5"),  # The base is one part.
    ],
)
def test_a_sweep_makes_all_that_its_table_reads(
    make_config: Callable[..., Config], overrides: tuple[str, ...]
):
    config = make_config(*overrides)
    ablate.check_sweeps(config)
    made = {stage.name for work in ablate.works(config) for stage in work.stages()}
    read = {one.relative for one in ablate.table_stage(config).origins()}
    assert read - {"tokens", "machine"} <= made


def test_tables_show_labels_and_have_an_order(make_config: Callable[..., Config]):
    def recipe(rows: str, label: str) -> object:
        own = f"compare.recipes=[{{name: own, label: {label}, overrides: [train.alpha=0.1]}}]"
        config = make_config(f"compare.rows={rows}", own)
        return fingerprint_of(compare.table_stage(config).recipe)

    first = recipe("[decoder, knn, memory]", "a")
    assert first == recipe("[decoder, knn, memory]", "a")
    assert first != recipe("[decoder, memory, knn]", "a")
    assert first != recipe("[decoder, knn, memory]", "b")


def test_the_vocabulary_is_asked_for_again_once_there_are_tokens(tiny_config: Config):
    plan = SeedPlan(tiny_config, 0)
    assert plan.vocab_size == tiny_config.tokenizer.vocab_size
    before = plan.of_equal_size().config.decoder
    tokens = Artifacts(tiny_config).tokens
    tokens.begin({}, {})
    tokens.finish(counts={"vocab_size": 4 * tiny_config.tokenizer.vocab_size})
    assert plan.vocab_size == 4 * tiny_config.tokenizer.vocab_size
    assert plan.of_equal_size().config.decoder != before


def test_labels_are_names_and_differ():
    assert label_of("datastore.input.layer", 0.7) == "datastore.input.layer-0.7"
    assert label_of("a b/c", None) == "a-b-c-None"
    long = [label_of("x" * 80, value) for value in (1, 2)]
    assert long[0] != long[1] and all(len(name) <= 60 for name in long)


def test_rows_are_planned_before_anything_exists(make_config: Callable[..., Config]):
    config = make_config("retrieval.engine=scann")
    plan = SeedPlan(config, 0)
    rows = {key: planned_row(plan, key) for key in ROWS}
    both = rows["memory_knn"]
    assert both is not None
    assert [part.name for part in both.parts] == [
        "decoder-seed-0", "memory-seed-0", "knn-seed-0",
    ]  # fmt: skip
    small, longer = rows["small_lm"], rows["longer"]
    assert small is not None and longer is not None
    assert longer.parts[0].config.pretrain.num_steps > config.pretrain.num_steps
    assert small.parts[1].config.decoder.width < config.decoder.width
    assert small.decoders() == ["decoder/seed-0", "decoder/seed-0-small"]


def test_a_row_can_mix_the_decoder_with_another(tiny_config: Config):
    recipe = "{name: second, parts: beside, overrides: [decoder.width=24, pretrain.num_steps=3]}"
    config = changed_config(tiny_config, {}, [f"compare.recipes=[{recipe}]"])
    row = planned_row(SeedPlan(config, 7), "second")
    assert row is not None
    assert [part.name for part in row.parts] == ["decoder-seed-7", "decoder-seed-7-second"]
    assert row.parts[1].config.decoder.width == 24
    kinds = {stage.artifact.kind for stage in row.stages()}
    assert kinds == {"decoder", "scores"}
    assert row.decoders() == ["decoder/seed-7", "decoder/seed-7-second"]


def _finished(
    workdir: Path,
    relative: str,
    made_from: dict[str, str],
    recipe: dict[str, object] | None = None,
    **measured: float,
) -> str:
    artifact = Artifact(workdir, relative, relative.split("/")[0])
    artifact.begin(recipe or {}, made_from)
    return artifact.finish(measured=measured).fingerprint


@pytest.fixture
def fake_run(tiny_config: Config) -> Path:
    """Manifests of a student and a teacher; seconds are powers of two, so sums tell apart."""
    workdir = Path(Artifacts(tiny_config).workdir)
    tokens = _finished(workdir, "tokens", {}, seconds=1000.0)
    decoders = {
        name: _finished(
            workdir, f"decoder/{name}", {"tokens": tokens}, seconds=spent, model_flops=spent * 10
        )
        for name, spent in (("student", 1.0), ("teacher", 2.0))
    }
    stores = {
        name: _finished(
            workdir,
            f"datastore/{name}/train",
            {"tokens": tokens, f"decoder/{name}": decoders[name]},
            seconds=spent,
            model_flops=spent * 10,
        )
        for name, spent in (("student", 4.0), ("teacher", 8.0))
    }
    index = _finished(
        workdir, "index/teacher", {"datastore/teacher/train": stores["teacher"]}, seconds=16.0
    )
    targets = _finished(workdir, "targets/teacher/train", {"index/teacher": index}, seconds=32.0)
    _finished(
        workdir,
        "memory/student",
        {
            "tokens": tokens,
            "decoder/student": decoders["student"],
            "datastore/student/train": stores["student"],
            "targets/teacher/train": targets,
        },
        seconds=64.0,
        model_flops=640.0,
    )
    return workdir


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
        recipe = embed.recipe(changed_config(tiny_config, {"datastore.name": name, **more}))
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
    def expected(name: str, **estimate: float) -> Expected:
        return Expected(
            Artifact(fake_run, name, name.split("/")[0]),
            {key.replace("_", " "): value for key, value in estimate.items()},
        )

    forecaster = Forecaster(fake_run, 1e9, {"train": 8000, "valid": 10, "test": 10}, 4)
    known = [expected("decoder/student"), expected("memory/student")]
    todo = [*known, expected("decoder/new", model_flops=500.0), expected("targets/new/train")]
    found = forecaster.forecast(todo)
    assert (found.num_artifacts, found.num_missing, found.flops) == (4, 2, 500.0)
    start = 4.0
    assert found.seconds["decoder"] == pytest.approx(500.0 / 10.0 + start)
    assert found.seconds["targets"] == pytest.approx(2.0 + start)
    before = Forecaster(fake_run, 1e9, None, 4).forecast([expected("index/new")])
    assert before.unknown == ("index",)


def test_durations():
    assert [duration(s) for s in (3, 600, 12_000)] == ["3 s", "10 min", "3 h 20 min"]
