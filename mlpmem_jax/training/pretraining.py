"""What `pretrain` trains: the decoder, on windows of tokens."""

from typing import Any

import jax

from mlpmem_jax.config.networks import DecoderConfig
from mlpmem_jax.config.stages import PretrainConfig
from mlpmem_jax.input.feed import Batch
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.training.flops import TRAINING_FACTOR, decoder_flops_per_token
from mlpmem_jax.training.losses import lm_loss
from mlpmem_jax.training.networks import decoder_builder
from mlpmem_jax.training.run_data import TaskData
from mlpmem_jax.training.step import LossParts
from mlpmem_jax.training.task import WindowTask


class PretrainTask(WindowTask):
    """Next-token cross-entropy of the decoder; the separator counts as a label too."""

    name = "pretrain"

    def __init__(
        self,
        decoder: DecoderConfig,
        settings: PretrainConfig,
        data: TaskData,
        mesh: jax.sharding.Mesh,
        *,
        window_tokens: int,
        seed: int,
    ):
        """Prepares.

        Args:
            decoder: The section `decoder`.
            settings: The section `pretrain`.
            data: What is read.
            mesh: Devices.
            window_tokens: Tokens in a window.
            seed: Of the data order.
        """
        self._chunk_tokens = settings.loss_chunk_tokens
        self.vocab_size = data.vocab_size
        super().__init__(
            settings,
            mesh,
            decoder_builder(decoder, data.vocab_size),
            train=data.token_windows("train", window_tokens),
            valid=data.token_windows("valid", window_tokens),
            window_tokens=window_tokens,
            seed=seed,
        )
        forward = decoder_flops_per_token(decoder, data.vocab_size, window_tokens)
        self.flops_per_step = self.tokens_per_step * TRAINING_FACTOR * forward

    def loss(self, model: Decoder, frozen: Any, batch: Batch, step: jax.Array) -> LossParts:
        """Cross-entropy summed over the batch."""
        final_BLD, _ = model.hidden(batch["token"], batch.get("segment"))
        assert final_BLD is not None
        total, sums = lm_loss(
            final_BLD,
            model.head_VD(),
            batch["label"],
            batch["weight"],
            vocab_size=model.vocab_size,
            chunk_tokens=self._chunk_tokens,
            normalizer=1.0,
        )
        return LossParts(total, sums)
