"""Tiny networks of every family with large random weights, and prompts for them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlpmem_jax.config.networks import DecoderConfig, MemoryConfig
from mlpmem_jax.corpus.tokenizer import train_tokenizer
from mlpmem_jax.generation.interpolated import InterpolatedModel
from mlpmem_jax.generation.language_model import LanguageModel
from mlpmem_jax.models.decoder import Decoder, Site
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.parallel.mesh import single_device_mesh

VOCAB, CONTEXT, SEPARATOR = 61, 16, 0
SITE = Site("ffn_input", 1)
WEIGHT = 0.4
# In "e" a document ends just before the text to continue.
PROMPTS = {
    "": [], "b": [5, 9, 3], "c": list(range(1, 14)), "d": [7] * 40, "e": [8, 9, SEPARATOR, 4],
}  # fmt: skip
NGRAMS = {"ngram_orders": (2, 5), "ngram_rows": 128, "ngram_width": 7}
MEMORIES = {
    "recent": {"recent_tokens": 3},
    "own": {"recent_tokens": 8, "recent_table": "own", "recent_width": 5, "gate": "learned"},
    "ngrams": NGRAMS,
}


@functools.cache
def networks(family: str, vocab: int = VOCAB, context: int = CONTEXT) -> tuple[Decoder, Memory]:
    gpt2 = {"norm": "layer", "positions": "learned", "activation": "gelu", "biases": "all"}
    config = DecoderConfig(
        width=32, num_layers=2, num_heads=4, num_kv_heads=2, context_tokens=context,
        layer_loop="scan", **(gpt2 | {"head": "tied"} if family == "gpt2" else {}),
        **(NGRAMS if family == "decoder-ngrams" else {}),
    )  # fmt: skip
    memory = MemoryConfig(width=16, num_layers=1, **MEMORIES.get(family, {}))

    return (
        drawn(lambda: Decoder(config, vocab, rngs=nnx.Rngs(0)), seed=0),
        drawn(lambda: Memory(memory, 32, vocab, rngs=nnx.Rngs(0)), seed=1),
    )


def drawn(build: Callable[[], Any], seed: int, scale: float = 0.4) -> Any:
    """Makes a network with parameters from NumPy: nothing to compile.

    They are large, since small ones make every distribution nearly flat.
    """
    graphdef, abstract = nnx.split(nnx.eval_shape(build))
    rng = np.random.default_rng(seed)
    state = jax.tree.map(
        lambda leaf: jnp.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype), abstract
    )
    return nnx.merge(graphdef, state)


@functools.cache
def tiny_model(family: str = "llama", with_memory: bool = True) -> InterpolatedModel:
    decoder, memory = networks(family)
    return InterpolatedModel(
        decoder, memory if with_memory else None, site=SITE,
        weight=None if memory.config.gate == "learned" else WEIGHT, separator=SEPARATOR,
        mesh=single_device_mesh(),
    )  # fmt: skip


TEXT = "def read(path):\n    return open(path).read()  # naïve, 日本語 🙂\n"
LONG_CONTEXT = 64


@functools.cache
def tiny_language_model(with_memory: bool = True) -> LanguageModel:
    """A model with a tokenizer of bytes and a few words."""
    tokenizer = train_tokenizer([TEXT] * 3, 290, "<|endoftext|>")
    decoder, memory = networks("recent", tokenizer.vocab_size, LONG_CONTEXT)
    model = InterpolatedModel(
        decoder, memory if with_memory else None, site=SITE, weight=WEIGHT,
        separator=tokenizer.separator_id, mesh=single_device_mesh(),
    )  # fmt: skip
    return LanguageModel(model, tokenizer)
