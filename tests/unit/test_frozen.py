"""Networks that are not trained, in their compute dtype: the same results to the last bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlpmem_jax.config.networks import DecoderConfig, MemoryConfig
from mlpmem_jax.models.decoder import Site
from mlpmem_jax.models.frozen import freeze, frozen_bytes
from mlpmem_jax.models.joint import Joint
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.training import networks
from tests.unit.tiny_models import drawn

VOCAB, LENGTH = 50, 4
SITE = Site("ffn_input", 1)
GPT2 = {
    "norm": "layer", "positions": "learned", "activation": "gelu", "biases": "all", "head": "tied",
}  # fmt: skip
QWEN3 = {"num_kv_heads": 1, "qk_norm": "head", "biases": "qkv"}
NGRAMS = {"ngram_orders": (2, 3), "ngram_rows": 128, "ngram_width": 5}
GATED = {"gate": "learned", "recent_tokens": 2, "recent_table": "decoder", "input_norm": "rms"}
TABLES = NGRAMS | {"recent_tokens": 1, "recent_table": "own", "recent_width": 8, "block": "gelu"}
TIED = {"head": "tied", "compute_dtype": "float32", "width": 16}


def build(decoder, memory):
    return networks.joint_builder(
        DecoderConfig(
            width=16, num_layers=1, num_heads=2, context_tokens=LENGTH,
            **{"compute_dtype": "bfloat16"} | decoder,
        ),
        MemoryConfig(**{"width": 12, "num_layers": 1, "compute_dtype": "bfloat16"} | memory),
        VOCAB,
    )  # fmt: skip


def results(network: Joint):
    """What both networks compute with their parameters."""
    graphdef, state = nnx.split(network)
    token_BL = jnp.arange(2 * LENGTH).reshape(2, LENGTH) * 7 % VOCAB

    @jax.jit
    def compute(state):
        network = nnx.merge(graphdef, state)
        decoder, memory = network.decoder, network.memory
        final, states = decoder.hidden(token_BL, sites=(SITE,))
        recent_BLM = jnp.stack([token_BL] * memory.config.num_read_tokens or [token_BL], axis=-1)
        inputs = memory.inputs(states[SITE], recent_BLM, decoder.embedding[...])
        hidden = memory.hidden(inputs)
        logits = decoder.logits(final), memory.logits(hidden, decoder.head_VD())
        gate = memory.interpolation(inputs) if memory.config.gate == "learned" else None
        return final, hidden, logits, gate

    return jax.tree.leaves(compute(state))


@pytest.mark.parametrize(
    ("decoder", "memory"),
    [({}, GATED), (GPT2, TABLES), (QWEN3, TIED), (NGRAMS, TIED)],
    ids=["llama", "gpt2", "qwen3", "ngrams"],
)
def test_frozen_networks_compute_the_same(decoder, memory):
    network = drawn(lambda: build(decoder, memory)(nnx.Rngs(0)), seed=0)
    expected = results(network)
    freeze(network, network.memory.config)
    assert network.decoder.blocks.query[...].dtype == jnp.bfloat16
    assert network.decoder.blocks.ffn_norm_scale[...].dtype == jnp.float32
    for a, b in zip(results(network), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    for part in (network.decoder, network.memory):
        held = sum(x.nbytes for x in jax.tree.leaves(nnx.state(part, nnx.Param)))
        assert frozen_bytes(part, network.memory.config) == held


def test_checkpoints_are_read_in_the_compute_dtype(tmp_path):
    """As if they were read in float32 and cast; in float32 nothing is cast."""
    mesh, artifact = single_device_mesh(), Artifact(tmp_path, "joint/a", "joint")
    network = drawn(lambda: build(GPT2, TIED)(nnx.Rngs(0)), seed=0)
    networks.save_network(network, artifact, 0, mesh)
    exact = build(GPT2 | {"compute_dtype": "float32"}, TIED)
    reader = network.memory.config
    for make in (build(GPT2, TIED), exact):
        found = networks.restored(networks.frozen_builder(make, reader), artifact, mesh, step=0)
        expected = nnx.clone(network)
        if make is not exact:
            freeze(expected, reader)
        pairs = zip(
            jax.tree.leaves(nnx.state(found)), jax.tree.leaves(nnx.state(expected)), strict=True
        )
        for a, b in pairs:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
