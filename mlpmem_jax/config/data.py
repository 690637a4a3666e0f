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
    Name,
    PathText,
    PositiveInt,
    Rows,
    Text,
    Tokens,
    Width,
)

Dtype = Literal["float16", "bfloat16", "float32"]


class SplitPaths(Section):
    """Files of one split, when the splits are given and not drawn by hash."""

    paths: ListOf[GlobText] = setting((), "files or globs of this split")


class Source(Section):
    """One more place that text comes from."""

    source: Literal["stdlib", "text", "jsonl", "huggingface"] = setting("text", "kind of source")
    paths: ListOf[GlobText] = setting((), "files or globs (plain, .gz, .zst, .zstd)")
    field: Text = setting("text", "field of a JSONL record or dataset row that holds the text")
    dataset: Text | None = setting(None, "name of a Hugging Face dataset")
    dataset_config: Text | None = setting(None, "configuration of that dataset")
    dataset_split: Text = setting("train", "split of that dataset to stream")
    weight: float = setting(
        1.0, "share of its documents that is kept, by content hash", ge=1e-9, le=1
    )


class CorpusConfig(Source):
    """Where text comes from and how it is cut into documents and splits."""

    source: Literal["stdlib", "text", "jsonl", "huggingface"] = setting(
        "stdlib", "stdlib: source code of the running Python's standard library"
    )
    more: ListOf[Source] = setting((), "further sources; all together make one row space")
    document_regex: Text | None = setting(
        None, "a document begins wherever this regular expression matches a line's start"
    )
    train: SplitPaths = setting(SplitPaths(), "explicit training files")
    valid: SplitPaths = setting(SplitPaths(), "explicit validation files")
    test: SplitPaths = setting(SplitPaths(), "explicit test files")
    valid_fraction: Fraction = setting(0.05, "share of documents drawn for validation")
    test_fraction: Fraction = setting(0.05, "share of documents drawn for test")
    max_bytes: Bytes | None = setting(
        None, "stop after this many bytes of text; what is left out does not count"
    )
    on_error: Literal["error", "skip"] = setting(
        "error", "what to do with a file that is not UTF-8 text, or a record without usable text"
    )
    attention: Literal["across", "within"] = setting(
        "across", "whether attention crosses document boundaries inside a window"
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
    """Byte-level BPE, trained on the corpus or given."""

    path: PathText | None = setting(
        None, "an existing tokenizer.json; none trains one on the corpus"
    )
    vocab_size: Annotated[int, Field(ge=257, le=10**7), WHOLE] = setting(
        4096, "entries of a trained tokenizer, separator included"
    )
    separator: Text = setting("<|endoftext|>", "token that starts each document")
    train_bytes: Bytes = setting(32_000_000, "bytes of training text that BPE is trained on")


class StateSite(Section):
    """One hidden state of the decoder."""

    site: Literal["ffn_input", "residual"] = setting(
        "ffn_input",
        "ffn_input: what the block's feed-forward reads, after its norm; residual: its output",
    )
    layer: Layer = setting(
        1.0, "block: a whole number counts from 1, a decimal is a share of depth"
    )

    def block(self, num_layers: int) -> int:
        """Returns the block's number counted from 1 (a fraction f is ceil(f·num_layers))."""
        if isinstance(self.layer, int):
            return self.layer
        # The tolerance keeps 0.7 * 10 at 7: binary fractions land just above.
        return max(1, -int(-(self.layer * num_layers - 1e-9) // 1))


class DatastoreConfig(Section):
    """Which states of which tokens are stored, and how."""

    name: Name = setting("base", "name of the datastore")
    key: StateSite = setting(StateSite(), "the state that is searched (kNN-LM's key)")
    input: StateSite = setting(StateSite(layer=0.7), "the state that the memory reads")
    arrays: ListOf[Literal["key", "input", "label", "logprob"]] = setting(
        ("key", "input", "label", "logprob"), "what is stored of each row"
    )
    dtype: Dtype = setting("float16", "storage type of keys and inputs")
    window_tokens: Tokens | Auto = setting(
        "auto", "tokens that the decoder reads at once; auto: decoder.context_tokens"
    )
    stride_tokens: Tokens | Auto = setting(
        "auto", "rows scored by each window; auto: half a window"
    )
    batch_size: Count = runtime(32, "windows embedded at once, over all devices")
    shard_rows: PositiveInt = setting(32768, "rows in a storage shard (one file an array)")
    chunk_rows: PositiveInt = setting(256, "rows in the smallest readable piece of a shard")


class RetrievalConfig(Section):
    """How neighbours are found (paper, section 2)."""

    name: Name = setting("auto", "name of index and neighbours; auto: datastore.name")
    exact_name: Name = setting(
        "auto",
        "name of the exact neighbours of valid and test, which depend on K alone; auto: name",
    )
    engine: Literal["auto", "scann", "exact"] = setting(
        "auto", "scann: approximate, re-ranked exactly; exact: brute force on the mesh"
    )
    num_neighbors: Width = setting(256, "neighbours of each row, K; own row excluded")
    min_recall: Fraction = setting(0.95, "a measured recall@K below this is an error")
    recall_queries: Annotated[int, Field(ge=1000, le=10**7), WHOLE] = setting(
        1024, "rows sampled to measure recall"
    )
    shard_rows: PositiveInt = setting(4_000_000, "rows in an index shard")
    num_leaves: PositiveInt | Auto = setting(
        "auto", "leaves of the tree; auto: square root of rows"
    )
    num_leaves_to_search: PositiveInt | Auto = setting(
        "auto", "leaves visited by a query; auto: raised until the recall suffices"
    )
    num_reorder: PositiveInt | Auto = setting(
        "auto", "candidates whose distance is computed exactly; auto: 2 (K + 1), raised if needed"
    )
    dims_per_block: Width = setting(2, "dimensions quantised together")
    training_rows: Rows = setting(100_000, "most rows on which the index is trained")
    query_batch: PositiveInt = runtime(8192, "queries searched at once")
    key_chunk_rows: PositiveInt = runtime(
        65536, "keys that one device of the exact engine scores at once"
    )
    keep_train: Literal["none", "all"] = setting(
        "none", "whether neighbours of training rows are kept"
    )


class TargetsConfig(Section):
    """kNN next-token distributions (paper, Eq. 3)."""

    name: Name = setting("base", "name of the targets")
    workdir: PathText | None = setting(
        None, "run directory of the teacher whose targets are read; none: this run makes them"
    )
    temperature: Annotated[float, Field(ge=1e-6, le=1e9)] | Auto = setting(
        "auto", "τ of the distance softmax; auto: chosen on validation for the kNN-LM"
    )
    num_tokens: Width = setting(32, "most probable tokens kept of each distribution, S")
    dtype: Literal["float16", "bfloat16"] = setting("float16", "storage type of probabilities")
