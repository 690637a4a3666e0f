"""Where the artifacts of a run lie."""

from typing import Literal

from mlpmem_jax.config.schema import Config
from mlpmem_jax.store.array_specs import Split
from mlpmem_jax.store.files import absolute
from mlpmem_jax.store.manifest import Artifact

# In the names of what joint training makes anew on the way, before the number of the phase.
REFRESHED = ".refresh-"


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
