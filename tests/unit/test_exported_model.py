"""Decoder and memory as `transformers` loads them: our log-probabilities, with a cache and without.

These tests are skipped where torch and transformers, which are optional, are not installed.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlpmem_jax.config.networks import DecoderConfig, MemoryConfig
from mlpmem_jax.generation.interpolated import InterpolatedModel
from mlpmem_jax.interop.exports import model_settings, save_model
from mlpmem_jax.interop.settings import huggingface_settings
from mlpmem_jax.models.decoder import Decoder, Site
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.models.ngrams import hashed
from mlpmem_jax.parallel.mesh import single_device_mesh
from tests.unit.tiny_models import NGRAMS, SEPARATOR, VOCAB, drawn

WIDTH, CONTEXT, WEIGHT, NEW = 32, 64, 0.4, 20
GPT2 = {"norm": "layer", "positions": "learned", "activation": "gelu", "biases": "all"}
DECODERS = {
    "gpt2": {**GPT2, "head": "tied"},
    "llama": {"num_kv_heads": 2},
    "llama-tied": {"num_kv_heads": 2, "head": "tied"},
}
MEMORIES = {
    "official-gpt2": {"width": 32, "block": "gelu", "input_norm": "none"},
    "official-llama": {"width": 32, "input_norm": "none", "biases": "ffn"},
    "state": {"temperature": 1.5},
    "recent": {"recent_tokens": 3, "input_norm": "rms"},
    "own": {"recent_tokens": 8, "recent_table": "own", "recent_width": 5, "block": "gelu"},
    "gate": {**NGRAMS, "recent_tokens": 2, "gate": "learned", "gate_floor": 0.02},
    "ngrams": {**NGRAMS, "projection_bias": "learned"},
    "tied": {"width": 32, "head": "tied", "recent_tokens": 1},
}
# Every decoder and every memory at least once, and both kinds of state.
CASES = [
    ("gpt2", "official-gpt2", Site("ffn_input", 3)),
    ("gpt2", "own", Site("ffn_input", 2)),
    ("gpt2", "gate", Site("residual", 2)),
    ("gpt2", "tied", Site("ffn_input", 1)),
    ("llama", "official-llama", Site("ffn_input", 3)),
    ("llama", "state", Site("residual", 3)),
    ("llama", "recent", Site("ffn_input", 2)),
    ("llama-tied", "ngrams", Site("residual", 1)),
    ("llama-tied", "gate", Site("ffn_input", 2)),
    ("llama-tied", "tied", Site("ffn_input", 2)),
]


def _networks(decoder: str, memory: str) -> tuple[Decoder, Memory]:
    config = DecoderConfig(
        width=WIDTH, num_layers=3, num_heads=4, context_tokens=CONTEXT, **DECODERS[decoder]
    )
    shape = MemoryConfig(**{"width": 16, "num_layers": 2, **MEMORIES[memory]})
    return (
        drawn(lambda: Decoder(config, VOCAB, rngs=nnx.Rngs(0)), seed=0, scale=0.2),
        drawn(lambda: Memory(shape, WIDTH, VOCAB, rngs=nnx.Rngs(0)), seed=1, scale=0.2),
    )


def _name(case: tuple[str, str, Site]) -> str:
    return f"{case[0]}-{case[1]}-{case[2].kind}"


READ_TOKENS = [case for case in CASES if case[1] in ("own", "gate")]
some = pytest.mark.parametrize("both", READ_TOKENS, ids=_name, indirect=True)


@pytest.fixture
def both(request: pytest.FixtureRequest, tmp_path: Path):
    """Our model, and the same as transformers loads it."""
    torch = pytest.importorskip("torch", reason="needs torch and transformers (optional)")
    transformers = pytest.importorskip("transformers", reason="needs transformers (optional)")
    decoder, memory = _networks(*request.param[:2])
    site = request.param[2]
    weight = None if memory.config.gate == "learned" else WEIGHT
    settings = huggingface_settings(decoder.config, VOCAB, SEPARATOR)
    settings = model_settings(settings, memory.config, WIDTH, site, weight)
    save_model(decoder, memory, tmp_path, settings)
    loaded, about = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    assert not about["missing_keys"] and not about["unexpected_keys"], about
    ours = InterpolatedModel(
        decoder, memory, site=site, weight=weight, separator=SEPARATOR, mesh=single_device_mesh()
    )
    return ours, loaded.eval()


def _read(model: InterpolatedModel, tokens: np.ndarray, more: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens with `more` greedy ones, and log-probabilities after each token of both.

    Tokens are read one at a time, through the cache.
    """

    @jax.jit
    def step(parameters, cache, token_BL):
        length_B = jnp.ones(len(token_BL), jnp.int32)
        return model.extend(parameters, cache, token_BL, length_B)

    cache, found = model.empty_cache(len(tokens)), []
    for place in range(tokens.shape[1] + more):
        if place == tokens.shape[1]:
            best = found[-1].argmax(-1)[:, None].astype(np.int32)
            tokens = np.concatenate([tokens, best], axis=1)
        logprob, cache = step(model.parameters, cache, tokens[:, place : place + 1])
        found.append(np.asarray(logprob)[:, :VOCAB])
    return tokens, np.stack(found, axis=1)


