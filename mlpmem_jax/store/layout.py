"""Where the artifacts of a run lie, and what arrays they hold.

The one place that knows names, dtypes, shapes and chunking; writers and readers import it.
"""

import dataclasses
from typing import Any, Literal

import numpy as np

from mlpmem_jax.config.schema import Config
from mlpmem_jax.store.arrays import DTYPES
from mlpmem_jax.store.files import absolute
from mlpmem_jax.store.manifest import Artifact

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
# In the names of what joint training makes anew on the way, before the number of the phase.
REFRESHED = ".refresh-"

# Tokens are read in windows and in embedding order: large shards, small readable pieces.
TOKEN_SHARD_ROWS = 1 << 20
TOKEN_CHUNK_ROWS = 1 << 14
DOCUMENT_SHARD_ROWS = 1 << 16
DOCUMENT_CHUNK_ROWS = 1 << 13


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Shape, dtype and chunking of one array.

    Attributes:
        tail: Shape after the rows.
        dtype: NumPy dtype.
        shard_rows: Rows of a shard.
        chunk_rows: Rows of a readable piece.
    """

    tail: tuple[int, ...]
    dtype: Any
    shard_rows: int
    chunk_rows: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.tail, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def token_dtype(vocab_size: int) -> Any:
    """Returns the smallest unsigned dtype that holds every token id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


class Layout:
    """The artifacts of a run directory, by the names in the configuration."""

    def __init__(self, config: Config):
        self._config = config
        self.workdir = absolute(config.workdir)

    def _artifact(self, relative: str, kind: str) -> Artifact:
        return Artifact(self.workdir, relative, kind)

    @property
    def tokenizer(self) -> Artifact:
        """tokenizer.json."""
        return self._artifact("tokenizer", "tokenizer")

    @property
    def tokens(self) -> Artifact:
        """The three splits: token ids, document offsets, byte and word counts."""
        return self._artifact("tokens", "tokens")

    @property
    def decoder(self) -> Artifact:
        """Checkpoints of the decoder."""
        return self._artifact(f"decoder/{self._config.decoder.name}", "decoder")

    def datastore(self, split: Split) -> Artifact:
        """Keys, inputs, labels and decoder log-probabilities of a split."""
        return self._artifact(f"datastore/{self._config.datastore.name}/{split}", "datastore")

    @property
    def index(self) -> Artifact:
        """The neighbour index over the training split's keys."""
        return self._artifact(f"index/{self._config.retrieval_name}", "index")

    def neighbors(self, split: Split) -> Artifact:
        """The K nearest training rows of each row; those of valid and test are exact."""
        name = self._config.retrieval_name if split == "train" else self._config.exact_name
        return self._artifact(f"neighbors/{name}/{split}", "neighbors")

    def neighbors_by_index(self, split: Split) -> Artifact:
        """The same for valid and test, as the engine of the index finds them."""
        name = f"neighbors/{self._config.retrieval_name}/{split}-by-index"
        return self._artifact(name, "neighbors")

    def targets(self, split: Split) -> Artifact:
        """Sparse kNN distributions, of this run or of its teacher's."""
        teacher = self._config.targets.workdir
        workdir = self.workdir if teacher is None else absolute(teacher)
        return Artifact(workdir, f"targets/{self._config.targets.name}/{split}", "targets")

    @property
    def memory(self) -> Artifact:
        """Checkpoints of the memory."""
        return self._artifact(f"memory/{self._config.memory.name}", "memory")

    @property
    def joint(self) -> Artifact:
        """Checkpoints of decoder and memory, trained together."""
        return self._artifact(f"joint/{self._config.joint_name}", "joint")

    @property
    def trained(self) -> Artifact:
        """What `train` makes."""
        return self.joint if self._config.train.mode == "joint" else self.memory

    @property
    def results(self) -> Artifact:
        """The table, as JSON, CSV and picture."""
        joint = self._config.train.mode == "joint"
        name = f"joint-{self._config.joint_name}" if joint else self._config.memory.name
        return self._artifact(f"results/{name}", "results")

    @property
    def analysis(self) -> Artifact:
        """Where the gains come from, and how sharp the distributions are."""
        return self._artifact(f"analysis/{self._config.memory.name}", "analysis")

    @property
    def cost(self) -> Artifact:
        """Cost against the size of the datastore."""
        return self._artifact(f"cost/{self._config.memory.name}", "cost")

    @property
    def search_quality(self) -> Artifact:
        """What approximate search costs."""
        return self._artifact(f"search-quality/{self._config.memory.name}", "search-quality")

    def scores(self, name: str, split: Split) -> Artifact:
        """Log-probabilities that a model gives the labels of a split."""
        return self._artifact(f"scores/{name}/{split}", "scores")

    @property
    def machine(self) -> Artifact:
        """What the machine can do in a second, measured once."""
        return self._artifact("machine", "machine")

    def table(self, command: Literal["compare", "overfitting", "ablate"], name: str) -> Artifact:
        """A table of several runs: JSON, CSV and picture."""
        return self._artifact(f"results/{name}", command)

    def datastore_arrays(self) -> dict[str, ArraySpec]:
        """Arrays of a datastore split (design: key_ND, input_ND, label_N, logprob_N)."""
        store = self._config.datastore
        chunking = (store.shard_rows, store.chunk_rows)
        state = ArraySpec((self._config.decoder.width,), DTYPES[store.dtype], *chunking)
        specs = {
            "key": state,
            "input": state,
            "label": ArraySpec((), np.int32, *chunking),
            "logprob": ArraySpec((), np.float32, *chunking),
        }
        wanted = [name for name in specs if name in store.arrays]
        if store.key == store.input and "key" in wanted and "input" in wanted:
            wanted.remove("input")  # The same state is stored once.
        return {name: specs[name] for name in wanted}

    def input_array(self) -> str:
        """Name of the array that holds the memory's input."""
        return "input" if "input" in self.datastore_arrays() else "key"

    def scores_arrays(self) -> dict[str, ArraySpec]:
        """Arrays of scores: logprob_N (float32), and label_N to compare sides."""
        store = self._config.datastore
        chunking = (store.shard_rows, store.chunk_rows)
        return {
            "logprob": ArraySpec((), np.float32, *chunking),
            "label": ArraySpec((), np.int32, *chunking),
        }

    def neighbors_arrays(self) -> dict[str, ArraySpec]:
        """Arrays of neighbours: row (int64) and squared distance (float32)."""
        store = self._config.datastore
        tail = (self._config.retrieval.num_neighbors,)
        chunking = (store.shard_rows, store.chunk_rows)
        return {
            "row": ArraySpec(tail, np.int64, *chunking),
            "distance": ArraySpec(tail, np.float32, *chunking),
        }

    def targets_arrays(self, vocab_size: int) -> dict[str, ArraySpec]:
        """Arrays of sparse targets: id_NS, prob_NS, mass_N, and label_N to compare sides."""
        store = self._config.datastore
        tail = (self._config.targets.num_tokens,)
        chunking = (store.shard_rows, store.chunk_rows)
        return {
            "id": ArraySpec(tail, token_dtype(vocab_size), *chunking),
            "prob": ArraySpec(tail, DTYPES[self._config.targets.dtype], *chunking),
            "mass": ArraySpec((), np.float32, *chunking),
            "label": ArraySpec((), np.int32, *chunking),
        }
