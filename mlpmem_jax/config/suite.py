"""Sections about tables of several runs: compare, overfitting, ablate."""

from typing import Literal, get_args

from mlpmem_jax.config.base import Section, setting
from mlpmem_jax.config.types import (
    AnyText,
    Epochs,
    ListOf,
    Name,
    OpenFraction,
    Seed,
    SweptFloat,
    SweptInt,
    Text,
)

# A row of the main table; what each is stands in `studies/tables/rows.py`.
RowName = Literal[
    "decoder",
    "longer",
    "equal_size",
    "knn",
    "knn_scann",
    "memory",
    "memory_ce",
    "memory_kl",
    "small_lm",
    "memory_knn",
    "joint",
    "joint_gate",
]
ALL_ROWS: tuple[RowName, ...] = get_args(RowName)


class TeacherConfig(Section):
    """Another decoder, whose states give the targets: the configuration with changed keys."""

    name: Name = setting("teacher", "name, for compare.recipes.N.teacher")
    overrides: ListOf[AnyText] = setting((), "changed keys, section.key=value each")


class RecipeConfig(Section):
    """An additional row: the configuration with changed keys."""

    name: Name = setting("recipe", "name of the row")
    label: Text | None = setting(None, "label in tables and figures; not set: the name")
    overrides: ListOf[AnyText] = setting((), "changed keys, section.key=value each")
    parts: Literal["all", "decoder", "beside"] = setting(
        "all",
        "all: decoder with memory; decoder: the decoder alone; beside: the decoder interpolated "
        "with the decoder of the configuration or of base",
    )
    base: Text | None = setting(
        None,
        "name of an earlier row of compare.recipes; this row starts from its configuration",
    )
    teacher: Text | None = setting(None, "one of compare.teachers; not set: the row's decoder")


class CompareConfig(Section):
    """The main table: the memory, its baselines and controls, over several seeds."""

    seeds: ListOf[Seed] = setting((0, 1, 2), "seeds; every row is trained for each", min_length=1)
    rows: ListOf[RowName] = setting(
        ALL_ROWS, "rows of the table, in order; the decoder is always included", min_length=1
    )
    recipes: ListOf[RecipeConfig] = setting((), "additional rows, after the others")
    teachers: ListOf[TeacherConfig] = setting((), "further decoders, teachers of additional rows")
    extra_flops: Literal["all", "networks"] = setting(
        "all",
        "FLOPs of the equal-cost controls; all: everything the memory costs beyond the decoder "
        "(search and index count seconds × peak); networks: FLOPs of the networks only",
    )
    parameter_tolerance: OpenFraction = setting(
        0.01, "allowed difference in parameters of the equal-size controls, as a share"
    )


class OverfittingConfig(Section):
    """Test loss (nats) by epoch of a decoder and a memory trained for many epochs."""

    seeds: ListOf[Seed] = setting((0,), "seeds; one run for each", min_length=1)
    decoder_epochs: Epochs = setting(6, "training epochs of the decoder")
    memory_epochs: Epochs = setting(8, "training epochs of the memory")


class SweepConfig(Section):
    """One key of the configuration, and its values."""

    key: Text = setting("train.alpha", "dotted key of the configuration")
    values: ListOf[SweptInt | SweptFloat | AnyText | None] = setting((), "values of the key")
    overrides: ListOf[AnyText] = setting((), "changed keys for all values, section.key=value each")
    role: Literal["model", "teacher"] = setting(
        "model",
        "model: the key changes the evaluated model; teacher: only the decoder whose states give "
        "the targets",
    )
    hold: Literal["none", "memory_parameters"] = setting(
        "none",
        "memory_parameters (only for memory.num_layers): choose memory.width and memory.ffn_width "
        "for a constant number of parameters",
    )


class AblateConfig(Section):
    """Sweeps over one key each, starting from the configuration."""

    seeds: ListOf[Seed] = setting((0,), "seeds; one run for each", min_length=1)
    sweeps: ListOf[SweepConfig] = setting((), "the sweeps, in order")
