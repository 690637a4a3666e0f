"""A run without artifacts: shapes of what a task would read, for compiling it."""

import dataclasses

import jax
import numpy as np

from mlpmem_jax.config.data import DatastoreConfig, TargetsConfig
from mlpmem_jax.config.networks import DecoderConfig, MemoryConfig
from mlpmem_jax.corpus.windows import TokenWindows
from mlpmem_jax.input.rows import TargetReader
from mlpmem_jax.input.windows import WindowSource
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.parallel.sharding import batch_sharding
from mlpmem_jax.store.array_specs import Split, datastore_arrays, input_array, targets_arrays
from mlpmem_jax.training.networks import (
    abstract_network,
    decoder_builder,
    frozen_builder,
    memory_builder,
)


class BlankTokens:
    """A long stream of separators."""

    num_tokens = 1 << 40
    separator_id = 0

    def read_windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Returns zeros [B, length]."""
        return np.zeros((len(starts), length), np.int32)


@dataclasses.dataclass(frozen=True)
class BlankRun:
    """Stands in for `training.run_data.RunData` where nothing has been made yet.

    Every array that it yields is zero; only shapes and dtypes mean anything.

    Attributes:
        vocab_size: V of the tokenizer, unpadded.
        within: As in `RunData`.
        with_logprob: As in `RunData`.
    """

    vocab_size: int
    decoder_config: DecoderConfig
    memory_config: MemoryConfig
    datastore: DatastoreConfig
    targets: TargetsConfig
    within: bool
    with_logprob: bool

    def token_windows(self, split: Split, length: int) -> WindowSource:
        """Returns blank windows of tokens."""
        return TokenWindows(BlankTokens(), length, segments=self.within)

    def stored_rows(self, split: Split, length: int) -> WindowSource:
        """Returns blank windows of stored rows."""
        specs = datastore_arrays(self.datastore, self.decoder_config.width)
        state = specs[input_array(specs)]
        names = {"input": state, "label": specs["label"]}
        if self.with_logprob:
            names["logprob"] = specs["logprob"]
        weight = {"weight": np.zeros((1, length), np.float32)}
        rows = {name: np.zeros((1, length, *spec.tail), spec.dtype) for name, spec in names.items()}
        return _BlankWindows(rows | weight | self._recent(length) | self._targets(length))

    def tokens_with_targets(self, split: Split, length: int) -> WindowSource:
        """Returns blank windows of tokens with targets."""
        tokens = self.token_windows(split, length).read(np.zeros(1, np.int64))
        both = {"lm_weight": tokens["weight"], **self._recent(length), **self._targets(length)}
        return _BlankWindows(tokens | both)

    def decoder(self, mesh: jax.sharding.Mesh) -> Decoder:
        """Returns shapes, dtypes and shardings of the decoder, which is not trained."""
        build = decoder_builder(self.decoder_config, self.vocab_size)
        return abstract_network(frozen_builder(build, self.memory_config), mesh)

    def memory(self, mesh: jax.sharding.Mesh) -> Memory:
        """Returns shapes, dtypes and shardings of a memory that is not trained."""
        width = self.decoder_config.width
        build = memory_builder(self.memory_config, width, self.vocab_size)
        return abstract_network(frozen_builder(build, self.memory_config), mesh)

    def _recent(self, length: int) -> dict[str, np.ndarray]:
        num_recent = self.memory_config.num_read_tokens
        return {"recent": np.zeros((1, length, num_recent), np.int32)} if num_recent else {}

    def _targets(self, length: int) -> dict[str, np.ndarray]:
        specs = targets_arrays(self.datastore, self.targets, self.vocab_size)
        rows = {
            f"target_{name}": np.zeros((1, length, *spec.tail), spec.dtype)
            for name, spec in specs.items()
        }
        return TargetReader.prepared(rows)


class _BlankWindows:
    """Windows of which all are the one given."""

    num_windows = 1 << 40

    def __init__(self, arrays: dict[str, np.ndarray]):
        self._arrays = arrays

    def read(self, windows: np.ndarray) -> dict[str, np.ndarray]:
        return {name: np.repeat(array, len(windows), 0) for name, array in self._arrays.items()}


def abstract_batch(
    source: WindowSource, batch_size: int, mesh: jax.sharding.Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a global batch of a source's windows, and where it lies."""
    one = source.read(np.zeros(1, np.int64))
    return {
        name: jax.ShapeDtypeStruct(
            (batch_size, *array.shape[1:]), array.dtype, sharding=batch_sharding(mesh, array.ndim)
        )
        for name, array in one.items()
    }
