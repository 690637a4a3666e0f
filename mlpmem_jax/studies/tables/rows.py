"""The rows of the main table: what each is made of, and how its controls are sized.

To add a row, name it in `config/suite.py` (`RowName`) and give its recipe here.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, cast

from mlpmem_jax.config.schema import Config
from mlpmem_jax.config.suite import CompareConfig, RecipeConfig, RowName
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.sources import Sources
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.studies.tables.ledger import Ledger
from mlpmem_jax.studies.tables.part_scores import Part
from mlpmem_jax.studies.tables.variants import (
    Variant,
    base_variant,
    changed_variant,
    taught_variant,
    without_memory,
)

Parts = tuple[Part, ...] | None  # None: they cannot be made here.


@dataclasses.dataclass(frozen=True)
class Row:
    """One row for one seed.

    Attributes:
        key: For files.
        label: For people.
        parts: What is mixed, the base first.
    """

    key: str
    label: str
    parts: tuple[Part, ...]

    def stages(self) -> list[Stage]:
        """Returns all stages up to the scores of its parts."""
        return [stage for part in self.parts for stage in part.stages()]

    def made_of(self) -> list[str]:
        """Returns the artifacts that it takes before it can be used, by path."""
        return [name for part in self.parts for name in part.made_of()]

    def decoders(self) -> list[str]:
        """Returns the decoders among them, and those that joint training goes on from."""
        found = []
        for part in self.parts:
            if part.kind == "decoder":
                found += part.made_of()
            elif part.kind == "mixture" or (
                part.kind == "joint" and part.run.config.train.decoder_start == "checkpoint"
            ):
                found.append(part.run.decoder.relative)
        return found


class SeedPlan:
    """What the rows of one seed are made from.

    Attributes:
        config: The configuration of the command.
        base: Decoder, datastore, targets and memory as configured.
    """

    def __init__(self, config: Config, seed: int, sources: Sources | None = None):
        self.config = config
        sources = sources or Sources(config.workdir, reads=False)
        self.base = base_variant(config, seed, sources)

    @property
    def decoder(self) -> Part:
        """The decoder that all others are held against."""
        return Part("decoder", self.base)

    def with_memory(self, overrides: dict[str, Any], label: str) -> tuple[Part, ...]:
        """The decoder with a memory of other settings."""
        return model_parts(changed_variant(self.base, overrides, label))

    def joint(self, gate: str, label: str) -> Part:
        """Decoder and memory trained together for as many steps as the memory alone.

        The memory is warmed up: the decoder, from its checkpoint, moves in the second half.
        """
        train = self.base.config.train
        frozen = train.num_steps // 2
        moving = train.num_steps - frozen
        warmup = min(train.decoder_optimizer.warmup_of(moving), moving // 2)
        overrides = {
            "train.mode": "joint",
            "train.mix_windows": "auto",
            "memory.gate": gate,
            "train.decoder_freeze_steps": frozen,
            "train.decoder_optimizer.warmup_steps": warmup,
        }
        return Part("joint", changed_variant(self.base, overrides, label))

    def base_of(self, recipe: RecipeConfig) -> Variant:
        """Returns the configuration that a row of one's own changes, with its decoder and targets.

        Raises:
            ConfigError: A key or value of another row or of a teacher is wrong.
        """
        if recipe.base is not None:
            (named,) = (one for one in self.config.compare.recipes if one.name == recipe.base)
            return changed_variant(self.base_of(named), {}, named.name, named.overrides)
        return self.base if recipe.teacher is None else self.taught(recipe.teacher)

    def changed(self, recipe: RecipeConfig) -> Variant:
        """Returns the configuration with the changes of a row of one's own.

        Raises:
            ConfigError: A key or value is wrong.
        """
        base = self.base_of(recipe)
        if recipe.parts == "all":
            return changed_variant(base, {}, recipe.name, texts=recipe.overrides)
        alone = without_memory(base)
        return changed_variant(alone, {}, recipe.name, recipe.overrides, targets=base.teacher)

    def taught(self, name: str) -> Variant:
        """Returns the configuration with its memory taught by another decoder.

        Raises:
            ConfigError: A key or value of the teacher is wrong, or it decides nothing.
        """
        (teacher,) = (one for one in self.config.compare.teachers if one.name == name)
        variant = taught_variant(self.base, {}, name, texts=teacher.overrides)
        if variant == self.base:
            raise ConfigError(f"overrides={list(teacher.overrides)} have no effect on targets")
        return variant

    @property
    def vocab_size(self) -> int:
        """V; before there is a tokenizer, the one that is asked for.

        Asked anew each time: rows are planned before there are tokens, and again after.
        """
        tokens = self.base.run.tokens
        if tokens.is_complete():
            return int(tokens.load().counts["vocab_size"])
        return self.config.tokenizer.vocab_size

    def extra_flops(self) -> float:
        """Flops that the memory cost beyond its decoder, by manifests or by estimates."""
        from mlpmem_jax.pipeline.estimates import embedding_estimate, training_estimate

        run = self.base.run
        if not (run.memory.is_complete() and run.machine.is_complete()):
            known = [training_estimate(run), embedding_estimate(run, "train")]
            return float(sum(estimate.get("model flops", 0.0) for estimate in known))
        ledger = Ledger(run.store, float(run.machine.load().counts["peak_flops"]))
        decoder = [run.decoder.relative]
        whole = ledger.cost([run.memory.relative, *decoder], decoder)
        alone = ledger.cost(decoder, decoder)
        if self.config.compare.extra_flops == "networks":
            return whole.network_flops - alone.network_flops
        return whole.total_flops - alone.total_flops

    def trained_longer(self) -> Part:
        """The same decoder, trained for as many more flops as the memory cost.

        From the start; an imported one is fine-tuned.
        """
        config = self.base.config
        extra = round(self.extra_flops() / _flops_per_step(config, self.vocab_size))
        if config.decoder.pretrained is None or config.pretrain.fine_tune == "full":
            return self._decoder(
                {"pretrain.num_steps": config.pretrain.num_steps + extra}, "longer"
            )
        overrides = {"pretrain.fine_tune": "full", "pretrain.num_steps": max(1, extra)}
        return self._decoder(overrides, "longer")

    def of_equal_size(self) -> Part:
        """A decoder with the parameters of decoder and memory together, on the same tokens."""
        from mlpmem_jax.training.flops import decoder_parameters

        config = self.base.config
        wanted = decoder_parameters(config.decoder, self.vocab_size)["total"]
        return self._decoder(self._shape(wanted + self._memory_parameters()), "equal-size")

    def small_lm(self) -> Part:
        """A decoder with the parameters of the memory, trained for the flops that it cost."""
        overrides = self._shape(self._memory_parameters())
        shaped = changed_variant(without_memory(self.base), overrides, "small").config
        num_steps = self.extra_flops() / _flops_per_step(shaped, self.vocab_size)
        overrides["pretrain.num_steps"] = max(1, round(num_steps))
        return self._decoder(overrides, "small")

    def _shape(self, wanted: int) -> dict[str, Any]:
        from mlpmem_jax.studies.tables.sizes import decoder_shape

        tolerance = self.config.compare.parameter_tolerance
        shape = self.base.config.decoder
        return decoder_shape(shape, self.vocab_size, wanted, tolerance)[1]

    def _memory_parameters(self) -> int:
        from mlpmem_jax.training.flops import memory_parameters

        config = self.base.config
        return memory_parameters(config.memory, config.decoder.width, self.vocab_size)["total"]

    def _decoder(self, overrides: dict[str, Any], label: str) -> Part:
        config = self.base.config
        num_steps = overrides.get("pretrain.num_steps", config.pretrain.num_steps)
        if config.pretrain.optimizer.warmup_of(num_steps) > num_steps // 2:
            overrides["pretrain.optimizer.warmup_steps"] = num_steps // 2
        return Part("decoder", changed_variant(without_memory(self.base), overrides, label))

    def knn_scann(self) -> Parts:
        """The kNN-LM of what ScaNN finds, where it is installed."""
        from mlpmem_jax.retrieval.engine import is_approximate_installed

        if not is_approximate_installed():
            return None
        variant = self.base
        if self._engine() != "scann":
            variant = changed_variant(self.base, {"retrieval.engine": "scann"}, "scann")
        return (self.decoder, Part("knn_by_index", variant))

    def _engine(self) -> str:
        """The engine of the base, as far as it is known."""
        from mlpmem_jax.parallel.mesh import make_mesh
        from mlpmem_jax.pipeline.search_needs import indexed_engine
        from mlpmem_jax.retrieval.engine import choose_engine

        found, tokens = indexed_engine(self.base.run), self.base.run.tokens
        if found is not None:
            return found
        num_rows = 0
        if tokens.is_complete():
            num_rows = int(tokens.load().counts["train_tokens"]) - 1
        platform = make_mesh(self.config.mesh).devices.flat[0].platform
        return choose_engine(self.base.config.retrieval, num_rows, platform).engine


def _flops_per_step(config: Config, vocab_size: int) -> float:
    """Returns model flops of a step of pretraining."""
    from mlpmem_jax.training.flops import TRAINING_FACTOR, decoder_flops_per_token

    window = config.pretrain_window_tokens
    forward = decoder_flops_per_token(config.decoder, vocab_size, window)
    return TRAINING_FACTOR * forward * config.pretrain.batch_size * window


@dataclasses.dataclass(frozen=True)
class RowRecipe:
    """How a row is made.

    Attributes:
        label: For people.
        parts: What it is made of for a seed; None where it cannot be made here.
        missing: Why, in the latter case.
        uses_costs: Whether it is sized by what the memory cost, and so made after it.
    """

    label: str
    parts: Callable[[SeedPlan], Parts]
    missing: str = ""
    uses_costs: bool = False


ROWS: dict[RowName, RowRecipe] = {
    "decoder": RowRecipe("decoder", lambda plan: (plan.decoder,)),
    "longer": RowRecipe(
        "decoder, equal flops", lambda plan: (plan.trained_longer(),), uses_costs=True
    ),
    "equal_size": RowRecipe("decoder, equal size", lambda plan: (plan.of_equal_size(),)),
    "knn": RowRecipe("+ kNN-LM, exact", lambda plan: (plan.decoder, Part("knn", plan.base))),
    "knn_scann": RowRecipe(
        "+ kNN-LM, ScaNN", SeedPlan.knn_scann, missing="the package scann is not installed"
    ),
    "memory": RowRecipe("+ memory", lambda plan: model_parts(plan.base)),
    "memory_ce": RowRecipe(
        "+ memory, CE only", lambda plan: plan.with_memory({"train.alpha": 0.0}, "ce")
    ),
    "memory_kl": RowRecipe(
        "+ memory, KL only", lambda plan: plan.with_memory({"train.alpha": 1.0}, "kl")
    ),
    "small_lm": RowRecipe(
        "+ second small LM", lambda plan: (plan.decoder, plan.small_lm()), uses_costs=True
    ),
    "memory_knn": RowRecipe(
        "+ memory + kNN-LM",
        lambda plan: (plan.decoder, Part("memory", plan.base), Part("knn", plan.base)),
    ),
    "joint": RowRecipe("joint", lambda plan: (plan.joint("none", "joint"),)),
    "joint_gate": RowRecipe("joint, learned gate", lambda plan: (plan.joint("learned", "gate"),)),
}


def model_parts(variant: Variant, step: int | None = None) -> tuple[Part, ...]:
    """Returns what is evaluated of a variant: its decoder with its memory.

    Where λ was trained with them they are one part, else two whose λ is chosen on validation.

    Args:
        variant: How they are made.
        step: Of the memory, one before its last; none: the last.
    """
    if variant.config.train.mode == "joint":
        return (Part("joint", variant),)
    if variant.config.brings_interpolation:
        return (Part("mixture", variant, step),)
    return (Part("decoder", variant), Part("memory", variant, step))


def _own_parts(recipe: RecipeConfig, plan: SeedPlan) -> tuple[Part, ...]:
    changed = plan.changed(recipe)
    alone = Part("decoder", changed)
    if recipe.parts == "decoder":
        return (alone,)
    if recipe.parts == "beside":
        return (Part("decoder", plan.base_of(recipe)), alone)
    return model_parts(changed)


def row_recipe(compare: CompareConfig, key: str) -> RowRecipe:
    """Returns how a row of `compare` is made, one of ours or of the configuration's own."""
    for recipe in compare.recipes:
        if recipe.name == key:
            return RowRecipe(recipe.label or recipe.name, functools.partial(_own_parts, recipe))
    return ROWS[cast(RowName, key)]


