"""Training that continues the memory from before text was appended (train.memory_start)."""

import functools

import jax
import numpy as np

from mlpmem_jax.console import say
from mlpmem_jax.errors import ArtifactError, ConfigError
from mlpmem_jax.input.windows import replayed_order
from mlpmem_jax.pipeline.changed import CONTINUES, memory_before
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.networks import check_start, starting_memory, vocab_size
from mlpmem_jax.store.joined import Rows
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.training.memory_training import Continuation


def check_continued(run: Artifacts) -> None:
    """Refuses to continue a memory that does not fit, or where no row is new to it.

    Raises:
        ArtifactError: The memory has another shape, decoder or vocabulary, or it is not known
            which rows it was trained on.
        ConfigError: Nothing was appended since, or rows were removed.
    """
    if not run.config.continues_memory:
        return
    memory = memory_before(run)
    manifest = memory.load()
    check_start(run, memory)
    size = int(manifest.counts["vocab_size"])
    if size != vocab_size(run):
        raise ArtifactError(
            f"{memory.path}: {CONTINUES}: this memory was trained with a vocabulary of {size} "
            f"tokens, and {run.tokenizer.path} has {vocab_size(run)}"
        )
    for needed in (run.tokens, run.decoder):
        if needed.relative not in manifest.made_from:
            raise ArtifactError(
                f"{memory.path}: {CONTINUES}: this memory was not trained with {needed.relative}, "
                f"the run's {needed.label}"
            )
    if run.datastore("train").is_complete():
        new_rows(run, memory)


def new_rows(run: Artifacts, memory: Artifact) -> np.ndarray:
    """Returns which training rows a memory was not trained on: bool [N].

    Raises:
        ArtifactError: It is not known which rows it was trained on.
        ConfigError: None is new, or it was trained on rows that are no longer there.
    """
    before, now = _trained_on(run, memory), Rows.of(run.datastore("train"))
    gone = int((before.numbers_in(now) < 0).sum())
    if gone:
        raise ConfigError(
            f"{CONTINUES}: {memory.path} was trained on {gone:,} rows that were removed since; a "
            "memory without them needs train.memory_start=fresh"
        )
    is_new_N: np.ndarray = now.numbers_in(before) < 0
    if not is_new_N.any():
        raise ConfigError(
            f"{CONTINUES}: no text was appended since {memory.path} was trained; use `append`, or "
            "train.memory_start=fresh"
        )
    return is_new_N


def _trained_on(run: Artifacts, memory: Artifact) -> Rows:
    """Returns the rows of a memory, by the parts that today's rows consist of."""
    stored = [
        Artifact(run.store, name, "datastore")
        for name in memory.load().made_from
        if name.startswith("datastore/")
    ]
    found = [one for one in stored if one.load().recipe["split"] == "train"]
    if not found:
        raise ArtifactError(
            f"{memory.path}: {CONTINUES}: not trained on stored rows (train.inputs=stored), so "
            "that new rows cannot be told from those it was trained on"
        )
    compacted = run.corpus.start.get("datastore/train")
    if compacted is not None:
        copy = Artifact(run.store, compacted, "datastore")
        if copy.load().recipe["compacted"] == found[0].relative:
            return Rows.of(copy)
    return Rows.of(found[0])


def continuation(run: Artifacts, mesh: jax.sharding.Mesh) -> Continuation | None:
    """Returns what training continues, and which windows it reads; None: a fresh memory."""
    config = run.config
    if not config.continues_memory:
        return None
    memory, length = memory_before(run), config.train_window_tokens
    is_new_N = new_rows(run, memory)
    is_new_W = np.logical_or.reduceat(is_new_N, np.arange(0, len(is_new_N), length))
    num_new, num_old = int(is_new_W.sum()), int((~is_new_W).sum())
    read = config.train.num_steps * config.train.batch_size
    replayed = read * config.train.replay_share if num_old else 0.0
    say(
        f"continues {memory.path}: {int(is_new_N.sum()):,} of {len(is_new_N):,} rows are new; "
        f"{num_new:,} windows with new rows are read {(read - replayed) / num_new:.1f} times "
        f"each, {num_old:,} others {replayed / max(1, num_old):.1f} times"
    )
    return Continuation(
        functools.partial(starting_memory, run, mesh, memory),
        replayed_order(is_new_W, config.train.replay_share, config.seed),
    )
