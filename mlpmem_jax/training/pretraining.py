"""What `pretrain` trains: the decoder, on windows of tokens, perhaps on kNN targets too."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from mlpmem_jax.config.networks import DecoderConfig
from mlpmem_jax.config.stages import PretrainConfig
from mlpmem_jax.input.feed import Batch
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.training.flops import TRAINING_FACTOR, decoder_flops_per_token
from mlpmem_jax.training.losses import lm_loss, memory_loss
from mlpmem_jax.training.networks import decoder_builder
from mlpmem_jax.training.run_data import TaskData
from mlpmem_jax.training.state import TrainState, split_module
from mlpmem_jax.training.step import LossParts
from mlpmem_jax.training.task import WindowTask


class PretrainTask(WindowTask):
    """Next-token cross-entropy of the decoder; the separator counts as a label too.

    With `pretrain.alpha` α > 0: α·KL(p_kNN ‖ p_LM) + (1−α)·CE, as a memory learns (Eq. 6).
    """

    name = "pretrain"

    def __init__(
        self,
        decoder: DecoderConfig,
        settings: PretrainConfig,
        data: TaskData,
        mesh: jax.sharding.Mesh,
        start: Callable[[], Decoder] | None = None,
        *,
        window_tokens: int,
        seed: int,
    ):
        """Prepares.

        Args:
            start: Reads the decoder that training begins with; None: a fresh one.
        """
        self._chunk_tokens = settings.loss_chunk_tokens
        self._alpha = settings.alpha
        self._start = start
        self.vocab_size = data.vocab_size
        windows = data.tokens_with_targets if settings.alpha else data.token_windows
        super().__init__(
            settings,
            mesh,
            decoder_builder(decoder, data.vocab_size),
            train=windows("train", window_tokens),
            valid=windows("valid", window_tokens),
            window_tokens=window_tokens,
            seed=seed,
        )
        forward = decoder_flops_per_token(decoder, data.vocab_size, window_tokens)
        self.flops_per_step = self.tokens_per_step * TRAINING_FACTOR * forward

    def prepare(self, state: TrainState) -> TrainState:
        """Takes over a pretrained decoder."""
        if self._start is None:
            return state
        network: Decoder = nnx.merge(self._graphdef, state.params, state.fixed)
        nnx.update(network, nnx.state(self._start()))
        _, params, fixed = split_module(network)
        return dataclasses.replace(state, params=params, fixed=fixed)

    def loss(self, model: Decoder, frozen: Any, batch: Batch, step: jax.Array) -> LossParts:
        """The loss summed over the batch."""
        final_BLD, _ = model.hidden(batch["token"], batch.get("segment"))
        assert final_BLD is not None
        limits = {"vocab_size": model.vocab_size, "chunk_tokens": self._chunk_tokens}
        head_VD = model.head_VD()
        if self._alpha:
            batch = {**batch, "weight": batch["lm_weight"]}
            return LossParts(*memory_loss(final_BLD, head_VD, batch, self._alpha, **limits))
        return LossParts(*lm_loss(final_BLD, head_VD, batch["label"], batch["weight"], **limits))

    def _validation_sums(self, network: Any, frozen: Any, batch: Batch) -> Mapping[str, Any]:
        if self._alpha:  # In validation the separator is no label.
            batch = {**batch, "lm_weight": batch["weight"]}
        return super()._validation_sums(network, frozen, batch)
