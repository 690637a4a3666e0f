"""Variants of a configuration share what does not depend on the changed keys."""

from collections.abc import Callable

import pytest

from mlpmem_jax.config.load import changed_config
from mlpmem_jax.config.schema import Config
from mlpmem_jax.config.suite import RecipeConfig
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.pipeline import tokenize
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.refresh import Phases
from mlpmem_jax.pipeline.sources import Sources
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.studies.cost import command as cost
from mlpmem_jax.studies.search_quality import command as search_quality
from mlpmem_jax.studies.tables.rows import planned_row
from mlpmem_jax.studies.tables.seed_plan import SeedPlan
from mlpmem_jax.studies.tables.variants import (
    Variant,
    base_variant,
    changed_variant,
    made_by,
    taught_variant,
)

MEMORY_OF_TARGETS = {"targets", "memory"}
SEARCHED = {"index", "neighbors"} | MEMORY_OF_TARGETS
STATES = {"datastore"} | SEARCHED
DECODED = {"decoder"} | STATES


def base_of(config: Config, seed: int = 7) -> Variant:
    """The configuration itself, with the text as it is."""
    return base_variant(config, seed, Sources(config.workdir, reads=False))


def made(variant: Variant) -> dict[str, Stage]:
    """All stages up to the memory, by the paths of their artifacts."""
    return {stage.artifact.relative: stage for stage in variant.memory_stages()}


def own_kinds(variant: Variant, base: Variant) -> set[str]:
    """Kinds of the artifacts that a variant does not share with its base."""
    return {name.split("/")[0] for name in set(made(variant)) - set(made(base))}


@pytest.mark.parametrize(
    ("key", "value", "own"),
    [
        ("train.alpha", 0.0, {"memory"}),
        ("memory.num_layers", 5, {"memory"}),
        ("targets.temperature", 3.0, MEMORY_OF_TARGETS),
        ("targets.num_tokens", 4, MEMORY_OF_TARGETS),
        ("retrieval.num_neighbors", 8, SEARCHED),
        ("retrieval.exact_rows", 9, {"neighbors"} | MEMORY_OF_TARGETS),
        ("datastore.input.layer", 1.0, {"datastore", "memory"}),
        ("datastore.input.site", "residual", {"datastore", "memory"}),
        ("datastore.key.layer", 0.5, STATES),
        ("pretrain.num_steps", 9, DECODED),
        ("decoder.width", 64, DECODED),
        ("corpus.attention", "within", DECODED),
        ("corpus.max_bytes", 90_000, {"tokenizer", "tokens"} | DECODED),
        ("tokenizer.vocab_size", 290, {"tokenizer", "tokens"} | DECODED),
        ("train.log_interval_steps", 3, set()),
    ],
)
def test_only_what_depends_on_a_key_is_made_anew(
    tiny_config: Config, key: str, value: object, own: set[str]
):
    base = base_of(tiny_config)
    assert base.config.seed == 7
    variant = changed_variant(base, {key: value}, "x")
    assert own_kinds(variant, base) == own
    # What is shared is the same to the last setting: nothing is overwritten.
    stages, shared = made(variant), made(base)
    for name in set(stages) & set(shared):
        assert stages[name].artifact.recipe == shared[name].artifact.recipe
        assert stages[name].artifact.inputs is not None
        assert [one.relative for one in stages[name].artifact.inputs] == [
            one.relative for one in shared[name].artifact.inputs
        ]


@pytest.mark.parametrize("overrides", [{}, {"targets.share": 0.5}])
def test_an_ngram_teacher_needs_no_search(tiny_config: Config, overrides: dict[str, object]):
    base = base_of(tiny_config)
    variant = changed_variant(base, {"targets.teacher": "ngram", **overrides}, "x")
    assert own_kinds(variant, base) == MEMORY_OF_TARGETS
    kinds = {stage.artifact.kind for stage in made(variant).values()}
    assert kinds == {"tokenizer", "tokens", "decoder", "datastore", "targets", "memory"}
    for split in ("train", "valid"):
        assert variant.run.targets(split).inputs == (variant.run.tokens,)
    # It says nothing about neighbours, and draws nothing unless a share does.
    changed = {"retrieval.num_neighbors": 8, "targets.temperature": 3.0, "seed": 8}
    other = changed_config(variant.config, changed)
    same = [variant.run.of(other).targets(s).relative for s in ("train", "valid")]
    drawn = [variant.run.targets(s).relative for s in ("train", "valid")]
    assert same[1] == drawn[1] and (same[0] == drawn[0]) == (not overrides)


