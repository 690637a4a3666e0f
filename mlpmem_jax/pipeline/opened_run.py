"""A finished run as Python objects: its networks, arrays and results (docs/api.md)."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from mlpmem_jax.config.load import load_config
from mlpmem_jax.config.schema import Config
from mlpmem_jax.corpus.tokenizer import TextTokenizer, load_tokenizer
from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.generation.interpolated import InterpolatedModel
from mlpmem_jax.generation.language_model import LanguageModel
from mlpmem_jax.models.decoder import Decoder, Site
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.parallel.mesh import make_mesh
from mlpmem_jax.pipeline.evaluate import RESULTS
from mlpmem_jax.pipeline.execute import CONFIG
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.interpolation import interpolation
from mlpmem_jax.pipeline.networks import finished_decoder, finished_networks
from mlpmem_jax.pipeline.resolve import resolved
from mlpmem_jax.store.array_specs import Split
from mlpmem_jax.store.files import absolute, read_json
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.stored_array import StoredArray


def open_run(workdir: str | Path, overrides: Sequence[str] = ()) -> "Run":
    """Opens a run directory by the configuration that it was made with last.

    Args:
        workdir: The run directory, a local one.
        overrides: `section.key=value` each: other names or sizes of a mesh, another λ.

    Raises:
        ConfigError: There is no configuration, or an override is wrong.
    """
    folder = str(Path(workdir).expanduser())
    path = absolute(folder) / CONFIG
    return Run(Artifacts(resolved(load_config(str(path), overrides, {"workdir": folder}))))


@dataclasses.dataclass(frozen=True)
class Run:
    """The artifacts that a configuration names. What is read is checked against its manifest."""

    artifacts: Artifacts

    @property
    def config(self) -> Config:
        """The configuration, with the compute dtypes of this machine."""
        return self.artifacts.config

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """The devices, as the section `mesh` arranges them."""
        return make_mesh(self.config.mesh)

    def tokenizer(self) -> TextTokenizer:
        """Returns the tokenizer."""
        return load_tokenizer(self.artifacts.tokenizer)

    def tokens(self, split: Split) -> TokenSplit:
        """Returns the token stream of a split, with its documents."""
        return TokenSplit.open(self.artifacts.tokens, split)

    def decoder(self) -> Decoder:
        """Returns the decoder: the one trained with the memory if `train.mode` is joint."""
        if self.config.train.mode == "joint":
            return finished_networks(self.artifacts, self.mesh)[0]
        return finished_decoder(self.artifacts, self.mesh)

    def memory(self) -> Memory:
        """Returns the memory."""
        return finished_networks(self.artifacts, self.mesh)[1]

    def datastore(self, split: Split) -> dict[str, StoredArray]:
        """Returns the stored states, labels and log-probabilities of a split."""
        return _arrays(self.artifacts.datastore(split))

    def neighbors(self, split: Split) -> dict[str, StoredArray]:
        """Returns the nearest training rows of a split's rows, and their squared distances."""
        return _arrays(self.artifacts.neighbors(split))

    def targets(self, split: Split) -> dict[str, StoredArray]:
        """Returns the sparse kNN distributions of a split: id, prob, mass, label."""
        return _arrays(self.artifacts.targets(split))

    def results(self) -> dict[str, Any]:
        """Returns what `evaluate` found.

        Raises:
            ArtifactError: The command has not run.
        """
        artifact = self.artifacts.results
        artifact.verify()
        return dict(read_json(artifact.path / RESULTS))

    def model(self, *, weight: float | None = None, with_memory: bool = True) -> LanguageModel:
        """Returns decoder and memory as one language model.

        Args:
            weight: λ, the memory's share, in [0, 1]; not set: as trained, as the memory's gate
                gives it, or as `evaluate` chose it.
            with_memory: Whether the memory is used; False: the decoder alone.

        Raises:
            ArtifactError: A network or the tokenizer is missing, damaged, or fits no other; or λ
                is not set and was never chosen.
            ValueError: The weight is not from 0 to 1.
        """
        if weight is not None and not 0 <= weight <= 1:
            raise ValueError(f"weight={weight} must be from 0 to 1")
        config = self.config
        chosen = weight
        if with_memory and weight is None:
            chosen = interpolation(self.artifacts)
        memory = None
        if with_memory or config.train.mode == "joint":
            decoder, memory = finished_networks(self.artifacts, self.mesh, frozen=True)
        else:
            decoder = finished_decoder(self.artifacts, self.mesh, frozen=True)
        tokenizer = self.tokenizer()
        if tokenizer.vocab_size != decoder.vocab_size:
            raise ArtifactError(
                f"{self.artifacts.tokenizer.path} has a vocabulary of {tokenizer.vocab_size} "
                f"tokens and {self.artifacts.decoder.path} one of {decoder.vocab_size}: use the "
                "tokenizer that the decoder was trained with"
            )
        model = InterpolatedModel(
            decoder,
            memory if with_memory else None,
            site=Site.of(config.datastore.input, config.decoder.num_layers),
            weight=chosen if with_memory else 0.0,
            separator=tokenizer.separator_id,
            mesh=self.mesh,
        )
        return LanguageModel(model, tokenizer)


def _arrays(artifact: Artifact) -> dict[str, StoredArray]:
    return {name: StoredArray(artifact, name) for name in artifact.load().arrays}
