"""The networks of a run, restored and checked against its configuration."""

from typing import Any, Literal

import jax

from mlpmem_jax.config.schema import Config
from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.store.layout import Layout
from mlpmem_jax.store.manifest import Artifact, Manifest, differences
from mlpmem_jax.training.networks import restored_decoder, restored_joint, restored_memory

# What may differ between training and use: weights are float32 whatever they are computed in.
_NO_SHAPE = ("name", "compute_dtype")
# What decides the λ of training (`Config.trained_interpolation`).
_INTERPOLATION = ("mode", "joint_weight", "interpolation", "interpolation_final")


def vocab_size(config: Config) -> int:
    """Returns V of the run's tokenizer, unpadded."""
    return int(Layout(config).tokens.load().counts["vocab_size"])


def separator_id(config: Config) -> int:
    """Returns the token that starts each document of the run."""
    return int(Layout(config).tokens.load().counts["separator_id"])


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
    check_shape(config, artifact, "decoder")
    return restored_decoder(artifact, config.decoder, wanted, mesh, step)


def finished_memory(
    config: Config,
    mesh: jax.sharding.Mesh,
    step: int | None = None,
    *,
    with_its_interpolation: bool = True,
) -> Memory:
    """Restores the run's memory, as it was after its last step or after a given one.

    Args:
        config: The whole configuration.
        mesh: Devices.
        step: A step whose checkpoint is there; None: the last.
        with_its_interpolation: Whether it is used with the λ that it was trained with.

    Raises:
        ArtifactError: It is missing, damaged, of another shape, was trained on the states of
            another decoder than the run's, or with another λ than the configuration's.
    """
    layout = Layout(config)
    decoder, memory = layout.decoder, layout.memory
    trained_on = memory.load().made_from.get(decoder.relative)
    if trained_on != decoder.load().fingerprint:
        raise ArtifactError(
            f"{memory.path}: was trained on another decoder ({trained_on}) than {decoder.path} "
            f"({decoder.load().fingerprint}); train it again with `train --rebuild`"
        )
    check_shape(config, memory, "memory")
    check_inputs(config, memory)
    if with_its_interpolation:
        check_interpolation(config, memory)
    width = config.decoder.width
    return restored_memory(memory, config.memory, width, vocab_size(config), mesh, step)


def starting_memory(config: Config, mesh: jax.sharding.Mesh) -> Memory:
    """Restores the memory that joint training begins with; a gate that is new is left out.

    Raises:
        ArtifactError: As above.
    """
    trained = Layout(config).memory.load().recipe.get("memory", {})
    if trained.get("gate") == "none":
        gate = {name: trained[name] for name in ("gate", "gate_floor")}
        config = config.model_copy(update={"memory": config.memory.model_copy(update=gate)})
    return finished_memory(config, mesh, with_its_interpolation=False)


def finished_networks(config: Config, mesh: jax.sharding.Mesh) -> tuple[Decoder, Memory]:
    """Restores decoder and memory as `train.mode` says: apart, or trained together.

    Raises:
        ArtifactError: As above.
    """
    layout = Layout(config)
    if config.train.mode == "memory":
        return finished_decoder(config, mesh), finished_memory(config, mesh)
    check_shape(config, layout.joint, "decoder", "memory")
    check_inputs(config, layout.joint)
    check_interpolation(config, layout.joint)
    return finished_joint(config, layout.joint, mesh)


def finished_joint(
    config: Config, artifact: Artifact, mesh: jax.sharding.Mesh, step: int | None = None
) -> tuple[Decoder, Memory]:
    """Restores decoder and memory of a joint run.

    Args:
        config: The whole configuration.
        artifact: The run, or one phase of it.
        mesh: Devices.
        step: A step whose checkpoint is complete, of a run that is not; None: it is finished.

    Raises:
        ArtifactError: It is missing, damaged, or of another shape.
    """
    networks = config.decoder, config.memory
    return restored_joint(artifact, *networks, vocab_size(config), mesh, step)


def check_shape(
    config: Config, artifact: Artifact, *sections: Literal["decoder", "memory"]
) -> None:
    """Refuses networks that were trained with another shape than the configured one.

    Raises:
        ArtifactError: Names the keys, and both values of each.
    """
    recipe = artifact.load().recipe
    differing = []
    for section in sections:
        trained, configured = recipe.get(section), getattr(config, section)
        if trained is None:
            continue
        before = type(configured)().recipe()  # A key that is newer than the network.
        for key, value in configured.recipe().items():
            was = trained.get(key, before[key])
            if key not in _NO_SHAPE and was != value:
                differing.append(f"{section}.{key}={value} (trained with {was})")
    if differing:
        raise ArtifactError(
            f"{artifact.path}: the configured network is another one: " + ", ".join(differing)
        )


def check_inputs(config: Config, artifact: Artifact) -> None:
    """Refuses a memory that was trained on another state of the decoder than it would read.

    Where the decoder ran in training, what attention saw must be the same too. Of a memory that
    was trained on stored states, and whose datastore is gone, nothing is known.

    Raises:
        ArtifactError: Names the keys, and both values of each.
    """
    manifest = artifact.load()
    asked: dict[str, Any] = {"datastore": {"input": config.datastore.input.recipe()}}
    if "datastore" in manifest.recipe:
        trained = {name: manifest.recipe[name] for name in ("datastore", "corpus")}
        asked["corpus"] = {"attention": config.corpus.attention}
    else:
        stored = _trained_on(artifact)
        if stored is None:
            return
        trained = {"datastore": {"input": stored.recipe["datastore"]["input"]}}
    lines = differences(trained, asked)
    if lines:
        raise ArtifactError(f"{artifact.path}: was trained otherwise: " + "; ".join(lines))


def _trained_on(artifact: Artifact) -> Manifest | None:
    """Returns the manifest of the rows that a memory was trained on; None: they are gone.

    Raises:
        ArtifactError: They have been made anew since.
    """
    for name, fingerprint in artifact.load().made_from.items():
        if name.startswith("datastore/") and name.endswith("/train"):
            rows = Artifact(artifact.workdir, name, "datastore")
            if not rows.is_complete():
                return None
            if rows.load().fingerprint != fingerprint:
                raise ArtifactError(
                    f"{artifact.path}: was trained on rows that have been made anew since "
                    f"({rows.path}); train it again with `train --rebuild`"
                )
            return rows.load()
    return None


def check_interpolation(config: Config, artifact: Artifact) -> None:
    """Refuses another λ than networks were trained with: of a gate, where it began.

    Raises:
        ArtifactError: Names both.
    """
    recipe = artifact.load().recipe["train"]
    decides = {name: recipe[name] for name in _INTERPOLATION if name in recipe}
    train = config.train.model_copy(update=decides)
    trained = config.model_copy(update={"train": train}).trained_interpolation
    if trained != config.trained_interpolation:
        begun = " where the gate begins" if config.memory.gate == "learned" else ""
        raise ArtifactError(
            f"{artifact.path}: was trained with {_in_words(trained)}{begun}, but the configuration "
            f"has {_in_words(config.trained_interpolation)}; set train.interpolation, "
            "train.interpolation_final and train.joint_weight as in training"
        )


def _in_words(interpolation: float | None) -> str:
    if interpolation is None:
        return "a λ that is chosen on validation (no joint loss)"
    return f"λ = {interpolation}"
