"""Rules that span keys or sections. Each mistake names the keys and their values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlpmem_jax.config.schema import Config

_TABLES = ("compare", "overfitting", "ablate")


def cross_section_mistakes(config: Config) -> list[str]:
    """Returns one line for each rule that is broken."""
    rules: tuple[Callable[[Config], Iterator[str]], ...] = (
        _sources, _heads, _layers, _windows, _storage, _batches, _arrays, _mesh,
        _schedules, _names, _candidates, _losses, _starts, _studies, _tables,
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
    if not explicit and corpus.valid_fraction + corpus.test_fraction >= 1:
        yield (
            f"corpus.valid_fraction={corpus.valid_fraction} and corpus.test_fraction="
            f"{corpus.test_fraction} leave nothing to train on (their sum must be below 1)"
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
    if decoder.head_width == "auto":
        head_width = decoder.width // decoder.num_heads
        origin = f"decoder.width={decoder.width} / decoder.num_heads={decoder.num_heads}"
    else:
        head_width, origin = decoder.head_width, f"decoder.head_width={decoder.head_width}"
    divides = decoder.head_width != "auto" or decoder.width % decoder.num_heads == 0
    if decoder.positions == "rope" and divides and head_width % 2:
        yield f"{origin} must be even for decoder.positions=rope"
    if config.memory.head == "tied" and config.memory.width != decoder.width:
        yield (
            f"memory.head=tied needs memory.width={config.memory.width} equal to "
            f"decoder.width={decoder.width}"
        )


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
    if "input" not in store.arrays and ("key" not in store.arrays or store.key != store.input):
        yield (
            f"datastore.arrays={list(store.arrays)} lacks input, which the memory reads (key "
            "serves only where datastore.key and datastore.input are the same state)"
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


def _schedules(config: Config) -> Iterator[str]:
    train = config.train
    schedules = [
        ("pretrain", "optimizer", 0),
        ("train", "optimizer", train.memory_freeze_steps if train.mode == "joint" else 0),
    ]
    if train.mode == "joint":
        schedules.append(("train", "decoder_optimizer", train.decoder_freeze_steps))
    for name, key, frozen in schedules:
        section = getattr(config, name)
        warmup = getattr(section, key).warmup_steps
        if warmup + frozen > section.num_steps:
            added = f" and the {frozen} steps that it is frozen" if frozen else ""
            less = "is" if not added else "are"
            yield (
                f"{name}.{key}.warmup_steps={warmup}{added} {less} more than "
                f"{name}.num_steps={section.num_steps}"
            )


def _losses(config: Config) -> Iterator[str]:
    train, weights = config.train, config.loss_weights
    if not any(weights):
        yield (
            "train.joint_weight, train.lm_weight and train.memory_weight are all 0: "
            "nothing would be trained"
        )
    if train.mode == "memory" and weights.lm > 0:
        yield (
            f"train.lm_weight={weights.lm} needs train.mode=joint: the decoder is frozen in "
            "train.mode=memory"
        )
    if train.mode == "memory" and train.inputs == "online" and weights.joint > 0:
        yield (
            f"train.joint_weight={weights.joint} needs train.inputs=stored (which keeps "
            "log p of the decoder) or train.mode=joint, not train.inputs=online"
        )
    learned = config.memory.gate == "learned"
    if learned and weights.joint == 0:
        yield (
            "memory.gate=learned is trained by the joint loss: set train.joint_weight above 0 "
            f"(train.mode={train.mode}, train.joint_weight={train.joint_weight})"
        )
    if learned and train.interpolation_final is not None:
        yield (
            f"train.interpolation_final={train.interpolation_final} is a schedule, and "
            "memory.gate=learned learns λ: use one of the two"
        )
    floor = config.memory.gate_floor
    if learned and not floor <= train.interpolation <= 1 - floor:
        yield (
            f"train.interpolation={train.interpolation}, where the gate begins, must be from "
            f"memory.gate_floor={floor} to {1 - floor}"
        )


def _starts(config: Config) -> Iterator[str]:
    train = config.train
    starts = (train.decoder_start, train.memory_start)
    if train.mode == "joint" and starts == ("fresh", "checkpoint"):
        yield (
            "train.memory_start=checkpoint needs train.decoder_start=checkpoint: a memory "
            "reads the states of the decoder that it was trained on"
        )
    if train.refresh_interval_steps is None:
        return
    if train.mode != "joint":
        yield (
            f"train.refresh_interval_steps={train.refresh_interval_steps} needs "
            "train.mode=joint: a frozen decoder's targets do not age"
        )
    if config.targets.workdir is not None:
        yield (
            f"train.refresh_interval_steps={train.refresh_interval_steps} makes targets from "
            f"the current decoder: drop targets.workdir={config.targets.workdir}"
        )
