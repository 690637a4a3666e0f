"""The memory: blocks, input norms, projection, heads, no mixing of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlpmem_jax.config.networks import MemoryConfig
from mlpmem_jax.models.memory import InputStatistics, Memory, input_statistics

VOCAB, WIDTH = 50, 24


def make_memory(**keys) -> Memory:
    keys = {"width": 32, "num_layers": 3, "init_scale": 0.2} | keys
    return Memory(MemoryConfig(**keys), WIDTH, VOCAB, rngs=nnx.Rngs(0))


@pytest.fixture(autouse=True)
def compile_fast():
    """Compiling takes longer than running here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def make_input(scale=1.0) -> jax.Array:
    feature = jnp.arange(WIDTH, dtype=jnp.float32)
    return scale * (jax.random.normal(jax.random.key(1), (2, 7, WIDTH)) * (1 + feature) + feature)


@pytest.mark.parametrize("block", ["swiglu", "gelu"])
@pytest.mark.parametrize("input_norm", ["none", "rms", "standardize"])
def test_shapes_and_no_mixing(block, input_norm):
    memory = make_memory(block=block, input_norm=input_norm)
    input_BLD = make_input()
    hidden_BLE = memory.hidden(input_BLD)
    assert hidden_BLE.shape == (2, 7, 32)
    assert memory.head_VE().shape == (128, 32)
    changed = memory.hidden(input_BLD.at[0, 3].add(1.0))
    same = np.ones((2, 7), bool)
    same[0, 3] = False
    np.testing.assert_allclose(changed[same], hidden_BLE[same], atol=1e-6)
    assert float(jnp.abs(changed[0, 3] - hidden_BLE[0, 3]).max()) > 1e-4


@pytest.mark.parametrize("block", ["swiglu", "gelu"])
def test_equals_plain_reference(block):
    memory = make_memory(block=block, input_norm="none")
    x = make_input()
    arrays = memory.blocks.arrays()

    def norm(x, scale, bias=0.0):
        x = x - x.mean(-1, keepdims=True) if block == "gelu" else x
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale + bias

    expected = x @ memory.projection.projection[...]
    for i in range(3):
        p = {name: array[i] for name, array in arrays.items()}
        y = norm(expected, p["ffn_norm_scale"], p.get("ffn_norm_bias", 0.0))
        up = y @ p["up"] + p.get("up_bias", 0.0)
        h = jax.nn.silu(y @ p["gate"]) * up if block == "swiglu" else jax.nn.gelu(up)
        expected = expected + h @ p["down"] + p.get("down_bias", 0.0)
    expected = norm(expected, memory.final.arrays()["final_scale"])
    np.testing.assert_allclose(memory.hidden(x), expected, atol=2e-4)


def test_scan_equals_unroll():
    unrolled = make_memory(layer_loop="unroll")
    scanned = make_memory(layer_loop="scan", remat="full")
    np.testing.assert_allclose(
        scanned.hidden(make_input()), unrolled.hidden(make_input()), atol=1e-5
    )


def test_standardized_input_forgets_scale_and_offset():
    """Features of any scale give the same states once their statistics are stored."""
    x = make_input()
    results = []
    for scale in (1.0, 100.0):
        memory = make_memory()
        memory.set_input_statistics(*input_statistics(scale * x + 3))
        results.append(memory.hidden(scale * x + 3))
    np.testing.assert_allclose(results[0], results[1], atol=1e-3)


def test_input_statistics_leave_out_padding():
    x = make_input()
    padded = jnp.concatenate([x, jnp.full((2, 5, WIDTH), 1e3)], axis=1)
    weight = jnp.concatenate([jnp.ones((2, 7)), jnp.zeros((2, 5))], axis=1)
    for a, b in zip(input_statistics(x), input_statistics(padded, weight), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    mean_D, inverse_D = input_statistics(x)
    flat = np.asarray(x).reshape(-1, WIDTH)
    np.testing.assert_allclose(mean_D, flat.mean(0), rtol=1e-4)
    np.testing.assert_allclose(1 / inverse_D, flat.std(0), rtol=1e-4)


def test_statistics_are_no_parameters():
    memory = make_memory()
    _, params, statistics = nnx.split(memory, nnx.Param, InputStatistics)
    assert len(jax.tree.leaves(statistics)) == 2
    assert all(x.ndim > 0 for x in jax.tree.leaves(params))
    assert "input_mean" not in params and "input_mean" in statistics


def test_same_width_needs_no_projection():
    assert not hasattr(make_memory(width=WIDTH), "projection")


def test_tied_head_is_the_decoders():
    memory = make_memory(head="tied", width=WIDTH)
    head_VD = jnp.ones((128, WIDTH))
    assert memory.head_VE(head_VD) is head_VD
    assert not hasattr(memory, "head")
    logits = memory.logits(memory.hidden(make_input()), head_VD)
    assert bool(jnp.all(jnp.isneginf(logits[..., VOCAB:])))


RECENT = jnp.array([[5, 3, 0], [3, 0, 0]])


def test_embeddings_of_recent_tokens_stand_behind_the_state():
    memory = make_memory(recent_tokens=3)
    table_VD = jax.random.normal(jax.random.key(2), (128, WIDTH))
    state = make_input()[0, :2].astype(jnp.bfloat16)
    read = memory.inputs(state, RECENT, table_VD)
    assert read.shape == (2, 4 * WIDTH) and read.dtype == jnp.float32
    np.testing.assert_array_equal(read[:, :WIDTH], state.astype(jnp.float32))
    np.testing.assert_array_equal(read[1, WIDTH:], table_VD[RECENT[1]].reshape(-1))
    assert memory.input_mean[...].shape == (4 * WIDTH,)
    assert memory.hidden(read).shape == (2, 32)


def test_a_table_of_its_own_learns_from_the_tokens_read_and_has_no_weight_decay():
    memory = make_memory(recent_tokens=3, recent_table="own", recent_width=6)
    assert memory.recent[...].shape == (128, 6)
    assert memory.recent.get_metadata()["role"] == "table"

    def total(memory):
        return jnp.sum(memory.hidden(memory.inputs(make_input()[0, :2], RECENT)) ** 2)

    gradient = nnx.grad(total)(memory)["recent"][...]
    moved = np.flatnonzero(np.abs(gradient).sum(1))
    assert moved.tolist() == [0, 3, 5]


def test_a_memory_of_the_paper_reads_the_state_alone():
    memory, state = make_memory(), make_input()
    assert memory.inputs(state) is state


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None, None), "memory.recent_tokens=3: .* no tokens are given"),
        ((RECENT, None), "no embeddings of the decoder are given"),
        ((RECENT[:, :2], jnp.ones((128, WIDTH))), "memory.recent_tokens=3, and 2 tokens"),
        ((RECENT, jnp.ones((256, WIDTH))), "embeddings of 256 tokens, .* has 128"),
    ],
    ids=["states-alone", "no-table", "too-few", "other-vocabulary"],
)
def test_what_it_reads_must_be_given(given, expected):
    with pytest.raises(ValueError, match=expected):
        make_memory(recent_tokens=3).inputs(make_input()[0, :2], *given)
