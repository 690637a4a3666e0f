"""What `pretrain` trains: the decoder, on windows of tokens."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from mlpmem_jax.config.schema import Config
from mlpmem_jax.input.feed import Batch, Feed
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.training.flops import TRAINING_FACTOR, decoder_flops_per_token
from mlpmem_jax.training.losses import lm_loss
from mlpmem_jax.training.networks import decoder_builder
from mlpmem_jax.training.run_data import RunData, TaskData
from mlpmem_jax.training.state import TrainState, structure
from mlpmem_jax.training.step import LossParts
from mlpmem_jax.training.validation import Validator


class PretrainTask:
    """Next-token cross-entropy of the decoder; the separator counts as a label too."""

    name = "pretrain"
    frozen: Any = ()

    def __init__(self, config: Config, mesh: jax.sharding.Mesh, data: TaskData | None = None):
        data = data or RunData(config)
        settings = config.pretrain
        length = config.pretrain_window_tokens
        self._config = config
        self._mesh = mesh
        self._chunk_tokens = settings.loss_chunk_tokens
        self._within = config.corpus.attention == "within"
        self.source = data.token_windows("train", length)
        self.build = decoder_builder(config, data.vocab_size)
        self.vocab_size = data.vocab_size
        self._graphdef = structure(self.build)
        self.tokens_per_step = settings.batch_size * length
        forward = decoder_flops_per_token(config.decoder, data.vocab_size, length)
        self.flops_per_step = self.tokens_per_step * TRAINING_FACTOR * forward
        self._validator = Validator(
            data.token_windows("valid", length),
            mesh,
            batch_size=settings.batch_size,
            num_batches=settings.eval_batches,
            sums=self._validation_sums,
        )

    def prepare(self, state: TrainState) -> TrainState:
        """A decoder needs nothing from data."""
        return state

    def loss(self, model: Decoder, frozen: Any, batch: Batch) -> LossParts:
        """Cross-entropy summed over the batch."""
        segments = batch["segment"] if self._within else None
        final_BLD, _ = model.hidden(batch["token"], segments)
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

    def feed(self, steps: range) -> Feed:
        """Returns training batches."""
        settings = self._config.pretrain
        return Feed(
            self.source,
            self._mesh,
            batch_size=settings.batch_size,
            seed=self._config.seed,
            steps=steps,
            prefetch=settings.prefetch_batches,
        )

    def _validation_sums(self, network: Any, frozen: Any, batch: Batch) -> Mapping[str, Any]:
        return self.loss(nnx.merge(self._graphdef, *network), frozen, batch).sums

    def validate(self, state: TrainState) -> dict[str, float]:
        """Returns nats per scored token and accuracy on validation windows."""
        return self._validator((state.params, state.fixed), self.frozen)