@pytest.mark.parametrize("both", CASES, ids=_name, indirect=True)
def test_it_gives_our_distributions(both):
    """Whole windows, with documents that end inside; and the same tokens after greedy choices."""
    import torch

    ours, loaded = both
    tokens = np.random.default_rng(0).integers(1, VOCAB, (2, 20)).astype(np.int32)
    tokens[0, 0] = tokens[1, 7] = SEPARATOR
    stream, expected = _read(ours, tokens, NEW)
    held = torch.tensor(stream).long()
    with torch.no_grad():
        outputs = loaded(held, labels=held)
    found = outputs.logits.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(np.exp(found).sum(-1), 1, atol=1e-5)
    nats = -np.take_along_axis(found[:, :-1], stream[:, 1:, None].astype(int), axis=-1).mean()
    np.testing.assert_allclose(float(outputs.loss), nats, rtol=1e-5)
    with torch.no_grad():
        for use_cache in (True, False):
            made = loaded.generate(
                held[:, :-NEW],
                attention_mask=torch.ones_like(held[:, :-NEW]),
                do_sample=False,
                max_new_tokens=NEW,
                use_cache=use_cache,
                eos_token_id=None,
            )
            np.testing.assert_array_equal(made.numpy(), stream, err_msg=f"{use_cache=}")


@some
def test_padding_is_not_read(both):
    """A prompt that is padded on the left continues as it does alone."""
    import torch

    _, loaded = both
    rng = np.random.default_rng(3)
    rows = [torch.tensor(rng.integers(1, VOCAB, length)) for length in (9, 5)]
    padded = torch.stack([rows[0], torch.cat([torch.full((4,), 1), rows[1]])])
    mask = torch.ones_like(padded)
    mask[1, :4] = 0
    about = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    with torch.no_grad():
        made = loaded.generate(padded, attention_mask=mask, **about)
        alone = loaded.generate(rows[1][None], attention_mask=mask[1:, 4:], **about)
    np.testing.assert_array_equal(made[1, 4:].numpy(), alone[0].numpy())


@some
def test_what_a_memory_needs_beside_a_cache(both):
    import torch

    _, loaded = both
    tokens = torch.tensor([[5, 9, 3, 8]])
    with torch.no_grad():
        whole = loaded(tokens).logits[:, -1]
        last = loaded(tokens, logits_to_keep=1).logits
        np.testing.assert_allclose(last[:, 0], whole, atol=1e-5)
        outputs = loaded(tokens[:, :3], use_cache=True)
        # transformers 5 has called it both.
        name = "cache" if "cache" in outputs else "past_key_values"
        cache = {name: outputs[name]}
        with pytest.raises(ValueError, match="pass context_ids, all tokens so far"):
            loaded(tokens[:, 3:], **cache)
        after = loaded(tokens[:, 3:], context_ids=tokens, **cache)
    np.testing.assert_allclose(after.logits[:, -1], whole, atol=1e-4)


def test_n_grams_are_hashed_alike(tmp_path: Path):
    torch = pytest.importorskip("torch", reason="needs torch and transformers (optional)")
    pytest.importorskip("transformers", reason="needs transformers (optional)")
    import importlib.util

    import mlpmem_jax.interop

    file = Path(mlpmem_jax.interop.__path__[0]) / "exported" / "modeling_mlpmem.py"
    spec = importlib.util.spec_from_file_location("exported_modeling", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tokens = np.random.default_rng(0).integers(0, 2**31 - 1, (4000, 5)).astype(np.int32)
    tokens[:5] = [[0] * 5, [1] * 5, [2**31 - 1] * 5, [-1] * 5, [127, 128, 0, 1, 2]]
    for rows in (128, 32768, 2**30):
        for order in (1, 2, 5):
            expected = np.asarray(hashed(jnp.asarray(tokens[:, :order]), rows))
            found = module.hashed(torch.tensor(tokens[:, :order]).long(), rows).numpy()
            np.testing.assert_array_equal(found, expected)
