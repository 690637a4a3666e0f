"""The registry of commands, a module each in `pipeline/` or `studies/`.

This registry imports none of them, so `--help` and mistakes in the configuration are
answered without starting JAX. A command's module has `main(config, options) -> int`.
"""

import contextlib
import importlib
from collections.abc import Collection
from dataclasses import dataclass

from mlpmem_jax.config.load import dump_config
from mlpmem_jax.config.schema import Config
from mlpmem_jax.console import quiet_libraries, say
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.parallel import multihost
from mlpmem_jax.parallel.agreement import refuse_different
from mlpmem_jax.parallel.coordinator import told_by_all
from mlpmem_jax.parallel.host import keep_freed_memory
from mlpmem_jax.pipeline import resolve
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.store.files import check_reachable
from mlpmem_jax.store.manifest import software_versions

__all__ = ["COMMANDS", "Command", "Options", "run_command"]


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        module: Its module.
        summary: One line for `--help`.
        sections: The sections, or single keys, of the configuration that it reads.
        alone: Whether it is for one process.
    """

    module: str
    summary: str
    sections: tuple[str, ...]
    alone: bool = False


_RUN = ("workdir", "seed")
# What says which trained model is meant, and with which λ it was trained.
_MODEL = ("train.mode", "train.name", "train.interpolation", "train.interpolation_final")
# What commands read that run every stage, some of them several times.
_EVERY_STAGE = (
    *_RUN, "corpus", "tokenizer", "decoder", "memory", "mesh", "datastore", "retrieval", "targets",
    "pretrain", "train", "evaluate",
)  # fmt: skip

COMMANDS: dict[str, Command] = {
    "tokenize": Command(
        "pipeline.tokenize",
        "text into documents, splits and tokens",
        (*_RUN, "corpus", "tokenizer", "decoder.context_tokens", "pretrain.window_tokens"),
    ),
    "pretrain": Command(
        "pipeline.pretrain",
        "train the decoder on the tokens",
        (*_RUN, "corpus.attention", "decoder", "mesh", "pretrain"),
    ),
    "embed": Command(
        "pipeline.embed",
        "run the decoder over the corpus and store its states",
        (*_RUN, "corpus.attention", "decoder", "mesh", "datastore"),
    ),
    "index": Command(
        "pipeline.index",
        "build the search index over the stored keys",
        (*_RUN, "mesh", "datastore", "retrieval"),
    ),
    "retrieve": Command(
        "pipeline.retrieve",
        "find neighbours and turn them into next-token distributions",
        (*_RUN, "mesh", "datastore", "retrieval", "targets"),
    ),
    "train": Command(
        "pipeline.train",
        "train the MLP Memory on those distributions",
        (
            *_RUN, "corpus.attention", "decoder", "memory", "mesh", "datastore", "retrieval",
            "targets", "train",
        ),
    ),
    "evaluate": Command(
        "pipeline.evaluate",
        "compare decoder, kNN-LM and memory on held-out text",
        (
            *_RUN, "corpus.attention", "decoder", "memory", "mesh", "datastore", "retrieval",
            "targets", *_MODEL, "train.joint_weight", "train.loss_chunk_tokens", "evaluate",
        ),
    ),
    "compare": Command(
        "studies.compare.command",
        "the main table: baselines, controls and memories, several seeds",
        (*_EVERY_STAGE, "compare"),
        alone=True,
    ),
    "overfitting": Command(
        "studies.overfitting.command",
        "test nats by epoch, for a decoder and a memory trained for long",
        (*_EVERY_STAGE, "overfitting"),
        alone=True,
    ),
    "ablate": Command(
        "studies.ablate.command",
        "sweeps of one key each around the configuration",
        (*_EVERY_STAGE, "ablate"),
        alone=True,
    ),
    "generate": Command(
        "pipeline.generate",
        "continue prompts with decoder and memory",
        (
            *_RUN, "corpus.attention", "decoder", "memory", "mesh", "datastore.input", *_MODEL,
            "train.joint_weight", "generate",
        ),
    ),
    "compile": Command(
        "pipeline.compile",
        "check ahead of time whether a step fits its devices, and what bounds it",
        (
            *_RUN, "corpus.attention", "tokenizer.vocab_size", "decoder", "memory", "mesh",
            "datastore", "targets", "pretrain", "train", "compile",
        ),
        alone=True,
    ),
    "analyze": Command(
        "studies.analyze.command",
        "where a finished run helps: by token frequency, by n-gram, by sharpness",
        (
            *_RUN, "corpus.attention", "decoder", "memory", "mesh", "datastore", "retrieval",
            "train.loss_chunk_tokens", "evaluate", "analyze",
        ),
        alone=True,
    ),
    "cost": Command(
        "studies.cost.command",
        "latency, throughput and bytes while the datastore grows by doublings",
        (
            *_RUN, "corpus.attention", "decoder", "memory", "mesh", "datastore", "retrieval",
            "targets", "train", "evaluate", "cost",
        ),
        alone=True,
    ),
    "search-quality": Command(
        "studies.search_quality.command",
        "what approximate search costs the kNN-LM and the memory",
        (
            *_RUN, "corpus", "tokenizer", "decoder", "memory", "mesh", "datastore", "retrieval",
            "targets", "pretrain", "train", "evaluate", "search_quality",
        ),
        alone=True,
    ),
    "run": Command(
        "pipeline.run",
        "tokenize to evaluate in order, then the table and a sample; what is there is kept",
        tuple(Config.model_fields),
    ),
}  # fmt: skip


def run_command(name: str, config: Config, options: Options) -> int:
    """Imports a command's module, runs it, and returns its exit code.

    Here, and nowhere else, the processes of a run join; what only prints needs no others.
    """
    quiet_libraries()
    keep_freed_memory()
    alone = options.dry_run or options.print_config
    with contextlib.nullcontext() if alone else multihost.joined():
        _check_reachable_by_all(config, COMMANDS[name].sections)
        started_with = {"command": name, "flags": options.flags(), "software": software_versions()}
        refuse_different(started_with | config.model_dump(mode="json"))
        if COMMANDS[name].alone and multihost.is_active():
            raise ConfigError(f"{name}: is for one process, without --processes")
        module = importlib.import_module(f"{__package__}.{COMMANDS[name].module}")
        # `compile` is about the devices of its topology, not of this machine.
        if "mesh" in COMMANDS[name].sections and name != "compile":
            config = resolve.resolved(config)
        if options.print_config:
            say(dump_config(config).rstrip())
            return 0
        return int(module.main(config, options))


def _check_reachable_by_all(config: Config, sections: Collection[str]) -> None:
    """Asks the buckets of a run, on every process, since each has credentials of its own.

    After they have joined: one that ended before would be waited for by all others.

    Raises:
        ConfigError: On every process: what one of them cannot reach.
    """
    problems: tuple[str, ...] = ()
    try:
        check_reachable(config.model_dump(mode="json"), sections)
    except ConfigError as error:
        problems = error.messages
    found = told_by_all("reachable", problems)
    if found[0] and all(each == found[0] for each in found):
        raise ConfigError(found[0])
    lines = [f"process {k}: {line}" for k, each in enumerate(found) for line in each]
    if lines:
        raise ConfigError(lines)
