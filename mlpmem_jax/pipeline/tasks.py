"""The training tasks of a configuration, on its artifacts or, blank, on shapes alone."""

import functools
from typing import Literal

import jax

from mlpmem_jax.interop.huggingface import load_decoder
from mlpmem_jax.models.decoder import Site
from mlpmem_jax.pipeline.continuing import continuation
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.networks import finished_decoder, starting_memory
from mlpmem_jax.roofline.blank import BlankRun
from mlpmem_jax.store.array_specs import Split
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.training.joint_training import JointTask, Start
from mlpmem_jax.training.memory_training import MemoryTask
from mlpmem_jax.training.pretraining import PretrainTask
from mlpmem_jax.training.run_data import RunData, TaskData
from mlpmem_jax.training.train_settings import TrainSettings


def run_data(run: Artifacts, section: Literal["pretrain", "train"]) -> RunData:
    """Returns the artifacts that `pretrain` or `train` reads."""
    config = run.config
    taught = section == "train" or config.pretrain.alpha > 0
    targets: tuple[Split, ...] = ("train", "valid") if taught else ()
    stored = () if config.decoder_runs or section == "pretrain" else targets
    return RunData(
        tokens=run.tokens,
        datastore={split: run.datastore(split) for split in stored},
        targets={split: run.targets(split) for split in targets},
        num_recent=config.memory.num_read_tokens if section == "train" else 0,
        within=config.attends_within,
        with_logprob=config.reads_logprob,
    )


def blank_run(run: Artifacts) -> BlankRun:
    """Returns the same where no artifact is made yet."""
    config = run.config
    return BlankRun(
        vocab_size=config.tokenizer.vocab_size,
        decoder_config=config.decoder,
        memory_config=config.memory,
        datastore=config.datastore,
        targets=config.targets,
        within=config.attends_within,
        with_logprob=config.reads_logprob,
    )


def pretrain_task(run: Artifacts, mesh: jax.sharding.Mesh, *, blank: bool = False) -> PretrainTask:
    """Returns what `pretrain` trains.

    Args:
        blank: Whether it is only compiled: nothing is read, and arrays are shapes.
    """
    config, data = run.config, _data(run, "pretrain", blank=blank)
    path, start = config.decoder.pretrained, None
    if path is not None and not blank:
        start = functools.partial(load_decoder, path, config.decoder, data.vocab_size, mesh)
    return PretrainTask(
        config.decoder,
        config.pretrain,
        data,
        mesh,
        start,
        window_tokens=config.pretrain_window_tokens,
        seed=config.seed,
    )


def memory_task(run: Artifacts, mesh: jax.sharding.Mesh, *, blank: bool = False) -> MemoryTask:
    """Returns what `train` trains in mode `memory`; see `pretrain_task`."""
    settings, decoder = _train_settings(run), None
    if settings.reads_decoder:
        decoder = (
            blank_run(run).decoder(mesh) if blank else finished_decoder(run, mesh, frozen=True)
        )
    continues = None if blank else continuation(run, mesh)
    return MemoryTask(settings, _data(run, "train", blank=blank), mesh, decoder, continues)


def joint_task(
    run: Artifacts,
    mesh: jax.sharding.Mesh,
    *,
    continues: Artifact | None = None,
    blank: bool = False,
) -> JointTask:
    """Returns what `train` trains in mode `joint`; see `pretrain_task`.

    Args:
        continues: A finished phase whose whole state this run goes on from.
        blank: See `pretrain_task`.
    """
    train = run.config.train
    decoder = functools.partial(finished_decoder, run, mesh)
    memory = functools.partial(starting_memory, run, mesh)
    start = Start(
        decoder if train.decoder_start == "checkpoint" else None,
        memory if train.memory_start == "checkpoint" else None,
        continues,
    )
    return JointTask(_train_settings(run), _data(run, "train", blank=blank), mesh, start)


def _data(run: Artifacts, section: Literal["pretrain", "train"], *, blank: bool) -> TaskData:
    return blank_run(run) if blank else run_data(run, section)


def _train_settings(run: Artifacts) -> TrainSettings:
    config = run.config
    return TrainSettings(
        train=config.train,
        decoder=config.decoder,
        memory=config.memory,
        site=Site.of(config.datastore.input, config.decoder.num_layers),
        weights=config.loss_weights,
        window_tokens=config.train_window_tokens,
        mix_windows=config.train_mix_windows,
        seed=config.seed,
    )
