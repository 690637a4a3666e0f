"""What `train` trains in mode `joint`: decoder and memory in one step, from one loss."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from mlpmem_jax.input.feed import Batch
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.models.joint import Joint, scale_gradient
from mlpmem_jax.models.memory import Memory
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
from mlpmem_jax.training.interpolation import interpolation_of
from mlpmem_jax.training.joint_loss import DecoderHead, joint_loss
from mlpmem_jax.training.networks import joint_builder
from mlpmem_jax.training.run_data import TaskData
from mlpmem_jax.training.state import TrainState, split_module
from mlpmem_jax.training.step import LossParts
from mlpmem_jax.training.task import WindowTask
from mlpmem_jax.training.train_settings import TrainSettings


@dataclasses.dataclass(frozen=True)
class Start:
    """What joint training begins with.

    Networks are restored by the functions given here, once a fresh state is made.

    Attributes:
        decoder: Restores the decoder on the mesh; None: a fresh one.
        memory: Restores the memory on the mesh; None: a fresh one.
        phase: A finished phase whose whole state is taken over instead; None: there is none.
    """

    decoder: Callable[[], Decoder] | None = None
    memory: Callable[[], Memory] | None = None
    phase: Artifact | None = None


class JointTask(WindowTask):
    """w_joint·(−log p) + w_lm·(−log p_LM) + w_mem·[α·KL + (1−α)·CE]; the decoder runs once."""

    name = "train"

    def __init__(
        self,
        settings: TrainSettings,
        data: TaskData,
        mesh: jax.sharding.Mesh,
        start: Start,
    ):
        """Prepares."""
        length = settings.window_tokens
        self._train, self._memory = settings.train, settings.memory
        self._start = start
        self._site = settings.site
        self._terms = settings.terms
        self.vocab_size = data.vocab_size
        networks = (settings.decoder, settings.memory, data.vocab_size)
        super().__init__(
            settings.train,
            mesh,
            joint_builder(*networks, settings.train.interpolation),
            train=data.tokens_with_targets("train", length),
            valid=data.tokens_with_targets("valid", length),
            window_tokens=length,
            seed=settings.seed,
        )
        memory = (settings.memory, settings.decoder.width, self.vocab_size)
        self._forward = (
            decoder_flops_per_token(settings.decoder, self.vocab_size, length),
            memory_flops_per_token(*memory),
        )
        self._tied_head = tied_head_flops_per_token(*memory)
        self._frozen_input = frozen_input_flops_per_token(*memory[:2])
        last = settings.train.num_steps - 1
        self.flops_per_step = self.flops_of(range(last, last + 1))

    def flops_of(self, steps: range) -> float:
        """Returns the model flops of some steps: fewer while a network is frozen."""
        per_token = joint_training_flops_per_token(
            self._train, *self._forward, steps, self._tied_head, self._frozen_input
        )
        return self.tokens_per_step * per_token

    def continued(self, abstract: TrainState) -> TrainState | None:
        """Returns the whole state of the phase before, where there is one."""
        if self._start.phase is None:
            return None
        return abstract.with_items(restore_finished(self._start.phase, abstract.items()))

    def prepare(self, state: TrainState) -> TrainState:
        """Takes over finished networks, and measures the input of a fresh memory."""
        network: Joint = nnx.merge(self._graphdef, state.params, state.fixed)
        if self._start.decoder is not None:
            nnx.update(network.decoder, nnx.state(self._start.decoder()))
        if self._start.memory is not None:
            nnx.update(network.memory, nnx.state(self._start.memory()))
        _, params, fixed = split_module(network)
        state = dataclasses.replace(state, params=params, fixed=fixed)
        if self._start.memory is None and self._memory.input_norm == "standardize":
            batches = self.feed(range(self._train.normalizer_batches))
            with jax.set_mesh(self._mesh):
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
            batch["token"], batch.get("segment"), sites=(self._site,), differentiated=True
        )
        assert final_BLD is not None
        # The memory reads a state of the decoder, perhaps its embeddings, and its head if tied.
        scaled = functools.partial(scale_gradient, factor=self._train.decoder_gradient)
        table_VD = scaled(decoder.embedding[...])
        input_BLX = memory.inputs(scaled(states[self._site]), batch.get("recent"), table_VD)
        decoder_head_VD = decoder.head_VD()
        total, sums = joint_loss(
            memory.hidden(input_BLX),
            memory.head_VE(scaled(decoder_head_VD)),
            DecoderHead(final_BLD, decoder_head_VD, batch["lm_weight"]),
            interpolation_of(self._train, memory, input_BLX, step),
            batch,
            self._terms,
            vocab_size=decoder.vocab_size,
            chunk_tokens=self._train.loss_chunk_tokens,
        )
        return LossParts(total, sums)
