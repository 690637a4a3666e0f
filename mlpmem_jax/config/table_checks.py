"""Rules about studies and tables of several runs. They name the keys and their values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mlpmem_jax.config.suite import ALL_ROWS

if TYPE_CHECKING:
    from mlpmem_jax.config.schema import Config

_TABLES = ("compare", "overfitting", "ablate")


def table_mistakes(config: Config) -> Iterator[str]:
    """Yields one line for each rule that is broken."""
    for rule in (_studies, _tables):
        yield from rule(config)


def _studies(config: Config) -> Iterator[str]:
    if not config.cost.engines:
        yield "cost.engines=[] must name at least one engine (scann, exact)"
    for key, values in (
        ("cost.engines", config.cost.engines),
        ("analyze.ngram_orders", config.analyze.ngram_orders),
        ("analyze.masses", config.analyze.masses),
    ):
        if len(set(values)) < len(values):
            yield f"{key}={list(values)} names something twice"
    if not config.analyze.masses:
        yield "analyze.masses=[] must hold at least one mass between 0 and 1"
    settings = config.search_quality.settings
    if not settings:
        yield "search_quality.settings=[] must hold at least one setting"
    names = [setting.name for setting in settings]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"search_quality.settings: the name {name} is given twice"
    for place, setting in enumerate(settings):
        wanted, least = setting.num_reorder, config.retrieval.num_neighbors + 1
        if wanted != "auto" and wanted < least:
            yield (
                f"search_quality.settings.{place}.num_reorder={wanted} must be more than "
                f"retrieval.num_neighbors={config.retrieval.num_neighbors} (the own row is found "
                "too)"
            )


def _tables(config: Config) -> Iterator[str]:
    tables = {f"{section}.name": getattr(config, section).name for section in _TABLES}
    for key, name in tables.items():
        if name in (".", "..", "metrics"):
            yield f"{key}={name} must be the name of a directory to make in results/"
        for other, taken in {"memory.name": config.memory.name, **tables}.items():
            if other != key and taken == name and (other == "memory.name" or other < key):
                yield f"{key}={name} and {other}={taken} must differ: both lie in results/"
    for section in _TABLES:
        seeds = getattr(config, section).seeds
        if len(set(seeds)) < len(seeds):
            yield f"{section}.seeds={list(seeds)} names a seed twice"
    if len(set(config.compare.rows)) < len(config.compare.rows):
        yield f"compare.rows={list(config.compare.rows)} names a row twice"
    names: list[str] = list(ALL_ROWS)
    for place, recipe in enumerate(config.compare.recipes):
        if recipe.name in names:
            yield f"compare.recipes.{place}.name={recipe.name} is the name of another row"
        if not recipe.overrides and recipe.teacher is None:
            yield f"compare.recipes.{place}.overrides=[] must change at least one key"
        names.append(recipe.name)
    yield from _teachers(config, names)


def _teachers(config: Config, rows: list[str]) -> Iterator[str]:
    teachers = [teacher.name for teacher in config.compare.teachers]
    for place, teacher in enumerate(config.compare.teachers):
        where = f"compare.teachers.{place}"
        if teacher.name in rows or teacher.name in teachers[:place]:
            yield f"{where}.name={teacher.name} is the name of a row or of another teacher"
        if not teacher.overrides:
            yield f"{where}.overrides=[] must change at least one key"
    for place, recipe in enumerate(config.compare.recipes):
        where = f"compare.recipes.{place}"
        if recipe.teacher is not None and recipe.teacher not in teachers:
            known = ", ".join(teachers) or "there are none"
            yield f"{where}.teacher={recipe.teacher} is none of compare.teachers ({known})"
        if recipe.teacher is not None and recipe.parts != "all":
            yield f"{where}.teacher={recipe.teacher} teaches a memory: {where}.parts must be all"
