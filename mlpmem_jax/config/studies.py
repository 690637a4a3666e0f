"""Sections of the studies of a finished run: analyze, cost, search_quality."""

from typing import Annotated, Any, Literal

from pydantic import Field

from mlpmem_jax.config.base import Section, runtime, setting
from mlpmem_jax.config.types import (
    WHOLE,
    Auto,
    Count,
    Fraction,
    ListOf,
    Name,
    OpenFraction,
    PositiveInt,
    Rows,
    Tokens,
    Width,
)

NgramOrder = Annotated[int, Field(ge=2, le=16), WHOLE]


class AnalyzeConfig(Section):
    """Sources of the gains, and sharpness of the distributions."""

    frequency_base: Annotated[int, Field(ge=2, le=10**6), WHOLE] = setting(
        4, "base of the frequency bins, which start at 0, 1 and its powers"
    )
    ngram_orders: ListOf[NgramOrder] = setting(
        (2, 3, 4),
        "orders n; tokens are split by whether the n-gram that ends there occurs in training text",
    )
    sharpness_rows: Rows | None = setting(4096, "random test tokens for sharpness; not set: all")
    masses: ListOf[OpenFraction] = setting(
        (0.5, 0.75, 0.9, 0.95, 0.99),
        "probability masses; the tokens needed to reach each are counted",
    )
    read_tokens: PositiveInt = runtime(1 << 20, "training tokens read at once")
    chunk_rows: PositiveInt = runtime(256, "rows with full distributions held at once, all devices")


class CostConfig(Section):
    """Cost as the datastore grows by doublings."""

    doublings: Annotated[int, Field(ge=1, le=40), WHOLE] = setting(
        6, "number of halvings: sizes are all rows, the first half, the first quarter and so on"
    )
    engines: ListOf[Literal["scann", "exact"]] = setting(
        ("scann", "exact"), "kNN-LM engines to measure"
    )
    rounds: Annotated[int, Field(ge=3, le=10**6), WHOLE] = setting(
        8, "measurements of each size, for the intervals"
    )
    num_tokens: Count = setting(64, "tokens timed per round, one text at a time")
    num_prompts: Count = setting(8, "prompts timed per round, to their first token")
    prompt_tokens: Tokens = setting(128, "tokens per prompt, for the time to the first token")
    batch_size: Count = setting(16, "texts per batch, for tokens per second")
    batch_steps: Count = setting(8, "tokens of each text of the batch timed per round")
    confidence: OpenFraction = setting(0.95, "level of the confidence intervals")
    quality: Literal["none", "train"] = setting(
        "none", "train: train a memory of the same size for each size of the datastore"
    )


class SearchSetting(Section):
    """One search setting."""

    name: Name = setting("setting", "name in tables and figures")
    engine: Literal["scann", "exact", "routed"] = setting("scann", "as retrieval.engine")
    num_leaves_to_search: PositiveInt | Auto = setting("auto", "as in retrieval")
    num_reorder: PositiveInt | Auto = setting("auto", "as in retrieval")
    dims_per_block: Width = setting(2, "as in retrieval")
    cells_to_search: PositiveInt | Auto = setting("auto", "as in retrieval")
    min_recall: Fraction = setting(0.0, "raise auto values until this recall; 0: do not raise")


class SearchQualityConfig(Section):
    """Loss in quality of the kNN-LM and the memory from approximate search."""

    settings: ListOf[SearchSetting] = setting(
        (
            SearchSetting(name="leaves-1", num_leaves_to_search=1),
            SearchSetting(name="leaves-4", num_leaves_to_search=4),
            SearchSetting(name="leaves-16", num_leaves_to_search=16),
            SearchSetting(name="leaves-64", num_leaves_to_search=64),
            SearchSetting(name="exact", engine="exact"),
        ),
        "settings to compare; the last exact one is the reference",
    )
    sample_rows: Rows = setting(2048, "training rows for recall and KL to the exact distribution")

    def recipe(self) -> dict[str, Any]:
        """Returns the keys that decide what is computed, without those that an engine ignores."""
        recipe = super().recipe()
        for each in recipe["settings"]:
            if each["engine"] != "routed":
                each.pop("cells_to_search")
        return recipe
