"""Counts of parameters and floating-point operations, and what devices can do.

Model flops: matrix products only, a multiply-add is 2, the backward pass twice the forward
pass (once for a matrix that is frozen), nothing recomputed, and nothing that no result depends
on. Not counted: norms, softmax, rotary positions and the like, and the optimiser. Attention is
causal: by default a query is charged for the keys that it may see, half of the window on
average ("half"); "full" charges all of them, the convention of PaLM (arXiv 2204.02311,
appendix B). The head is charged for the padded vocabulary, since that is what runs.
"""

import itertools
import math
import time
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from mlpmem_jax.config.networks import DecoderConfig, MemoryConfig
from mlpmem_jax.config.stages import TrainConfig
from mlpmem_jax.models import layers
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.parallel.chips import chip_of

_BURST_SECS = 0.06
# The best that this process has measured: other work on the machine only lowers a measurement.
_cpu_peak = 0.0
TRAINING_FACTOR = 3  # forward, and two products in the backward pass for each of its own


def decoder_flops_per_token(
    config: DecoderConfig,
    vocab_size: int,
    window_tokens: int,
    *,
    num_layers: int | None = None,
    last_ffn: bool = True,
    head: bool = True,
    attention: Literal["half", "full"] = "half",
) -> float:
    """Returns flops of a forward pass, per token of a window.

    Args:
        vocab_size: V; padded here.
        window_tokens: L, over which attention runs.
        num_layers: Blocks that run, when the states above are not wanted; None: all.
        last_ffn: Whether the feed-forward of the last of them runs: what it reads may be all
            that is wanted.
        head: Whether logits are computed.
        attention: Which keys a query is charged for, see above.
    """
    depth = config.num_layers if num_layers is None else num_layers
    heads = config.num_heads
    groups, head_width = config.resolved_kv_heads, config.resolved_head_width
    projections = config.width * head_width * (2 * heads + 2 * groups)
    # A sliding window: the first queries see fewer keys than it has.
    seen = min(window_tokens, config.attention_window or window_tokens)
    keys = seen if attention == "full" else seen - seen * (seen - 1) / (2 * window_tokens)
    mixing = 2 * heads * head_width * keys  # scores, and the sum of values
    hidden = layers.ffn_width(config.ffn_width, config.width, config.activation)
    ffn = _ffn_weights(config.width, hidden, config.activation)
    num_ffns = depth if last_ffn else depth - 1
    logits = config.width * layers.padded_vocab_size(vocab_size) if head else 0
    ngrams = len(config.ngram_orders) * config.ngram_width * config.width
    return 2.0 * (ngrams + depth * (projections + mixing) + num_ffns * ffn + logits)


def memory_flops_per_token(
    config: MemoryConfig, decoder_width: int, vocab_size: int, *, head: bool = True
) -> float:
    """Returns flops of a forward pass of the memory, per token.

    Args:
        decoder_width: Width of the states that it reads, D.
        vocab_size: V; padded here.
        head: Whether logits are computed.
    """
    hidden = layers.ffn_width(config.ffn_width, config.width, config.block)
    weights = config.num_layers * _ffn_weights(config.width, hidden, config.block)
    input_width = config.input_width(decoder_width)
    if input_width != config.width:
        weights += input_width * config.width
    if head:
        weights += config.width * layers.padded_vocab_size(vocab_size)
    return 2.0 * weights


def tied_head_flops_per_token(config: MemoryConfig, decoder_width: int, vocab_size: int) -> float:
    """Returns flops of the memory's head in a forward pass, where it is the decoder's; else 0."""
    if config.head != "tied":
        return 0.0
    blocks = memory_flops_per_token(config, decoder_width, vocab_size, head=False)
    return memory_flops_per_token(config, decoder_width, vocab_size) - blocks


def frozen_input_flops_per_token(config: MemoryConfig, decoder_width: int) -> float:
    """Returns flops of the gradient of the memory's input, where nothing before it is trained.

    They are computed only where they lead back to the decoder. 0 where the memory itself has
    parameters there: tables of its own, a norm.
    """
    input_width = config.input_width(decoder_width)
    trained = config.has_tables or config.input_norm == "rms"
    return 0.0 if trained or input_width == config.width else 2.0 * input_width * config.width


