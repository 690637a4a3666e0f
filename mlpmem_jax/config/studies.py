"""Sections of the studies of a finished run: analyze, cost, search_quality."""

from typing import Annotated, Literal

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
    """Where the gains come from, and how sharp the distributions are."""

    frequency_base: Annotated[int, Field(ge=2, le=10**6), WHOLE] = setting(
        4, "frequency bins begin at 0, 1 and the powers of this number"
    )
    ngram_orders: ListOf[NgramOrder] = setting(
        (2, 3, 4), "n: whether the n tokens that end with the label occur in the training text"
    )
    sharpness_rows: Rows | None = setting(4096, "test tokens drawn to measure sharpness; none: all")
    masses: ListOf[OpenFraction] = setting(
        (0.5, 0.75, 0.9, 0.95, 0.99), "probability masses whose number of tokens is counted"
    )
    read_tokens: PositiveInt = runtime(1 << 20, "training tokens read at once")
    chunk_rows: PositiveInt = runtime(
        256, "rows whose whole distributions exist at the same time, over all devices"
    )


class CostConfig(Section):
    """Cost while the datastore grows by doublings."""

    doublings: Annotated[int, Field(ge=1, le=40), WHOLE] = setting(
        6, "sizes: all rows, and the first half, quarter, … of them, so many times"
    )
    engines: ListOf[Literal["scann", "exact"]] = setting(
        ("scann", "exact"), "engines of the kNN-LM that are measured"
    )
    rounds: Annotated[int, Field(ge=3, le=10**6), WHOLE] = setting(
        8, "times that each size is measured; intervals are over them"
    )
    num_tokens: Count = setting(64, "tokens timed in a round, one text at a time")
    num_prompts: Count = setting(8, "times to the first token taken in a round")
    prompt_tokens: Tokens = setting(128, "tokens of a prompt, for the time to the first")
    batch_size: Count = setting(16, "texts continued together, for tokens per second")
    batch_steps: Count = setting(8, "tokens of each of these texts timed in a round")
    confidence: OpenFraction = setting(0.95, "level of the intervals")
    quality: Literal["none", "train"] = setting(
        "none", "train: a memory of the same size for each size of the datastore, and its nats"
    )


class SearchSetting(Section):
    """One way to search."""

    name: Name = setting("setting", "ending of the names of index, targets and memory")
    engine: Literal["scann", "exact"] = setting("scann", "as retrieval.engine")
    num_leaves_to_search: PositiveInt | Auto = setting("auto", "as in retrieval")
    num_reorder: PositiveInt | Auto = setting("auto", "as in retrieval")
    dims_per_block: Width = setting(2, "as in retrieval")
    min_recall: Fraction = setting(
        0.0, "as in retrieval: what is auto is raised until this recall; 0 raises nothing"
    )


class SearchQualityConfig(Section):
    """What approximate search costs the kNN-LM and the memory."""

    settings: ListOf[SearchSetting] = setting(
        (
            SearchSetting(name="leaves-1", num_leaves_to_search=1),
            SearchSetting(name="leaves-4", num_leaves_to_search=4),
            SearchSetting(name="leaves-16", num_leaves_to_search=16),
            SearchSetting(name="leaves-64", num_leaves_to_search=64),
            SearchSetting(name="exact", engine="exact"),
        ),
        "settings to compare; the last one that is exact is what the others are held against",
    )
    sample_rows: Rows = setting(
        2048, "training rows on which recall and KL to the exact distribution are measured"
    )
