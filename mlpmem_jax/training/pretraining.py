"""What `pretrain` trains: the decoder, on windows of tokens."""

from typing import Any

import jax

from mlpmem_jax.config.schema import Config
from mlpmem_jax.input.feed import Batch
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.training.flops import TRAINING_FACTOR, decoder_flops_per_token
from mlpmem_jax.training.losses import lm_loss
from mlpmem_jax.training.networks import decoder_builder
from mlpmem_jax.training.run_data import RunData, TaskData
from mlpmem_jax.training.step import LossParts
from mlpmem_jax.training.task import WindowTask


class PretrainTask(WindowTask):
    """Next-token cross-entropy of the decoder; the separator counts as a label too."""

    name = "pretrain"

    def __init__(self, config: Config, mesh: jax.sharding.Mesh, data: TaskData | None = None):
        data = data or RunData(config)
        settings, length = config.pretrain, config.pretrain_window_tokens
        self._chunk_tokens = settings.loss_chunk_tokens
        self.vocab_size = data.vocab_size
        super().__init__(
            settings,
            mesh,
            decoder_builder(config, data.vocab_size),
            train=data.token_windows("train", length),
            valid=data.token_windows("valid", length),
            window_tokens=length,
            seed=config.seed,
        )
        forward = decoder_flops_per_token(config.decoder, data.vocab_size, length)
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
