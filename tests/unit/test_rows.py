"""Rows of tables: what they are made of, and that content tells them apart."""

from collections.abc import Callable

import pytest

from mlpmem_jax.config.load import changed_config
from mlpmem_jax.config.schema import Config
from mlpmem_jax.config.suite import RecipeConfig
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.studies.ablate import command as ablate
from mlpmem_jax.studies.compare import command as compare
from mlpmem_jax.studies.overfitting import command as overfitting
from mlpmem_jax.studies.tables.part_scores import Part
from mlpmem_jax.studies.tables.rows import ROWS, check_recipes, planned_row
from mlpmem_jax.studies.tables.seed_plan import SeedPlan
from mlpmem_jax.studies.tables.variants import made_by
from tests.unit.test_variants import CONTINUED

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
    run = Artifacts(make_config(*overrides))
    ablate.check_sweeps(run)
    stages = [stage for work in ablate.works(run) for stage in work.stages()]
    read = {one.relative for one in ablate.table_stage(run).origins()}
    assert read - {"machine"} <= {stage.artifact.relative for stage in stages}


def test_tables_show_labels_and_have_an_order(make_config: Callable[..., Config]):
    def table(rows: str, label: str) -> str:
        own = f"compare.recipes=[{{name: own, label: {label}, overrides: [train.alpha=0.1]}}]"
        config = make_config(f"compare.rows={rows}", own)
        return compare.table_stage(Artifacts(config)).artifact.relative

    first = table("[decoder, knn, memory]", "a")
    assert first == table("[decoder, knn, memory]", "a")
    assert first != table("[decoder, memory, knn]", "a")
    assert first != table("[decoder, knn, memory]", "b")


def test_the_vocabulary_is_asked_for_again_once_there_are_tokens(tiny_config: Config):
    plan = SeedPlan(tiny_config, 0)
    assert plan.vocab_size == tiny_config.tokenizer.vocab_size
    before = plan.of_equal_size().run.config.decoder
    tokens = Artifacts(tiny_config).tokens
    tokens.begin({})
    tokens.finish(counts={"vocab_size": 4 * tiny_config.tokenizer.vocab_size})
    assert plan.vocab_size == 4 * tiny_config.tokenizer.vocab_size
    assert plan.of_equal_size().run.config.decoder != before


def test_rows_are_planned_before_anything_exists(make_config: Callable[..., Config]):
    config = make_config("retrieval.engine=scann")
    plan = SeedPlan(config, 0)
    rows = {key: planned_row(plan, key) for key in ROWS}
    both = rows["memory_knn"]
    assert both is not None
    assert [part.kind for part in both.parts] == ["decoder", "memory", "knn"]
    assert [part.scores("test").relative for part in both.parts[:2]] == [
        part.scores("test").relative for part in (plan.decoder, Part("memory", plan.base))
    ]
    small, longer = rows["small_lm"], rows["longer"]
    assert small is not None and longer is not None
    assert longer.parts[0].run.config.pretrain.num_steps > config.pretrain.num_steps
    assert small.parts[1].run.config.decoder.width < config.decoder.width
    decoders = [plan.base.run.decoder.relative, small.parts[1].run.decoder.relative]
    assert small.decoders() == decoders and len(set(decoders)) == 2


def test_a_row_can_mix_the_decoder_with_another(tiny_config: Config):
    recipe = "{name: second, parts: beside, overrides: [decoder.width=24, pretrain.num_steps=3]}"
    config = changed_config(tiny_config, {}, [f"compare.recipes=[{recipe}]"])
    plan = SeedPlan(config, 7)
    row = planned_row(plan, "second")
    assert row is not None
    assert [part.kind for part in row.parts] == ["decoder", "decoder"]
    assert row.parts[0].run.decoder.relative == plan.base.run.decoder.relative
    assert row.parts[1].run.config.decoder.width == 24
    kinds = {stage.artifact.kind for stage in row.stages()}
    assert kinds == {"tokenizer", "tokens", "decoder", "scores"}
    assert row.decoders() == [part.run.decoder.relative for part in row.parts]
    assert len(set(row.decoders())) == 2


def test_a_row_can_start_from_another_row(tiny_config: Config):
    """Its decoder and its targets are that row's, whether it has a memory or stands beside it."""
    own = ", ".join(
        (
            "{name: wide, parts: decoder, overrides: [decoder.width=24]}",
            "{name: wide-memory, base: wide}",
            "{name: wide-ce, base: wide-memory, overrides: [train.alpha=0]}",
            "{name: second, base: wide, parts: beside, "
            "overrides: [decoder.num_layers=1, pretrain.alpha=0.4]}",
        )
    )
    config = changed_config(tiny_config, {}, [f"compare.recipes=[{own}]"])
    check_recipes(Artifacts(config))
    plan = SeedPlan(config, 7)
    rows = {one.name: planned_row(plan, one.name) for one in config.compare.recipes}
    runs = {name: [part.run for part in row.parts] for name, row in rows.items() if row}
    assert runs["wide"][0].config.decoder.width == 24
    wide = {runs[name][0].decoder.relative for name in runs}
    assert wide == {runs["wide"][0].decoder.relative} != {plan.base.run.decoder.relative}
    memory, plain = (runs[name][1] for name in ("wide-memory", "wide-ce"))
    assert (memory.config.train.alpha, plain.config.train.alpha) == (0.4, 0)
    assert memory.targets("train").relative == plain.targets("train").relative
    second = runs["second"][1].decoder
    assert memory.targets("train").relative in {made.relative for made in second.inputs}


