"""Variants of a configuration: some keys changed, everything that is equal shared.

Artifacts go by content, so a variant shares by itself what its keys do not change. What is left
to say is where targets and starting points come from that are not the variant's own.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mlpmem_jax.config.load import changed_config
from mlpmem_jax.config.schema import Config
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.pipeline import (
    embed,
    exact_sample,
    index,
    pretrain,
    recipes,
    retrieve,
    tokenize,
    train,
)
from mlpmem_jax.pipeline.checks import check_unchanged_text
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.resolve import resolved
from mlpmem_jax.pipeline.sources import Sources
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.store.array_specs import Split
from mlpmem_jax.store.manifest import Artifact

# Keys of other sections decide nothing that is made, or belong to the table.
SECTIONS = (
    "corpus", "tokenizer", "decoder", "datastore", "retrieval", "targets", "memory", "pretrain",
    "train",
)  # fmt: skip
_TARGETS: tuple[Split, ...] = ("train", "valid")
# A memory that asks nothing of a decoder: it shares no head and reads no tokens.
_ALONE = {"memory.head": "untied", "memory.recent_tokens": 0, "memory.ngram_orders": ()}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One configuration of the networks, and where its targets come from.

    Attributes:
        run: The artifacts of what is evaluated.
        teacher: Those of what makes index, neighbours and targets; usually the same.
        start: Those of the memory that joint training begins with, where it begins with one.
    """

    run: Artifacts
    teacher: Artifacts
    start: Artifacts | None = None

    @classmethod
    def of(cls, run: Artifacts) -> "Variant":
        """Returns the variant that makes its own targets."""
        return cls(run, run)

    @property
    def config(self) -> Config:
        """The configuration of what is evaluated."""
        return self.run.config

    def decoder_stages(self) -> list[Stage]:
        """Returns the stages up to the decoder; one that learns from targets needs them first."""
        taught = self.config.pretrain.alpha and self.teacher is not self.run
        before = Variant.of(self.teacher).targets_stages() if taught else []
        return [*before, *_decoder_stages(self.run)]

    def retrieval_stages(self) -> list[Stage]:
        """Returns the stages up to neighbours and targets."""
        return [
            *self.decoder_stages(),
            *embed.stages(self.run),
            *_decoder_stages(self.teacher),
            *embed.stages(self.teacher),
            *index.stages(self.teacher),
            *retrieve.stages(self.teacher),
        ]

    def targets_stages(self) -> list[Stage]:
        """Returns the stages up to the targets; neighbours of test rows serve none."""
        stages = self.retrieval_stages()
        if self.teacher.config.targets.teacher == "ngram":  # Nothing is searched for.
            searched = ("index", "neighbors")
            return [one for one in stages if one.artifact.kind not in searched]
        unused = {one.relative for one in exact_sample.neighbors_of_test(self.teacher)}
        return [one for one in stages if one.artifact.relative not in unused]

    def memory_stages(self) -> list[Stage]:
        """Returns the stages up to the memory."""
        stages = self.targets_stages()
        start = [] if self.start is None else train.stages(self.start)
        return [*stages, *start, *train.stages(self.run)]

    def keeping(self, network: Literal["decoder", "memory"], steps: Sequence[int]) -> "Variant":
        """Returns the variant with a network whose checkpoints of these steps are kept."""
        made: Artifact = getattr(self.run, network)
        recipe = {**(made.recipe or {}), "kept_steps": list(steps)}
        kept = Artifact.of(self.run.store, made.kind, recipe, made.inputs, made.label)
        run = self.run.with_given({network: kept})
        return Variant(run, run if self.teacher is self.run else self.teacher, self.start)


def _decoder_stages(run: Artifacts) -> list[Stage]:
    tokens = [] if run.tokens.is_complete() else tokenize.stages(run)
    return [*tokens, *pretrain.stages(run)]


