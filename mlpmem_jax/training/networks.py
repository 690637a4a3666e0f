"""How the configured networks are made, and restored from finished training runs."""

from collections.abc import Callable
from typing import TypeVar

import jax
from flax import nnx

from mlpmem_jax.config.schema import Config
from mlpmem_jax.datastore.layout import Layout
from mlpmem_jax.datastore.manifest import Artifact
from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.parallel.sharding import abstract_state
from mlpmem_jax.training.checkpoint import restore_finished
from mlpmem_jax.training.state import flatten, split_module, structure, unflatten

Network = TypeVar("Network", bound=nnx.Module)


def vocab_size(config: Config) -> int:
    """Returns V of the run's tokenizer, unpadded."""
    return int(Layout(config).tokens.load().counts["vocab_size"])


def decoder_builder(config: Config, vocab_size: int) -> Callable[[nnx.Rngs], Decoder]:
    """Returns a function that makes the decoder."""
    return lambda rngs: Decoder(config.decoder, vocab_size, rngs=rngs)


def memory_builder(config: Config, vocab_size: int) -> Callable[[nnx.Rngs], Memory]:
    """Returns a function that makes the memory."""
    return lambda rngs: Memory(config.memory, config.decoder.width, vocab_size, rngs=rngs)


def finished_decoder(config: Config, mesh: jax.sharding.Mesh, step: int | None = None) -> Decoder:
    """Restores the run's decoder, as it was after its last step or after a given one.

    Raises:
        ArtifactError: It is missing, damaged, of another shape, or of another vocabulary
            than the tokens.
    """
    layout = Layout(config)
    artifact = layout.decoder
    trained, wanted = artifact.load().counts["vocab_size"], vocab_size(config)
    if trained != wanted:
        raise ArtifactError(
            f"{artifact.path}: the decoder has a vocabulary of {trained} tokens and "
            f"{layout.tokens.path} one of {wanted}; use the tokenizer that it was trained with"
        )
    return _restored(decoder_builder(config, wanted), artifact, mesh, step)


def finished_memory(config: Config, mesh: jax.sharding.Mesh, step: int | None = None) -> Memory:
    """Restores the run's memory, as it was after its last step or after a given one.

    Raises:
        ArtifactError: It is missing, damaged, of another shape, or was trained on the
            states of another decoder than the run's.
    """
    layout = Layout(config)
    decoder, memory = layout.decoder, layout.memory
    trained_on = memory.load().made_from.get(decoder.relative)
    if trained_on != decoder.load().fingerprint:
        raise ArtifactError(
            f"{memory.path}: was trained on another decoder ({trained_on}) than {decoder.path} "
            f"({decoder.load().fingerprint}); train it again with `train --rebuild`"
        )
    return _restored(memory_builder(config, vocab_size(config)), memory, mesh, step)


def _restored(
    build: Callable[[nnx.Rngs], Network],
    artifact: Artifact,
    mesh: jax.sharding.Mesh,
    step: int | None,
) -> Network:
    def states() -> tuple[nnx.State, nnx.State]:
        return split_module(build(nnx.Rngs(0)))[1:]

    params, fixed = abstract_state(states, mesh)
    items = {"params": flatten(params), "fixed": flatten(fixed)}
    flat = restore_finished(artifact, items, step)
    return nnx.merge(
        structure(build), unflatten(params, flat["params"]), unflatten(fixed, flat["fixed"])
    )
