"""What training tasks read: windows of stored tokens, rows and targets."""

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Literal, Protocol

from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.corpus.windows import TokenWindows
from mlpmem_jax.input.rows import StoredRows
from mlpmem_jax.input.tokens import TokensWithTargets
from mlpmem_jax.input.windows import WindowSource
from mlpmem_jax.store.array_specs import Split
from mlpmem_jax.store.manifest import Artifact


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


@dataclasses.dataclass(frozen=True)
class RunData:
    """The artifacts that training reads (`roofline.blank.BlankRun` is the same without any).

    Attributes:
        datastore: Stored rows of each split.
        targets: The kNN targets of each split.
        num_recent: Recent tokens that the memory reads, M; 0: none.
        within: Whether attention stays within documents.
        with_logprob: Whether the decoder's log-probabilities are read with stored rows.
    """

    tokens: Artifact
    datastore: Mapping[Split, Artifact]
    targets: Mapping[Split, Artifact]
    num_recent: int
    within: bool
    with_logprob: bool

    @cached_property
    def _train(self) -> TokenSplit:
        return TokenSplit.open(self.tokens, "train")

    def _split(self, split: Split) -> TokenSplit:
        return self._train if split == "train" else TokenSplit.open(self.tokens, split)

    @property
    def vocab_size(self) -> int:
        """V of the tokenizer, unpadded."""
        return self._train.vocab_size

    def token_windows(self, split: Split, length: int) -> WindowSource:
        """Returns windows of tokens; in validation the separator is no label."""
        weights: Literal["train", "score"] = "train" if split == "train" else "score"
        return TokenWindows(self._split(split), length, weights, segments=self.within)

    def stored_rows(self, split: Split, length: int) -> WindowSource:
        """Returns windows of stored inputs with their targets."""
        return StoredRows(
            self.datastore[split],
            length,
            self._train.separator_id,
            self.num_recent,
            targets=self.targets[split],
            with_logprob=self.with_logprob,
        )

    def tokens_with_targets(self, split: Split, length: int) -> WindowSource:
        """Returns windows of tokens with their targets."""
        tokens, targets = self._split(split), self.targets[split]
        return TokensWithTargets(tokens, targets, length, self.num_recent, segments=self.within)
