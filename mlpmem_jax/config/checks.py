"""Rules that span keys. Each message names the keys, their values and what is allowed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from mlpmem_jax.config.pretrained import longest_context, missing_tokenizer, pretrained_keys
from mlpmem_jax.config.pretrained_memory import memory_keys, state_width
from mlpmem_jax.config.table_checks import table_mistakes
from mlpmem_jax.config.target_checks import target_mistakes
from mlpmem_jax.config.training_checks import training_mistakes
from mlpmem_jax.config.weight_files import is_gone
from mlpmem_jax.errors import ConfigError

if TYPE_CHECKING:
    from mlpmem_jax.config.schema import Config


def cross_section_mistakes(config: Config) -> list[str]:
    """Returns one line for each broken rule."""
    rules: tuple[Callable[[Config], Iterator[str]], ...] = (
        _sources, _separator, _heads, _rope_scaling, _pretrained, _memory, _recent, _layers,
        _windows, _storage, _batches, _arrays, _mesh, _candidates, target_mistakes,
        training_mistakes, table_mistakes,
    )  # fmt: skip
    return [mistake for rule in rules for mistake in rule(config)]


def _must_divide(small: str, small_value: int, large: str, large_value: int) -> Iterator[str]:
    if large_value % small_value:
        yield f"{small}={small_value} must divide {large}={large_value}"


def _sources(config: Config) -> Iterator[str]:
    corpus = config.corpus
    explicit = [s for s in ("train", "valid", "test") if getattr(corpus, s).paths]
    if explicit and len(explicit) < 3:
        keys = " and ".join(f"corpus.{split}.paths" for split in explicit)
        yield f"corpus.train.paths, corpus.valid.paths and corpus.test.paths: only {keys} set"
    if explicit and corpus.source in ("stdlib", "huggingface"):
        yield (
            f"corpus.source={corpus.source} has no explicit splits: use corpus.source=text or "
            "jsonl, or remove corpus.train/valid/test"
        )
    named = {"corpus": corpus} | {f"corpus.more.{i}": more for i, more in enumerate(corpus.more)}
    for name, source in named.items():
        where = f"{name}.source={source.source}"
        reads_paths = source.source in ("text", "jsonl")
        if reads_paths and not source.paths and not (name == "corpus" and explicit):
            yield f"{where} requires {name}.paths (files or globs)"
        if source.source == "huggingface" and not source.dataset:
            yield f"{where} requires {name}.dataset (a name)"
        if not reads_paths and source.paths:
            yield f"{where} does not read {name}.paths={list(source.paths)} (text and jsonl do)"
    if explicit:
        return
    fractions = {split: getattr(corpus, f"{split}_fraction") for split in ("valid", "test")}
    for split, fraction in fractions.items():
        if fraction == 0:
            yield (
                f"corpus.{split}_fraction=0 leaves no text for {split}, which every run requires: "
                f"set it above 0, or set corpus.train/valid/test.paths"
            )
    if sum(fractions.values()) >= 1:
        keys = " and ".join(f"corpus.{split}_fraction={f}" for split, f in fractions.items())
        yield f"{keys} leave nothing to train on: their sum must be below 1"


def _separator(config: Config) -> Iterator[str]:
    tokenizer = config.tokenizer
    if tokenizer.path is None and len(tokenizer.separator) == 1:
        yield (
            f"tokenizer.separator={tokenizer.separator!r} is one character, which is also a token "
            "of text in a trained tokenizer: use a longer one, such as <|endoftext|>"
        )


def _heads(config: Config) -> Iterator[str]:
    decoder = config.decoder
    width = ("decoder.width", decoder.width)
    heads = ("decoder.num_heads", decoder.num_heads)
    if decoder.num_kv_heads != "auto":
        yield from _must_divide("decoder.num_kv_heads", decoder.num_kv_heads, *heads)
    divides = width[1] % heads[1] == 0
    origin = f"decoder.head_width={decoder.head_width}"
    if decoder.head_width == "auto":
        yield from _must_divide(*heads, *width)
        origin = f"decoder.width={width[1]} / decoder.num_heads={heads[1]}"
    divides = divides or decoder.head_width != "auto"
    if decoder.positions == "rope" and divides and decoder.resolved_head_width % 2:
        yield f"{origin} must be even for decoder.positions=rope"
    if config.memory.head == "tied" and config.memory.width != decoder.width:
        yield (
            f"memory.head=tied requires memory.width={config.memory.width} to equal "
            f"decoder.width={decoder.width}"
        )


def _rope_scaling(config: Config) -> Iterator[str]:
    decoder = config.decoder
    scaling = decoder.rope_scaling
    if scaling.kind != "none" and decoder.positions != "rope":
        yield (
            f"decoder.rope_scaling.kind={scaling.kind} requires decoder.positions=rope, not "
            f"{decoder.positions}"
        )
    if scaling.kind == "yarn" and decoder.rope_theta == 1:
        yield "decoder.rope_scaling.kind=yarn requires decoder.rope_theta=1 to be larger"
    if scaling.fast_turns <= scaling.slow_turns:
        yield (
            f"decoder.rope_scaling.fast_turns={scaling.fast_turns} must be more than "
            f"decoder.rope_scaling.slow_turns={scaling.slow_turns}"
        )


def _pretrained(config: Config) -> Iterator[str]:
    """A pretrained decoder has the shape that it has; its context may be cut."""
    path = config.decoder.pretrained
    if path is None:
        if config.pretrain.fine_tune != "none":
            yield "pretrain.fine_tune=full requires decoder.pretrained, the decoder to train"
        return
    if config.pretrain.alpha and config.pretrain.fine_tune == "none":
        yield (
            f"pretrain.alpha={config.pretrain.alpha} has no effect with decoder.pretrained={path}: "
            "set pretrain.fine_tune=full"
        )
    if is_gone(path):
        return
    try:
        wanted = pretrained_keys(path)
    except ConfigError as error:
        yield from error.messages
        return
    for dotted, value in wanted.items():
        given = functools.reduce(getattr, dotted.split("."), config)
        free = dotted.startswith("tokenizer.") or dotted == "decoder.context_tokens"
        if not free and given != value:
            yield f"{dotted}={given}: the decoder in decoder.pretrained={path} has {value}"
    if config.tokenizer.path is None:
        yield (
            f"decoder.pretrained={path}: {missing_tokenizer(path)}; set tokenizer.path to the "
            "tokenizer.json that this decoder was trained with"
        )
    if config.decoder.ngram_orders:
        yield f"decoder.ngram_orders: the decoder in decoder.pretrained={path} has none"
    most = longest_context(path)
    if config.decoder.context_tokens > most:
        yield (
            f"decoder.context_tokens={config.decoder.context_tokens}: the decoder in "
            f"decoder.pretrained={path} reads at most {most}"
        )


def _memory(config: Config) -> Iterator[str]:
    """A pretrained memory has the shape that it has, and reads the states of its decoder."""
    path, train = config.memory.pretrained, config.train
    if path is None or is_gone(path):
        return
    try:
        wanted, width = memory_keys(path), state_width(path)
    except ConfigError as error:
        yield from error.messages
        return
    for dotted, value in wanted.items():
        given = getattr(config.memory, dotted.removeprefix("memory."))
        if given != value:
            yield f"{dotted}={given}: the memory in memory.pretrained={path} has {value}"
    if width != config.decoder.width:
        yield (
            f"memory.pretrained={path}: reads states of width {width}, and "
            f"decoder.width={config.decoder.width}"
        )
    if train.mode == "joint" and train.memory_start != "checkpoint":
        yield (
            f"memory.pretrained={path} has no effect with train.mode=joint and "
            f"train.memory_start={train.memory_start}: set train.memory_start=checkpoint"
        )


def _recent(config: Config) -> Iterator[str]:
    # Generation starts again from half of the context when a row of its cache is full.
    most = max(1, config.decoder.context_tokens // 2)
    limit = f"decoder.context_tokens={config.decoder.context_tokens}: at most {most}"
    if config.memory.recent_tokens > most:
        tokens = config.memory.recent_tokens
        yield f"memory.recent_tokens={tokens} is more than half of {limit}"
    for name in ("decoder", "memory"):
        orders = list(getattr(config, name).ngram_orders)
        if max(orders, default=0) > most:
            yield f"{name}.ngram_orders={orders}: {max(orders)} is more than half of {limit}"
        if len(set(orders)) < len(orders):
            yield f"{name}.ngram_orders={orders} repeats an order"


def _layers(config: Config) -> Iterator[str]:
    num_layers = config.decoder.num_layers
    for name in ("key", "input"):
        site = getattr(config.datastore, name)
        if site.block(num_layers) > num_layers:
            yield f"datastore.{name}.layer={site.layer} exceeds decoder.num_layers={num_layers}"


def _windows(config: Config) -> Iterator[str]:
    context = config.decoder.context_tokens
    embedding = ("datastore.window_tokens", config.embedding_window_tokens)
    windows = [embedding, ("pretrain.window_tokens", config.pretrain_window_tokens)]
    if config.decoder_runs:
        windows.append(("train.window_tokens", config.train_window_tokens))
    for name, tokens in windows:
        if tokens > context:
            yield f"{name}={tokens} is longer than decoder.context_tokens={context}"
    yield from _must_divide("datastore.stride_tokens", config.embedding_stride_tokens, *embedding)


def _storage(config: Config) -> Iterator[str]:
    shard = ("datastore.shard_rows", config.datastore.shard_rows)
    yield from _must_divide("datastore.chunk_rows", config.datastore.chunk_rows, *shard)
    yield from _must_divide("datastore.window_tokens", config.embedding_window_tokens, *shard)


def _batches(config: Config) -> Iterator[str]:
    for name in ("pretrain", "train"):
        section = getattr(config, name)
        batch = (f"{name}.batch_size", section.batch_size)
        yield from _must_divide(f"{name}.accumulation_steps", section.accumulation_steps, *batch)


def _arrays(config: Config) -> Iterator[str]:
    store = config.datastore
    missing = sorted({"label", "logprob"} - set(store.arrays))
    if missing:
        yield f"datastore.arrays must hold label and logprob: {missing} missing"
    if config.targets.workdir is None:
        yield from without_keys(config)
    if "input" not in store.arrays and ("key" not in store.arrays or store.key != store.input):
        yield (
            f"datastore.arrays={list(store.arrays)} lacks input, which the memory reads (key "
            "replaces it only if datastore.key equals datastore.input)"
        )


def without_keys(config: Config) -> Iterator[str]:
    """Yields a line where no keys are stored that could be searched."""
    arrays = list(config.datastore.arrays)
    if "key" not in arrays:
        yield (
            f"datastore.arrays={arrays} lacks key, which index, retrieve and evaluate search; only "
            "training on a teacher's targets (targets.workdir) works without it"
        )


def _mesh(config: Config) -> Iterator[str]:
    mesh = config.mesh
    inferred = [f"mesh.{a}" for a in ("data", "fsdp", "tensor") if getattr(mesh, a) == "auto"]
    if len(inferred) > 1:
        yield f"only one mesh size may be auto, not {' and '.join(inferred)}"
    if mesh.data != "auto":
        yield from _must_divide("mesh.dcn_data", mesh.dcn_data, "mesh.data", mesh.data)


def _candidates(config: Config) -> Iterator[str]:
    retrieval = config.retrieval
    if retrieval.num_reorder != "auto" and retrieval.num_reorder <= retrieval.num_neighbors:
        yield (
            f"retrieval.num_reorder={retrieval.num_reorder} must be more than "
            f"retrieval.num_neighbors={retrieval.num_neighbors} (a row finds itself too)"
        )
    visited, leaves = retrieval.num_leaves_to_search, retrieval.num_leaves
    if visited != "auto" and leaves != "auto" and visited > leaves:
        yield f"retrieval.num_leaves_to_search={visited} exceeds retrieval.num_leaves={leaves}"
