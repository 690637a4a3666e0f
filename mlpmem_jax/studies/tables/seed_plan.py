"""What the rows of one seed are made from: the configuration, its controls and its variants."""

from typing import Any

from mlpmem_jax.config.load import changed_config
from mlpmem_jax.config.schema import Config
from mlpmem_jax.config.suite import RecipeConfig
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.pipeline.sources import Sources
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

    def _earlier(self, recipe: RecipeConfig) -> RecipeConfig | None:
        """Returns the row that a row of one's own starts from, or None: the configuration."""
        return next((one for one in self.config.compare.recipes if one.name == recipe.base), None)

    def _overrides(self, recipe: RecipeConfig) -> tuple[str, ...]:
        """Returns those of a chain of rows.

        Raises:
            ConfigError: The decoder of a row before the last learns from targets or with a memory.
        """
        earlier = self._earlier(recipe)
        if earlier is None:
            return tuple(recipe.overrides)
        before = self._overrides(earlier)
        for text in before:
            key, _, value = (word.strip() for word in text.partition("="))
            if (key, value) == ("train.mode", "joint") or (
                key == "pretrain.alpha" and value not in ("0", "0.0")
            ):
                raise ConfigError(
                    f"base={earlier.name} has {key}={value}: rows cannot start from a row whose "
                    "decoder learns from targets or with a memory"
                )
        return (*before, *recipe.overrides)

    def _root(self, recipe: RecipeConfig) -> Variant:
        """Returns the configuration, with the teacher of the first row of a chain."""
        earlier = self._earlier(recipe)
        if earlier is not None:
            return self._root(earlier)
        return self.base if recipe.teacher is None else self.taught(recipe.teacher)

    def base_of(self, recipe: RecipeConfig) -> Variant:
        """Returns what a row of one's own starts from, decoder, targets and memory.

        Raises:
            ConfigError: A key or value of another row or of a teacher is wrong.
        """
        earlier = self._earlier(recipe)
        if earlier is None:
            return self._root(recipe)
        return changed_variant(self._root(recipe), {}, earlier.name, self._overrides(earlier))

    def changed(self, recipe: RecipeConfig) -> Variant:
        """Returns the configuration with the changes of a row of one's own.

        Raises:
            ConfigError: A key or value is wrong.
        """
        root, texts = self._root(recipe), self._overrides(recipe)
        if recipe.parts != "all":
            alone = without_memory(root)
            learns = changed_config(alone.config, {}, texts).pretrain.alpha > 0
            targets = self.base_of(recipe).teacher if learns else None
            return changed_variant(alone, {}, recipe.name, texts, targets=targets)
        train = changed_config(root.config, {}, texts).train
        if train.mode == "joint" and train.memory_start == "checkpoint":  # Of the base's memory.
            return changed_variant(self.base_of(recipe), {}, recipe.name, recipe.overrides)
        return changed_variant(root, {}, recipe.name, texts)

    def decoder_of_base(self, recipe: RecipeConfig) -> Part:
        """Returns the decoder that a row with parts=beside mixes with its own."""
        earlier = self._earlier(recipe)
        return self.decoder if earlier is None else Part("decoder", self.changed(earlier))

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
