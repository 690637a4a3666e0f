"""Model flops, parameter counts and the peak of the devices.

Conventions: a multiply-add is two flops; the backward pass costs twice the forward pass;
what is recomputed (remat) does not count. Attention counts the causal half: a token of a
window of L sees (L + 1) / 2 tokens on average. Norms, activations and lookups of
embeddings do not count.
"""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mlpmem_jax.config.networks import DecoderConfig, MemoryConfig
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.models.layers import ffn_width, padded_vocab_size
from mlpmem_jax.models.memory import Memory

_FORWARD, _TRAINING = 2, 6  # flops for each weight that a token meets

# bf16 matrix flop/s of a chip, from the vendors' data sheets (dense, no sparsity).
PEAK_FLOPS_PER_SEC = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


class ParameterCounts(NamedTuple):
    """Parameters of a network.

    Attributes:
        total: All.
        non_embedding: Without token and position embeddings and output head.
    """

    total: int
    non_embedding: int


def _decoder_block_weights(config: DecoderConfig) -> int:
    heads = config.num_heads
    groups = heads if config.num_kv_heads == "auto" else config.num_kv_heads
    head_width = config.width // heads if config.head_width == "auto" else config.head_width
    attention = config.width * head_width * (2 * heads + 2 * groups)
    hidden = ffn_width(config.ffn_width, config.width, config.activation)
    matrices = 3 if config.activation == "swiglu" else 2
    return attention + matrices * config.width * hidden


def decoder_flops(
    config: DecoderConfig, vocab_size: int, window_tokens: int, *, training: bool = True
) -> float:
    """Returns the decoder's model flops for each token of a window.

    Args:
        config: The section `decoder`.
        vocab_size: V; the head is padded, and counted so.
        window_tokens: L.
        training: Forward and backward; otherwise forward alone.
    """
    factor = _TRAINING if training else _FORWARD
    head_width = (
        config.width // config.num_heads if config.head_width == "auto" else config.head_width
    )
    # Scores and mixing: two products over the tokens that a token sees.
    attention = 2 * config.num_heads * head_width * (window_tokens + 1) / 2
    weights = config.num_layers * (_decoder_block_weights(config) + attention)
    return factor * (weights + padded_vocab_size(vocab_size) * config.width)


def memory_flops(
    config: MemoryConfig, input_width: int, vocab_size: int, *, training: bool = True
) -> float:
    """Returns the memory's model flops for each row; arguments as in `decoder_flops`."""
    factor = _TRAINING if training else _FORWARD
    return factor * (_memory_matrices(config, input_width) + _memory_head(config, vocab_size))


def _memory_matrices(config: MemoryConfig, input_width: int) -> int:
    hidden = ffn_width(config.ffn_width, config.width, config.block)
    matrices = 3 if config.block == "swiglu" else 2
    projection = input_width * config.width if input_width != config.width else 0
    return config.num_layers * matrices * config.width * hidden + projection


def _memory_head(config: MemoryConfig, vocab_size: int) -> int:
    return padded_vocab_size(vocab_size) * config.width


def decoder_parameters(config: DecoderConfig, vocab_size: int) -> ParameterCounts:
    """Counts the decoder's parameters, padded vocabulary included."""
    return _counted(lambda: Decoder(config, vocab_size, rngs=nnx.Rngs(0)))


def memory_parameters(config: MemoryConfig, input_width: int, vocab_size: int) -> ParameterCounts:
    """Counts the memory's parameters, padded vocabulary included."""
    return _counted(lambda: Memory(config, input_width, vocab_size, rngs=nnx.Rngs(0)))


_NOT_COUNTED = ("embedding", "position", "head")


def _counted(build: Callable[[], nnx.Module]) -> ParameterCounts:
    params = nnx.state(nnx.eval_shape(build), nnx.Param)
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    sizes = [int(leaf.size) for _, leaf in leaves]
    outside = [
        n for name, n in zip(names, sizes, strict=True) if name.split("/")[0] in _NOT_COUNTED
    ]
    return ParameterCounts(sum(sizes), sum(sizes) - sum(outside))


@functools.cache
def peak_flops_per_sec() -> float:
    """Returns the peak of one device: by its data sheet, or, on CPU, as measured.

    An accelerator that is not in the table counts as unknown: NaN.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _measured_cpu_peak()
    kinds = [kind for kind in PEAK_FLOPS_PER_SEC if kind in device.device_kind]
    return PEAK_FLOPS_PER_SEC[max(kinds, key=len)] if kinds else float("nan")


def _measured_cpu_peak(size: int = 1024, repeats: int = 5) -> float:
    """Times a float32 product; all simulated devices share the cores, so it is cut up."""
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    product(x).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / jax.local_device_count()
