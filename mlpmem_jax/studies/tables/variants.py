"""Variants of a configuration inside one work directory, so that they share what is equal.

A variant is a configuration with some keys changed. What it makes anew gets names of its
own (`decoder.name`, `datastore.name`, …): everything whose recipe changes, and everything
that is made from such a thing. What is not made anew keeps the name, and so is shared.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mlpmem_jax.config.load import changed_config
from mlpmem_jax.config.schema import Config
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.pipeline import embed, index, pretrain, retrieve, train
from mlpmem_jax.pipeline.resolve import resolved
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.store.checked_json import fingerprint_of
from mlpmem_jax.store.layout import Layout

# The sections whose names tell artifacts apart, in the order of the data flow, and the
# kinds of artifacts that go by them.
_NAMED = {
    "decoder": ("decoder",),
    "datastore": ("datastore",),
    "retrieval": ("index", "neighbors"),
    "targets": ("targets",),
    "memory": ("memory", "joint"),
}
# What is not a matter of variants: other tokens need another work directory, and the rest
# decides nothing that is made.
SECTIONS = (*_NAMED, "pretrain", "train")
_LONGEST_LABEL = 60
# A memory that asks nothing of a decoder: it shares no head and reads no tokens.
_ALONE = {"memory.head": "untied", "memory.recent_tokens": 0, "memory.ngram_orders": ()}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One configuration of the networks, and where its targets come from.

    Attributes:
        config: Of what is evaluated.
        teacher: Of what makes index, neighbours and targets; usually the same.
        start: Of the memory that joint training begins with, where it begins with one.
    """

    config: Config
    teacher: Config
    start: Config | None = None

    @classmethod
    def of(cls, config: Config) -> "Variant":
        """Returns the variant that makes its own targets."""
        return cls(config, config)

    def decoder_stages(self) -> list[Stage]:
        """Returns the stages up to the decoder."""
        return pretrain.stages(self.config)

    def datastore_stages(self) -> list[Stage]:
        """Returns the stages up to the datastore of what is evaluated."""
        return [*self.decoder_stages(), *embed.stages(self.config)]

    def retrieval_stages(self) -> list[Stage]:
        """Returns the stages up to neighbours and targets."""
        return [
            *self.datastore_stages(),
            *pretrain.stages(self.teacher),
            *embed.stages(self.teacher),
            *index.stages(self.teacher),
            *retrieve.stages(self.teacher),
        ]

    def memory_stages(self) -> list[Stage]:
        """Returns the stages up to the memory; neighbours of test rows serve none."""
        test = Layout(self.teacher).neighbors("test").relative
        retrieval = [stage for stage in self.retrieval_stages() if stage.name != test]
        start = [] if self.start is None else train.stages(self.start)
        return [*retrieval, *start, *train.stages(self.config)]


def base_variant(config: Config, seed: int) -> Variant:
    """Returns the configuration itself with a seed, everything named after the seed.

    Tokens do not depend on the seed and are shared by all.

    Raises:
        ConfigError: The targets are made elsewhere, where their cost is not known, or the
            memory that joint training begins with is; or joint training has no λ.
    """
    if config.targets.workdir is not None:
        raise ConfigError(
            f"targets.workdir={config.targets.workdir}: tables of several runs make all targets "
            "themselves, to count what they cost; drop the key (rows of compare can learn from "
            "compare.teachers)"
        )
    if config.train.mode == "joint" and config.train.memory_start == "checkpoint":
        raise ConfigError(
            "train.memory_start=checkpoint: the configuration of a table of several runs says "
            "nothing about how that memory was trained; use train.mode=memory, and joint training "
            "that goes on from it as one of compare.recipes"
        )
    _refuse_without_interpolation(config)
    name = f"seed-{seed}"
    names = {f"{section}.name": name for section in _NAMED}
    names |= {"retrieval.exact_name": "auto", "train.name": "auto"}
    return Variant.of(resolved(changed_config(config, {"seed": seed, **names})))


