"""The registry of commands, a module each in `pipeline/` or `studies/`.

This registry imports none of them, so `--help` and configuration errors do not start JAX.
A command's module has `main(run, options) -> int`, or `stages(run)` alone.
"""

import contextlib
import importlib
from collections.abc import Collection
from dataclasses import dataclass
from types import ModuleType

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
        sections: The sections, or single keys, of the configuration that it reads; its own first.
        reads_text: Whether the text is read again, rather than remembered by the run directory.
        alone: Whether it runs in a single process.
    """

    module: str
    summary: str
    sections: tuple[str, ...]
    reads_text: bool = False
    alone: bool = False


# Of every command; behind what is a command's own, as in its help.
_RUN = ("workdir", "store", "seed")
# Which trained model is meant, and with which λ it was trained.
_MODEL = ("train.mode", "train.interpolation", "train.interpolation_final")
# Read by commands that run every stage, some of them several times.
_EVERY_STAGE = (
    *_RUN, "corpus", "tokenizer", "decoder", "memory", "mesh", "datastore", "retrieval", "targets",
    "pretrain", "train", "evaluate",
)  # fmt: skip

# Read by commands that change the training text and bring up to date what follows from it.
_CHANGING = (
    "retrieval", "targets", *_RUN, "corpus.document_regex", "corpus.field", "corpus.on_error",
    "corpus.attention", "decoder", "mesh", "datastore",
)  # fmt: skip

COMMANDS: dict[str, Command] = {
    "run": Command(
        "pipeline.run",
        "all stages from tokenize to evaluate, then a sample; complete artifacts are reused",
        tuple(Config.model_fields),
        reads_text=True,
    ),
    "tokenize": Command(
        "pipeline.tokenize",
        "split text into documents and train, valid and test; tokenize it",
        ("corpus", "tokenizer", *_RUN, "decoder.context_tokens", "pretrain.window_tokens"),
        reads_text=True,
    ),
    "pretrain": Command(
        "pipeline.pretrain",
        "train the decoder on the tokens",
        ("pretrain", "decoder", *_RUN, "corpus.attention", "mesh"),
    ),
    "embed": Command(
        "pipeline.embed",
        "run the decoder over the tokens and store its states (the datastore)",
        ("datastore", *_RUN, "corpus.attention", "decoder", "mesh"),
    ),
    "index": Command(
        "pipeline.index",
        "build the search index over the datastore",
        ("retrieval", *_RUN, "mesh", "datastore"),
    ),
    "retrieve": Command(
        "pipeline.retrieve",
        "find neighbours and turn them into next-token distributions (the targets)",
        ("retrieval", "targets", *_RUN, "mesh", "datastore"),
    ),
    "train": Command(
        "pipeline.train",
        "train the MLP Memory on the targets",
        (
            "train", "memory", *_RUN, "corpus.attention", "decoder", "mesh", "datastore",
            "retrieval", "targets",
        ),
    ),
    "evaluate": Command(
        "pipeline.evaluate",
        "compare decoder, kNN-LM and memory on held-out text",
        (
            "evaluate", *_RUN, "corpus.attention", "decoder", "memory", "mesh", "datastore",
            "retrieval", "targets", *_MODEL, "train.joint_weight", "train.loss_chunk_tokens",
        ),
    ),
    "generate": Command(
        "pipeline.generate",
        "continue prompts with decoder and memory",
        (
            "generate", *_RUN, "corpus.attention", "decoder", "memory", "mesh", "datastore.input",
            *_MODEL, "train.joint_weight",
        ),
    ),
    "serve": Command(
        "pipeline.serve",
        "answer requests over HTTP with decoder and memory (OpenAI completions)",
        (
            "serve", "generate.interpolation", *_RUN, "corpus.attention", "decoder", "memory",
            "mesh", "datastore.input", *_MODEL, "train.joint_weight",
        ),
        alone=True,
    ),
    "export": Command(
        "pipeline.export",
        "write decoder and memory as a directory that transformers loads",
        (
            *_RUN, "decoder", "memory", "mesh", "datastore.input", "generate.interpolation",
            *_MODEL, "train.joint_weight",
        ),
        alone=True,
    ),
    "append": Command(
        "pipeline.append",
        "add training text to a run: its rows, and the neighbours and targets of all",
        _CHANGING,
        alone=True,
    ),
    "remove": Command(
        "pipeline.remove",
        "take documents out of the training rows, neighbours and targets of a run",
        _CHANGING,
        alone=True,
    ),
    "compact": Command(
        "pipeline.compact",
        "copy what appending and removing have left into one datastore",
        _CHANGING,
        alone=True,
    ),
    "artifacts": Command(
        "pipeline.artifacts",
        "list the artifacts of the store, what uses them, and remove what nothing uses",
        _RUN,
        alone=True,
    ),
    "compare": Command(
        "studies.compare.command",
        "the main table: baselines, controls and memories, over several seeds",
        ("compare", *_EVERY_STAGE),
        reads_text=True,
        alone=True,
    ),
    "overfitting": Command(
        "studies.overfitting.command",
        "test loss by epoch, of a decoder and a memory trained for many epochs",
        ("overfitting", *_EVERY_STAGE),
        reads_text=True,
        alone=True,
    ),
    "ablate": Command(
        "studies.ablate.command",
        "sweeps over one key each, starting from the configuration",
        ("ablate", *_EVERY_STAGE),
        reads_text=True,
        alone=True,
    ),
    "analyze": Command(
        "studies.analyze.command",
        "gains of a finished run by token frequency and n-gram, and sharpness",
        (
            "analyze", *_RUN, "corpus.attention", "decoder", "memory", "mesh", "datastore",
            "retrieval", "train.loss_chunk_tokens", "evaluate",
        ),
        alone=True,
    ),
    "cost": Command(
        "studies.cost.command",
        "latency, throughput and storage as the datastore grows",
        (
            "cost", *_RUN, "corpus.attention", "decoder", "memory", "mesh", "datastore",
            "retrieval", "targets", "train", "evaluate",
        ),
        alone=True,
    ),
    "search-quality": Command(
        "studies.search_quality.command",
        "loss in quality from approximate search, of the kNN-LM and the memory",
        ("search_quality", *_EVERY_STAGE),
        reads_text=True,
        alone=True,
    ),
    "evaluate-tasks": Command(
        "studies.tasks.command",
        "evaluate decoder, memory, kNN-LM or RAG on tasks of lm-evaluation-harness",
        (
            "tasks", "generate.interpolation", *_RUN, "corpus.attention", "decoder", "memory",
            "mesh", "datastore", "retrieval", *_MODEL, "train.joint_weight",
        ),
        alone=True,
    ),
    "compile": Command(
        "pipeline.compile",
        "check ahead of time whether a step fits its devices, and what limits its speed",
        (
            "compile", *_RUN, "corpus.attention", "tokenizer.vocab_size", "decoder", "memory",
            "mesh", "datastore", "targets", "pretrain", "train",
        ),
        alone=True,
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
            raise ConfigError(f"{name}: runs in a single process, without --processes")
        module = importlib.import_module(f"{__package__}.{COMMANDS[name].module}")
        # `compile` is about the devices of its topology, not of this machine.
        if "mesh" in COMMANDS[name].sections and name != "compile":
            config = resolve.resolved(config)
        if options.print_config:
            say(dump_config(config).rstrip())
            return 0
        return _run(module, config, options, reads_text=COMMANDS[name].reads_text)


def _run(module: ModuleType, config: Config, options: Options, *, reads_text: bool) -> int:
    from mlpmem_jax.pipeline.execute import execute
    from mlpmem_jax.pipeline.graph import Artifacts
    from mlpmem_jax.pipeline.sources import Sources

    run = Artifacts(config, Sources(config.workdir, reads=reads_text))
    if hasattr(module, "main"):
        return int(module.main(run, options))
    return execute(module.stages, run, options)


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
