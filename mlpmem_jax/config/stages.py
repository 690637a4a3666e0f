"""Sections about training and what follows: pretrain, train, evaluate, generate."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mlpmem_jax.config.base import Section, runtime, setting
from mlpmem_jax.config.types import (
    WHOLE,
    AnyText,
    Auto,
    Count,
    Decay,
    Epsilon,
    Fraction,
    ListOf,
    NonNegativeInt,
    OpenFraction,
    PositiveInt,
    Rows,
    Scale,
    Seed,
    Tokens,
    Weight,
)

# Validation rows for tuning τ and λ: more do not improve them, and all K neighbours of each row
# are held in memory.
TUNING_ROWS = 1 << 17
# Steps of warm-up where none are set and the run is long enough.
WARMUP_STEPS = 50


class OptimizerConfig(Section):
    """AdamW with warm-up, decay and clipping."""

    learning_rate: float = setting(2e-3, "peak learning rate", ge=1e-12, le=1e3)
    schedule: Literal["cosine", "linear", "constant"] = setting("cosine", "decay after the warm-up")
    warmup_steps: NonNegativeInt | Auto = setting(
        "auto", "steps of linear warm-up; auto: 50, at most half of the steps"
    )
    final_fraction: Fraction = setting(0.1, "final learning rate, as a share of the peak")
    weight_decay: Weight = setting(0.1, "decoupled weight decay, on matrices only")
    beta1: Decay = setting(0.9, "decay of the first moment")
    beta2: Decay = setting(0.95, "decay of the second moment")
    epsilon: Epsilon = setting(1e-8, "constant added to the root of the second moment")
    clip_norm: Scale | None = setting(1.0, "largest gradient norm; not set: no clipping")

    def warmup_of(self, num_steps: int) -> int:
        """Returns the steps of warm-up, where the parameters move in so many steps."""
        if self.warmup_steps == "auto":
            return min(WARMUP_STEPS, num_steps // 2)
        return self.warmup_steps


class TrainingConfig(Section):
    """Keys of both training commands.

    Attributes:
        unset: Values of keys that change nothing, and so are no part of the recipe.
    """

    unset: ClassVar[Mapping[str, object]] = {}

    num_steps: PositiveInt = setting(600, "optimiser steps")
    batch_size: Count = setting(16, "windows per step, over all devices")
    window_tokens: Tokens | Auto = setting("auto", "tokens per window")
    optimizer: OptimizerConfig = setting(OptimizerConfig(), "optimiser")
    accumulation_steps: Count = setting(1, "parts of a batch, for gradient accumulation")
    loss_chunk_tokens: PositiveInt = runtime(1024, "tokens per device with logits held at once")
    log_interval_steps: PositiveInt = runtime(10, "steps between lines of metrics")
    eval_interval_steps: PositiveInt = runtime(200, "steps between validations")
    eval_batches: Count = runtime(8, "batches per validation in training, over the split")
    checkpoint_interval_steps: PositiveInt = runtime(200, "steps between checkpoints")
    keep_checkpoints: Count = runtime(2, "number of checkpoints to keep")
    prefetch_batches: Count = runtime(4, "batches read ahead")

    def moving_steps(self) -> dict[str, int]:
        """Returns by optimiser the steps in which its parameters move."""
        return {"optimizer": self.num_steps}

    def recipe(self) -> dict[str, Any]:
        """Returns the keys that decide what is computed, the warm-up as a number of steps."""
        recipe = super().recipe()
        for name, steps in self.moving_steps().items():
            recipe[name]["warmup_steps"] = getattr(self, name).warmup_of(steps)
        return {key: value for key, value in recipe.items() if self.unset.get(key, self) != value}


class PretrainConfig(TrainingConfig):
    """Training of the decoder on the corpus."""

    unset: ClassVar[Mapping[str, object]] = {"fine_tune": "none", "alpha": 0.0}

    window_tokens: Tokens | Auto = setting("auto", "window size; auto: decoder.context_tokens")
    fine_tune: Literal["none", "full"] = setting(
        "none", "full: train the decoder of decoder.pretrained further, for pretrain.num_steps"
    )
    alpha: Fraction = setting(
        0.0,
        "weight of KL(p_kNN ‖ p_LM) against cross-entropy, with the targets of another run "
        "(targets.workdir; in a table the configuration's or its base row's)",
    )


LossWeight = Weight | Auto
Start = Literal["checkpoint", "fresh"]


class TrainConfig(TrainingConfig):
    """Training of the memory, alone (paper, section 3.2) or jointly with the decoder."""

    unset: ClassVar[Mapping[str, object]] = {"head_start": "fresh"}

    mode: Literal["memory", "joint"] = setting(
        "memory", "memory: frozen decoder (paper); joint: both trained"
    )
    inputs: Literal["stored", "online"] = setting(
        "stored",
        "stored: rows of the datastore; online: the frozen decoder runs in each step (mode=memory)",
    )
    joint_weight: LossWeight = setting(
        "auto",
        "weight of the interpolated cross-entropy; auto: 1 if mode=joint, else 0",
    )
    lm_weight: LossWeight = setting(
        "auto", "weight of the decoder's loss; auto: 1 if mode=joint, else 0"
    )
    memory_weight: LossWeight = setting("auto", "weight of the memory's loss; auto: 1")
    interpolation: Fraction = setting(
        0.3, "λ in the joint loss; initial λ with a schedule or a learned gate"
    )
    interpolation_final: Fraction | None = setting(
        None, "final λ of a linear schedule; not set: constant λ"
    )
    gate_prior: Weight = setting(0.0, "weight of KL(train.interpolation ‖ gate), against collapse")
    decoder_start: Start = setting("checkpoint", "mode=joint: the run's decoder, or a fresh one")
    memory_start: Start = setting(
        "fresh",
        "initial memory: fresh, or (checkpoint) the run's; mode=memory: the one before `append`",
    )
    replay_share: Annotated[float, Field(ge=0, le=0.99)] = setting(
        0.5,
        "mode=memory, memory_start=checkpoint: share of windows of rows from before `append`",
    )
    head_start: Start = setting(
        "fresh",
        "mode=memory: initial head of the memory; checkpoint: the decoder's, of equal width",
    )
    decoder_gradient: Weight = setting(
        1.0, "mode=joint: factor of the memory's gradient into the decoder"
    )
    decoder_freeze_steps: NonNegativeInt = setting(
        0, "mode=joint: steps with a frozen decoder, before its schedule"
    )
    memory_freeze_steps: NonNegativeInt = setting(
        0, "mode=joint: steps with a frozen memory, before its schedule"
    )
    refresh_interval_steps: PositiveInt | None = setting(
        None, "mode=joint: steps between rebuilds of the targets; not set: none"
    )
    refresh_agreement: Fraction = setting(
        1.0,
        "keep the targets while this share of sampled neighbours is unchanged; 1: always rebuild",
    )
    decoder_optimizer: OptimizerConfig = setting(
        OptimizerConfig(learning_rate=5e-4), "optimiser of the decoder (mode=joint)"
    )
    num_steps: PositiveInt = setting(1000, "optimiser steps")
    batch_size: Count = setting(32, "windows per step, over all devices")
    window_tokens: Tokens | Auto = setting(
        "auto",
        "rows per window; auto: datastore.chunk_rows if inputs=stored, else decoder.context_tokens",
    )
    optimizer: OptimizerConfig = setting(OptimizerConfig(weight_decay=0.0), "optimiser")
    alpha: Fraction = setting(0.4, "weight of KL(p_kNN ‖ p_MEM) against cross-entropy (Eq. 6)")
    mix_windows: Count | Auto = setting(
        "auto",
        "shuffle rows across batch_size * mix_windows windows; 1: whole windows; auto: 32 for "
        "stored rows (fewer, if that is more than 4096 windows), 1 if the decoder runs",
    )
    normalizer_batches: Count = setting(4, "batches for memory.input_norm=standardize")

    def moving_steps(self) -> dict[str, int]:
        """Returns by optimiser the steps in which its parameters move."""
        frozen = (self.memory_freeze_steps, self.decoder_freeze_steps)
        memory, decoder = frozen if self.mode == "joint" else (0, 0)
        steps = self.num_steps
        return {"optimizer": max(0, steps - memory), "decoder_optimizer": max(0, steps - decoder)}


class EvaluateConfig(Section):
    """The table of `evaluate`."""

    batch_size: Count = runtime(32, "windows per batch, over all devices")
    bootstrap_samples: Annotated[int, Field(ge=100, le=10**6), WHOLE] = setting(
        2000, "resamples of the paired bootstrap over documents"
    )
    confidence: OpenFraction = setting(0.95, "level of the confidence intervals")
    knn_valid_rows: Rows | None = setting(
        TUNING_ROWS,
        "random validation rows for tuning the kNN-LM, at most; not set: all, held in memory",
    )
    latency_tokens: Count = runtime(64, "tokens to decode when measuring milliseconds per token")


class GenerateConfig(Section):
    """Sampling of `generate`."""

    prompts: ListOf[AnyText] = runtime(
        (), "texts to continue; empty: the first words of a random validation document"
    )
    max_new_tokens: PositiveInt = runtime(64, "tokens to generate")
    sampling: Literal["greedy", "random"] = runtime(
        "random", "greedy: most probable token; random: sample"
    )
    temperature: float = runtime(
        0.8,
        "divisor of the log-probabilities",
        hint="generate.sampling=greedy takes no temperature",
        ge=1e-6,
        le=1e6,
    )
    top_k: PositiveInt | None = runtime(None, "sample from the k most probable; not set: from all")
    top_p: Annotated[float, Field(ge=1e-6, le=1)] | None = runtime(
        0.95, "sample from the fewest tokens with this mass; not set: from all"
    )
    interpolation: Fraction | Auto = runtime(
        "auto", "λ of the memory; auto: as trained, else by evaluate"
    )
    seed: Seed | None = runtime(None, "seed of the sampler; not set: the run's seed")