def test_a_table_has_a_row_of_an_ngram_teacher(make_config: Callable[..., Config]):
    recipe = "{name: ngrams, overrides: [targets.teacher=ngram]}"
    config = make_config("compare.rows=[memory]", f"compare.recipes=[{recipe}]")
    plan = SeedPlan(config, 7)
    rows = {name: planned_row(plan, name) for name in ("memory", "ngrams")}
    made_for = {
        name: {stage.artifact.relative for stage in made_by(row.stages())}
        for name, row in rows.items()
        if row is not None
    }
    own = {name.split("/")[0] for name in made_for["ngrams"] - made_for["memory"]}
    assert own == {"targets", "memory", "scores"}


def test_studies_of_search_refuse_targets_that_need_none(make_config: Callable[..., Config]):
    config = make_config(
        "targets.teacher=ngram",
        "cost.quality=train",
        "cost.engines=[exact]",
        "cost.prompt_tokens=8",
    )
    with pytest.raises(ConfigError, match="targets.teacher=ngram: search-quality is about"):
        search_quality._check(base_of(config).run)
    with pytest.raises(ConfigError, match="cost.quality=train makes the targets of each part"):
        cost._check(base_of(config).run)


@pytest.mark.parametrize(
    ("key", "value", "own"),
    [
        ("retrieval.exclude", "document", MEMORY_OF_TARGETS),
        ("retrieval.exclude_repeats_tokens", 8, MEMORY_OF_TARGETS),
        ("targets.share", 0.5, MEMORY_OF_TARGETS),
        ("targets.min_mass", 0.9, MEMORY_OF_TARGETS),
        ("targets.min_recall", 0.5, MEMORY_OF_TARGETS),
        ("targets.share_by", "row", set()),  # Without effect.
        ("targets.ngram_min_count", 3, set()),
    ],
)
def test_index_and_exact_neighbours_do_not_depend_on_how_targets_are_made(
    tiny_config: Config, key: str, value: object, own: set[str]
):
    base = base_of(tiny_config)
    assert own_kinds(changed_variant(base, {key: value}, "x"), base) == own
    kept = changed_config(base.config, {"retrieval.keep_train": "all"})
    plain = base.run.of(kept).neighbors("train")
    assert base.run.tokens.relative not in {one.relative for one in plain.inputs}
    if key.startswith("retrieval"):
        found = base.run.of(changed_config(kept, {key: value})).neighbors("train")
        assert found.relative != plain.relative
        assert base.run.tokens.relative in {one.relative for one in found.inputs}


def test_other_inputs_keep_the_targets(tiny_config: Config):
    base = base_of(tiny_config)
    variant = changed_variant(base, {"datastore.input.layer": 1.0}, "x")
    for split in ("train", "valid"):
        assert variant.run.targets(split) is base.run.targets(split)
    own = {stage.artifact.label for name, stage in made(variant).items() if name not in made(base)}
    title = "[seed 7, x]"
    assert own == {
        f"datastore/train {title}", f"datastore/valid {title}", f"datastore/test {title}",
        f"memory {title}",
    }  # fmt: skip
    sources = {one.relative for one in variant.run.memory.inputs}
    wanted = {variant.run.datastore("train").relative, base.run.targets("train").relative}
    assert wanted <= sources


def test_other_inputs_and_other_targets_share_no_index(tiny_config: Config):
    """Targets are then made from the new datastore, and an index of the base would not be."""
    base = base_of(tiny_config)
    variant = changed_variant(base, {"datastore.input.layer": 1.0, "targets.num_tokens": 5}, "x")
    assert own_kinds(variant, base) == STATES
    shared = {name.split("/")[0] for name in set(made(variant)) & set(made(base))}
    assert shared == {"tokenizer", "tokens", "decoder"}
    own = variant.run.datastore("train").relative
    assert own in {one.relative for one in variant.run.index.inputs}


def test_keys_that_decide_nothing_keep_the_targets_of_other_inputs(tiny_config: Config):
    base = base_of(tiny_config)
    overrides = {"datastore.input.layer": 1.0, "pretrain.log_interval_steps": 3}
    variant = changed_variant(base, overrides, "x")
    assert own_kinds(variant, base) == {"datastore", "memory"}


