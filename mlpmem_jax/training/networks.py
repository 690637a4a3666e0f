"""How networks are made, saved, and restored from training runs."""

from collections.abc import Callable
from typing import TypeVar

import jax
from flax import nnx

from mlpmem_jax.config.networks import DecoderConfig, MemoryConfig
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.models.joint import Joint
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.parallel.sharding import abstract_state
from mlpmem_jax.store.manifest import Artifact, Completion
from mlpmem_jax.training.checkpoint import Checkpoints, restore_finished
from mlpmem_jax.training.content import digest_of
from mlpmem_jax.training.state import flatten, split_module, structure, unflatten

Network = TypeVar("Network", bound=nnx.Module)


def decoder_builder(decoder: DecoderConfig, vocab_size: int) -> Callable[[nnx.Rngs], Decoder]:
    """Returns a function that makes the decoder."""
    return lambda rngs: Decoder(decoder, vocab_size, rngs=rngs)


def memory_builder(
    memory: MemoryConfig, decoder_width: int, vocab_size: int, gate_start: float = 0.5
) -> Callable[[nnx.Rngs], Memory]:
    """Returns a function that makes the memory; its gate, if any, gives `gate_start` at first."""
    return lambda rngs: Memory(memory, decoder_width, vocab_size, gate_start=gate_start, rngs=rngs)


def joint_builder(
    decoder: DecoderConfig, memory: MemoryConfig, vocab_size: int, gate_start: float = 0.5
) -> Callable[[nnx.Rngs], Joint]:
    """Returns a function that makes decoder and memory as one network."""
    parts = (
        decoder_builder(decoder, vocab_size),
        memory_builder(memory, decoder.width, vocab_size, gate_start),
    )
    return lambda rngs: Joint(*parts, rngs=rngs)


def restored_decoder(
    artifact: Artifact,
    decoder: DecoderConfig,
    vocab_size: int,
    mesh: jax.sharding.Mesh,
    step: int | None = None,
) -> Decoder:
    """Restores a decoder; that it was trained with this shape is for the caller to check.

    Args:
        artifact: Its checkpoints.
        decoder: Its shape.
        vocab_size: V, unpadded.
        mesh: Devices.
        step: A step whose checkpoint is there; None: the last of a finished run.

    Raises:
        ArtifactError: It is missing, damaged, or does not fit.
    """
    return _restored(decoder_builder(decoder, vocab_size), artifact, mesh, step)


def restored_memory(
    artifact: Artifact,
    memory: MemoryConfig,
    decoder_width: int,
    vocab_size: int,
    mesh: jax.sharding.Mesh,
    step: int | None = None,
) -> Memory:
    """Restores a memory, as `restored_decoder` does a decoder."""
    return _restored(memory_builder(memory, decoder_width, vocab_size), artifact, mesh, step)


def restored_joint(
    artifact: Artifact,
    decoder: DecoderConfig,
    memory: MemoryConfig,
    vocab_size: int,
    mesh: jax.sharding.Mesh,
    step: int | None = None,
) -> tuple[Decoder, Memory]:
    """Restores decoder and memory that were trained together, as `restored_decoder` does."""
    network = _restored(joint_builder(decoder, memory, vocab_size), artifact, mesh, step)
    return network.decoder, network.memory


def save_network(
    network: nnx.Module, artifact: Artifact, step: int, mesh: jax.sharding.Mesh
) -> Completion:
    """Saves a network alone, as `pretrain` and `train` save it."""
    _, params, fixed = split_module(network)
    checkpoints = Checkpoints(artifact.path, 1, ("params", "fixed"))
    with jax.set_mesh(mesh):  # Where there is nothing, what stands for it is on all devices too.
        items = {"params": flatten(params), "fixed": flatten(fixed)}
        checkpoints.save(step, items)
    checkpoints.close()
    return Completion(
        counts={"steps": step},
        files=checkpoints.files(step),
        measured={"model_flops": 0.0},
        content=digest_of(items),
    )


def abstract_network(build: Callable[[nnx.Rngs], Network], mesh: jax.sharding.Mesh) -> Network:
    """Returns a network whose variables are shapes, dtypes and shardings only."""
    return nnx.merge(structure(build), *_abstract_states(build, mesh))


def _abstract_states(
    build: Callable[[nnx.Rngs], Network], mesh: jax.sharding.Mesh
) -> tuple[nnx.State, nnx.State]:
    """Returns parameters and other variables, as ShapeDtypeStructs with shardings."""

    def states() -> tuple[nnx.State, nnx.State]:
        return split_module(build(nnx.Rngs(0)))[1:]

    return abstract_state(states, mesh)


def _restored(
    build: Callable[[nnx.Rngs], Network],
    artifact: Artifact,
    mesh: jax.sharding.Mesh,
    step: int | None = None,
) -> Network:
    params, fixed = _abstract_states(build, mesh)
    items = {"params": flatten(params), "fixed": flatten(fixed)}
    flat = restore_finished(artifact, items, step)
    return nnx.merge(
        structure(build), unflatten(params, flat["params"]), unflatten(fixed, flat["fixed"])
    )
