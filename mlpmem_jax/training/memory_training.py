"""What `train` trains in mode `memory`: the MLP Memory, beside a frozen decoder (section 3.2)."""

from typing import Any

import jax
from flax import nnx

from mlpmem_jax.config.schema import Config
from mlpmem_jax.input.feed import Batch
from mlpmem_jax.input.windows import WindowSource
from mlpmem_jax.models.decoder import Site
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.store.array_specs import Split
from mlpmem_jax.training.flops import decoder_flops_per_token, memory_training_flops_per_token
from mlpmem_jax.training.input_statistics import measured_statistics, with_statistics
from mlpmem_jax.training.interpolation import interpolation_of, joint_terms
from mlpmem_jax.training.joint_loss import joint_loss
from mlpmem_jax.training.losses import memory_loss
from mlpmem_jax.training.networks import memory_builder
from mlpmem_jax.training.run_data import RunData, TaskData
from mlpmem_jax.training.state import TrainState
from mlpmem_jax.training.step import LossParts
from mlpmem_jax.training.task import WindowTask


class MemoryTask(WindowTask):
    """α·KL(p_kNN ‖ p_MEM) + (1−α)·CE on stored inputs, or on those of a decoder that runs.

    With `train.joint_weight` above 0, −log p of the mixture with the stored p_LM besides.
    """

    name = "train"

    def __init__(self, config: Config, mesh: jax.sharding.Mesh, data: TaskData | None = None):
        data = data or RunData(config)
        self._config = config
        self._online = config.train.inputs == "online"
        self._site = Site.of(config.datastore.input, config.decoder.num_layers)
        self._terms = joint_terms(config)
        self.vocab_size = data.vocab_size
        super().__init__(
            config.train,
            mesh,
            memory_builder(config, data.vocab_size),
            train=_windows(config, data, "train"),
            valid=_windows(config, data, "valid"),
            window_tokens=config.train_window_tokens,
            seed=config.seed,
            mix_windows=config.train_mix_windows,
        )
        self._decoder_graphdef: Any = None
        if self._online or config.memory.head == "tied":
            self._decoder_graphdef, self.frozen = nnx.split(data.decoder(mesh))
        elif config.memory.reads_decoder_table:
            self.frozen = nnx.state(data.decoder(mesh), nnx.PathContains("embedding"))
        self.flops_per_step = self.tokens_per_step * self._flops_per_token()

    def _flops_per_token(self) -> float:
        config, width = self._config, self._config.decoder.width
        flops = memory_training_flops_per_token(config.memory, width, self.vocab_size)
        if self._online:  # Forward only, and only up to the state that the memory reads.
            flops += decoder_flops_per_token(
                config.decoder,
                self.vocab_size,
                config.train_window_tokens,
                num_layers=self._site.block,
                last_ffn=self._site.kind == "residual",
                head=False,
            )
        return flops

    def prepare(self, state: TrainState) -> TrainState:
        """Measures mean and deviation of the input on the first training batches."""
        if self._config.memory.input_norm != "standardize":
            return state
        batches = self.feed(range(self._config.train.normalizer_batches))
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
        if self._config.memory.reads_decoder_table:
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
        if self._config.memory.head == "tied":
            head_VD = nnx.merge(self._decoder_graphdef, frozen).head_VD()
        input_BLX = self._inputs(model, frozen, batch)
        hidden_BLE, head_VE = model.hidden(input_BLX), model.head_VE(head_VD)
        chunk_tokens = self._config.train.loss_chunk_tokens
        if self._terms.weights.joint:
            total, sums = joint_loss(
                hidden_BLE,
                head_VE,
                batch["logprob"],
                interpolation_of(self._config, model, input_BLX, step),
                batch,
                self._terms,
                vocab_size=model.vocab_size,
                chunk_tokens=chunk_tokens,
                normalizer=1.0,
            )
            return LossParts(total, sums)
        total, sums = memory_loss(
            hidden_BLE,
            head_VE,
            batch["label"],
            batch["weight"],
            batch["target_id"],
            batch["target_prob"],
            batch["target_mass"],
            self._terms.alpha,
            vocab_size=model.vocab_size,
            chunk_tokens=chunk_tokens,
            normalizer=1.0,
        )
        return LossParts(total, sums)


def _windows(config: Config, data: TaskData, split: Split) -> WindowSource:
    length = config.train_window_tokens
    if config.train.inputs == "online":
        return data.tokens_with_targets(split, length)
    return data.stored_rows(split, length)
