"""Milliseconds per token: one prompt, one token at a time, with a key/value cache.

The systems take turns, so that whatever else the machine does falls on all of them alike.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mlpmem_jax.config.schema import Config
from mlpmem_jax.evaluation.timed_decoding import CompiledModel, System, Writer, in_turns
from mlpmem_jax.generation.interpolated import InterpolatedModel
from mlpmem_jax.models.decoder import Decoder, Site
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.store.layout import Layout


def compiled_models(
    config: Config,
    decoder: Decoder,
    memory: Memory,
    systems: Mapping[str, Mapping[str, Any]],
    mesh: jax.sharding.Mesh,
) -> dict[str, CompiledModel]:
    """Returns the decoder alone and with the memory, ready to be timed.

    Args:
        config: The whole configuration.
        decoder: On the mesh.
        memory: On the mesh.
        systems: As in `evaluate.json`: λ of the kNN-LM and of the memory.
        mesh: Devices.
    """
    key, read = (
        Site.of(site, config.decoder.num_layers)
        for site in (config.datastore.key, config.datastore.input)
    )
    weight = None
    if config.memory.gate != "learned":
        weight = float(systems["memory"]["interpolation"])
    separator = int(Layout(config).tokens.load().counts["separator_id"])
    return {
        name: CompiledModel(
            InterpolatedModel(
                decoder, each, site=read, weight=weight, separator=separator, mesh=mesh
            ),
            key,
            float(systems["knn"]["interpolation"]),
        )
        for name, each in (("decoder", None), ("memory", memory))
    }


def time_tokens(systems: Mapping[str, System], num_tokens: int) -> dict[str, dict[str, float]]:
    """Measures every system, in turns.

    Args:
        systems: By name.
        num_tokens: Tokens that each of them draws.

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
