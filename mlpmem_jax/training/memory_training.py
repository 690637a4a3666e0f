"""What `train` trains in mode `memory`: the MLP Memory, beside a frozen decoder (section 3.2)."""

from typing import Any

import jax
from flax import nnx

from mlpmem_jax.input.feed import Batch
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.training.flops import decoder_flops_per_token, memory_training_flops_per_token
from mlpmem_jax.training.input_statistics import measured_statistics, with_statistics
from mlpmem_jax.training.interpolation import interpolation_of
from mlpmem_jax.training.joint_loss import joint_loss
from mlpmem_jax.training.losses import memory_loss
from mlpmem_jax.training.networks import memory_builder
from mlpmem_jax.training.run_data import TaskData
from mlpmem_jax.training.state import TrainState
from mlpmem_jax.training.step import LossParts
from mlpmem_jax.training.task import WindowTask
from mlpmem_jax.training.train_settings import TrainSettings


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
    ):
        """Prepares.

        Args:
            settings: What is trained and how.
            data: What is read.
            mesh: Devices.
            decoder: The frozen decoder, on the mesh, if `settings.reads_decoder`.
        """
        self._train, self._memory = settings.train, settings.memory
        self._online = settings.online
        self._site = settings.site
        self._terms = settings.terms
        self.vocab_size = data.vocab_size
        windows = data.tokens_with_targets if settings.online else data.stored_rows
        width = settings.decoder.width
        super().__init__(
            settings.train,
            mesh,
            memory_builder(settings.memory, width, data.vocab_size, settings.train.interpolation),
            train=windows("train", settings.window_tokens),
            valid=windows("valid", settings.window_tokens),
            window_tokens=settings.window_tokens,
            seed=settings.seed,
            mix_windows=settings.mix_windows,
        )
        self._decoder_graphdef: Any = None
        if settings.reads_decoder:
            assert decoder is not None
            if self._online or self._memory.head == "tied":
                self._decoder_graphdef, self.frozen = nnx.split(decoder)
            else:
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
        """Measures mean and deviation of the input on the first training batches."""
        if self._memory.input_norm != "standardize":
            return state
        batches = self.feed(range(self._train.normalizer_batches))
        with jax.set_mesh(self._mesh):
            arrays = (state.params, state.fixed), self.frozen
            measured = measured_statistics(self._measured_inputs, arrays, batches)
        memory: Memory = nnx.merge(self._graphdef, state.params, state.fixed)
        return with_statistics(state, memory, memory, measured)

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
        head_VD = None
        if self._memory.head == "tied":
            head_VD = nnx.merge(self._decoder_graphdef, frozen).head_VD()
        input_BLX = self._inputs(model, frozen, batch)
        hidden_BLE, head_VE = model.hidden(input_BLX), model.head_VE(head_VD)
        limits = {"vocab_size": model.vocab_size, "chunk_tokens": self._train.loss_chunk_tokens}
        if self._terms.weights.joint:
            weight_BL = interpolation_of(self._train, model, input_BLX, step)
            logprob_BL, terms = batch["logprob"], self._terms
            return LossParts(
                *joint_loss(hidden_BLE, head_VE, logprob_BL, weight_BL, batch, terms, **limits)
            )
        return LossParts(*memory_loss(hidden_BLE, head_VE, batch, self._terms.alpha, **limits))
