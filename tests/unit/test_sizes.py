"""Controls of equal size: counts against the networks, and the search."""

import math

import jax
import pytest
from flax import nnx

from mlpmem_jax.config.networks import DecoderConfig, MemoryConfig
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.studies.tables.sizes import decoder_shape, memory_shape
from mlpmem_jax.training.flops import decoder_parameters, memory_parameters

GPT2 = {
    "norm": "layer", "positions": "learned", "activation": "gelu", "biases": "all",
    "head": "tied", "width": 48, "num_layers": 3, "num_heads": 4, "context_tokens": 32,
}  # fmt: skip
NGRAMS = {"width": 48, "ngram_orders": (2, 4), "ngram_rows": 300, "ngram_width": 6}
LLAMA = {"width": 64, "num_layers": 2, "num_heads": 8, "num_kv_heads": 2, "ffn_width": 100}


def num_parameters(network):
    return sum(math.prod(array.shape) for array in jax.tree.leaves(nnx.state(network, nnx.Param)))


def arrays(network):
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(network))
    return {jax.tree_util.keystr(path): (leaf.shape, leaf.dtype) for path, leaf in leaves}


@pytest.mark.parametrize("keys", [GPT2, LLAMA, LLAMA | {"biases": "all", "head_width": 10}, NGRAMS])
def test_decoders_are_counted_as_they_are(keys):
    config = DecoderConfig(**keys)
    network = nnx.eval_shape(lambda: Decoder(config, 300, rngs=nnx.Rngs(0)))
    assert decoder_parameters(config, 300)["total"] == num_parameters(network)
    assert arrays(Decoder(config, 300, rngs=None)) == arrays(network)


@pytest.mark.parametrize(
    "keys",
    [
        {"width": 32},
        {"width": 24, "block": "gelu", "input_norm": "rms"},
        {"width": 32, "head": "tied", "ffn_width": 50},
        {"width": 24, "gate": "learned"},
        {"width": 32, "recent_tokens": 2, "gate": "learned"},
        {"width": 24, "recent_tokens": 3, "recent_table": "own", "input_norm": "rms"},
        {"width": 24, "recent_tokens": 3, "recent_table": "own", "recent_width": 10},
        {"width": 32, "recent_tokens": 1, "ngram_orders": (2, 3), "ngram_rows": 256},
    ],
)
def test_memories_are_counted_as_they_are(keys):
    config = MemoryConfig(num_layers=3, **keys)
    network = nnx.eval_shape(lambda: Memory(config, 32, 300, rngs=nnx.Rngs(0)))
    assert memory_parameters(config, 32, 300)["total"] == num_parameters(network)
    assert arrays(Memory(config, 32, 300, rngs=None)) == arrays(network)


@pytest.mark.parametrize("share", [0.5, 0.7, 1.0, 1.48, 2.5])
@pytest.mark.parametrize("keys", [{}, LLAMA | {"width": 256}, GPT2 | {"width": 256}])
def test_shapes_of_a_wanted_size(keys, share):
    config = DecoderConfig(**keys)
    wanted = round(share * decoder_parameters(config, 4096)["total"])
    shape, overrides = decoder_shape(config, 4096, wanted, 0.02)
    assert overrides.pop("pretrain.fine_tune") == "none"
    update = {name.removeprefix("decoder."): value for name, value in overrides.items()}
    made = DecoderConfig(**{**config.model_dump(), **update})
    assert decoder_parameters(made, 4096)["total"] == shape.parameters
    assert abs(shape.parameters / wanted - 1) <= 0.02
    assert made.width % (2 * made.num_heads) == 0
    # Not a needle or a pancake: the proportions are near those asked for.
    assert 1 / 5 < (made.width / made.num_layers) / (config.width / config.num_layers) < 5


def test_an_impossible_size_is_refused():
    with pytest.raises(ConfigError, match=r"compare.parameter_tolerance=0.001: no decoder has"):
        decoder_shape(DecoderConfig(), 4096, 10_001, 0.001)


def test_depth_against_width_at_equal_parameters():
    config = MemoryConfig(width=128, num_layers=4)
    wanted = memory_parameters(config, 128, 4096)["total"]
    for num_layers in (1, 2, 4, 8, 16):
        overrides = memory_shape(config, num_layers, 128, 4096)
        update = {name.removeprefix("memory."): value for name, value in overrides.items()}
        made = MemoryConfig(**{**config.model_dump(), **update})
        assert made.num_layers == num_layers
        assert abs(memory_parameters(made, 128, 4096)["total"] / wanted - 1) < 0.005
        assert 2 < made.ffn_width / made.width < 4
