"""Sections about data: corpus, tokenizer, datastore, retrieval, targets."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from mlpmem_jax.config.base import Section, runtime, setting
from mlpmem_jax.config.types import (
    WHOLE,
    Auto,
    Bytes,
    Count,
    Fraction,
    GlobText,
    Layer,
    ListOf,
    PathText,
    PositiveFraction,
    PositiveInt,
    Rows,
    Text,
    Tokens,
    Width,
)

Dtype = Literal["float16", "bfloat16", "float32"]


class SplitPaths(Section):
    """Files of one split, for explicit splits."""

    paths: ListOf[GlobText] = setting((), "files or globs of this split")


class Source(Section):
    """A further source of text."""

    source: Literal["stdlib", "text", "jsonl", "huggingface"] = setting("text", "kind of source")
    paths: ListOf[GlobText] = setting((), "files or globs (plain, .gz, .zst or .zstd)")
    field: Text = setting("text", "field of a JSONL record or dataset row that holds the text")
    dataset: Text | None = setting(None, "name of a Hugging Face dataset")
    dataset_config: Text | None = setting(None, "configuration of the dataset")
    dataset_split: Text = setting("train", "split of the dataset to stream")
    weight: float = setting(1.0, "share of its documents to keep, by content hash", ge=1e-9, le=1)


class CorpusConfig(Source):
    """Sources of text, and its division into documents and splits."""

    source: Literal["stdlib", "text", "jsonl", "huggingface"] = setting(
        "stdlib", "stdlib: source code of the running Python's standard library"
    )
    more: ListOf[Source] = setting((), "further sources, joined with the first")
    document_regex: Text | None = setting(
        None, "regular expression that matches the first line of each document"
    )
    train: SplitPaths = setting(SplitPaths(), "explicit training files")
    valid: SplitPaths = setting(SplitPaths(), "explicit validation files")
    test: SplitPaths = setting(SplitPaths(), "explicit test files")
    valid_fraction: Fraction = setting(0.05, "share of documents drawn for validation")
    test_fraction: Fraction = setting(0.05, "share of documents drawn for test")
    max_bytes: Bytes | None = setting(
        None, "stop before the first document that would exceed this; not set: all"
    )
    near_duplicates: float | None = setting(
        None,
        "leave out documents that share this much of their word 5-grams (MinHash); not set: none",
        ge=0.1,
        le=1,
    )
    on_error: Literal["error", "skip"] = setting(
        "error", "on a file that is not UTF-8 or a record without usable text: exit, or skip it"
    )
    attention: Literal["across", "within"] = setting(
        "across",
        "across: attention crosses document boundaries inside a window; within: it does not",
    )

    @field_validator("document_regex")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            # Deep nesting and huge repetitions are errors of their own kinds.
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"is not a regular expression: {error}") from None
        return value


class TokenizerConfig(Section):
    """Byte-level BPE, trained on the corpus or loaded."""

    path: PathText | None = setting(None, "existing tokenizer.json; not set: trained on the corpus")
    vocab_size: Annotated[int, Field(ge=257, le=10**7), WHOLE] = setting(
        4096, "entries of a trained tokenizer, separator included"
    )
    separator: Text = setting("<|endoftext|>", "token that starts each document")
    train_bytes: Bytes = setting(32_000_000, "bytes of training text for training BPE")


class StateSite(Section):
    """One hidden state of the decoder."""

    site: Literal["ffn_input", "residual"] = setting(
        "ffn_input",
        "ffn_input: input of the feed-forward layer, after its norm; residual: output of the block",
    )
    layer: Layer = setting(1.0, "block, by number (1: first) or share of the depth (1.0: last)")

    def block(self, num_layers: int) -> int:
        """Returns the block's number counted from 1 (a fraction f is ceil(f·num_layers))."""
        if isinstance(self.layer, int):
            return self.layer
        # The tolerance keeps 0.7 * 10 at 7: binary fractions land just above.
        return max(1, -int(-(self.layer * num_layers - 1e-9) // 1))


class DatastoreConfig(Section):
    """Storage of the decoder's states."""

    key: StateSite = setting(StateSite(), "searched state (the kNN-LM's key)")
    input: StateSite = setting(StateSite(layer=0.7), "input of the memory")
    arrays: ListOf[Literal["key", "input", "label", "logprob"]] = setting(
        ("key", "input", "label", "logprob"), "arrays stored for each row"
    )
    dtype: Dtype = setting("float16", "storage dtype of keys and inputs")
    window_tokens: Tokens | Auto = setting("auto", "window size; auto: decoder.context_tokens")
    stride_tokens: Tokens | Auto = setting("auto", "rows scored per window; auto: half a window")
    batch_size: Count = runtime(32, "windows per batch, over all devices")
    shard_rows: PositiveInt = setting(32768, "rows per storage shard (one file per array)")
    chunk_rows: PositiveInt = setting(256, "rows in the smallest readable piece of a shard")


class RetrievalConfig(Section):
    """Search for neighbours (paper, section 2)."""

    engine: Literal["auto", "scann", "exact", "routed"] = setting(
        "auto",
        "scann: approximate, re-ranked exactly; exact: brute force; routed: exact inside the "
        "k-means cells nearest to a query; auto: by the number of rows: exact, ScaNN (CPU), "
        "routed (docs/design.md)",
    )
    num_neighbors: Width = setting(256, "neighbours per row, K, without the row itself")
    min_recall: Fraction = setting(
        0.95, "raise auto settings until recall@K reaches this; warn where it stays lower"
    )
    recall_queries: Annotated[int, Field(ge=1000, le=10**7), WHOLE] = setting(
        1024, "rows sampled to measure recall"
    )
    shard_rows: PositiveInt = setting(4_000_000, "rows per index shard")
    num_leaves: PositiveInt | Auto = setting("auto", "tree leaves; auto: square root of rows")
    num_leaves_to_search: PositiveInt | Auto = setting(
        "auto", "leaves visited per query; auto: raised until the recall suffices"
    )
    num_reorder: PositiveInt | Auto = setting(
        "auto", "candidates re-ranked by exact distance; auto: 2 (K + 1), raised if needed"
    )
    dims_per_block: Width = setting(2, "dimensions quantised together")
    training_rows: Rows = setting(100_000, "rows for training ScaNN's index, at most")
    cells: Annotated[int, Field(ge=1, le=10**6), WHOLE] | Auto = setting(
        "auto",
        "cells of the routed engine; auto: one for 256 rows, or for K + 1 if these are more; "
        "centroids take at most 1 GiB",
    )
    cells_to_search: PositiveInt | Auto = setting(
        "auto", "cells visited per query (routed engine); auto: raised until the recall suffices"
    )
    query_batch: PositiveInt = runtime(8192, "queries searched at once")
    memory_bytes: Bytes | Auto = runtime(
        "auto",
        "memory for the keys that are searched at a time, of each device (exact) or each process "
        "(ScaNN, routed); auto: half of what there is",
    )
    key_chunk_rows: PositiveInt | Auto = runtime(
        "auto",
        "keys scored at once per device (exact engine); auto: 65,536 on a CPU, else by its memory",
    )
    keep_train: Literal["none", "all"] = setting("none", "neighbours of training rows to keep")
    exact_rows: Rows | Literal["all"] = setting(
        "all",
        "neighbours of valid and test: all: exact ones; a number: those that the index finds, and "
        "exact ones of so many rows of test, which say what that costs the kNN-LM",
    )
    exclude: Literal["row", "document"] = setting(
        "row", "never neighbours of a training row: itself, or all rows of its document"
    )
    exclude_repeats_tokens: Annotated[int, Field(ge=0, le=1000), WHOLE] = setting(
        0,
        "never neighbours of a training row: those with its label after its last n tokens; 0: off",
    )

    def searches_by_index(self, split: str) -> bool:
        """Returns whether the neighbours of a split are those that the index finds."""
        return split == "train" or self.exact_rows != "all"

    @property
    def excludes_more(self) -> bool:
        """Whether more than the own row is excluded from the neighbours of training rows."""
        return self.exclude != "row" or self.exclude_repeats_tokens > 0


class TargetsConfig(Section):
    """Next-token distributions that the memory learns, of the kNN-LM (paper, Eq. 3) or others."""

    workdir: PathText | None = setting(None, "run directory of the teacher; not set: this run")
    teacher: Literal["knn", "ngram", "arrow"] = setting(
        "knn",
        "knn: neighbours of each row; ngram: what follows the longest context seen elsewhere; "
        "arrow: those of the official code",
    )
    train_arrow: PathText | None = runtime(
        None, "teacher=arrow: file or directory (*.arrow) with the targets of training rows"
    )
    valid_arrow: PathText | None = runtime(None, "teacher=arrow: the same of validation rows")
    ngram_min_count: Annotated[int, Field(ge=1, le=1000), WHOLE] = setting(
        1, "teacher=ngram: least number of other occurrences of a context"
    )
    temperature: Annotated[float, Field(ge=1e-6, le=1e9)] | Auto = setting(
        "auto", "τ of the softmax over distances; auto: tuned on validation for the kNN-LM"
    )
    num_tokens: Width = setting(32, "most probable tokens kept per distribution, S")
    min_mass: PositiveFraction | None = setting(
        None, "keep the fewest tokens with this mass, at most num_tokens; not set: num_tokens"
    )
    min_recall: Fraction | None = setting(
        None,
        "search for training rows only as thoroughly as this recall@K takes, and at most as the "
        "index is searched; not set: like that. teacher=knn and keep_train=none",
    )
    share: PositiveFraction = setting(
        1.0, "share of training rows with targets; the others are not searched for and learn labels"
    )
    share_by: Literal["document", "row"] = setting(
        "document", "how the share is drawn: whole documents, or single rows"
    )
    dtype: Literal["float16", "bfloat16"] = setting("float16", "storage dtype of probabilities")

    def arrow_of(self, split: str) -> str | None:
        """Returns where the targets of a split are in files of the official code, if there."""
        return {"train": self.train_arrow, "valid": self.valid_arrow}.get(split)
