"""Rules that span keys or sections. Each mistake names the keys and their values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from mlpmem_jax.config.table_checks import table_mistakes
from mlpmem_jax.config.training_checks import training_mistakes

if TYPE_CHECKING:
    from mlpmem_jax.config.schema import Config


def cross_section_mistakes(config: Config) -> list[str]:
    """Returns one line for each rule that is broken."""
    rules: tuple[Callable[[Config], Iterator[str]], ...] = (
        _sources, _separator, _heads, _recent, _layers, _windows, _storage, _batches, _arrays,
        _mesh, _names, _candidates, training_mistakes, table_mistakes,
    )  # fmt: skip
    return [mistake for rule in rules for mistake in rule(config)]


def _must_divide(small: str, small_value: int, large: str, large_value: int) -> Iterator[str]:
    if large_value % small_value:
        yield f"{small}={small_value} must divide {large}={large_value}"


def _sources(config: Config) -> Iterator[str]:
    corpus = config.corpus
    explicit = [s for s in ("train", "valid", "test") if getattr(corpus, s).paths]
    if explicit and len(explicit) < 3:
        yield (
            "corpus.train.paths, corpus.valid.paths and corpus.test.paths go together: only "
            + " and ".join(f"corpus.{s}.paths" for s in explicit)
            + " given"
        )
    for name, source in [("corpus", corpus)] + [
        (f"corpus.more.{i}", s) for i, s in enumerate(corpus.more)
    ]:
        needs_paths = source.source in ("text", "jsonl")
        if needs_paths and not source.paths and not (name == "corpus" and explicit):
            yield f"{name}.source={source.source} needs {name}.paths (files or globs)"
        if source.source == "huggingface" and not source.dataset:
            yield f"{name}.source=huggingface needs {name}.dataset (a name)"
        if source.source in ("stdlib", "huggingface") and source.paths:
            yield (
                f"{name}.paths={list(source.paths)} is not read by "
                f"{name}.source={source.source} (text and jsonl read paths)"
            )
    if explicit and corpus.source in ("stdlib", "huggingface"):
        yield (
            f"corpus.source={corpus.source} has no explicit splits: set corpus.source=text or "
            "jsonl, or drop corpus.train/valid/test"
        )
    for split in ("valid", "test"):
        if not explicit and getattr(corpus, f"{split}_fraction") == 0:
            yield (
                f"corpus.{split}_fraction=0 leaves no text for {split}, which every run needs: set "
                "it above 0, or name the files of each split in corpus.train/valid/test.paths"
            )
    if not explicit and corpus.valid_fraction + corpus.test_fraction >= 1:
        yield (
            f"corpus.valid_fraction={corpus.valid_fraction} and corpus.test_fraction="
            f"{corpus.test_fraction} leave nothing to train on (their sum must be below 1)"
        )


def _separator(config: Config) -> Iterator[str]:
    tokenizer = config.tokenizer
    if tokenizer.path is None and len(tokenizer.separator) == 1:
        yield (
            f"tokenizer.separator={tokenizer.separator!r} is one character, which a trained "
            "tokenizer has as a token of text too: take a longer one, such as <|endoftext|>"
        )


def _heads(config: Config) -> Iterator[str]:
    decoder = config.decoder
    if decoder.head_width == "auto":
        yield from _must_divide(
            "decoder.num_heads", decoder.num_heads, "decoder.width", decoder.width
        )
    if decoder.num_kv_heads != "auto":
        yield from _must_divide(
            "decoder.num_kv_heads", decoder.num_kv_heads, "decoder.num_heads", decoder.num_heads
        )
    origin = f"decoder.head_width={decoder.head_width}"
    if decoder.head_width == "auto":
        origin = f"decoder.width={decoder.width} / decoder.num_heads={decoder.num_heads}"
    divides = decoder.head_width != "auto" or decoder.width % decoder.num_heads == 0
    if decoder.positions == "rope" and divides and decoder.resolved_head_width % 2:
        yield f"{origin} must be even for decoder.positions=rope"
    if config.memory.head == "tied" and config.memory.width != decoder.width:
        yield (
            f"memory.head=tied needs memory.width={config.memory.width} equal to "
            f"decoder.width={decoder.width}"
        )


def _recent(config: Config) -> Iterator[str]:
    memory, context = config.memory, config.decoder.context_tokens
    # Generation starts again from half of the context when a row of its cache is full.
    most = max(1, context // 2)
    if memory.recent_tokens > most:
        yield (
            f"memory.recent_tokens={memory.recent_tokens} is more than half of "
            f"decoder.context_tokens={context}: at most {most}"
        )
    for section, reader in (("decoder", config.decoder), ("memory", memory)):
        orders = list(reader.ngram_orders)
        if max(orders, default=0) > most:
            yield (
                f"{section}.ngram_orders={orders}: {max(orders)} is more than half of "
                f"decoder.context_tokens={context}: at most {most}"
            )
        if len(set(orders)) < len(orders):
            yield f"{section}.ngram_orders={orders} names an order twice"


def _layers(config: Config) -> Iterator[str]:
    num_layers = config.decoder.num_layers
    for name in ("key", "input"):
        site = getattr(config.datastore, name)
        if site.block(num_layers) > num_layers:
            yield (f"datastore.{name}.layer={site.layer} is beyond decoder.num_layers={num_layers}")


def _windows(config: Config) -> Iterator[str]:
    context = config.decoder.context_tokens
    windows = {
        "datastore.window_tokens": config.embedding_window_tokens,
        "pretrain.window_tokens": config.pretrain_window_tokens,
    }
    if config.decoder_runs:
        windows["train.window_tokens"] = config.train_window_tokens
    for name, tokens in windows.items():
        if tokens > context:
            yield f"{name}={tokens} is longer than decoder.context_tokens={context}"
    yield from _must_divide(
        "datastore.stride_tokens",
        config.embedding_stride_tokens,
        "datastore.window_tokens",
        config.embedding_window_tokens,
    )


def _storage(config: Config) -> Iterator[str]:
    store = config.datastore
    shard = ("datastore.shard_rows", store.shard_rows)
    yield from _must_divide("datastore.chunk_rows", store.chunk_rows, *shard)
    yield from _must_divide("datastore.window_tokens", config.embedding_window_tokens, *shard)


def _batches(config: Config) -> Iterator[str]:
    for name in ("pretrain", "train"):
        section = getattr(config, name)
        yield from _must_divide(
            f"{name}.accumulation_steps",
            section.accumulation_steps,
            f"{name}.batch_size",
            section.batch_size,
        )


def _arrays(config: Config) -> Iterator[str]:
    missing = {"label", "logprob"} - set(config.datastore.arrays)
    if missing:
        yield f"datastore.arrays must hold label and logprob: {sorted(missing)} missing"
    store = config.datastore
    if config.targets.workdir is None:
        yield from without_keys(config)
    if "input" not in store.arrays and ("key" not in store.arrays or store.key != store.input):
        yield (
            f"datastore.arrays={list(store.arrays)} lacks input, which the memory reads (key "
            "serves only where datastore.key and datastore.input are the same state)"
        )


def without_keys(config: Config) -> Iterator[str]:
    """Yields a line where nothing is stored that could be searched."""
    arrays = list(config.datastore.arrays)
    if "key" not in arrays:
        yield (
            f"datastore.arrays={arrays} lacks key, which index, retrieve and evaluate search; only "
            "training on a teacher's targets (targets.workdir) does without"
        )


def _mesh(config: Config) -> Iterator[str]:
    inferred = [axis for axis in ("data", "fsdp", "tensor") if getattr(config.mesh, axis) == "auto"]
    if len(inferred) > 1:
        yield (
            "only one mesh size may be auto, not "
            + " and ".join(f"mesh.{axis}" for axis in inferred)
        )
    if config.mesh.data != "auto":
        yield from _must_divide(
            "mesh.dcn_data", config.mesh.dcn_data, "mesh.data", config.mesh.data
        )


def _names(config: Config) -> Iterator[str]:
    for section in ("decoder", "memory", "datastore", "retrieval", "targets", "train"):
        name = getattr(config, section).name
        if name in (".", ".."):
            yield f"{section}.name={name} must be the name of a directory to make"
    if config.retrieval.exact_name in (".", ".."):
        name = config.retrieval.exact_name
        yield f"retrieval.exact_name={name} must be the name of a directory to make"
    if config.memory.name == "metrics":
        yield "memory.name=metrics is taken: metrics of training lie in results/metrics"


def _candidates(config: Config) -> Iterator[str]:
    retrieval = config.retrieval
    if retrieval.num_reorder != "auto" and retrieval.num_reorder <= retrieval.num_neighbors:
        yield (
            f"retrieval.num_reorder={retrieval.num_reorder} must be more than "
            f"retrieval.num_neighbors={retrieval.num_neighbors} (the own row is found too)"
        )
    if retrieval.num_leaves != "auto" and retrieval.num_leaves_to_search != "auto":
        visited, leaves = retrieval.num_leaves_to_search, retrieval.num_leaves
        if visited > leaves:
            yield (
                f"retrieval.num_leaves_to_search={visited} is more than "
                f"retrieval.num_leaves={leaves}"
            )
