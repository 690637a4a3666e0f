"""Rules about studies and tables of several runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mlpmem_jax.config.suite import ALL_ROWS

if TYPE_CHECKING:
    from mlpmem_jax.config.schema import Config

_TABLES = ("compare", "overfitting", "ablate")


def table_mistakes(config: Config) -> Iterator[str]:
    """Yields one line for each broken rule."""
    for rule in (_lists, _settings, _recipes, _teachers):
        yield from rule(config)


def _lists(config: Config) -> Iterator[str]:
    filled = {
        "cost.engines": config.cost.engines,
        "analyze.masses": config.analyze.masses,
        "search_quality.settings": config.search_quality.settings,
    }
    distinct = {
        "cost.engines": config.cost.engines,
        "analyze.ngram_orders": config.analyze.ngram_orders,
        "analyze.masses": config.analyze.masses,
        "compare.rows": config.compare.rows,
        **{f"{section}.seeds": getattr(config, section).seeds for section in _TABLES},
    }
    yield from (f"{key}=[] must have at least one entry" for key, v in filled.items() if not v)
    for key, values in distinct.items():
        if len(set(values)) < len(values):
            yield f"{key}={list(values)} repeats an entry"


def _settings(config: Config) -> Iterator[str]:
    settings = config.search_quality.settings
    names = [setting.name for setting in settings]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"search_quality.settings: the name {name} is given twice"
    least = config.retrieval.num_neighbors
    for place, setting in enumerate(settings):
        if setting.num_reorder != "auto" and setting.num_reorder <= least:
            yield (
                f"search_quality.settings.{place}.num_reorder={setting.num_reorder} must be more "
                f"than retrieval.num_neighbors={least} (a row finds itself too)"
            )


def _recipes(config: Config) -> Iterator[str]:
    rows: list[str] = list(ALL_ROWS)
    earlier: list[str] = []
    mixed = [recipe.name for recipe in config.compare.recipes if recipe.parts == "beside"]
    teachers = [teacher.name for teacher in config.compare.teachers]
    for place, recipe in enumerate(config.compare.recipes):
        where, teacher = f"compare.recipes.{place}", recipe.teacher
        if recipe.name in rows:
            yield f"{where}.name={recipe.name} is the name of another row"
        if not recipe.overrides and teacher is None and recipe.base is None:
            yield f"{where}.overrides=[] must change at least one key"
        if teacher is not None and teacher not in teachers:
            known = ", ".join(teachers) or "there are none"
            yield f"{where}.teacher={teacher} is none of compare.teachers ({known})"
        if teacher is not None and recipe.parts != "all":
            yield f"{where}.teacher={teacher} teaches a memory: {where}.parts must be all"
        if recipe.base is not None and recipe.base not in earlier:
            known = ", ".join(earlier) or "there are none"
            yield f"{where}.base={recipe.base} is none of the rows before it ({known})"
        if recipe.base is not None and teacher is not None:
            yield f"{where}.teacher={teacher}: with {where}.base it is the teacher of that row"
        if recipe.base in mixed:
            yield f"{where}.base={recipe.base} mixes two decoders (parts=beside): name another row"
        rows.append(recipe.name)
        earlier.append(recipe.name)


def _teachers(config: Config) -> Iterator[str]:
    taken = {*ALL_ROWS, *(recipe.name for recipe in config.compare.recipes)}
    for place, teacher in enumerate(config.compare.teachers):
        where = f"compare.teachers.{place}"
        if teacher.name in taken:
            yield f"{where}.name={teacher.name} is the name of a row or of another teacher"
        if not teacher.overrides:
            yield f"{where}.overrides=[] must change at least one key"
        taken.add(teacher.name)
