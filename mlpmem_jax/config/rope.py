"""Rotary positions beyond the context that a decoder was first trained with."""

import math
from typing import Literal

from mlpmem_jax.config.base import Section, setting
from mlpmem_jax.config.types import Tokens


class RopeScaling(Section):
    """Scaling of the frequencies of rotary positions."""

    kind: Literal["none", "linear", "llama3", "yarn"] = setting(
        "none",
        "rotary positions beyond the first context; linear: arXiv 2306.15595; llama3: Llama 3.1; "
        "yarn: arXiv 2309.00071",
    )
    factor: float = setting(1.0, "what slow frequencies are divided by", ge=1, le=1e6)
    original_tokens: Tokens = setting(8192, "context of the first training (llama3, yarn)")
    slow_turns: float = setting(
        1.0,
        "frequencies of fewer turns in that context are divided by the whole factor (llama3: "
        "low_freq_factor, yarn: beta_slow)",
        gt=0,
        le=1e6,
    )
    fast_turns: float = setting(
        4.0,
        "frequencies of more turns stay as they are (llama3: high_freq_factor, yarn: beta_fast)",
        gt=0,
        le=1e6,
    )
    attention_factor: float = setting(
        1.0, "factor of rotated queries and keys (yarn)", gt=0, le=1e3
    )

    def factors(self, half: int, theta: float) -> list[float]:
        """Returns what each of `half` frequencies theta^(-i / half) is multiplied by."""
        if self.kind == "none":
            return [1.0] * half
        if self.kind == "linear":
            return [1 / self.factor] * half
        kept = self._kept_by_turns if self.kind == "llama3" else self._kept_by_index
        return [kept(i, half, theta) * (1 - 1 / self.factor) + 1 / self.factor for i in range(half)]

    def _kept_by_turns(self, index: int, half: int, theta: float) -> float:
        """Returns the share of a frequency that is not scaled, linear in its turns."""
        turns = self.original_tokens * theta ** (-index / half) / (2 * math.pi)
        return _clipped((turns - self.slow_turns) / (self.fast_turns - self.slow_turns))

    def _kept_by_index(self, index: int, half: int, theta: float) -> float:
        """Returns the same, linear in the number of the frequency between whole bounds."""

        def index_of(turns: float) -> float:
            return half * math.log(self.original_tokens / (turns * 2 * math.pi)) / math.log(theta)

        first = max(math.floor(index_of(self.fast_turns)), 0)
        last = min(math.ceil(index_of(self.slow_turns)), 2 * half - 1)
        return 1 - _clipped((index - first) / (last - first or 0.001))


def _clipped(value: float) -> float:
    return min(max(value, 0.0), 1.0)
