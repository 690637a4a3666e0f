"""What `train` trains in mode `joint`: decoder and memory in one step, from one loss."""

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx

from mlpmem_jax.config.schema import Config
from mlpmem_jax.input.feed import Batch
from mlpmem_jax.models.decoder import Site
from mlpmem_jax.models.joint import Joint, scale_gradient
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.training.checkpoint import restore_finished
from mlpmem_jax.training.flops import (
    decoder_flops_per_token,
    frozen_input_flops_per_token,
    joint_training_flops_per_token,
    memory_flops_per_token,
    tied_head_flops_per_token,
)
from mlpmem_jax.training.input_statistics import measured_statistics, with_statistics
from mlpmem_jax.training.interpolation import interpolation_of, joint_terms
from mlpmem_jax.training.joint_loss import DecoderHead, joint_loss
from mlpmem_jax.training.networks import finished_decoder, joint_builder, starting_memory
from mlpmem_jax.training.run_data import RunData, TaskData
from mlpmem_jax.training.state import TrainState, split_module
from mlpmem_jax.training.step import LossParts
from mlpmem_jax.training.task import WindowTask


class JointTask(WindowTask):
    """w_joint·(−log p) + w_lm·(−log p_LM) + w_mem·[α·KL + (1−α)·CE]; the decoder runs once."""

    name = "train"

    def __init__(
        self,
        config: Config,
        mesh: jax.sharding.Mesh,
        data: TaskData | None = None,
        *,
        continues: Artifact | None = None,
    ):
        """Prepares.

        Args:
            config: The whole configuration.
            mesh: Devices.
            data: What is read; None: the artifacts of the run.
            continues: A finished phase whose whole state this run goes on from.
        """
        data = data or RunData(config)
        length = config.train_window_tokens
        self._config = config
        self._continues = continues
        self._site = Site.of(config.datastore.input, config.decoder.num_layers)
        self._terms = joint_terms(config)
        self.vocab_size = data.vocab_size
        super().__init__(
            config.train,
            mesh,
            joint_builder(config, self.vocab_size),
            train=data.tokens_with_targets("train", length),
            valid=data.tokens_with_targets("valid", length),
            window_tokens=length,
            seed=config.seed,
        )
        memory = (config.memory, config.decoder.width, self.vocab_size)
        self._forward = (
            decoder_flops_per_token(config.decoder, self.vocab_size, length),
            memory_flops_per_token(*memory),
        )
        self._tied_head = tied_head_flops_per_token(*memory)
        self._frozen_input = frozen_input_flops_per_token(*memory[:2])
        last = config.train.num_steps - 1
        self.flops_per_step = self.flops_of(range(last, last + 1))

    def flops_of(self, steps: range) -> float:
        """Returns the model flops of some steps: fewer while a network is frozen."""
        per_token = joint_training_flops_per_token(
            self._config.train, *self._forward, steps, self._tied_head, self._frozen_input
        )
        return self.tokens_per_step * per_token

    def continued(self, abstract: TrainState) -> TrainState | None:
        """Returns the whole state of the phase before, where there is one."""
        if self._continues is None:
            return None
        return abstract.with_items(restore_finished(self._continues, abstract.items()))

    def prepare(self, state: TrainState) -> TrainState:
        """Takes over finished networks, and measures the input of a fresh memory."""
        config, mesh = self._config, self._mesh
        network: Joint = nnx.merge(self._graphdef, state.params, state.fixed)
        if config.train.decoder_start == "checkpoint":
            nnx.update(network.decoder, nnx.state(finished_decoder(config, mesh)))
        if config.train.memory_start == "checkpoint":
            nnx.update(network.memory, nnx.state(starting_memory(config, mesh)))
        _, params, fixed = split_module(network)
        state = dataclasses.replace(state, params=params, fixed=fixed)
        measures = config.train.memory_start == "fresh"
        if measures and config.memory.input_norm == "standardize":
            batches = self.feed(range(config.train.normalizer_batches))
            with jax.set_mesh(mesh):
                measured = measured_statistics(self._inputs, (params, fixed), batches)
            state = with_statistics(state, network, network.memory, measured)
        return state

    def _inputs(self, arrays: Any, batch: Batch) -> jax.Array:
        network: Joint = nnx.merge(self._graphdef, *arrays)
        decoder, memory = network.decoder, network.memory
        _, states = decoder.hidden(
            batch["token"], batch.get("segment"), sites=(self._site,), final=False
        )
        return memory.inputs(states[self._site], batch.get("recent"), decoder.embedding[...])

    def loss(self, model: Joint, frozen: Any, batch: Batch, step: jax.Array) -> LossParts:
        """The joint loss summed over the batch."""
        decoder, memory = model.decoder, model.memory
        final_BLD, states = decoder.hidden(
            batch["token"], batch.get("segment"), sites=(self._site,)
        )
        assert final_BLD is not None
        # The memory reads a state of the decoder, perhaps its embeddings, and its head if tied.
        scaled = functools.partial(scale_gradient, factor=self._config.train.decoder_gradient)
        table_VD = scaled(decoder.embedding[...])
        input_BLX = memory.inputs(scaled(states[self._site]), batch.get("recent"), table_VD)
        decoder_head_VD = decoder.head_VD()
        total, sums = joint_loss(
            memory.hidden(input_BLX),
            memory.head_VE(scaled(decoder_head_VD)),
            DecoderHead(final_BLD, decoder_head_VD, batch["lm_weight"]),
            interpolation_of(self._config, memory, input_BLX, step),
            batch,
            self._terms,
            vocab_size=decoder.vocab_size,
            chunk_tokens=self._config.train.loss_chunk_tokens,
            normalizer=1.0,
        )
        return LossParts(total, sums)
