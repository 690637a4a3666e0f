"""What `train` trains in mode `memory`: the MLP Memory, beside a frozen decoder (section 3.2)."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from mlpmem_jax.input.feed import Batch
from mlpmem_jax.input.windows import WindowsOf
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.training.flops import decoder_flops_per_token, memory_training_flops_per_token
from mlpmem_jax.training.gate_fitting import Outputs, fitted_gate
from mlpmem_jax.training.input_statistics import measured_statistics, with_statistics
from mlpmem_jax.training.interpolation import interpolation_of
from mlpmem_jax.training.joint_loss import joint_loss
from mlpmem_jax.training.losses import memory_loss, token_logprob
from mlpmem_jax.training.networks import memory_builder
from mlpmem_jax.training.run_data import TaskData
from mlpmem_jax.training.state import TrainState, split_module
from mlpmem_jax.training.step import LossParts
from mlpmem_jax.training.task import WindowTask
from mlpmem_jax.training.train_settings import TrainSettings


@dataclasses.dataclass(frozen=True)
class Continuation:
    """How training goes on after text was appended.

    Attributes:
        memory: Restores the memory from before on the mesh, once a fresh state is made.
        windows_of: Global record numbers to windows, of new rows and of replayed old ones.
    """

    memory: Callable[[], Memory]
    windows_of: WindowsOf


class MemoryTask(WindowTask):
    """α·KL(p_kNN ‖ p_MEM) + (1−α)·CE on stored inputs, or on those of a decoder that runs.

    With `train.joint_weight` above 0, −log p of the mixture with the stored p_LM besides.
    """

    name = "train"

    def __init__(
        self,
        settings: TrainSettings,
        data: TaskData,
        mesh: jax.sharding.Mesh,
        decoder: Decoder | None = None,
        continues: Continuation | None = None,
    ):
        """Prepares.

        Args:
            settings: What is trained and how.
            data: What is read.
            mesh: Devices.
            decoder: The frozen decoder, on the mesh, if `settings.reads_decoder`.
            continues: The memory that it begins with; None: a fresh one.
        """
        self._train, self._memory = settings.train, settings.memory
        self._online = settings.online
        self._continues = continues
        self._site = settings.site
        self._terms = settings.terms
        self.vocab_size = data.vocab_size
        windows = data.tokens_with_targets if settings.online else data.stored_rows
        width = settings.decoder.width
        self._window_tokens = settings.window_tokens
        self._valid = windows("valid", settings.window_tokens)
        super().__init__(
            settings.train,
            mesh,
            memory_builder(settings.memory, width, data.vocab_size, settings.train.interpolation),
            train=windows("train", settings.window_tokens),
            valid=self._valid,
            window_tokens=settings.window_tokens,
            seed=settings.seed,
            mix_windows=settings.mix_windows,
            windows_of=None if continues is None else continues.windows_of,
        )
        self._decoder_graphdef: Any = None
        self._first_head_VD: jax.Array | None = None
        if settings.reads_decoder:
            assert decoder is not None
            if self._train.head_start == "checkpoint":
                self._first_head_VD = decoder.head_VD()
            if self._online or self._memory.head == "tied":
                self._decoder_graphdef, self.frozen = nnx.split(decoder)
            elif self._memory.reads_decoder_table:
                self.frozen = nnx.state(decoder, nnx.PathContains("embedding"))
        self.flops_per_step = self.tokens_per_step * self._flops_per_token(settings)

    def _flops_per_token(self, settings: TrainSettings) -> float:
        decoder = settings.decoder
        flops = memory_training_flops_per_token(self._memory, decoder.width, self.vocab_size)
        if self._online:  # Forward only, and only up to the state that the memory reads.
            flops += decoder_flops_per_token(
                decoder,
                self.vocab_size,
                settings.window_tokens,
                num_layers=self._site.block,
                last_ffn=self._site.kind == "residual",
                head=False,
            )
        return flops

    def prepare(self, state: TrainState) -> TrainState:
        """Takes over the memory from before, or copies a head and measures the input.

        Its mean and deviation are measured on the first training batches; a memory from before
        has its own.
        """
        if self._continues is not None:
            memory: Memory = nnx.merge(self._graphdef, state.params, state.fixed)
            nnx.update(memory, nnx.state(self._continues.memory()))
            _, params, fixed = split_module(memory)
            return dataclasses.replace(state, params=params, fixed=fixed)
        if self._first_head_VD is not None:
            network: Memory = nnx.merge(self._graphdef, state.params, state.fixed)
            # A copy: the step donates its state, and the decoder holds this array.
            head_VE = jax.device_put(
                self._first_head_VD.astype(network.head[...].dtype, copy=True),
                network.head[...].sharding,
            )
            network.head[...] = head_VE
            state = dataclasses.replace(state, params=split_module(network)[1])
            self._first_head_VD = None
        if self._memory.input_norm != "standardize":
            return state
        batches = self.feed(range(self._train.normalizer_batches))
        with jax.set_mesh(self._mesh):
            arrays = (state.params, state.fixed), self.frozen
            measured = measured_statistics(self._measured_inputs, arrays, batches)
        memory = nnx.merge(self._graphdef, state.params, state.fixed)
        return with_statistics(state, memory, memory, measured)

    def finish(self, state: TrainState) -> tuple[TrainState, Mapping[str, float]]:
        """Fits the gate (memory.gate=fitted); the rest of the memory stays as it is."""
        if self._memory.gate != "fitted":
            return state, {}
        memory: Memory = nnx.merge(self._graphdef, state.params, state.fixed)
        gate = fitted_gate(
            self._gate_outputs,
            ((state.params, state.fixed), self.frozen),
            self._valid,
            self._mesh,
            batch_size=self._train.batch_size,
            window_tokens=self._window_tokens,
            num_features=memory.input_width,
            floor=self._memory.gate_floor,
        )
        for parameter, value in ((memory.gate, gate.weight_X), (memory.gate_bias, [gate.bias])):
            new = np.asarray(value, parameter[...].dtype)
            parameter[...] = jax.device_put(new, parameter[...].sharding)
        state = dataclasses.replace(state, params=split_module(memory)[1])
        left_out = {"gate_nats": gate.nats, "gate_nats_one": gate.nats_one}
        return state, {} if math.isnan(gate.nats) else left_out

    def _gate_outputs(self, network: Any, frozen: Any, batch: Batch) -> Outputs:
        memory: Memory = nnx.merge(self._graphdef, *network)
        input_BLX = self._inputs(memory, frozen, batch)
        logprob_BL = token_logprob(
            memory.hidden(input_BLX),
            memory.head_VE(self._decoder_head(frozen)),
            batch["label"],
            vocab_size=memory.vocab_size,
            chunk_tokens=self._train.loss_chunk_tokens,
        )
        return memory.normalized(input_BLX), logprob_BL, batch["logprob"]

    def _decoder_head(self, frozen: Any) -> jax.Array | None:
        if self._memory.head != "tied":
            return None
        return nnx.merge(self._decoder_graphdef, frozen).head_VD()

    def _measured_inputs(self, arrays: Any, batch: Batch) -> jax.Array:
        network, frozen = arrays
        return self._inputs(nnx.merge(self._graphdef, *network), frozen, batch)

    def _inputs(self, model: Memory, frozen: Any, batch: Batch) -> jax.Array:
        """Returns what the memory reads, input_BLX."""
        table_VD = None
        if self._memory.reads_decoder_table:
            table_VD = frozen["embedding"][...]
        return model.inputs(self._states(frozen, batch), batch.get("recent"), table_VD)

    def _states(self, frozen: Any, batch: Batch) -> jax.Array:
        """Returns the decoder's states: read from the batch, or computed by the frozen decoder."""
        if not self._online:
            return batch["input"]
        decoder = nnx.merge(self._decoder_graphdef, frozen)
        _, states = decoder.hidden(
            batch["token"], batch.get("segment"), sites=(self._site,), final=False
        )
        return jax.lax.stop_gradient(states[self._site])

    def loss(self, model: Memory, frozen: Any, batch: Batch, step: jax.Array) -> LossParts:
        """The memory's loss summed over the scored rows of the batch."""
        input_BLX = self._inputs(model, frozen, batch)
        hidden_BLE = model.hidden(input_BLX)
        head_VE = model.head_VE(self._decoder_head(frozen))
        limits = {"vocab_size": model.vocab_size, "chunk_tokens": self._train.loss_chunk_tokens}
        if self._terms.weights.joint:
            weight_BL = interpolation_of(self._train, model, input_BLX, step)
            logprob_BL, terms = batch["logprob"], self._terms
            return LossParts(
                *joint_loss(hidden_BLE, head_VE, logprob_BL, weight_BL, batch, terms, **limits)
            )
        return LossParts(*memory_loss(hidden_BLE, head_VE, batch, self._terms.alpha, **limits))
