"""What `train` trains in mode `memory`: the MLP Memory, beside a frozen decoder (section 3.2)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mlpmem_jax.config.schema import Config
from mlpmem_jax.datastore.layout import Split
from mlpmem_jax.input.feed import Batch, Feed, WindowSource
from mlpmem_jax.models.decoder import Site
from mlpmem_jax.models.memory import Memory, input_statistics
from mlpmem_jax.training.flops import (
    TRAINING_FACTOR,
    decoder_flops_per_token,
    memory_flops_per_token,
)
from mlpmem_jax.training.losses import memory_loss
from mlpmem_jax.training.networks import memory_builder
from mlpmem_jax.training.run_data import RunData, TaskData
from mlpmem_jax.training.state import TrainState, split_module, structure
from mlpmem_jax.training.step import LossParts
from mlpmem_jax.training.validation import Validator


class MemoryTask:
    """α·KL(p_kNN ‖ p_MEM) + (1−α)·CE on stored inputs, or on those of a decoder that runs."""

    name = "train"

    def __init__(self, config: Config, mesh: jax.sharding.Mesh, data: TaskData | None = None):
        settings = config.train
        self._config = config
        self._data = data or RunData(config)
        self._mesh = mesh
        self._length = config.train_window_tokens
        self._online = settings.inputs == "online"
        self._within = config.corpus.attention == "within"
        self._site = Site.of(config.datastore.input, config.decoder.num_layers)
        self.vocab_size = self._data.vocab_size
        self.build = memory_builder(config, self.vocab_size)
        self._graphdef = structure(self.build)
        self._decoder_graphdef: Any = None
        self.frozen: Any = ()
        needs_decoder = self._online or config.memory.head == "tied"
        if needs_decoder:
            self._decoder_graphdef, self.frozen = nnx.split(self._data.decoder(mesh))
        self.source = self._windows("train")
        self.tokens_per_step = settings.batch_size * self._length
        self.flops_per_step = self.tokens_per_step * self._flops_per_token()
        self._validator = Validator(
            self._windows("valid"),
            mesh,
            batch_size=settings.batch_size,
            num_batches=settings.eval_batches,
            sums=self._validation_sums,
        )

    def _windows(self, split: Split) -> WindowSource:
        if self._online:
            return self._data.tokens_with_targets(split, self._length)
        return self._data.stored_rows(split, self._length)

    def _flops_per_token(self) -> float:
        config, width = self._config, self._config.decoder.width
        flops = TRAINING_FACTOR * memory_flops_per_token(config.memory, width, self.vocab_size)
        if self._online:  # Forward only, and only up to the state that the memory reads.
            flops += decoder_flops_per_token(
                config.decoder,
                self.vocab_size,
                self._length,
                num_layers=self._site.block,
                head=False,
            )
        return flops

    def prepare(self, state: TrainState) -> TrainState:
        """Measures mean and deviation of the input on the first training batches."""
        if self._config.memory.input_norm != "standardize":
            return state
        count = self._config.train.normalizer_batches
        inputs = jax.jit(self._inputs)
        with jax.set_mesh(self._mesh):
            parts = [(inputs(self.frozen, b), b["weight"]) for b in self.feed(range(count))]
            states, weights = (jnp.concatenate(each) for each in zip(*parts, strict=True))
            mean_D, inverse_std_D = jax.jit(input_statistics)(states, weights)
        memory = nnx.merge(self._graphdef, state.params, state.fixed)
        memory.set_input_statistics(mean_D, inverse_std_D)
        measured = split_module(memory)[2]
        placed = jax.tree.map(
            lambda new, old: jax.device_put(new, old.sharding), measured, state.fixed
        )
        return dataclasses.replace(state, fixed=placed)

    def _inputs(self, frozen: Any, batch: Batch) -> jax.Array:
        """Returns input_BLD: read from the batch, or computed by the frozen decoder."""
        if not self._online:
            return batch["input"]
        decoder = nnx.merge(self._decoder_graphdef, frozen)
        segments = batch["segment"] if self._within else None
        _, states = decoder.hidden(batch["token"], segments, sites=(self._site,), final=False)
        return jax.lax.stop_gradient(states[self._site])

    def loss(self, model: Memory, frozen: Any, batch: Batch) -> LossParts:
        """The memory's loss summed over the scored rows of the batch."""
        head_VD = None
        if self._config.memory.head == "tied":
            head_VD = nnx.merge(self._decoder_graphdef, frozen).head_VD()
        total, sums = memory_loss(
            model.hidden(self._inputs(frozen, batch)),
            model.head_VE(head_VD),
            batch["label"],
            batch["weight"],
            batch["target_id"],
            batch["target_prob"],
            batch["target_mass"],
            self._config.train.alpha,
            vocab_size=model.vocab_size,
            chunk_tokens=self._config.train.loss_chunk_tokens,
            normalizer=1.0,
        )
        return LossParts(total, sums)

    def feed(self, steps: range) -> Feed:
        """Returns training batches."""
        settings = self._config.train
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
        """Returns loss, cross-entropy, KL and top-1 agreement on validation rows."""
        return self._validator((state.params, state.fixed), self.frozen)
