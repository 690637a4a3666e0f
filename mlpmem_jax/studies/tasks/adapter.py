"""The model interface of lm-evaluation-harness; importing this module needs the package lm_eval."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM

from mlpmem_jax.studies.tasks.text_model import TextModel


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A `TextModel` as the harness wants it."""

    def __init__(self, model: TextModel):
        """Takes the model."""
        super().__init__()
        self._model = model

    @property
    def eot_token_id(self) -> int:
        """The token that begins and ends documents; also what an empty context stands for."""
        return self._model.tokenizer.separator_id

    @property
    def max_length(self) -> int:
        """Tokens that a row may read, the separator that begins it included."""
        return self._model.context_tokens

    @property
    def tokenizer_name(self) -> str:
        """A digest of the tokenizer."""
        return self._model.tokenizer.content_digest()

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Returns the tokens of a text; none is ever added."""
        return self._model.encode(string)

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Returns log p(continuation | context) with whether the continuation is greedy."""
        pairs = self._model.extended_pairs([request.args for request in requests])
        found = super().loglikelihood([SimpleNamespace(args=pair) for pair in pairs], True)
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return list(found)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scores = self._model.score([(context, rest) for _, context, rest in requests])
        return [(score.logprob, score.is_greedy) for score in scores]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns log p of whole texts, in windows as the harness cuts them for every model."""
        texts = [
            [
                utils.make_disjoint_window(window)
                for window in utils.get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.eot_token_id, self.max_length, 1
                )
            ]
            for request in requests
        ]
        return [score.logprob for score in self._model.score_windows(texts)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns continuations of prompts."""
        found = self._model.write([request.args for request in requests])
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return found
