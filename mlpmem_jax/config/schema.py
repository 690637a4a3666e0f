"""The whole configuration.

Defaults live here and in the section modules, nowhere else. Nothing in this package
imports JAX: a mistake is reported before a device is touched.
"""

from typing import NamedTuple

from mlpmem_jax.config.base import Section, runtime, setting
from mlpmem_jax.config.compile import CompileConfig
from mlpmem_jax.config.data import (
    CorpusConfig,
    DatastoreConfig,
    RetrievalConfig,
    TargetsConfig,
    TokenizerConfig,
)
from mlpmem_jax.config.networks import DecoderConfig, MemoryConfig, MeshConfig
from mlpmem_jax.config.serve import ServeConfig
from mlpmem_jax.config.stages import (
    EvaluateConfig,
    GenerateConfig,
    PretrainConfig,
    TrainConfig,
)
from mlpmem_jax.config.studies import AnalyzeConfig, CostConfig, SearchQualityConfig
from mlpmem_jax.config.suite import AblateConfig, CompareConfig, OverfittingConfig
from mlpmem_jax.config.tasks import TasksConfig
from mlpmem_jax.config.types import PathText, Seed

__all__ = ["Config", "LossWeights"]

# Windows whose rows are shuffled together, and their limit for a whole batch: these rows, and as
# many that are read ahead, are held in host memory.
_MIX_WINDOWS, _MOST_MIXED = 32, 4096


class LossWeights(NamedTuple):
    """Weights of the three terms of the joint loss (w_joint, w_lm, w_mem)."""

    joint: float
    lm: float
    memory: float


class Config(Section):
    """Everything that can be set."""

    workdir: PathText = runtime("runs/quickstart", "run directory, local or gs://")
    store: PathText | None = runtime(
        None,
        "directory of artifacts, which several runs may share; not set: workdir/artifacts",
    )
    seed: Seed = setting(0, "seed of weight initialization and data order")
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
    serve: ServeConfig = runtime(ServeConfig(), ServeConfig.__doc__ or "")
    compile: CompileConfig = runtime(CompileConfig(), CompileConfig.__doc__ or "")
    analyze: AnalyzeConfig = setting(AnalyzeConfig(), AnalyzeConfig.__doc__ or "")
    cost: CostConfig = setting(CostConfig(), CostConfig.__doc__ or "")
    search_quality: SearchQualityConfig = setting(
        SearchQualityConfig(), SearchQualityConfig.__doc__ or ""
    )
    tasks: TasksConfig = setting(TasksConfig(), TasksConfig.__doc__ or "")
    compare: CompareConfig = setting(CompareConfig(), CompareConfig.__doc__ or "")
    overfitting: OverfittingConfig = setting(OverfittingConfig(), OverfittingConfig.__doc__ or "")
    ablate: AblateConfig = setting(AblateConfig(), AblateConfig.__doc__ or "")

    @property
    def embedding_window_tokens(self) -> int:
        """Tokens in a window of `embed`."""
        window = self.datastore.window_tokens
        return self.decoder.context_tokens if window == "auto" else window

    @property
    def embedding_stride_tokens(self) -> int:
        """Rows that one embedding window scores."""
        stride = self.datastore.stride_tokens
        return max(1, self.embedding_window_tokens // 2) if stride == "auto" else stride

    @property
    def pretrain_window_tokens(self) -> int:
        """Tokens in a pretraining window."""
        window = self.pretrain.window_tokens
        return self.decoder.context_tokens if window == "auto" else window

    @property
    def decoder_runs(self) -> bool:
        """Whether the decoder runs in the training step of `train`."""
        return self.train.mode == "joint" or self.train.inputs == "online"

    @property
    def continues_memory(self) -> bool:
        """Whether `train` continues the memory from before text was appended, decoder frozen."""
        continues = self.train.mode == "memory" and self.train.memory_start == "checkpoint"
        return continues and self.memory.pretrained is None

    @property
    def train_window_tokens(self) -> int:
        """Rows (stored inputs) or tokens (the decoder runs) in a window of `train`."""
        if self.train.window_tokens != "auto":
            return self.train.window_tokens
        stored = not self.decoder_runs
        return self.datastore.chunk_rows if stored else self.decoder.context_tokens

    @property
    def train_mix_windows(self) -> int:
        """Windows whose stored rows are shuffled together in `train`."""
        if self.train.mix_windows != "auto":
            return self.train.mix_windows
        if self.decoder_runs:
            return 1
        return max(1, min(_MIX_WINDOWS, _MOST_MIXED // self.train.batch_size))

    @property
    def loss_weights(self) -> LossWeights:
        """Weights of the loss terms of `train`, as numbers."""
        train, joint = self.train, float(self.train.mode == "joint")
        given = (train.joint_weight, train.lm_weight, train.memory_weight)
        chosen = zip(given, (joint, joint, 1.0), strict=True)
        return LossWeights(*(auto if weight == "auto" else weight for weight, auto in chosen))

    @property
    def trained_interpolation(self) -> float | None:
        """Final λ of training; None if λ is tuned on validation."""
        if self.loss_weights.joint == 0:
            return None
        final = self.train.interpolation_final
        return self.train.interpolation if final is None else final

    @property
    def reads_logprob(self) -> bool:
        """Whether `train` reads the decoder's log-probabilities with the stored rows."""
        return self.loss_weights.joint > 0 or self.memory.gate == "fitted"

    @property
    def attends_within(self) -> bool:
        """Whether attention stays within documents."""
        return self.corpus.attention == "within"

    @property
    def brings_interpolation(self) -> bool:
        """Whether `train` decides λ: fixed in the loss, or given by a gate."""
        return self.memory.has_gate or self.trained_interpolation is not None
