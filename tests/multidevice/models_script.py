"""Checks that need eight devices; run by test_models.py in a process of its own."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlpmem_jax.config.networks import DecoderConfig, MemoryConfig, MeshConfig
from mlpmem_jax.config.schema import LossWeights
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.models.decoder import Decoder, Site
from mlpmem_jax.models.joint import Joint
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.parallel.mesh import make_mesh, single_device_mesh
from mlpmem_jax.parallel.sharding import batch_sharding, create_sharded
from mlpmem_jax.training.joint_loss import DecoderHead, JointTerms, joint_loss
from mlpmem_jax.training.losses import lm_loss, means, memory_loss, token_logprob

# 300 pads to 384: over eight devices the last part of the vocabulary is padding alone.
VOCAB, BATCH, LENGTH, KEPT = 300, 8, 12, 4
MESHES = [(2, 2, 2), (8, 1, 1), (1, 1, 8)]
DECODER = DecoderConfig(
    width=32, num_layers=2, num_heads=8, num_kv_heads=4, ffn_width=64, context_tokens=LENGTH,
    init_scale=0.2, layer_loop="scan",
)  # fmt: skip
GPT2 = DECODER.model_copy(
    update={
        "norm": "layer", "positions": "learned", "activation": "gelu", "biases": "all",
        "head": "tied", "num_kv_heads": "auto",
        "ngram_orders": (1, 2), "ngram_rows": 256, "ngram_width": 8,
    }
)  # fmt: skip
# Norms of queries and keys run over heads that lie on different devices.
OLMO2 = DECODER.model_copy(
    update={
        "norm_place": "post", "qk_norm": "projection", "biases": "attention", "sliding_window": 5,
    }
)  # fmt: skip
MEMORY = MemoryConfig(width=16, num_layers=2, ffn_width=32, init_scale=0.3)
RECENT = {
    "recent_tokens": 2, "recent_table": "own", "recent_width": 8,
    "ngram_orders": (1, 2), "ngram_rows": 256, "ngram_width": 8,
}  # fmt: skip
SITE = Site("ffn_input", 2)


def mesh_of(sizes):
    return make_mesh(MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))))


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (BATCH, LENGTH + 1))
    return {
        "token": tokens[:, :-1].astype(np.int32),
        "label": tokens[:, 1:].astype(np.int32),
        "recent": rng.integers(0, VOCAB, (BATCH, LENGTH, 2)).astype(np.int32),
        "weight": (rng.random((BATCH, LENGTH)) > 0.2).astype(np.float32),
        "input": rng.standard_normal((BATCH, LENGTH, 32)).astype(np.float32),
        "target_id": rng.integers(0, VOCAB, (BATCH, LENGTH, KEPT)).astype(np.uint16),
        "target_prob": rng.random((BATCH, LENGTH, KEPT)).astype(np.float16),
        "target_mass": (rng.random((BATCH, LENGTH)) > 0.3).astype(np.float32),
    }


def on_mesh(build, function, mesh):
    """Returns the state of a network made on the mesh, and function(network, batch)."""
    graphdef = nnx.split(nnx.eval_shape(build))[0]
    state = create_sharded(lambda: nnx.state(build()), mesh)
    parts = {k: jax.device_put(v, batch_sharding(mesh, v.ndim)) for k, v in batch().items()}
    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(lambda state, data: function(graphdef, state, data))
            .lower(state, parts)
            .compile()
        )
        return state, compiled(state, parts), compiled.as_text()


def decoder_step(graphdef, state, data):
    def loss(state):
        model = nnx.merge(graphdef, state)
        final, states = model.hidden(data["token"], sites=(SITE,))
        value, sums = lm_loss(
            final, model.head_VD(), data["label"], data["weight"],
            vocab_size=VOCAB, chunk_tokens=5,
        )  # fmt: skip
        logprob = token_logprob(
            final, model.head_VD(), data["label"], vocab_size=VOCAB, chunk_tokens=7
        )
        return value / data["weight"].sum(), (means(sums), logprob, final, states[SITE])

    return jax.value_and_grad(loss, has_aux=True)(state)


def memory_step(graphdef, state, data):
    params, rest = nnx.split_state(state, nnx.Param, ...)

    def loss(params):
        model = nnx.merge(graphdef, params, rest)
        value, sums = memory_loss(
            model.hidden(model.inputs(data["input"], data["recent"])), model.head_VE(),
            data, 0.4, vocab_size=VOCAB, chunk_tokens=5,
        )  # fmt: skip
        return value / data["weight"].sum(), means(sums)

    return jax.value_and_grad(loss, has_aux=True)(params)


def assert_equal(got, expected, what):
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for (path, a), b in zip(paths, jax.tree.leaves(got), strict=True):
        where = f"{what} {jax.tree_util.keystr(path)}"
        np.testing.assert_allclose(np.asarray(b), np.asarray(a), atol=2e-5, err_msg=where)


def compare(build, function, what, sizes_of_meshes=MESHES):
    _, expected, _ = on_mesh(build, function, single_device_mesh())
    for sizes in sizes_of_meshes:
        state, got, text = on_mesh(build, function, mesh_of(sizes))
        assert_equal(got, expected, f"{what} on {sizes}")
        yield sizes, state, got, text


def shard(variable):
    return variable.get_raw_value().addressable_shards[0].data.shape


def check_decoder():
    for config in (DECODER, GPT2, OLMO2):

        def build(config=config):
            return Decoder(config, VOCAB, rngs=nnx.Rngs(0))

        meshes = MESHES if config is DECODER else MESHES[:1]
        for sizes, state, got, text in compare(build, decoder_step, "decoder", meshes):
            _, fsdp, tensor = sizes
            assert shard(state["embedding"]) == (384 // tensor, 32 // fsdp)
            assert shard(state["blocks"]["query"]) == (2, 32 // fsdp, 8 // tensor, 4)
            assert shard(state["blocks"]["down"]) == (2, 64 // tensor, 32 // fsdp)
            # Gradients lie as their parameters do, and logits are never gathered.
            assert shard(got[1]["embedding"]) == shard(state["embedding"])
            if tensor > 1:
                assert not re.search(rf"\[(\d+,)*{384}\]\S* all-gather", text)
        if config is DECODER:  # four key/value heads do not divide by eight: whole
            assert shard(state["blocks"]["key"])[2] == 4


def check_memory():
    for keys in ({}, RECENT):

        def build(keys=keys):
            return Memory(MEMORY.model_copy(update=keys), 32, VOCAB, rngs=nnx.Rngs(0))

        meshes = MESHES if keys else MESHES[:1]
        for sizes, state, got, _ in compare(build, memory_step, "memory", meshes):
            _, fsdp, tensor = sizes
            assert shard(state["head"]) == (384 // tensor, 16 // fsdp)
            assert shard(got[1]["blocks"]["up"]) == (2, 16 // fsdp, 32 // tensor)
            if keys:
                assert shard(got[1]["recent"]) == (384 // tensor, 8 // fsdp)
                assert shard(got[1]["ngrams"]) == (512 // tensor, 8 // fsdp)


def joint_step(graphdef, state, data):
    params, rest = nnx.split_state(state, nnx.Param, ...)

    def loss(params):
        model = nnx.merge(graphdef, params, rest)
        final, states = model.decoder.hidden(data["token"], sites=(SITE,))
        head = DecoderHead(final, model.decoder.head_VD(), data["weight"])
        read = model.memory.inputs(states[SITE], data["recent"], model.decoder.embedding[...])
        value, sums = joint_loss(
            model.memory.hidden(read), model.memory.head_VE(), head,
            model.memory.interpolation(read),
            data,
            JointTerms(LossWeights(1.0, 1.0, 0.5), 0.4), vocab_size=VOCAB, chunk_tokens=5,
        )  # fmt: skip
        return value / data["weight"].sum(), means(sums)

    return jax.value_and_grad(loss, has_aux=True)(params)


def check_joint():
    gated = MEMORY.model_copy(update={"gate": "learned", "recent_tokens": 2})

    def build():
        return Joint(
            lambda rngs: Decoder(DECODER, VOCAB, rngs=rngs),
            lambda rngs: Memory(gated, 32, VOCAB, gate_start=0.3, rngs=rngs),
            rngs=nnx.Rngs(0),
        )

    for sizes, state, got, text in compare(build, joint_step, "joint", MESHES[::2]):
        _, fsdp, tensor = sizes
        assert shard(state["decoder"]["head"]) == (384 // tensor, 32 // fsdp)
        assert shard(got[1]["memory"]["head"]) == (384 // tensor, 16 // fsdp)
        # Neither head's logits are gathered.
        assert not re.search(rf"\[(\d+,)*{384}\]\S* all-gather", text)


def check_sizes():
    assert dict(make_mesh(MeshConfig(fsdp=2)).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    hybrid = make_mesh(MeshConfig(data=4, fsdp=2)).devices.shape
    assert hybrid == (4, 2, 1)
    try:
        make_mesh(MeshConfig(data=3))
    except ConfigError as error:
        assert "need 3 devices, and there are 8" in str(error)
    else:
        raise AssertionError("sizes that do not fit were accepted")
    # A batch that the devices cannot share is computed whole by each of them.
    a = batch()
    with jax.set_mesh(mesh_of((2, 2, 2))):
        head = jnp.asarray(np.random.default_rng(1).standard_normal((384, 32)), jnp.float32)
        hidden, label = a["input"][:1], a["label"][:1]
        got = jax.jit(lambda *x: token_logprob(*x, vocab_size=VOCAB, chunk_tokens=5))(
            hidden, head, label
        )
    expected = jax.nn.log_softmax(hidden @ head[:VOCAB].T)
    expected = jnp.take_along_axis(expected, label[..., None], -1)[..., 0]
    np.testing.assert_allclose(got, expected, atol=2e-5)


if __name__ == "__main__":
    assert jax.device_count() == 8
    # Compiling takes longer than running here.
    jax.config.update("jax_disable_most_optimizations", True)
    {"decoder": check_decoder, "memory": check_memory, "joint": check_joint, "sizes": check_sizes}[
        sys.argv[1]
    ]()
    print("ok")
