"""Rules about training: schedules, losses, starts. They name the keys and their values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlpmem_jax.config.schema import Config


_LEAST_WEIGHT = 1e-6  # of a loss; float32 gradients of smaller ones vanish
_MOST_PHASES = 1000


def training_mistakes(config: Config) -> Iterator[str]:
    """Yields one line for each rule that is broken."""
    for rule in (_schedules, _losses, _rows, _starts):
        yield from rule(config)


def _schedules(config: Config) -> Iterator[str]:
    train = config.train
    schedules = [
        ("pretrain", "optimizer", 0),
        ("train", "optimizer", train.memory_freeze_steps if train.mode == "joint" else 0),
    ]
    if train.mode == "joint":
        schedules.append(("train", "decoder_optimizer", train.decoder_freeze_steps))
        freezes = (train.decoder_freeze_steps, train.memory_freeze_steps)
        if min(freezes) >= train.num_steps:
            yield (
                f"train.decoder_freeze_steps={freezes[0]} and train.memory_freeze_steps="
                f"{freezes[1]}: nothing would move in train.num_steps={train.num_steps}"
            )
    for name, key, frozen in schedules:
        section = getattr(config, name)
        warmup = getattr(section, key).warmup_steps
        if warmup != "auto" and warmup + frozen > section.num_steps:
            added = f" and the {frozen} steps that it is frozen" if frozen else ""
            less = "is" if not added else "are"
            yield (
                f"{name}.{key}.warmup_steps={warmup}{added} {less} more than "
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
    if train.mode == "memory" and weights.lm > 0:
        yield (
            f"train.lm_weight={weights.lm} needs train.mode=joint: the decoder is frozen in "
            "train.mode=memory"
        )
    if train.mode == "memory" and train.inputs == "online" and weights.joint > 0:
        yield (
            f"train.joint_weight={weights.joint} needs train.inputs=stored (which keeps "
            "log p of the decoder) or train.mode=joint, not train.inputs=online"
        )
    learned = config.memory.gate == "learned"
    if learned and weights.joint == 0:
        yield (
            "memory.gate=learned is trained by the joint loss: set train.joint_weight above 0 "
            f"(train.mode={train.mode}, train.joint_weight={train.joint_weight})"
        )
    if learned and train.interpolation_final is not None:
        yield (
            f"train.interpolation_final={train.interpolation_final} is a schedule, and "
            "memory.gate=learned learns λ: use one of the two"
        )
    floor = config.memory.gate_floor
    if learned and not floor <= train.interpolation <= 1 - floor:
        yield (
            f"train.interpolation={train.interpolation}, where the gate begins, must be from "
            f"memory.gate_floor={floor} to {1 - floor}"
        )


def _rows(config: Config) -> Iterator[str]:
    mixed = config.train_mix_windows
    if mixed > 1 and config.decoder_runs:
        yield (
            f"train.mix_windows={mixed} mixes stored rows, and train.mode={config.train.mode}, "
            f"train.inputs={config.train.inputs} reads windows of tokens: leave it at auto there, "
            "and take a shorter train.window_tokens and a larger train.batch_size instead"
        )


def _starts(config: Config) -> Iterator[str]:
    train = config.train
    starts = (train.decoder_start, train.memory_start)
    if train.mode == "joint" and starts == ("fresh", "checkpoint"):
        yield (
            "train.memory_start=checkpoint needs train.decoder_start=checkpoint: a memory "
            "reads the states of the decoder that it was trained on"
        )
    if train.refresh_interval_steps is None:
        return
    if train.mode != "joint":
        yield (
            f"train.refresh_interval_steps={train.refresh_interval_steps} needs "
            "train.mode=joint: a frozen decoder's targets do not age"
        )
    phases = -(-train.num_steps // train.refresh_interval_steps)
    if phases > _MOST_PHASES:
        yield (
            f"train.refresh_interval_steps={train.refresh_interval_steps} cuts train.num_steps="
            f"{train.num_steps} into {phases} phases, each with files of its own: at most "
            f"{_MOST_PHASES}"
        )
    if config.targets.workdir is not None:
        yield (
            f"train.refresh_interval_steps={train.refresh_interval_steps} makes targets from "
            f"the current decoder: drop targets.workdir={config.targets.workdir}"
        )