def base_variant(config: Config, seed: int, sources: Sources) -> Variant:
    """Returns the configuration itself with a seed.

    Raises:
        ConfigError: The targets are made elsewhere, where their cost is not known, or the
            memory that joint training begins with is; or joint training has no λ; or the
            training text has changed.
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
    seeded = resolved(changed_config(config, {"seed": seed}))
    run = Artifacts(seeded, sources, title=f"seed {seed}")
    why = "they count what all of it cost from the beginning: use another workdir"
    check_unchanged_text(run, "tables of several runs", why)
    return Variant.of(run)


def without_memory(base: Variant) -> Variant:
    """Returns a base for decoders that no memory reads: what a memory asks of them is dropped.

    Its head would have to be as wide as the decoder, the decoder as deep as the states that it
    reads, and its context twice as long as the tokens that it reads.
    """
    deepest = {f"datastore.{name}.layer": 1.0 for name in ("key", "input")}
    config = changed_config(base.config, _ALONE | deepest)
    return Variant.of(base.run.of(config, given={}))


def changed_variant(
    base: Variant,
    overrides: Mapping[str, Any],
    label: str,
    texts: Sequence[str] = (),
    *,
    targets: Artifacts | None = None,
) -> Variant:
    """Returns a variant of a base.

    Args:
        base: What is varied.
        overrides: Values by dotted path.
        label: For people.
        texts: More overrides, not parsed yet, `section.key=value` each.
        targets: Those that a decoder alone learns from with `pretrain.alpha`.

    Raises:
        ConfigError: A key or value is wrong, or a key is none that variants can change.
    """
    _check_keys([*overrides, *(text.partition("=")[0].strip() for text in texts)])
    changed = resolved(changed_config(base.config, overrides, texts))
    _refuse_without_interpolation(changed)
    run = base.run.of(changed, title=_titled(base, label))
    if changed.pretrain.alpha and targets is not None:
        _refuse_teacher_of_other_tokens(run, targets)
        return _taught(run, targets)
    if changed.train.mode == "joint" and changed.train.memory_start == "checkpoint":
        return _continued(base, run)
    taught = base.teacher is not base.run
    if taught:
        _refuse_teacher_with_refresh(changed)
        _refuse_teacher_of_other_tokens(run, base.teacher)
    if taught or _differs_in_input_alone(base.run, run):
        # Of the states only what the memory reads is another: targets stay, and so their maker.
        return _taught(run, base.teacher)
    return Variant.of(run)


def _titled(base: Variant, label: str) -> str:
    return f"{base.run.title}, {label}"


def _taught(run: Artifacts, teacher: Artifacts) -> Variant:
    """Returns a variant that learns from the targets of other artifacts."""
    given = {f"targets/{split}": teacher.targets(split) for split in _TARGETS}
    return Variant(run.with_given(given), teacher)


def _continued(base: Variant, run: Artifacts) -> Variant:
    """Returns a variant whose joint training begins with the memory of its base."""
    before, changed = base.config, run.config
    memory = changed.memory
    if before.memory.gate != "learned":  # A gate can be put on a memory that was trained without.
        gate = {name: getattr(before.memory, name) for name in ("gate", "gate_floor")}
        memory = memory.model_copy(update=gate)
    as_before = changed.model_copy(update={"train": before.train, "memory": memory})
    if before.train.mode != "memory" or as_before != before:
        raise ConfigError(
            "train.memory_start=checkpoint: joint training of a row can begin with the memory of "
            "the configuration, or of the row that base names: train.mode=memory there, and only "
            "keys of train and the gate different here"
        )
    if base.teacher is not base.run:
        _refuse_teacher_with_refresh(changed)
    started = run.with_given({"memory": base.run.memory})
    if base.teacher is base.run:  # Its targets, by content; a refresh makes others.
        return Variant(started, started, start=base.run)
    return dataclasses.replace(_taught(started, base.teacher), start=base.run)


def _refuse_without_interpolation(config: Config) -> None:
    """Refuses joint training without its joint loss: tables take λ from training."""
    if config.train.mode == "joint" and not config.brings_interpolation:
        raise ConfigError(
            f"train.joint_weight={config.train.joint_weight} with train.mode=joint: nothing trains "
            "with λ, and tables of several runs mix joint models by the λ of training; it must be "
            "above 0 there (evaluate, of one run, chooses λ on validation)"
        )


def _refuse_teacher_with_refresh(changed: Config) -> None:
    """Refuses to make targets anew from the decoder where a teacher makes them."""
    interval = changed.train.refresh_interval_steps
    if interval is not None:
        raise ConfigError(
            f"train.refresh_interval_steps={interval} makes targets from the current decoder, and "
            "here a teacher makes them: drop one of the two"
        )


def _refuse_teacher_of_other_tokens(run: Artifacts, teacher: Artifacts) -> None:
    """Refuses targets that are about other tokens than those that the memory is trained on."""
    if run.tokens.relative != teacher.tokens.relative:
        raise ConfigError(
            "a teacher must have the tokens of what it teaches: the same keys of corpus and "
            "tokenizer"
        )


def taught_variant(
    base: Variant, overrides: Mapping[str, Any], label: str, texts: Sequence[str] = ()
) -> Variant:
    """Returns a base whose memory learns from the targets of another decoder.

    Args:
        base: What is evaluated, but for its memory.
        overrides: What is different about the teacher.
        label: For people.
        texts: More of what is different, not parsed yet.

    Returns:
        The variant; the base itself where the targets would be the same.

    Raises:
        ConfigError: As `changed_variant`.
    """
    # No memory reads the teacher's states, so that none need be as wide.
    alone = base.run.of(changed_config(base.config, _ALONE))
    teacher = changed_variant(Variant.of(alone), overrides, label, texts=texts).run
    if teacher.targets("train").relative == base.run.targets("train").relative:
        return base
    _refuse_teacher_with_refresh(base.config)
    _refuse_teacher_of_other_tokens(base.run, teacher)
    return _taught(base.run.titled(_titled(base, f"taught by {label}")), teacher)


def _check_keys(keys: Sequence[str]) -> None:
    for key in keys:
        section = key.partition(".")[0]
        # What is no section is refused with a hint.
        if section in Config.model_fields and section not in SECTIONS:
            raise ConfigError(
                f"{key}: cannot differ between the rows of a table; keys of "
                f"{', '.join(SECTIONS)} can"
            )
        if key == "targets.workdir":
            raise ConfigError(f"{key}: rows of a table learn from compare.teachers")


def _differs_in_input_alone(base: Artifacts, changed: Artifacts) -> bool:
    """Whether of everything that targets are made from only the memory's input is another."""
    names = ("retrieval", "targets")
    if any(getattr(base.config, name) != getattr(changed.config, name) for name in names):
        return False
    if base.decoder.relative != changed.decoder.relative:
        return False
    made = [recipes.datastore(run.config) for run in (base, changed)]
    differing = made[0]["datastore"]["input"] != made[1]["datastore"]["input"]
    for recipe in made:
        del recipe["datastore"]["input"]
    return differing and made[0] == made[1]


def made_by(stages: Sequence[Stage]) -> list[Stage]:
    """Returns stages in their order, each artifact once: with the label of the first."""
    found: dict[str, Stage] = {}
    for stage in stages:
        found.setdefault(str(stage.artifact.path), stage)
    return list(found.values())
