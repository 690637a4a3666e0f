"""The memory: blocks, input norms, projection, heads, no mixing of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlpmem_jax.config.networks import MemoryConfig
from mlpmem_jax.models.memory import InputStatistics, Memory
from mlpmem_jax.models.ngrams import hashed
from mlpmem_jax.training.input_statistics import Statistics, moments, statistics, together

VOCAB, WIDTH = 50, 24


def make_memory(**keys) -> Memory:
    keys = {"width": 32, "num_layers": 3, "init_scale": 0.2} | keys
    return Memory(MemoryConfig(**keys), WIDTH, VOCAB, rngs=nnx.Rngs(0))


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
        memory.set_input_statistics(*_measured(scale * x + 3))
        results.append(memory.hidden(scale * x + 3))
    np.testing.assert_allclose(results[0], results[1], atol=1e-3)


def _measured(input_BLX: jax.Array, weight_BL: jax.Array | None = None) -> Statistics:
    """In two parts of different size and mean, as batches are."""
    weight_BL = jnp.ones(input_BLX.shape[:-1]) if weight_BL is None else weight_BL
    parts = [(input_BLX[:, :2], weight_BL[:, :2]), (input_BLX[:, 2:], weight_BL[:, 2:])]
    return statistics(together(*(moments(*part) for part in parts)))


def test_input_statistics_leave_out_padding():
    x = make_input().at[:, :2].add(50.0)
    padded = jnp.concatenate([x, jnp.full((2, 5, WIDTH), 1e3)], axis=1)
    weight = jnp.concatenate([jnp.ones((2, 7)), jnp.zeros((2, 5))], axis=1)
    for a, b in zip(_measured(x), _measured(padded, weight), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    mean_X, inverse_X = _measured(x)
    flat = np.asarray(x).reshape(-1, WIDTH)
    np.testing.assert_allclose(mean_X, flat.mean(0), rtol=1e-4)
    np.testing.assert_allclose(1 / inverse_X, flat.std(0), rtol=1e-4)


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
    assert memory.recent.get_metadata()["role"] == "embedding"

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
        ((None, None), "memory.recent_tokens=3: .* none are given"),
        ((RECENT, None), "embeddings of the decoder are read; none"),
        ((RECENT[:, :2], jnp.ones((128, WIDTH))), "memory.recent_tokens=3: 3 tokens are read; 2"),
        ((RECENT, jnp.ones((256, WIDTH))), "has 128 tokens .*, the embeddings that are given 256"),
    ],
    ids=["states-alone", "no-table", "too-few", "other-vocabulary"],
)
def test_what_it_reads_must_be_given(given, expected):
    with pytest.raises(ValueError, match=expected):
        make_memory(recent_tokens=3).inputs(make_input()[0, :2], *given)


def test_ngrams_are_looked_up_whole():
    """A row of a table for each n-gram; tokens behind it change nothing, each token in it does."""
    memory = make_memory(ngram_orders=(2, 3), ngram_rows=4096, ngram_width=8)
    assert memory.ngrams[...].shape == (2 * 4096, 8)
    state = jnp.zeros((1, WIDTH))

    def read(*tokens):
        return np.asarray(memory.inputs(state, jnp.array([tokens])))[0, WIDTH:].reshape(2, 8)

    first = read(5, 3, 1)
    np.testing.assert_array_equal(first, read(5, 3, 1))
    other = read(5, 3, 2)
    np.testing.assert_array_equal(first[0], other[0])
    assert not np.array_equal(first[1], other[1])
    assert not np.array_equal(first, read(3, 5, 1))
    table = np.asarray(memory.ngrams[...])
    rows = [int(np.flatnonzero((table == r).all(1))[0]) for r in (*first, *other)]
    assert rows[0] == rows[2] < 4096 <= min(rows[1], rows[3]) and rows[1] != rows[3]


def test_hashed_rows_are_spread_over_the_table():
    pairs = np.stack(np.meshgrid(np.arange(300), np.arange(300)), -1).reshape(-1, 2)
    count = np.bincount(np.asarray(hashed(jnp.asarray(pairs), 1024)), minlength=1024)
    # 88 a row by chance, with a deviation of 9.4.
    assert len(count) == 1024 and count.min() > 30 and count.max() < 160


def test_the_hash_stays_what_trained_memories_were_trained_with():
    grams = jnp.array([[0, 0], [5, 3], [3, 5], [70_000, 65_536]])
    assert hashed(grams, 32768).tolist() == [11047, 15122, 16913, 29099]


def test_states_alone_are_refused_by_the_key_that_says_more():
    with pytest.raises(ValueError, match=r"memory\.recent_tokens=2.* width 72, not 24"):
        make_memory(recent_tokens=2).hidden(make_input())
