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
    """Another decoder whose states make targets: the configuration's with some keys changed."""

    name: Name = setting("teacher", "what rows call it")
    overrides: ListOf[AnyText] = setting(
        (), "what is different about it, section.key=value each, as on the command line"
    )


class RecipeConfig(Section):
    """A row of one's own: the configuration with some keys changed."""

    name: Name = setting("recipe", "name of the row")
    label: Text | None = setting(None, "what tables and pictures call it; none: its name")
    overrides: ListOf[AnyText] = setting(
        (), "what is different, section.key=value each, as on the command line"
    )
    parts: Literal["all", "decoder", "beside"] = setting(
        "all",
        "all: decoder with memory, or joint; decoder: the decoder alone; beside: the decoder mixed "
        "with that of the configuration",
    )
    teacher: Text | None = setting(
        None, "which of compare.teachers makes the targets; none: the row's own decoder"
    )


class CompareConfig(Section):
    """The main table: the memory beside its baselines and controls, several seeds."""

    name: Name = setting("compare", "name of the table in results/")
    seeds: ListOf[Seed] = setting((0, 1, 2), "seeds; each trains every row anew", min_length=1)
    rows: ListOf[RowName] = setting(
        ALL_ROWS, "rows of the table, in its order; the decoder is always one", min_length=1
    )
    recipes: ListOf[RecipeConfig] = setting((), "rows of one's own, after the others")
    teachers: ListOf[TeacherConfig] = setting(
        (), "other decoders, of the same tokenizer, that rows of one's own learn from"
    )
    extra_flops: Literal["all", "networks"] = setting(
        "all",
        "what the controls of equal cost are given: all that the memory cost beyond the decoder "
        "(search and index count seconds × peak), or only what networks computed",
    )
    parameter_tolerance: OpenFraction = setting(
        0.01, "how far the parameters of controls of equal size may be off, as a share"
    )


class OverfittingConfig(Section):
    """Test nats by epoch, for a decoder and a memory that are trained for long."""

    name: Name = setting("overfitting", "name of the table in results/")
    seeds: ListOf[Seed] = setting((0,), "seeds", min_length=1)
    decoder_epochs: Epochs = setting(6, "epochs that the decoder is trained for")
    memory_epochs: Epochs = setting(8, "epochs that the memory is trained for")


class SweepConfig(Section):
    """One key of the configuration, and the values that it takes."""

    key: Text = setting("train.alpha", "dotted key of the configuration")
    values: ListOf[SweptInt | SweptFloat | AnyText | None] = setting((), "its values")
    overrides: ListOf[AnyText] = setting(
        (), "what else is different for all of its values, section.key=value each"
    )
    role: Literal["model", "teacher"] = setting(
        "model",
        "model: the key changes what is evaluated; teacher: only the decoder whose states make "
        "the targets, the model stays",
    )
    hold: Literal["none", "memory_parameters"] = setting(
        "none",
        "memory_parameters (for key memory.num_layers): memory.width and memory.ffn_width are "
        "chosen so that the memory keeps its parameters",
    )


class AblateConfig(Section):
    """Sweeps of one key each, around the configuration."""

    name: Name = setting("ablate", "name of the table in results/")
    seeds: ListOf[Seed] = setting((0,), "seeds", min_length=1)
    sweeps: ListOf[SweepConfig] = setting((), "the sweeps, in order")