def test_other_text_and_other_tokenizers_have_tokens_of_their_own(make_config):
    """Rows that differ in corpus or tokenizer are planned beside the others."""
    longer = "{name: more, overrides: [corpus.max_bytes=95_000, tokenizer.vocab_size=310]}"
    same = longer.replace("more", "same").replace("310", "310, train.alpha=0.1")
    config = make_config("compare.rows=[memory]", f"compare.recipes=[{longer}, {same}]")
    plan = SeedPlan(config, 7)
    rows = {name: planned_row(plan, name) for name in ("decoder", "memory", "more", "same")}
    stages = {name: made_by(row.stages()) for name, row in rows.items() if row is not None}
    kinds = {
        name: {
            one.artifact.relative for one in of_row if one.artifact.kind in ("tokenizer", "tokens")
        }
        for name, of_row in stages.items()
    }
    assert all(len(found) == 2 for found in kinds.values())
    assert kinds["decoder"] == kinds["memory"] and kinds["more"] == kinds["same"]
    assert not kinds["decoder"] & kinds["more"]
    # Of two rows with the same text, the decoder and all that follows are shared as well.
    shared = {one.artifact.relative for one in stages["more"]} & {
        one.artifact.relative for one in stages["same"]
    }
    assert {name.split("/")[0] for name in shared} >= {"decoder", "datastore", "index", "targets"}
    # An artifact is begun after all that it is made from.
    for of_row in stages.values():
        places = {stage.artifact.relative: place for place, stage in enumerate(of_row)}
        for stage in of_row:
            assert all(
                places[one.relative] < places[stage.artifact.relative]
                for one in stage.artifact.inputs
            )
    for part in rows["more"].parts:  # type: ignore[union-attr]
        assert part.run.config.tokenizer.vocab_size == 310
    # A second seed trains other networks on the same tokens.
    other = planned_row(SeedPlan(config, 8), "more")
    assert other is not None
    shared = {one.artifact.relative for one in made_by(other.stages())} & {
        one.artifact.relative for one in stages["more"]
    }
    assert shared == kinds["more"]


def test_a_teacher_makes_targets_alone(tiny_config: Config):
    base = base_of(tiny_config)
    variant = taught_variant(base, {"decoder.width": 64}, "big")
    assert variant.config.decoder.width == 32 and variant.teacher.config.decoder.width == 64
    own, taught = variant.run, variant.teacher
    assert own.decoder.relative == base.run.decoder.relative != taught.decoder.relative
    for split in ("train", "valid"):
        assert own.datastore(split).relative == base.run.datastore(split).relative
        assert own.targets(split) is taught.targets(split)
        assert own.targets(split).relative != base.run.targets(split).relative
    stages = made(variant)
    assert {own.decoder.relative, taught.decoder.relative} <= set(stages)
    assert list(stages)[-1] == own.memory.relative != base.run.memory.relative
    assert taught.neighbors("valid").relative in stages
    assert taught.neighbors("test").relative not in stages


def test_joint_training_goes_on_from_the_memory_of_the_base(tiny_config: Config):
    base = base_of(tiny_config)
    variant = changed_variant(
        base,
        {"train.mode": "joint", "train.num_steps": 3},
        "x",
        texts=["train.memory_start=checkpoint", "train.decoder_optimizer.warmup_steps=1"],
    )
    assert set(made(variant)) - set(made(base)) == {variant.run.joint.relative}
    assert variant.run.memory is base.run.memory
    sources = {one.relative for one in variant.run.joint.inputs}
    assert {base.run.decoder.relative, base.run.memory.relative} <= sources


CONTINUED = (
    "train.mode=joint", "train.memory_start=checkpoint", "train.decoder_optimizer.warmup_steps=1",
)  # fmt: skip


def test_a_gate_can_be_put_on_the_memory_of_the_base(tiny_config: Config):
    base = base_of(tiny_config)
    texts = [*CONTINUED, "memory.gate=learned", "memory.gate_floor=0.1"]
    variant = changed_variant(base, {}, "x", texts=texts)
    assert variant.config.memory.gate == "learned" and variant.start is base.run
    assert variant.start.config.memory.gate == "none"


def test_joint_training_goes_on_from_what_a_teacher_taught(tiny_config: Config):
    base = base_of(tiny_config)
    taught = taught_variant(base, {"decoder.width": 64}, "big")
    variant = changed_variant(taught, {}, "x", texts=CONTINUED)
    stages = made(variant)
    assert taught.run.memory.relative in stages and base.run.memory.relative not in stages
    sources = {one.relative for one in stages[variant.run.joint.relative].artifact.inputs}
    wanted = (base.run.decoder, taught.run.memory, taught.teacher.targets("train"))
    assert {one.relative for one in wanted} <= sources


def test_with_a_teacher_the_decoder_of_a_row_can_be_another(tiny_config: Config):
    base = base_of(tiny_config)
    taught = taught_variant(base, {"decoder.width": 64}, "big")
    variant = changed_variant(taught, {"pretrain.num_steps": 3}, "x")
    assert variant.teacher is taught.teacher
    assert variant.run.targets("train") is taught.teacher.targets("train")
    assert variant.run.decoder.relative not in made(taught)
    assert own_kinds(variant, taught) == {"decoder", "datastore", "memory"}