def memory_training_flops_per_token(
    config: MemoryConfig, decoder_width: int, vocab_size: int
) -> float:
    """Returns flops of training the memory alone, per token (arguments as above).

    A tied head is the frozen decoder's and has no gradient of its own; nor has the input, unless
    the memory has parameters before its projection.
    """
    blocks = memory_flops_per_token(config, decoder_width, vocab_size, head=False)
    head = memory_flops_per_token(config, decoder_width, vocab_size) - blocks
    head_factor = TRAINING_FACTOR if config.head == "untied" else TRAINING_FACTOR - 1
    unused = frozen_input_flops_per_token(config, decoder_width)
    return TRAINING_FACTOR * blocks + head_factor * head - unused


def joint_training_flops_per_token(
    train: TrainConfig,
    decoder_forward: float,
    memory_forward: float,
    steps: range,
    tied_head_forward: float = 0.0,
    frozen_input: float = 0.0,
) -> float:
    """Returns flops of joint training, per token of a step, summed over steps.

    A network that is frozen yet is charged its forward pass; a memory that is, for what leads
    back to a decoder that moves.

    Args:
        decoder_forward: Flops of the decoder's forward pass, per token.
        memory_forward: Of the memory's, head included.
        tied_head_forward: Of a head that is the decoder's: it moves where the decoder does.
        frozen_input: What `frozen_input_flops_per_token` says.
    """
    edges = {steps.start, steps.stop, train.decoder_freeze_steps, train.memory_freeze_steps}
    inside = sorted(edge for edge in edges if steps.start <= edge <= steps.stop)
    total = 0.0
    for first, stop in itertools.pairwise(inside):
        decoder_moves = first >= train.decoder_freeze_steps
        memory_moves = first >= train.memory_freeze_steps
        leads_back = decoder_moves and train.decoder_gradient > 0
        decoder = TRAINING_FACTOR if decoder_moves else 1
        memory = (1 + (memory_moves or leads_back)) * memory_forward
        memory += memory_moves * (memory_forward - tied_head_forward)
        memory -= (memory_moves and not leads_back) * frozen_input
        memory += leads_back * tied_head_forward
        total += (stop - first) * (decoder * decoder_forward + memory)
    return total


def decoder_parameters(config: DecoderConfig, vocab_size: int) -> dict[str, int]:
    """Returns the numbers of parameters: "total" and "non_embedding" (no tables, no head)."""
    return _count(Decoder(config, vocab_size, rngs=None))


def memory_parameters(config: MemoryConfig, decoder_width: int, vocab_size: int) -> dict[str, int]:
    """Returns the numbers of parameters: "total" and "non_embedding" (no table, no head)."""
    return _count(Memory(config, decoder_width, vocab_size, rngs=None))


def peak_flops(device: jax.Device) -> float | None:
    """Returns what a device can do in a second: from the table, or measured on CPU.

    On CPU it is the best of all measurements of this process. None for an accelerator that the
    table does not know.
    """
    global _cpu_peak
    if device.platform == "cpu":
        _cpu_peak = max(_cpu_peak, measure_cpu_flops())
        return _cpu_peak / max(1, jax.local_device_count("cpu"))
    chip = chip_of(device.device_kind)
    return None if chip is None else chip.flops


def measure_cpu_flops(seconds: float = 0.4, width: int = 1024) -> float:
    """Returns the best flop/s of float32 matrix products, in short bursts over some time.

    Between bursts it pauses: other work on the machine then slows some of them, not all.
    """
    square = jnp.ones((width, width), jnp.float32)
    multiply = jax.jit(jnp.matmul)
    multiply(square, square).block_until_ready()
    best = math.inf
    end = time.perf_counter() + seconds
    while (burst := time.perf_counter()) < end:
        while (start := time.perf_counter()) < burst + _BURST_SECS:
            multiply(square, square).block_until_ready()
            best = min(best, time.perf_counter() - start)
        time.sleep(_BURST_SECS / 2)
    return 2 * width**3 / best


def _ffn_weights(width: int, hidden: int, activation: str) -> int:
    return (3 if activation == "swiglu" else 2) * width * hidden


def _count(model: nnx.Module) -> dict[str, int]:
    sizes: dict[bool, int] = {False: 0, True: 0}
    for parameter in jax.tree.leaves(
        nnx.state(model, nnx.Param), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    ):
        is_table = parameter.get_metadata()["role"] in ("embedding", "head")
        sizes[is_table] += math.prod(parameter.shape)
    return {"total": sum(sizes.values()), "non_embedding": sizes[False]}
