"""The networks of a run, restored; those that its id does not pin down are checked."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.pipeline import recipes
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.store.differences import differences
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.training.networks import (
    Frozen,
    decoder_builder,
    frozen_builder,
    joint_builder,
    memory_builder,
    restored,
)

# Weights are float32 whatever they are computed in; a gate can be put on a memory without one.
_NO_SHAPE = ("compute_dtype", "gate", "gate_floor")


def vocab_size(run: Artifacts) -> int:
    """Returns V of the run's tokenizer, unpadded."""
    return int(run.tokens.load().counts["vocab_size"])


def separator_id(run: Artifacts) -> int:
    """Returns the token that starts each document of the run."""
    return int(run.tokens.load().counts["separator_id"])


def finished_decoder(
    run: Artifacts, mesh: jax.sharding.Mesh, step: int | None = None, *, frozen: bool = False
) -> Decoder:
    """Restores the run's decoder, as it was after its last step or after a given one.

    Args:
        run: The artifacts of the configuration.
        mesh: Devices.
        step: A step whose checkpoint is there; None: the last.
        frozen: Whether it is run and nothing else: parameters in the compute dtype
            (`models.frozen`) in place of float32.

    Raises:
        ArtifactError: It is missing or damaged, or its tokens were rebuilt since.
    """
    _refuse_stale(run.decoder, run.tokens)
    build = decoder_builder(run.config.decoder, vocab_size(run))
    return _restored(run, build, run.decoder, mesh, step, frozen)


def finished_memory(
    run: Artifacts, mesh: jax.sharding.Mesh, step: int | None = None, *, frozen: bool = False
) -> Memory:
    """Restores the run's memory, as it was after its last step or after a given one.

    Args:
        step: A step whose checkpoint is there; None: the last.
        frozen: As of `finished_decoder`.

    Raises:
        ArtifactError: It is missing or damaged, or its decoder was rebuilt since.
    """
    _refuse_stale(run.memory, run.decoder)
    config = run.config
    build = memory_builder(config.memory, config.decoder.width, vocab_size(run))
    return _restored(run, build, run.memory, mesh, step, frozen)


def starting_memory(
    run: Artifacts, mesh: jax.sharding.Mesh, artifact: Artifact | None = None
) -> Memory:
    """Restores the memory that training begins with; a gate that one of both lacks is left out.

    Args:
        run: The artifacts of the configuration.
        mesh: Devices.
        artifact: The memory; None: the run's.

    Raises:
        ArtifactError: It is missing or damaged, its decoder was rebuilt since, or it has another
            shape or other inputs than the configuration's.
    """
    artifact = run.memory if artifact is None else artifact
    trained = artifact.load().recipe["memory"]
    check_start(run, artifact)
    memory = run.config.memory
    if trained["gate"] == "none" or memory.gate == "none":
        gate = {name: trained[name] for name in ("gate", "gate_floor")}
        memory = memory.model_copy(update=gate)
    config = run.config.model_copy(update={"memory": memory})
    network = finished_memory(run.of(config, given=run.given | {"memory": artifact}), mesh)
    if memory.has_gate and not run.config.memory.has_gate:
        del network.gate, network.gate_bias
        network.config = run.config.memory
    return network


def finished_networks(
    run: Artifacts, mesh: jax.sharding.Mesh, *, frozen: bool = False
) -> tuple[Decoder, Memory]:
    """Restores decoder and memory as `train.mode` says: apart, or trained together.

    Args:
        run: The artifacts of the configuration.
        mesh: Devices.
        frozen: As of `finished_decoder`.

    Raises:
        ArtifactError: One is missing, damaged or stale.
    """
    if run.config.train.mode == "memory":
        decoder = finished_decoder(run, mesh, frozen=frozen)
        return decoder, finished_memory(run, mesh, frozen=frozen)
    return finished_joint(run, run.joint, mesh, frozen=frozen)


def finished_joint(
    run: Artifacts,
    artifact: Artifact,
    mesh: jax.sharding.Mesh,
    step: int | None = None,
    *,
    frozen: bool = False,
) -> tuple[Decoder, Memory]:
    """Restores decoder and memory of a joint run.

    Args:
        artifact: The joint run, or one phase of it.
        step: A step whose checkpoint is complete, of a run that is not; None: it is finished.
        frozen: As of `finished_decoder`.

    Raises:
        ArtifactError: It is missing or damaged.
    """
    build = joint_builder(run.config.decoder, run.config.memory, vocab_size(run))
    network = _restored(run, build, artifact, mesh, step, frozen)
    return network.decoder, network.memory


def _restored(
    run: Artifacts,
    build: Callable[[nnx.Rngs], Frozen],
    artifact: Artifact,
    mesh: jax.sharding.Mesh,
    step: int | None,
    frozen: bool,
) -> Frozen:
    if frozen:
        build = frozen_builder(build, run.config.memory)
    return restored(build, artifact, mesh, step)


def _refuse_stale(artifact: Artifact, source: Artifact) -> None:
    """Refuses a network whose input was rebuilt since.

    Raises:
        ArtifactError: Names both, and the fingerprints of the input then and now.
    """
    then, now = artifact.load().made_from.get(source.relative), source.load().fingerprint
    if then != now:
        raise ArtifactError(
            f"{artifact.path}: {artifact.label} was trained with another {source.path} ({then}, "
            f"now {now}); rebuild it with `{artifact.command} --rebuild`"
        )


def check_start(run: Artifacts, artifact: Artifact) -> None:
    """Refuses a memory to begin with of another shape or with other inputs.

    Args:
        run: The artifacts of the configuration.
        artifact: The memory.

    Raises:
        ArtifactError: Names the keys, and both values of each.
    """
    manifest, config = artifact.load(), run.config
    trained = {"memory": dict(manifest.recipe["memory"])}
    asked = {"memory": recipes.network(config, "memory")}
    for recipe in (trained, asked):
        for name in _NO_SHAPE:
            recipe["memory"].pop(name, None)
    trained["datastore"] = {"input": _input_of(artifact)}
    asked["datastore"] = {"input": config.datastore.input.recipe()}
    lines = differences(trained, asked)
    if lines:
        raise ArtifactError(
            f"{artifact.path}: train.memory_start=checkpoint: this memory was trained with other "
            f"settings: {'; '.join(lines)}"
        )


def _input_of(artifact: Artifact) -> Any:
    """Returns which state of the decoder a memory was trained on.

    Raises:
        ArtifactError: The rows that it was trained on are missing.
    """
    manifest = artifact.load()
    if "datastore" in manifest.recipe:
        return manifest.recipe["datastore"]["input"]
    rows = next(name for name in manifest.made_from if name.startswith("datastore/"))
    return Artifact(artifact.root, rows, "datastore").load().recipe["datastore"]["input"]