def test_a_chain_of_rows_is_one_row_with_all_their_changes(tiny_config: Config):
    """Also where a row on the way changes the memory's input alone, or has no memory."""
    changes = ("datastore.input.layer=1.0", "pretrain.num_steps=9", "targets.temperature=3.0")
    chain = (
        f"{{name: a, overrides: [{changes[0]}]}}",
        f"{{name: b, base: a, parts: decoder, overrides: [{changes[1]}]}}",
        f"{{name: c, base: b, overrides: [{changes[2]}]}}",
    )
    flat = f"{{name: flat, overrides: [{', '.join(changes)}]}}"
    config = changed_config(tiny_config, {}, [f"compare.recipes=[{', '.join((*chain, flat))}]"])
    plan = SeedPlan(config, 7)
    last, whole = planned_row(plan, "c"), planned_row(plan, "flat")
    assert last is not None and whole is not None
    assert last.made_of() == whole.made_of()
    assert last.parts[1].run.memory.relative != plan.base.run.memory.relative
    with pytest.raises(ConfigError, match=r"compare\.recipes\.3.*the row is c"):
        check_recipes(Artifacts(config))


def test_networks_of_other_tokens_are_not_mixed(make_config: Callable[..., Config]):
    recipe = "{name: second, parts: beside, overrides: [tokenizer.vocab_size=290]}"
    config = make_config(f"compare.recipes=[{recipe}]")
    with pytest.raises(ConfigError, match=r"compare\.recipes\.0: parts=beside mixes networks"):
        check_recipes(Artifacts(config))
    alone = make_config(f"compare.recipes=[{recipe.replace('beside', 'decoder')}]")
    check_recipes(Artifacts(alone))


def test_rows_are_told_apart_by_content_not_by_label(make_config: Callable[..., Config]):
    """A row may be called as one of ours is labelled; what is equal is made once."""
    own = "{name: ce, overrides: [train.alpha=1]}, {name: same, overrides: [train.alpha=0]}"
    config = make_config("compare.rows=[memory_ce]", f"compare.recipes=[{own}]")
    plan = SeedPlan(config, 0)
    rows = {name: planned_row(plan, name) for name in ("memory_ce", "ce", "same")}
    memories = {name: row.parts[1].run.memory.relative for name, row in rows.items() if row}
    assert memories["memory_ce"] == memories["same"] != memories["ce"]
    check_recipes(Artifacts(config))


def test_windows_decide_scores_and_not_the_decoder(make_config: Callable[..., Config]):
    recipe = "{name: wide, parts: decoder, overrides: [datastore.stride_tokens=8]}"
    plan = SeedPlan(make_config(f"compare.recipes=[{recipe}]"), 0)
    row = planned_row(plan, "wide")
    assert row is not None
    (part,) = row.parts
    assert part.run.decoder.relative == plan.decoder.run.decoder.relative
    assert part.scores("test").relative != plan.decoder.scores("test").relative


def test_roles_of_scores_tell_rows_and_steps_apart(make_config: Callable[..., Config]):
    """`run.json` keeps the artifacts of a table by role: none may take another's place."""
    run = Artifacts(make_config("overfitting.seeds=[0, 1]", "ablate.seeds=[0]"))
    stages = [stage for work in overfitting.works(run) for stage in work.stages()]
    roles = {stage.artifact.label: stage.artifact.relative for stage in made_by(stages)}
    assert set(roles.values()) == {stage.artifact.relative for stage in stages}


def test_no_two_artifacts_of_a_table_have_one_role(tiny_config: Config):
    """Roles are the keys of `run.json`: one that is overwritten would count as unused."""
    continued = RecipeConfig(
        name="continued",
        overrides=(
            "train.mode=joint", "train.memory_start=checkpoint", "train.num_steps=2",
            "train.refresh_interval_steps=1", "train.decoder_optimizer.warmup_steps=1",
        ),
    )  # fmt: skip
    compare_section = tiny_config.compare.model_copy(
        update={"seeds": (0, 3), "rows": ("knn", "memory", "memory_ce"), "recipes": (continued,)}
    )
    run = Artifacts(tiny_config.model_copy(update={"compare": compare_section}))
    roles: dict[str, set[str]] = {}
    for work in compare.works(run):
        for stage in work.stages():
            for one in (*stage.artifact.inputs, stage.artifact):
                roles.setdefault(one.label, set()).add(one.relative)
    assert len(roles) > 40 and {len(of_role) for of_role in roles.values()} == {1}