def without_memory(base: Variant) -> Variant:
    """Returns a base for decoders that no memory reads: what a memory asks of them is dropped.

    Its head would have to be as wide as the decoder, the decoder as deep as the states that it
    reads, and its context twice as long as the tokens that it reads.
    """
    deepest = {f"datastore.{name}.layer": 1.0 for name in ("key", "input")}
    return Variant.of(changed_config(base.config, _ALONE | deepest))


def changed_variant(
    base: Variant,
    overrides: Mapping[str, Any],
    label: str,
    always: Sequence[str] = (),
    texts: Sequence[str] = (),
) -> Variant:
    """Returns a variant of a base; what changes is named after the label.

    Args:
        base: What is varied.
        overrides: Values by dotted path; keys of the networks, of retrieval and training.
        label: For the names.
        always: Kinds of artifacts that get a name of their own in any case, because they
            are made in another way (checkpoints are kept).
        texts: More overrides, not parsed yet, `section.key=value` each.

    Raises:
        ConfigError: A key or value is wrong, or a key is none that variants can change.
    """
    _check_keys([*overrides, *(text.partition("=")[0].strip() for text in texts)])
    changed = resolved(changed_config(base.config, overrides, texts))
    _refuse_without_interpolation(changed)
    kinds = _changed_kinds(base.config, changed) | set(always)
    if changed.train.mode == "joint" and changed.train.memory_start == "checkpoint":
        return _continued(base, changed, kinds, label)
    if base.teacher != base.config and kinds - {"memory", "joint"}:
        raise ConfigError(
            "with a teacher, only keys of memory and train can differ, not what would make "
            f"{', '.join(sorted(kinds - {'memory', 'joint'}))} anew"
        )
    _refuse_teacher_with_refresh(base, changed)
    config = _renamed(changed, kinds, label)
    if "datastore" in kinds and "targets" not in kinds:
        # Only what the memory reads is another state: targets stay, and so does their maker.
        return Variant(config, base.teacher)
    teacher = config if base.teacher == base.config else base.teacher
    return Variant(config, teacher)


def _continued(base: Variant, changed: Config, kinds: set[str], label: str) -> Variant:
    """Returns a variant whose joint training begins with the memory of its base."""
    before = base.config
    memory = changed.memory
    if before.memory.gate == "none":  # A gate can be put on a memory that has none.
        gate = {name: getattr(before.memory, name) for name in ("gate", "gate_floor")}
        memory = memory.model_copy(update=gate)
    if before.train.mode != "memory" or kinds - {"joint"} or memory != before.memory:
        raise ConfigError(
            "train.memory_start=checkpoint: joint training of a row can begin with the memory of "
            "the configuration itself alone: train.mode=memory there, and only keys of train and "
            "the gate different here"
        )
    _refuse_teacher_with_refresh(base, changed)
    config = changed_config(changed, {"train.name": f"{before.memory.name}-{label}"})
    return Variant(config, base.teacher, start=before)


def _refuse_without_interpolation(config: Config) -> None:
    """Refuses joint training without its joint loss: tables take λ from training."""
    if config.train.mode == "joint" and not config.brings_interpolation:
        raise ConfigError(
            f"train.joint_weight={config.train.joint_weight} with train.mode=joint: nothing trains "
            "with λ, and tables of several runs mix joint models by the λ of training; it must be "
            "above 0 there (evaluate, of one run, chooses λ on validation)"
        )


def _refuse_teacher_with_refresh(base: Variant, changed: Config) -> None:
    """Refuses to make targets anew from the decoder where a teacher makes them."""
    interval = changed.train.refresh_interval_steps
    if base.teacher != base.config and interval is not None:
        raise ConfigError(
            f"train.refresh_interval_steps={interval} makes targets from the current decoder, and "
            "here a teacher makes them: drop one of the two"
        )


