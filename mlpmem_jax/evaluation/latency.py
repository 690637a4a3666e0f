"""Milliseconds per token: one prompt, one token at a time, with a key/value cache.

The systems take turns, so that whatever else the machine does falls on all of them alike.
"""

from collections.abc import Mapping

import numpy as np

from mlpmem_jax.evaluation.timed_decoding import System, Writer, in_turns


def time_tokens(systems: Mapping[str, System], num_tokens: int) -> dict[str, dict[str, float]]:
    """Measures every system, in turns.

    Returns:
        Milliseconds per token: median, and the quartiles.
    """
    writers = {name: Writer(system, 1) for name, system in systems.items()}
    secs: dict[str, list[float]] = {name: [] for name in writers}
    for name, spent in in_turns(writers, Writer.write, num_tokens):
        secs[name].append(spent.total)
    return {
        name: {
            f"p{percent}": float(np.percentile(each, percent)) * 1000 for percent in (25, 50, 75)
        }
        for name, each in secs.items()
    }
