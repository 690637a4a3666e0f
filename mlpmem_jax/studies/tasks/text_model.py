"""What lm-evaluation-harness evaluates: a model that scores and continues texts, in batches."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mlpmem_jax.corpus.tokenizer import TextTokenizer
from mlpmem_jax.errors import UserError
from mlpmem_jax.generation.sampling import Sampling
from mlpmem_jax.generation.slots import Rule, text_keys
from mlpmem_jax.studies.tasks.passages import Passages
from mlpmem_jax.studies.tasks.scoring import Row, RowScorer, Score, rows_of
from mlpmem_jax.studies.tasks.writing import Ask, KnnWriter, SlotWriter

MAX_GEN_TOKENS = 256  # where a task does not say, as the harness has it
# Keys of `generation_kwargs` that change nothing here with these values.
_WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "early_stopping": (True, False),
    "use_cache": (True, False),
    "num_return_sequences": (1,),
}
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclasses.dataclass(frozen=True)
class TextModel:
    """Decoder alone, with memory, with a kNN-LM, or with passages before the prompt.

    Attributes:
        tokenizer: Of the decoder.
        context_tokens: Tokens that a row may read.
        scorer: Scores rows.
        writer: Continues prompts.
        passages: Passages to set before prompts; None: no retrieval.
    """

    tokenizer: TextTokenizer
    context_tokens: int
    scorer: RowScorer
    writer: SlotWriter | KnnWriter
    seed: int
    passages: Passages | None = None

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text, without any that are added."""
        return [int(token) for token in self.tokenizer.encode([text])[0]]

    def extended(self, context: str, num_new: int) -> str:
        """Returns a prompt with passages before it, if there is retrieval and room for them.

        Args:
            num_new: Tokens that will follow it.
        """
        if self.passages is None or not context.strip():
            return context
        room = self.context_tokens - 1 - len(self.encode(context)) - num_new
        return self.passages.before(context, self.tokenizer, room) + context

    def extended_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Returns contexts and continuations with passages before the contexts.

        All continuations of one context see the same passages.
        """
        if self.passages is None:
            return list(pairs)
        longest: dict[str, int] = {}
        for context, rest in pairs:
            longest[context] = max(longest.get(context, 0), len(self.encode(rest)))
        before = {context: self.extended(context, count) for context, count in longest.items()}
        return [(before[context], rest) for context, rest in pairs]

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        """Returns log p(continuation | context), and whether all its tokens are the likeliest.

        Args:
            pairs: Tokens of contexts and continuations. The separator is set before a context that
                does not begin with it; of what does not fit, the beginning is left out.
        """
        parts = [
            rows_of([*self._opened(context), *rest], len(rest), self.context_tokens)
            for context, rest in pairs
        ]
        return self._summed(parts)

    def score_windows(
        self, texts: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]]
    ) -> list[Score]:
        """Returns log p of texts that are cut into windows: context and continuation of each.

        The context of a window is all that is read: no separator is added.
        """
        return self._summed(
            [[Row((*context, *rest), len(rest)) for context, rest in windows] for windows in texts]
        )

    def _summed(self, parts: Sequence[Sequence[Row]]) -> list[Score]:
        """Returns a score for each list of rows."""
        scores = iter(self.scorer.score([row for rows in parts for row in rows]))
        found = [[next(scores) for _ in rows] for rows in parts]
        return [
            Score(sum(one.logprob for one in rows), all(one.is_greedy for one in rows))
            for rows in found
        ]

    def _opened(self, context: Sequence[int]) -> list[int]:
        separator = self.tokenizer.separator_id
        return [*context] if context[:1] == [separator] else [separator, *context]

    def write(self, prompts: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Returns a continuation of each prompt, cut before a stop string.

        Args:
            prompts: Texts, and how each is continued: `generation_kwargs` of the harness.

        Raises:
            UserError: They hold what is not supported.
        """
        return self.writer.write([self._ask(context, how) for context, how in prompts])

    def _ask(self, context: str, how: Mapping[str, Any]) -> Ask:
        given = {key: value for key, value in how.items() if value is not None}
        lengths = [given.pop(key) for key in _LENGTHS if key in given]
        num_new = int(lengths[0]) if lengths else MAX_GEN_TOKENS
        until = given.pop("until", [])
        stops = [until] if isinstance(until, str) else list(until)
        ignore = bool(given.pop("ignore_eos", False))
        penalty = float(given.pop("repetition_penalty", 1.0))
        sampling = _sampling(given)
        for key, value in given.items():
            if value not in _WITHOUT_EFFECT.get(key, ()):
                raise UserError(f"generation_kwargs: {key}={value!r} is not supported")
        if isinstance(self.writer, KnnWriter) and (sampling.method != "greedy" or penalty != 1):
            raise UserError(
                "tasks.model=knn writes greedily: generation_kwargs with do_sample=true, a "
                "temperature or repetition_penalty are not supported"
            )
        # Half of the context at least is for the prompt: texts may be longer than the context.
        kept = max(self.context_tokens - num_new, self.context_tokens // 2, 1)
        prompt = self.extended(context, min(num_new, self.context_tokens - kept))
        tokens = self._opened(self.encode(prompt))[-kept:]
        rule = Rule(sampling, text_keys(self.seed, [prompt])[0], penalty)
        return Ask(tokens, num_new, [stop for stop in stops if stop], rule, ignore)


def _sampling(given: dict[str, Any]) -> Sampling:
    """Takes the keys of sampling out of `generation_kwargs`."""
    temperature = float(given.pop("temperature", 0.0 if "do_sample" not in given else 1.0))
    wanted = bool(given.pop("do_sample", temperature > 0))
    cuts = {key: given.pop(key, None) for key in ("top_k", "top_p", "min_p")}
    if not wanted or temperature == 0:
        return Sampling("greedy")
    return Sampling("random", temperature, cuts["top_k"] or None, cuts["top_p"], cuts["min_p"])
