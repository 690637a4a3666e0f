"""The rows of the main table, and what each is made of.

To add a row, name it in `config/suite.py` (`RowName`) and give its recipe here.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import cast

from mlpmem_jax.config.suite import CompareConfig, RecipeConfig, RowName
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.studies.tables.part_scores import Part
from mlpmem_jax.studies.tables.seed_plan import Parts, SeedPlan, model_parts


@dataclasses.dataclass(frozen=True)
class Row:
    """One row for one seed.

    Attributes:
        key: For files.
        label: For people.
        parts: What is mixed, the base first.
    """

    key: str
    label: str
    parts: tuple[Part, ...]

    def stages(self) -> list[Stage]:
        """Returns all stages up to the scores of its parts."""
        return [stage for part in self.parts for stage in part.stages()]

    def made_of(self) -> list[str]:
        """Returns the artifacts that it takes before it can be used, by path."""
        return [name for part in self.parts for name in part.made_of()]

    def decoders(self) -> list[str]:
        """Returns the decoders among them, and those that joint training goes on from."""
        found = []
        for part in self.parts:
            if part.kind == "decoder":
                found += part.made_of()
            elif part.kind == "mixture" or (
                part.kind == "joint" and part.run.config.train.decoder_start == "checkpoint"
            ):
                found.append(part.run.decoder.relative)
        return found


@dataclasses.dataclass(frozen=True)
class RowRecipe:
    """How a row is made.

    Attributes:
        label: For people.
        parts: What it is made of for a seed; None where it cannot be made here.
        missing: Why, in the latter case.
        uses_costs: Whether it is sized by what the memory cost, and so made after it.
    """

    label: str
    parts: Callable[[SeedPlan], Parts]
    missing: str = ""
    uses_costs: bool = False


ROWS: dict[RowName, RowRecipe] = {
    "decoder": RowRecipe("decoder", lambda plan: (plan.decoder,)),
    "longer": RowRecipe(
        "decoder, equal flops", lambda plan: (plan.trained_longer(),), uses_costs=True
    ),
    "equal_size": RowRecipe("decoder, equal size", lambda plan: (plan.of_equal_size(),)),
    "knn": RowRecipe("+ kNN-LM, exact", lambda plan: (plan.decoder, Part("knn", plan.base))),
    "knn_scann": RowRecipe(
        "+ kNN-LM, ScaNN", SeedPlan.knn_scann, missing="the package scann is not installed"
    ),
    "memory": RowRecipe("+ memory", lambda plan: model_parts(plan.base)),
    "memory_ce": RowRecipe(
        "+ memory, CE only", lambda plan: plan.with_memory({"train.alpha": 0.0}, "ce")
    ),
    "memory_kl": RowRecipe(
        "+ memory, KL only", lambda plan: plan.with_memory({"train.alpha": 1.0}, "kl")
    ),
    "small_lm": RowRecipe(
        "+ second small LM", lambda plan: (plan.decoder, plan.small_lm()), uses_costs=True
    ),
    "memory_knn": RowRecipe(
        "+ memory + kNN-LM",
        lambda plan: (plan.decoder, Part("memory", plan.base), Part("knn", plan.base)),
    ),
    "joint": RowRecipe("joint", lambda plan: (plan.joint("none", "joint"),)),
    "joint_gate": RowRecipe("joint, learned gate", lambda plan: (plan.joint("learned", "gate"),)),
}


def _own_parts(recipe: RecipeConfig, plan: SeedPlan) -> tuple[Part, ...]:
    changed = plan.changed(recipe)
    alone = Part("decoder", changed)
    if recipe.parts == "decoder":
        return (alone,)
    if recipe.parts == "beside":
        return (plan.decoder_of_base(recipe), alone)
    return model_parts(changed)


def row_recipe(compare: CompareConfig, key: str) -> RowRecipe:
    """Returns how a row of `compare` is made, one of ours or of the configuration's own."""
    for recipe in compare.recipes:
        if recipe.name == key:
            return RowRecipe(recipe.label or recipe.name, functools.partial(_own_parts, recipe))
    return ROWS[cast(RowName, key)]


def planned_row(plan: SeedPlan, key: str) -> Row | None:
    """Returns a row for a seed, or None where it cannot be made here."""
    recipe = row_recipe(plan.config.compare, key)
    parts = recipe.parts(plan)
    return None if parts is None else Row(key, recipe.label, parts)


def check_recipes(run: Artifacts) -> None:
    """Refuses teachers and rows of one's own that cannot be made, each with its place.

    Raises:
        ConfigError: With one line for each mistake.
    """
    config, mistakes = run.config, []
    plan = SeedPlan(config, config.compare.seeds[0], run.sources)
    configured = _scored((plan.decoder, *model_parts(plan.base)))
    refused: set[str | None] = set()
    rows: dict[str, set[str]] = {}
    for place, teacher in enumerate(config.compare.teachers):
        try:
            plan.taught(teacher.name)
        except ConfigError as error:
            refused.add(teacher.name)
            mistakes += [f"compare.teachers.{place}: {message}" for message in error.messages]
    for place, recipe in enumerate(config.compare.recipes):
        if {recipe.teacher, recipe.base} & refused:
            refused.add(recipe.name)
            continue
        where = f"compare.recipes.{place}"
        try:
            parts = _own_parts(recipe, plan)
            found, tokens = _scored(parts), {part.run.tokens.relative for part in parts}
        except ConfigError as error:
            refused.add(recipe.name)
            mistakes += [f"{where}: {message}" for message in error.messages]
            continue
        if len(tokens) > 1:
            mistakes.append(
                f"{where}: parts={recipe.parts} mixes networks, which need the same tokens: the "
                "same keys of corpus and tokenizer"
            )
        if len(found) < len(parts):
            mistakes.append(
                f"{where}.overrides={list(recipe.overrides)} have no effect: a decoder is mixed "
                "with itself; change decoder or pretrain"
            )
        elif found <= configured:
            mistakes.append(f"{where}.overrides={list(recipe.overrides)} have no effect")
        elif found in rows.values():
            same = next(name for name, row in rows.items() if row == found)
            mistakes.append(
                f"{where}.overrides={list(recipe.overrides)} have no effect: the row is {same}"
            )
        rows[recipe.name] = found
    if mistakes:
        raise ConfigError(mistakes)


def _scored(parts: Iterable[Part]) -> set[str]:
    return {part.scores("valid").relative for part in parts}
