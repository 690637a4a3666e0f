"""What training tasks read: the artifacts of a run."""

from functools import cached_property
from typing import Literal, Protocol

import jax

from mlpmem_jax.config.schema import Config
from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.corpus.windows import TokenWindows
from mlpmem_jax.input.rows import StoredRows
from mlpmem_jax.input.tokens import TokensWithTargets
from mlpmem_jax.input.windows import WindowSource
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.store.array_specs import Split
from mlpmem_jax.store.layout import Layout
from mlpmem_jax.training.networks import finished_decoder


class TaskData(Protocol):
    """What a training task asks for; splits are opened once they are asked for."""

    @property
    def vocab_size(self) -> int:
        """V of the tokenizer, unpadded."""
        ...

    def token_windows(self, split: Split, length: int) -> WindowSource:
        """Returns windows of tokens; in validation the separator is no label."""
        ...

    def stored_rows(self, split: Split, length: int) -> WindowSource:
        """Returns windows of stored inputs with their targets."""
        ...

    def tokens_with_targets(self, split: Split, length: int) -> WindowSource:
        """Returns windows of tokens with their targets."""
        ...

    def decoder(self, mesh: jax.sharding.Mesh) -> Decoder:
        """Returns the run's decoder."""
        ...


class RunData:
    """The artifacts of a run (`compiling.blank.BlankRun` is the same without any)."""

    def __init__(self, config: Config):
        self._config = config
        self._layout = Layout(config)

    @cached_property
    def _train(self) -> TokenSplit:
        return TokenSplit.open(self._layout.tokens, "train")

    @property
    def vocab_size(self) -> int:
        """V of the tokenizer, unpadded."""
        return int(self._train.vocab_size)

    def token_windows(self, split: Split, length: int) -> WindowSource:
        """Returns windows of tokens; in validation the separator is no label."""
        tokens = self._train if split == "train" else TokenSplit.open(self._layout.tokens, split)
        weights: Literal["train", "score"] = "train" if split == "train" else "score"
        return TokenWindows(tokens, length, weights, segments=self._config.attends_within)

    def stored_rows(self, split: Split, length: int) -> WindowSource:
        """Returns windows of stored inputs with their targets."""
        return StoredRows(
            self._layout,
            split,
            length,
            self._train.separator_id,
            self._config.memory.num_read_tokens,
            with_logprob=self._config.loss_weights.joint > 0,
        )

    def tokens_with_targets(self, split: Split, length: int) -> WindowSource:
        """Returns windows of tokens with their targets."""
        return TokensWithTargets(
            self._layout,
            split,
            length,
            self._config.memory.num_read_tokens,
            segments=self._config.attends_within,
        )

    def decoder(self, mesh: jax.sharding.Mesh) -> Decoder:
        """Restores the decoder."""
        return finished_decoder(self._config, mesh)
