"""The datastore against the decoder run plainly, row by row."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlpmem_jax.config.networks import DecoderConfig
from mlpmem_jax.embedding.blocks import EmbeddingSettings
from mlpmem_jax.embedding.embed import embed_split, make_embed_step
from mlpmem_jax.errors import RunFailed
from mlpmem_jax.models.decoder import Decoder, Site
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.store.array_specs import ArraySpec
from mlpmem_jax.store.arrays import open_array, read_rows
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.shards import ShardWriter

VOCAB, WIDTH, SEPARATOR = 300, 16, 0
KEY, INPUT = Site("ffn_input", 3), Site("residual", 2)


class Stream:
    """A token stream in memory."""

    separator_id = SEPARATOR

    def __init__(self, num_tokens):
        rng = np.random.default_rng(0)
        self.tokens = rng.integers(1, VOCAB, num_tokens).astype(np.int32)
        self.tokens[::11] = SEPARATOR
        self.num_tokens, self.num_rows = num_tokens, num_tokens - 1

    def read_windows(self, starts, length):
        out = np.full((len(starts), length), SEPARATOR, np.int32)
        for place, start in zip(out, starts, strict=True):
            tokens = self.tokens[int(start) : int(start) + length]
            place[: len(tokens)] = tokens
        return out


@pytest.fixture(scope="module")
def decoder():
    config = DecoderConfig(width=WIDTH, num_layers=3, num_heads=2, context_tokens=8, init_scale=0.3)
    return Decoder(config, VOCAB, rngs=nnx.Rngs(1))


def _specs(dtype=np.float32):
    state = ArraySpec((WIDTH,), dtype, 16, 4)
    return {
        "key": state,
        "input": state,
        "label": ArraySpec((), np.int32, 16, 4),
        "logprob": ArraySpec((), np.float32, 16, 4),
    }


def _settings(within=False):
    return EmbeddingSettings(
        states={"key": KEY, "input": INPUT},
        within=within,
        window_tokens=8,
        stride_tokens=4,
        batch_size=3,
    )


def _embed(decoder, tokens, path, within=False, specs=None):
    artifact = Artifact(path, "datastore/base/train", "datastore")
    specs = specs or _specs()
    embed_split(decoder, tokens, artifact, specs, _settings(within), single_device_mesh(), "embed")
    stores = {name: open_array(artifact.path / name) for name in specs}
    return {name: read_rows(store, 0, tokens.num_rows) for name, store in stores.items()}


@nnx.jit(static_argnames="within")
def _plain(decoder, window_1W, segment_1W, within):
    final, states = decoder.hidden(window_1W, segment_1W if within else None, sites=(KEY, INPUT))
    return decoder.logits(final), states[KEY], states[INPUT]


def _reference(decoder, tokens, row, within):
    """One row by itself: the window that ends with its block, blank behind the row."""
    stop = min((row // 4 + 1) * 4, tokens.num_rows)
    start = max(0, stop - 8)
    last = row - start
    window = np.zeros((1, 8), np.int32)
    window[0, : last + 1] = tokens.tokens[start : row + 1]
    segments = np.cumsum(window == SEPARATOR, axis=1, dtype=np.int32)
    logits, key, state = _plain(decoder, jnp.asarray(window), jnp.asarray(segments), within)
    logits_V = np.asarray(logits[0, last], np.float64)[:VOCAB]
    logprob_V = logits_V - logits_V.max() - np.log(np.exp(logits_V - logits_V.max()).sum())
    label = tokens.tokens[row + 1]
    return key[0, last], state[0, last], label, logprob_V[label]


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("num_tokens", [5, 17, 50])
def test_rows_equal_the_plain_reference(decoder, tmp_path, num_tokens, within):
    tokens = Stream(num_tokens)
    rows = _embed(decoder, tokens, tmp_path, within)
    for row in range(tokens.num_rows):
        key, state, label, logprob = _reference(decoder, tokens, row, within)
        np.testing.assert_allclose(rows["key"][row], key, rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(rows["input"][row], state, rtol=2e-4, atol=2e-5)
        assert rows["label"][row] == label
        np.testing.assert_allclose(rows["logprob"][row], logprob, rtol=1e-4, atol=1e-5)


def test_what_is_not_stored_is_not_computed(decoder, tmp_path):
    """The same states without log-probabilities, by fewer blocks."""
    tokens, state = Stream(17), _specs()["input"]
    expected = _embed(decoder, tokens, tmp_path / "all")
    found = _embed(decoder, tokens, tmp_path / "one", specs={"input": state})
    np.testing.assert_array_equal(found["input"], expected["input"])
    assert list(found) == ["input"]
    batch = {name: np.zeros((3, 8), np.int32) for name in ("token", "label")}
    batch["offset"] = np.zeros(3, np.int32)

    def flops(*names):
        dtypes = {name: np.dtype(np.float32) for name in names}
        step = make_embed_step(decoder, _settings(), dtypes)
        return step.func.lower(*step.args, batch).compile().cost_analysis()["flops"]

    assert flops("input") < 0.72 * flops("input", "logprob")


def test_finished_shards_are_kept_and_missing_ones_made(decoder, tmp_path, monkeypatch):
    tokens = Stream(70)
    expected = _embed(decoder, tokens, tmp_path / "whole")
    _embed(decoder, tokens, tmp_path / "part")
    folder = tmp_path / "part" / "datastore" / "base" / "train"
    (folder / "key" / "c" / "1" / "0").unlink()
    (folder / "label" / "c" / "3").unlink()
    kept = folder / "key" / "c" / "0" / "0"
    before = kept.stat().st_mtime_ns
    found = _embed(decoder, tokens, tmp_path / "part")
    assert kept.stat().st_mtime_ns == before
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_values_that_do_not_fit_their_dtype_are_refused(tmp_path):
    spec = {"key": ArraySpec((2,), np.float16, 4, 4)}
    writer = ShardWriter(tmp_path, spec, 4)
    with np.errstate(over="ignore"):
        rows = np.full((4, 2), 1e6).astype(np.float16)
    with pytest.raises(RunFailed, match="key: 8 values of shard 0 are not finite in float16"):
        writer.put(0, {"key": rows})
    assert not (tmp_path / "key" / "c").exists()


def test_pieces_may_come_in_any_order(tmp_path):
    spec = {"x": ArraySpec((), np.int32, 8, 4)}
    writer = ShardWriter(tmp_path, spec, 20)
    assert writer.missing_shards() == [0, 1, 2]
    for first in (16, 4, 12, 0, 8):
        writer.put(first, {"x": np.arange(first, min(first + 4, 20))})
    writer.close()
    np.testing.assert_array_equal(read_rows(open_array(tmp_path / "x"), 0, 20), np.arange(20))