@pytest.mark.parametrize("key", ["corpus.max_bytes=90_000", "tokenizer.vocab_size=290"])
def test_teachers_and_what_they_teach_have_the_same_tokens(tiny_config: Config, key: str):
    base = base_of(tiny_config)
    with pytest.raises(ConfigError, match="a teacher must have the tokens of what it teaches"):
        taught_variant(base, {}, "big", texts=[key])
    taught = taught_variant(base, {"decoder.width": 64}, "big")
    with pytest.raises(ConfigError, match="a teacher must have the tokens of what it teaches"):
        changed_variant(taught, {}, "x", texts=[key])


@pytest.mark.parametrize("other", ["pretrain.num_steps=3", "memory.num_layers=3"])
def test_joint_training_cannot_go_on_from_what_no_row_makes(tiny_config: Config, other: str):
    texts = [*CONTINUED, other]
    with pytest.raises(ConfigError, match="only keys of train and the gate different"):
        changed_variant(base_of(tiny_config), {}, "x", texts=texts)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("evaluate.confidence", "evaluate.confidence: cannot differ between the rows"),
        ("seed", "seed: cannot differ"),
        ("store", "store: cannot differ"),
        ("targets.workdir", "targets.workdir: rows of a table learn from compare.teachers"),
        ("memory.name", "memory.name=3: artifacts have no names"),
        ("memory.widht", "memory.widht=3: unknown key; did you mean memory.width?"),
        ("memori.width", "unknown key"),
    ],
)
def test_keys_that_cannot_be_varied(tiny_config: Config, key: str, message: str):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        changed_variant(base_of(tiny_config, 0), {key: 3}, "x")


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
    decoders = [part.run.decoder for part in (plan.decoder, plan.of_equal_size(), plan.small_lm())]
    assert len({one.relative for one in decoders}) == 3
    assert [one.label for one in decoders] == [
        "decoder [seed 0]", "decoder [seed 0, equal-size]", "decoder [seed 0, small]",
    ]  # fmt: skip
    wide = taught_variant(plan.base, {"decoder.width": 64}, "wide")
    assert wide.teacher.config.decoder.width == 64 and wide.config.memory.head == "tied"
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


def test_what_rows_share_has_the_label_of_the_first(make_config: Callable[..., Config]):
    more = "{name: more, overrides: [train.alpha=0.1, tokenizer.vocab_size=310]}"
    again = more.replace("name: more", "name: again").replace("alpha", "joint_weight")
    run = Artifacts(make_config("compare.rows=[memory]", f"compare.recipes=[{more}, {again}]"))
    keys = ("memory", "more", "again")
    rows = [planned_row(SeedPlan(run.config, seed), key) for seed in (0, 1) for key in keys]
    every = [*tokenize.stages(run), *(stage for row in rows if row for stage in row.stages())]
    labels = [one.artifact.label for one in made_by(every) if one.artifact.kind == "tokens"]
    assert labels == ["tokens", "tokens [seed 0, more]"]
    decoders = [one.artifact.label for one in made_by(every) if one.artifact.kind == "decoder"]
    assert decoders == [f"decoder [seed {seed}{of}]" for seed in (0, 1) for of in ("", ", more")]


def test_seeds_share_tokens_alone(tiny_config: Config):
    first, second = (set(made(base_of(tiny_config, seed))) for seed in (0, 1))
    assert {name.split("/")[0] for name in first & second} == {"tokenizer", "tokens"}


def test_tables_refuse_joint_training_without_lambda(tiny_config: Config):
    texts = ["train.mode=joint", "train.joint_weight=0", "train.decoder_optimizer.warmup_steps=2"]
    message = r"train\.joint_weight=0.* with train\.mode=joint"
    with pytest.raises(ConfigError, match=message):
        changed_variant(base_of(tiny_config, 0), {}, "x", texts=texts)
    with pytest.raises(ConfigError, match=message):
        base_of(changed_config(tiny_config, {}, texts), 0)


def test_a_refresh_makes_targets_of_its_own(tiny_config: Config):
    base = base_of(tiny_config)
    texts = [*CONTINUED, "train.refresh_interval_steps=4"]
    run = changed_variant(base, {}, "x", texts=texts).run
    assert run.targets("train").relative == base.run.targets("train").relative
    refreshed = Phases(run).refreshed(0)
    for split in ("train", "valid"):
        assert refreshed.targets(split).relative != base.run.targets(split).relative