def planned_row(plan: SeedPlan, key: str) -> Row | None:
    """Returns a row for a seed, or None where it cannot be made here."""
    recipe = row_recipe(plan.config.compare, key)
    parts = recipe.parts(plan)
    return None if parts is None else Row(key, recipe.label, parts)


def check_recipes(run: Artifacts) -> None:
    """Refuses teachers and rows of one's own that cannot be made, each with its place.

    Raises:
        ConfigError: With one line for each mistake.
    """
    config, mistakes = run.config, []
    plan = SeedPlan(config, config.compare.seeds[0], run.sources)
    configured = _scored((plan.decoder, *model_parts(plan.base)))
    refused = set()
    for place, teacher in enumerate(config.compare.teachers):
        try:
            plan.taught(teacher.name)
        except ConfigError as error:
            refused.add(teacher.name)
            mistakes += [f"compare.teachers.{place}: {message}" for message in error.messages]
    for place, recipe in enumerate(config.compare.recipes):
        if refused & {recipe.teacher, recipe.base}:
            refused.add(recipe.name)
            continue
        where = f"compare.recipes.{place}"
        try:
            parts = _own_parts(recipe, plan)
        except ConfigError as error:
            refused.add(recipe.name)
            mistakes += [f"{where}: {message}" for message in error.messages]
            continue
        if len({part.run.tokens.relative for part in parts}) > 1:
            mistakes.append(
                f"{where}: parts={recipe.parts} mixes networks, which need the same tokens: the "
                "same keys of corpus and tokenizer"
            )
        found = _scored(parts)
        if found <= configured or len(found) < len(parts):  # A decoder is not mixed with itself.
            mistakes.append(f"{where}.overrides={list(recipe.overrides)} have no effect")
    if mistakes:
        raise ConfigError(mistakes)


def _scored(parts: Iterable[Part]) -> set[str]:
    return {part.scores("valid").relative for part in parts}
