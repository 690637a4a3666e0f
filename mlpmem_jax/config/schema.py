"""The whole configuration and the checks that span sections.

Defaults live here and in the section modules, nowhere else. Nothing in this package
imports JAX: a mistake is reported before a device is touched.
"""

from typing import Annotated

from pydantic import Field, ValidationInfo, model_validator

from mlpmem_jax.config.base import Section, runtime, setting
from mlpmem_jax.config.data import (
    CorpusConfig,
    DatastoreConfig,
    RetrievalConfig,
    TargetsConfig,
    TokenizerConfig,
)
from mlpmem_jax.config.networks import DecoderConfig, MemoryConfig, MeshConfig
from mlpmem_jax.config.stages import (
    EvaluateConfig,
    GenerateConfig,
    PretrainConfig,
    TrainConfig,
)
from mlpmem_jax.config.suite import AblateConfig, CompareConfig, OverfittingConfig

__all__ = ["Config"]


class Config(Section):
    """Everything that can be set."""

    workdir: str = runtime("runs/quickstart", "the run's directory, local or gs://")
    seed: Annotated[int, Field(ge=0)] = setting(0, "seed of initial weights and of the data order")
    corpus: CorpusConfig = setting(CorpusConfig(), CorpusConfig.__doc__ or "")
    tokenizer: TokenizerConfig = setting(TokenizerConfig(), TokenizerConfig.__doc__ or "")
    decoder: DecoderConfig = setting(DecoderConfig(), DecoderConfig.__doc__ or "")
    memory: MemoryConfig = setting(MemoryConfig(), MemoryConfig.__doc__ or "")
    mesh: MeshConfig = runtime(MeshConfig(), MeshConfig.__doc__ or "")
    datastore: DatastoreConfig = setting(DatastoreConfig(), DatastoreConfig.__doc__ or "")
    retrieval: RetrievalConfig = setting(RetrievalConfig(), RetrievalConfig.__doc__ or "")
    targets: TargetsConfig = setting(TargetsConfig(), TargetsConfig.__doc__ or "")
    pretrain: PretrainConfig = setting(PretrainConfig(), PretrainConfig.__doc__ or "")
    train: TrainConfig = setting(TrainConfig(), TrainConfig.__doc__ or "")
    evaluate: EvaluateConfig = setting(EvaluateConfig(), EvaluateConfig.__doc__ or "")
    generate: GenerateConfig = setting(GenerateConfig(), GenerateConfig.__doc__ or "")
    compare: CompareConfig = setting(CompareConfig(), CompareConfig.__doc__ or "")
    overfitting: OverfittingConfig = setting(OverfittingConfig(), OverfittingConfig.__doc__ or "")
    ablate: AblateConfig = setting(AblateConfig(), AblateConfig.__doc__ or "")

    @property
    def embedding_window_tokens(self) -> int:
        """Tokens that the decoder reads at once when it embeds."""
        window = self.datastore.window_tokens
        return self.decoder.context_tokens if window == "auto" else window

    @property
    def embedding_stride_tokens(self) -> int:
        """Rows that one embedding window scores."""
        stride = self.datastore.stride_tokens
        return max(1, self.embedding_window_tokens // 2) if stride == "auto" else stride

    @property
    def retrieval_name(self) -> str:
        """Name of the index and of the neighbours."""
        return self.datastore.name if self.retrieval.name == "auto" else self.retrieval.name

    @property
    def pretrain_window_tokens(self) -> int:
        """Tokens in a pretraining window."""
        window = self.pretrain.window_tokens
        return self.decoder.context_tokens if window == "auto" else window

    @property
    def train_window_tokens(self) -> int:
        """Rows (stored inputs) or tokens (online) in a memory-training window."""
        if self.train.window_tokens != "auto":
            return self.train.window_tokens
        stored = self.train.inputs == "stored"
        return self.datastore.chunk_rows if stored else self.decoder.context_tokens

    @model_validator(mode="after")
    def _check_across_sections(self, info: ValidationInfo) -> "Config":
        # Imported here: the checks read this class.
        from mlpmem_jax.config.checks import cross_section_mistakes

        mistakes = cross_section_mistakes(self)
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self