def taught_variant(
    base: Variant, overrides: Mapping[str, Any], label: str, texts: Sequence[str] = ()
) -> Variant:
    """Returns a base whose memory learns from the targets of another decoder.

    Args:
        base: What is evaluated, but for its memory.
        overrides: What is different about the teacher.
        label: For the names.
        texts: More of what is different, not parsed yet.

    Returns:
        The variant; the base itself where the targets would be the same.

    Raises:
        ConfigError: As `changed_variant`.
    """
    # No memory reads the teacher's states, so that none need be as wide.
    untied = dataclasses.replace(base, config=_untied(base.config), teacher=_untied(base.teacher))
    teacher = changed_variant(untied, overrides, label, texts=texts).config
    if teacher.targets.name == base.config.targets.name:
        return base
    names = {
        "targets.name": teacher.targets.name,
        "memory.name": teacher.memory.name,
    }
    variant = Variant(changed_config(base.config, names), teacher)
    _refuse_teacher_with_refresh(variant, variant.config)
    return variant


def _untied(config: Config) -> Config:
    return changed_config(config, _ALONE)


def label_of(key: str, value: Any) -> str:
    """Returns a name for one value of one key, fit for a path."""
    text = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{key}-{value}")
    if len(text) > _LONGEST_LABEL:
        text = f"{text[: _LONGEST_LABEL - 9]}-{fingerprint_of([key, value])[:8]}"
    return text.strip("-")


def _check_keys(keys: Sequence[str]) -> None:
    for key in keys:
        section, _, rest = key.partition(".")
        known = section in Config.model_fields  # What is not is refused with a hint.
        if known and (section not in SECTIONS or rest in ("name", "exact_name")):
            raise ConfigError(
                f"{key}: cannot differ between the rows of a table; keys of "
                f"{', '.join(SECTIONS)} can, but for names"
            )
        if key == "targets.workdir":
            raise ConfigError(f"{key}: rows of a table learn from compare.teachers")


def _stages(config: Config) -> list[Stage]:
    commands = (pretrain, embed, index, retrieve)
    # Of training in phases the first: the others, and what lies between, follow from it.
    first, *_ = train.stages(config)
    return [*(stage for command in commands for stage in command.stages(config)), first]


def _changed_kinds(base: Config, changed: Config) -> set[str]:
    """Returns the kinds of artifacts that are made anew, by recipes and by what they read."""
    kinds = _fresh_kinds(base, changed, _differs_in_input_alone(base, changed))
    # Targets that are made anew besides are made from the new datastore, and all between them.
    return _fresh_kinds(base, changed, False) if kinds >= {"datastore", "targets"} else kinds


def _fresh_kinds(base: Config, changed: Config, input_alone: bool) -> set[str]:
    before = {stage.name: stage for stage in _stages(base)}
    fresh: set[str] = set()
    for stage in _stages(changed):
        kind = stage.name.split("/")[0]
        old = before.get(stage.name)
        sources = {one.relative for one in stage.origins()}
        if input_alone and kind in ("index", "neighbors", "targets"):
            # They read keys, labels and log-probabilities, which are the same.
            sources = {name for name in sources if not name.startswith("datastore/")}
        if (
            old is None
            or old.recipe != stage.recipe
            or {one.relative for one in old.origins()} != {one.relative for one in stage.origins()}
            or sources & fresh
        ):
            fresh.add(stage.name)
    return {name.split("/")[0] for name in fresh}


def _differs_in_input_alone(base: Config, changed: Config) -> bool:
    """Whether of decoder and datastore only the state that the memory reads is another."""
    if pretrain.recipe(base) != pretrain.recipe(changed):
        return False
    recipes = [embed.recipe(config) for config in (base, changed)]
    differing = recipes[0]["datastore"]["input"] != recipes[1]["datastore"]["input"]
    for recipe in recipes:
        del recipe["datastore"]["input"]
    return differing and recipes[0] == recipes[1]


def _renamed(config: Config, kinds: set[str], label: str) -> Config:
    names = {
        f"{section}.name": f"{getattr(config, section).name}-{label}"
        for section, made in _NAMED.items()
        if kinds & set(made)
    }
    return changed_config(config, names) if names else config


def made_by(stages: Sequence[Stage]) -> list[Stage]:
    """Returns stages without repetitions, in their order."""
    return list({stage.name: stage for stage in stages}.values())
