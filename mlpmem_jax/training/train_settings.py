"""What `train` trains and how, alone or jointly."""

import dataclasses

from mlpmem_jax.config.networks import DecoderConfig, MemoryConfig
from mlpmem_jax.config.schema import LossWeights
from mlpmem_jax.config.stages import TrainConfig
from mlpmem_jax.models.decoder import Site
from mlpmem_jax.training.joint_loss import JointTerms


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """The settings of `MemoryTask` and `JointTask`.

    Attributes:
        site: The decoder's state that is the memory's input.
        weights: Weights of the loss terms.
        window_tokens: Rows or tokens in a window.
        mix_windows: Windows whose stored rows are dealt out together.
        seed: Of initial weights and data order.
    """

    train: TrainConfig
    decoder: DecoderConfig
    memory: MemoryConfig
    site: Site
    weights: LossWeights
    window_tokens: int
    mix_windows: int
    seed: int

    @property
    def terms(self) -> JointTerms:
        """How the terms of the loss are weighted; the prior only where there is a gate."""
        train = self.train
        prior_weight = train.gate_prior if self.memory.gate == "learned" else 0.0
        return JointTerms(self.weights, train.alpha, train.interpolation, prior_weight)

    @property
    def online(self) -> bool:
        """Whether a frozen decoder runs in the step of `MemoryTask`."""
        return self.train.inputs == "online"

    @property
    def reads_decoder(self) -> bool:
        """Whether `MemoryTask` needs the decoder: to run it, its embeddings or its head."""
        return self.online or self.memory.reads_decoder or self.train.head_start == "checkpoint"
