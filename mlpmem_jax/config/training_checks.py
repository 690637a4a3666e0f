"""Rules about training: schedules, losses, starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlpmem_jax.config.schema import Config

_LEAST_WEIGHT = 1e-6  # of a loss; float32 gradients of smaller ones vanish
_MOST_PHASES = 1000


def training_mistakes(config: Config) -> Iterator[str]:
    """Yields one line for each broken rule."""
    for rule in (_schedules, _losses, _gate, _rows, _starts, _head, _refreshes):
        yield from rule(config)


def _schedules(config: Config) -> Iterator[str]:
    train = config.train
    freezes = (train.decoder_freeze_steps, train.memory_freeze_steps)
    decoder_frozen, memory_frozen = freezes if train.mode == "joint" else (0, 0)
    schedules = [("pretrain", "optimizer", 0), ("train", "optimizer", memory_frozen)]
    if train.mode == "joint":
        schedules.append(("train", "decoder_optimizer", decoder_frozen))
        if min(freezes) >= train.num_steps:
            yield (
                f"train.decoder_freeze_steps={freezes[0]} and train.memory_freeze_steps="
                f"{freezes[1]}: nothing is trained in train.num_steps={train.num_steps}"
            )
    for name, key, frozen in schedules:
        section = getattr(config, name)
        warmup = getattr(section, key).warmup_steps
        if warmup != "auto" and warmup + frozen > section.num_steps:
            added = f" plus {frozen} frozen steps" if frozen else ""
            yield (
                f"{name}.{key}.warmup_steps={warmup}{added} is more than "
                f"{name}.num_steps={section.num_steps}"
            )


def _losses(config: Config) -> Iterator[str]:
    train, weights = config.train, config.loss_weights
    if not any(weights):
        yield (
            "train.joint_weight, train.lm_weight and train.memory_weight are all 0: "
            "nothing would be trained"
        )
    for name, weight in zip(weights._fields, weights, strict=True):
        if 0 < weight < _LEAST_WEIGHT:
            yield f"train.{name}_weight={weight} must be 0 or at least {_LEAST_WEIGHT}"
    if train.mode == "joint":
        return
    if weights.lm > 0:
        yield (
            f"train.lm_weight={weights.lm} requires train.mode=joint: train.mode=memory freezes "
            "the decoder"
        )
    if train.inputs == "online" and weights.joint > 0:
        yield (
            f"train.joint_weight={weights.joint} requires train.inputs=stored (with the decoder's "
            "log p) or train.mode=joint, not train.inputs=online"
        )


def _gate(config: Config) -> Iterator[str]:
    train, floor = config.train, config.memory.gate_floor
    if config.memory.gate == "fitted" and config.decoder_runs:
        yield (
            "memory.gate=fitted is fitted to stored rows of validation: it requires "
            f"train.mode=memory and train.inputs=stored, not {train.mode} and {train.inputs}"
        )
    elif config.memory.gate == "fitted":
        for key, value, unset in (
            ("joint_weight", config.loss_weights.joint, 0),
            ("interpolation_final", train.interpolation_final, None),
            ("gate_prior", train.gate_prior, 0),
        ):
            if value != unset:
                yield f"train.{key}={value}: λ is fitted after training (memory.gate=fitted)"
    if config.memory.gate != "learned":
        return
    if config.loss_weights.joint == 0:
        yield (
            "memory.gate=learned is trained by the joint loss: set train.joint_weight above 0 "
            f"(train.mode={train.mode}, train.joint_weight={train.joint_weight})"
        )
    if train.interpolation_final is not None:
        yield (
            f"train.interpolation_final={train.interpolation_final} is a schedule of λ, and "
            "memory.gate=learned learns λ: use one of the two"
        )
    if not floor <= train.interpolation <= 1 - floor:
        yield (
            f"train.interpolation={train.interpolation}, the initial value of the gate, must be "
            f"from memory.gate_floor={floor} to {1 - floor}"
        )


def _rows(config: Config) -> Iterator[str]:
    mixed, train = config.train_mix_windows, config.train
    if mixed > 1 and config.decoder_runs:
        yield (
            f"train.mix_windows={mixed} mixes stored rows, and train.mode={train.mode}, "
            f"train.inputs={train.inputs} reads windows of tokens: use train.mix_windows=auto, a "
            "shorter train.window_tokens and a larger train.batch_size instead"
        )


def _starts(config: Config) -> Iterator[str]:
    train = config.train
    starts = (train.decoder_start, train.memory_start)
    if train.mode == "joint" and starts == ("fresh", "checkpoint"):
        yield (
            "train.memory_start=checkpoint requires train.decoder_start=checkpoint: a memory reads "
            "the states of the decoder that it was trained with"
        )


def _head(config: Config) -> Iterator[str]:
    train, memory = config.train, config.memory
    if train.head_start == "fresh":
        return
    key = "train.head_start=checkpoint"
    if train.mode == "joint":
        yield f"{key} requires train.mode=memory"
    if memory.head == "tied":
        yield f"{key}: memory.head=tied uses the decoder's head already"
    if memory.pretrained is not None:
        yield f"{key}: the memory of memory.pretrained={memory.pretrained} is not trained"
    if memory.width != config.decoder.width:
        yield (
            f"{key} requires memory.width={memory.width} to equal "
            f"decoder.width={config.decoder.width}"
        )


def _refreshes(config: Config) -> Iterator[str]:
    train, interval = config.train, config.train.refresh_interval_steps
    if interval is None:
        return
    key = f"train.refresh_interval_steps={interval}"
    if train.mode != "joint":
        yield f"{key} requires train.mode=joint: the targets of a frozen decoder stay valid"
    phases = -(-train.num_steps // interval)
    if phases > _MOST_PHASES:
        yield (
            f"{key} divides train.num_steps={train.num_steps} into {phases} phases, each with its "
            f"own artifacts: at most {_MOST_PHASES}"
        )
    if config.targets.workdir is not None:
        yield (
            f"{key} builds targets from the current decoder: remove "
            f"targets.workdir={config.targets.workdir}"
        )
