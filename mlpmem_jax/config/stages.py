"""Sections about training and what follows: pretrain, train, evaluate, generate."""

from typing import Annotated, Any, Literal

from pydantic import Field

from mlpmem_jax.config.base import Section, runtime, setting
from mlpmem_jax.config.types import (
    Auto,
    Count,
    Decay,
    Epsilon,
    Fraction,
    Mark,
    Name,
    NonNegativeInt,
    OpenFraction,
    PositiveInt,
    Rows,
    Scale,
    Seed,
    Tokens,
    Weight,
)

# Validation rows on which τ and λ are chosen: more make them no surer, and all K neighbours of
# each are held in memory.
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
    final_fraction: Fraction = setting(0.1, "learning rate at the end, as a share of the peak")
    weight_decay: Weight = setting(0.1, "decoupled weight decay of matrices")
    beta1: Decay = setting(0.9, "decay of the first moment")
    beta2: Decay = setting(0.95, "decay of the second moment")
    epsilon: Epsilon = setting(1e-8, "added to the root of the second moment")
    clip_norm: Scale | None = setting(1.0, "largest gradient norm")

    def warmup_of(self, num_steps: int) -> int:
        """Returns the steps of warm-up, where the parameters move in so many steps."""
        if self.warmup_steps == "auto":
            return min(WARMUP_STEPS, num_steps // 2)
        return self.warmup_steps


class TrainingConfig(Section):
    """What both training commands share."""

    num_steps: PositiveInt = setting(600, "optimiser steps")
    batch_size: Count = setting(16, "windows in a step, over all devices")
    window_tokens: Tokens | Auto = setting("auto", "tokens in a window")
    optimizer: OptimizerConfig = setting(OptimizerConfig(), "optimiser")
    accumulation_steps: Count = setting(1, "parts of a batch whose gradients are summed")
    loss_chunk_tokens: PositiveInt = runtime(
        1024, "tokens on a device whose logits exist at the same time"
    )
    log_interval_steps: PositiveInt = runtime(10, "steps between two lines of metrics")
    eval_interval_steps: PositiveInt = runtime(200, "steps between two validations")
    eval_batches: Count = runtime(
        8, "most batches of a validation during training, from the whole split"
    )
    checkpoint_interval_steps: PositiveInt = runtime(200, "steps between two checkpoints")
    keep_checkpoints: Count = runtime(2, "newest checkpoints that are kept")
    prefetch_batches: Count = runtime(4, "batches read ahead")

    def moving_steps(self) -> dict[str, int]:
        """Returns by optimiser the steps in which its parameters move."""
        return {"optimizer": self.num_steps}

    def recipe(self) -> dict[str, Any]:
        """Returns the keys that decide what is computed, the warm-up as a number of steps."""
        recipe = super().recipe()
        for name, steps in self.moving_steps().items():
            recipe[name]["warmup_steps"] = getattr(self, name).warmup_of(steps)
        return recipe


class PretrainConfig(TrainingConfig):
    """Training of the decoder on the corpus."""

    window_tokens: Tokens | Auto = setting(
        "auto", "tokens in a window; auto: decoder.context_tokens"
    )


LossWeight = Weight | Auto
Start = Literal["checkpoint", "fresh"]


class TrainConfig(TrainingConfig):
    """Training of the memory, alone (paper, section 3.2) or jointly with the decoder."""

    mode: Literal["memory", "joint"] = setting(
        "memory", "memory: the decoder is frozen (the paper); joint: both are trained"
    )
    name: Name = setting("auto", "name of a joint model; auto: memory.name")
    inputs: Literal["stored", "online"] = setting(
        "stored",
        "stored: rows of the datastore; online: the frozen decoder runs in the step (mode=memory)",
    )
    joint_weight: LossWeight = setting(
        "auto", "weight of -log p of the interpolated distribution; auto: 1 joint, 0 otherwise"
    )
    lm_weight: LossWeight = setting(
        "auto", "weight of the decoder's own cross-entropy; auto: 1 joint, 0 otherwise"
    )
    memory_weight: LossWeight = setting("auto", "weight of the memory's own loss; auto: 1")
    interpolation: Fraction = setting(
        0.3, "λ in the joint loss: fixed, where its schedule begins, or where the gate begins"
    )
    interpolation_final: Fraction | None = setting(
        None, "λ at the last step, reached linearly; none: it stays (not with a gate)"
    )
    gate_prior: Weight = setting(
        0.0, "weight of KL(train.interpolation ‖ gate), which keeps the gate from collapsing"
    )
    decoder_start: Start = setting("checkpoint", "mode=joint: the run's decoder, or a fresh one")
    memory_start: Start = setting("fresh", "mode=joint: a fresh memory, or the run's memory")
    decoder_gradient: Weight = setting(
        1.0, "factor of the gradient from the memory into the decoder; 0: none (mode=joint)"
    )
    decoder_freeze_steps: NonNegativeInt = setting(
        0, "steps before the decoder moves (mode=joint); its schedule begins then"
    )
    memory_freeze_steps: NonNegativeInt = setting(
        0, "steps before the memory moves (mode=joint); its schedule begins then"
    )
    refresh_interval_steps: PositiveInt | None = setting(
        None, "mode=joint: steps after which the targets are made anew; none: never"
    )
    refresh_agreement: Fraction = setting(
        1.0, "targets stay while this share of sampled neighbours is the same; 1: always anew"
    )
    decoder_optimizer: OptimizerConfig = setting(
        OptimizerConfig(learning_rate=5e-4), "optimiser of the decoder (mode=joint)"
    )
    num_steps: PositiveInt = setting(1000, "optimiser steps")
    batch_size: Count = setting(32, "windows in a step, over all devices")
    window_tokens: Tokens | Auto = setting(
        "auto", "rows in a window; auto: datastore.chunk_rows stored, context_tokens online"
    )
    optimizer: OptimizerConfig = setting(OptimizerConfig(weight_decay=0.0), "optimiser")
    alpha: Fraction = setting(0.4, "weight of KL(p_kNN ‖ p_MEM) against cross-entropy (Eq. 6)")
    mix_windows: Count | Auto = setting(
        "auto",
        "windows whose rows are dealt out together, so that a batch holds rows of up to "
        "batch_size * mix_windows windows; 1: whole windows; auto: 8 for stored rows (less where "
        "that would be more than 4096 windows), 1 where the decoder runs",
    )
    normalizer_batches: Count = setting(
        4, "batches that memory.input_norm=standardize is measured on"
    )

    def moving_steps(self) -> dict[str, int]:
        """Returns by optimiser the steps in which its parameters move."""
        frozen = (self.memory_freeze_steps, self.decoder_freeze_steps)
        memory, decoder = frozen if self.mode == "joint" else (0, 0)
        steps = self.num_steps
        return {"optimizer": max(0, steps - memory), "decoder_optimizer": max(0, steps - decoder)}


class EvaluateConfig(Section):
    """The table."""

    batch_size: Count = runtime(32, "windows evaluated at once, over all devices")
    bootstrap_samples: int = setting(
        2000, "draws of the paired bootstrap over documents", ge=100, le=10**6
    )
    confidence: OpenFraction = setting(0.95, "level of the intervals")
    knn_valid_rows: Rows | None = setting(
        TUNING_ROWS,
        "most validation rows on which the kNN-LM is tuned, drawn at random; none: all, in memory",
    )
    latency_tokens: Count = runtime(64, "tokens decoded to measure milliseconds per token")


class GenerateConfig(Section):
    """Sampling."""

    prompts: tuple[str, ...] = runtime(
        (), "texts to continue; empty: the first words of a validation document, drawn at random"
    )
    max_new_tokens: PositiveInt = runtime(64, "tokens to generate")
    sampling: Literal["greedy", "random"] = runtime("random", "greedy takes the most probable")
    temperature: Annotated[
        float, Field(ge=1e-6, le=1e6), Mark(hint="generate.sampling=greedy takes no temperature")
    ] = runtime(0.8, "divides the log-probabilities")
    top_k: PositiveInt | None = runtime(None, "keep so many most probable tokens")
    top_p: Annotated[float, Field(ge=1e-6, le=1)] | None = runtime(
        0.95, "keep the fewest tokens with this mass"
    )
    interpolation: Fraction | Auto = runtime(
        "auto", "λ, the memory's weight; auto: as trained, else as evaluate chose it on validation"
    )
    seed: Seed | None = runtime(None, "seed of the sampler; none: the run's seed")
