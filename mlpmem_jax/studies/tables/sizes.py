"""Shapes of a wanted number of parameters: controls of equal size."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from mlpmem_jax.config.networks import DecoderConfig, MemoryConfig
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.models import layers
from mlpmem_jax.training.flops import decoder_parameters, memory_parameters

_MOST_BLOCKS = 256


@dataclasses.dataclass(frozen=True)
class Shape:
    """Width and depth of a network, and what they amount to.

    Attributes:
        width: Of the residual stream.
        num_layers: Blocks.
        parameters: All of them, embeddings and head included.
        off: (parameters − wanted) / wanted.
    """

    width: int
    num_layers: int
    parameters: int
    off: float

    def overrides(self, section: str) -> dict[str, Any]:
        """Returns the keys of a section of the configuration that make this shape."""
        return {f"{section}.width": self.width, f"{section}.num_layers": self.num_layers}


def decoder_shape(
    config: DecoderConfig, vocab_size: int, wanted: int, tolerance: float
) -> tuple[Shape, dict[str, Any]]:
    """Returns the decoder of a wanted size whose proportions are nearest to a given one.

    Width and depth change; heads stay, and a feed-forward width that was given as a number
    grows with the width.

    Args:
        config: The decoder whose proportions are wanted.
        wanted: Parameters, embeddings and head included.
        tolerance: How far off they may be, as a share of `wanted`.

    Returns:
        The shape, and the overrides that make it.

    Raises:
        ConfigError: No width and depth come near enough.
    """
    step = 2 * config.num_heads if config.head_width == "auto" else 8

    def changed(width: int, num_layers: int) -> DecoderConfig:
        update: dict[str, Any] = {"width": width, "num_layers": num_layers}
        if config.ffn_width != "auto":
            update["ffn_width"] = max(1, round(config.ffn_width * width / config.width))
        return config.model_copy(update=update)

    def count(width: int, num_layers: int) -> int:
        return decoder_parameters(changed(width, num_layers), vocab_size)["total"]

    shape = _nearest_shape(
        count, config.width, config.num_layers, step, wanted, tolerance, "decoder"
    )
    # Another shape is trained from the start, whatever the given one comes from.
    fresh = {"decoder.pretrained": None, "pretrain.fine_tune": "none"}
    overrides = shape.overrides("decoder") | fresh
    if config.ffn_width != "auto":
        overrides["decoder.ffn_width"] = changed(shape.width, 1).ffn_width
    return shape, overrides


def memory_shape(
    config: MemoryConfig, num_layers: int, input_width: int, vocab_size: int
) -> dict[str, Any]:
    """Returns the overrides that give a memory another depth and the parameters it has.

    Width and feed-forward width change together: parameters grow linearly with the latter,
    so each width has one that fits; the width whose proportion of the two is nearest to the
    memory's own is taken.

    Args:
        config: The memory whose parameters are wanted.
        num_layers: Blocks that it is to have.
        input_width: D.
    """
    wanted = memory_parameters(config, input_width, vocab_size)["total"]
    proportion = layers.ffn_width(config.ffn_width, config.width, config.block) / config.width

    def count(width: int, hidden: int) -> int:
        update = {"width": width, "ffn_width": hidden, "num_layers": num_layers}
        tried = config.model_copy(update=update)
        return memory_parameters(tried, input_width, vocab_size)["total"]

    best, best_rank = (config.width, 1), math.inf
    step = 8 if config.width % 8 == 0 else 1
    widths = [config.width] if config.head == "tied" else _widths(config.width, step)
    for width in widths:
        without, each = count(width, 0), count(width, 1) - count(width, 0)
        hidden = round((wanted - without) / each)
        rank = abs(math.log(hidden / width / proportion)) if hidden > 0 else math.inf
        if rank < best_rank:
            best, best_rank = (width, hidden), rank
    return {
        "memory.num_layers": num_layers,
        "memory.width": best[0],
        "memory.ffn_width": best[1],
    }


def _nearest_shape(
    count: Callable[[int, int], int],
    width: int,
    num_layers: int,
    step: int,
    wanted: int,
    tolerance: float,
    name: str,
) -> Shape:
    """Among all widths and depths within the tolerance, the nearest proportions."""
    best: Shape | None = None
    best_rank = (math.inf, math.inf)
    nearest: Shape | None = None
    for shape in _shapes(count, width, step, wanted):
        if nearest is None or abs(shape.off) < abs(nearest.off):
            nearest = shape
        if abs(shape.off) > tolerance:
            continue
        proportion = abs(math.log(shape.width / shape.num_layers * num_layers / width))
        # Proportions within 15 % count as the same, then the nearer size wins.
        rank = (round(proportion / 0.15), abs(shape.off))
        if rank < best_rank:
            best, best_rank = shape, rank
    if best is None:
        found = (
            f"the nearest is width {nearest.width} with {nearest.num_layers} blocks "
            f"({nearest.parameters:,}, {100 * nearest.off:+.2f} %)"
            if nearest
            else "even the smallest has more"
        )
        raise ConfigError(
            f"compare.parameter_tolerance={tolerance}: no {name} has {wanted:,} parameters that "
            f"nearly; {found}: raise the tolerance"
        )
    return best


def _shapes(
    count: Callable[[int, int], int], width: int, step: int, wanted: int
) -> Iterator[Shape]:
    """Yields for each width the two depths whose parameters are around the wanted number."""
    for tried in _widths(width, step):
        one, two = count(tried, 1), count(tried, 2)
        if one > wanted * 1.5:
            return  # Wider is larger still.
        depth = 1 + (wanted - one) / (two - one)
        for num_layers in {max(1, math.floor(depth)), max(1, math.ceil(depth))}:
            if num_layers <= _MOST_BLOCKS:
                total = one + (num_layers - 1) * (two - one)
                yield Shape(tried, num_layers, total, total / wanted - 1)


def _widths(width: int, step: int) -> range:
    """Returns the widths to try, ascending: from an eighth of the width to four times it."""
    return range(max(step, width // 8 // step * step), max(2 * step, 4 * width) + 1, step)
