"""What `pretrain` and `train` share: a task, the loop, the manifest."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
from etils import epath
from flax import nnx

from mlpmem_jax.config.stages import WARMUP_STEPS, TrainingConfig
from mlpmem_jax.console import say
from mlpmem_jax.parallel.mesh import make_mesh
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.store.manifest import Artifact, Completion
from mlpmem_jax.training.loop import fit
from mlpmem_jax.training.networks import save_network
from mlpmem_jax.training.optimizer import parameter_groups


def train_task(
    run: Artifacts,
    section_name: Literal["pretrain", "train"],
    make_task: Callable[[Artifacts, jax.sharding.Mesh], Any],
    artifact: Artifact,
    *,
    first_step: int = 0,
    stop_step: int | None = None,
) -> Completion:
    """Trains a network into an artifact.

    Args:
        section_name: The section that says how.
        make_task: Makes the task on a mesh.
        artifact: Where checkpoints go.
        first_step: Where a phase of a run in phases begins.
        stop_step: Where it pauses; None: at the end.
    """
    config = run.config
    section = getattr(config, section_name)
    _log_short_warmup(section, section_name)
    mesh = make_mesh(config.mesh)
    task = make_task(run, mesh)
    name = artifact.relative.replace("/", "-")
    result = fit(
        task,
        section,
        seed=config.seed,
        mesh=mesh,
        directory=artifact.path,
        metrics_directory=epath.Path(config.workdir) / "results" / "metrics" / name,
        first_step=first_step,
        stop_step=stop_step,
    )
    shown = ", ".join(f"{k} {v:.4f}" for k, v in result.measured["validation"].items())
    say(f"{artifact.title}: validation {shown}")
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(result.state.params))
    return Completion(
        counts={
            "steps": section.num_steps if stop_step is None else stop_step,
            "parameters": num_parameters,
            "vocab_size": task.vocab_size,
        },
        files=result.files,
        measured=result.measured,
        content=result.content,
    )


def save_imported(
    network: nnx.Module, artifact: Artifact, mesh: jax.sharding.Mesh, vocab_size: int, path: str
) -> Completion:
    """Saves a network that was read from files of other software.

    Args:
        network: The network, on the mesh.
        artifact: Where its checkpoint goes.
        path: Where it was read, for the message.
    """
    saved = save_network(network, artifact, 0, mesh)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)))
    say(f"{artifact.title}: {parameters:,} parameters read from {path}")
    counts = {**saved.counts, "parameters": parameters, "vocab_size": vocab_size}
    return dataclasses.replace(saved, counts=counts)


def _log_short_warmup(section: TrainingConfig, section_name: str) -> None:
    """Logs the warm-ups that are shorter than the default because the run is short."""
    for group in parameter_groups(section):
        moving = group.num_steps - group.freeze_steps
        warmup = group.config.warmup_of(moving)
        if group.config.warmup_steps == "auto" and warmup < WARMUP_STEPS:
            key = "decoder_optimizer" if group.name == "decoder" else "optimizer"
            say(
                f"warm-up: {warmup} of {moving} steps ({section_name}.{key}.warmup_steps=auto; "
                f"{WARMUP_STEPS} in longer runs)"
            )
