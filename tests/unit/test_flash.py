"""Fused and blocked attention against plain attention; what a roofline charges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from mlpmem_jax.config.networks import DecoderConfig
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.models import attention, flash
from mlpmem_jax.models.attention import causal_attention, resolve_implementation
from mlpmem_jax.models.layers import with_remat
from mlpmem_jax.pipeline.checks import check_attention
from mlpmem_jax.roofline.costs import Costs
from mlpmem_jax.roofline.hlo import Program


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(flash, "INTERPRETED", True)


@pytest.mark.parametrize(
    ("heads", "groups", "length", "within", "window"),
    [
        (4, 4, 128, True, None),
        (4, 2, 256, False, None),
        (2, 1, 384, True, None),
        (2, 1, 256, True, 100),
    ],
)
def test_value_and_gradients_equal_dense(interpreted, heads, groups, length, within, window):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, length, heads, 16), (2, length, groups, 16), (2, length, groups, 16)]
    qkv = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=False)]
    segment_BL = None
    if within:
        segment_BL = jnp.cumsum(jax.random.bernoulli(keys[3], 0.02, (2, length)), axis=1)
        segment_BL = segment_BL.astype(jnp.int32)

    def loss(qkv, implementation):
        return jnp.sum(jnp.sin(causal_attention(*qkv, segment_BL, implementation, window)))

    both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    (value, grads), (expected, expected_grads) = both(qkv, "flash"), both(qkv, "xla")
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-4)
    for a, b in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "platform", "num_tokens", "expected"),
    [
        ("auto", "tpu", 1024, "flash"),
        ("auto", "tpu", 100, "blocked"),
        ("flash", "tpu", 100, "blocked"),
        ("flash", "tpu", 128, "flash"),
        ("auto", "cpu", 128, "blocked"),
        ("auto", "gpu", 128, "cudnn"),
        ("xla", "tpu", 128, "xla"),
    ],
)
def test_which_computation_is_taken(monkeypatch, name, platform, num_tokens, expected):
    monkeypatch.setattr(attention, "target_platform", lambda: platform)
    assert resolve_implementation(name, num_tokens, False, jnp.bfloat16, 64) == expected


@pytest.mark.parametrize(
    ("name", "platform", "dtype", "head_width", "message"),
    [
        ("flash", "cpu", "float32", 64, "flash needs a TPU, and the devices are cpu; use auto"),
        ("flash", "gpu", "bfloat16", 64, "flash needs a TPU, and the devices are gpu; use auto"),
        ("cudnn", "tpu", "bfloat16", 64, "cudnn needs a GPU, and the devices are tpu; use auto"),
        ("cudnn", "gpu", "float32", 64, "compute_dtype=bfloat16, not float32"),
        ("cudnn", "gpu", "bfloat16", 192, "multiple of 8 up to 128, not 192"),
        ("cudnn", "gpu", "bfloat16", 36, "multiple of 8 up to 128, not 36"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused(
    monkeypatch, name, platform, dtype, head_width, message
):
    decoder = DecoderConfig(width=head_width, num_heads=1, attention=name, compute_dtype=dtype)
    with pytest.raises(ConfigError, match=message):
        check_attention(decoder, platform)
    monkeypatch.setattr(attention, "target_platform", lambda: platform)
    with pytest.raises(ConfigError, match=message):
        resolve_implementation(name, 128, False, jnp.dtype(dtype), head_width)


@pytest.mark.parametrize("head_width", [192, 36])
def test_auto_leaves_heads_that_cudnn_does_not_take_to_xla(monkeypatch, head_width):
    monkeypatch.setattr(attention, "target_platform", lambda: "gpu")
    assert resolve_implementation("auto", 128, False, jnp.bfloat16, head_width) == "xla"


@pytest.mark.parametrize(("policy", "kept"), [("dots", 2), ("full", 0)])
def test_what_rematerialisation_keeps(interpreted, capsys, policy, kept):
    """The result and the sums of the softmax, from which the backward pass begins."""
    x_BLHA = jnp.ones((1, 128, 2, 16))

    def block(x_BLHA):
        return causal_attention(x_BLHA, x_BLHA, x_BLHA, None, "flash") ** 2

    print_saved_residuals(lambda x: jnp.sum(with_remat(block, policy)(x)), x_BLHA)
    lines = [line for line in capsys.readouterr().out.splitlines() if "_splash_attention" in line]
    assert len(lines) == kept
    assert [line.split()[0] for line in lines] == ["f32[1,2,128,16]", "f32[1,2,128]"][:kept]


# As the compiler for TPUs writes it, line breaks within the attributes included.
KERNELS = """HloModule m, is_scheduled=true

ENTRY %main (q: bf16[4,6,1024,64]) -> bf16[4,6,1024,64] {
  %q = bf16[4,6,1024,64]{3,2,1,0} parameter(0)
  %mask = s8[1,2,2]{2,1,0} constant({...})
  %splash_mha_fwd_residuals.1 = (f32[4,512,128]{2,1,0}, bf16[4,6,1024,64]{3,2,1,0}) \
custom-call(%mask, %mask, %q, %q, %q), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512, \\"block_kv\\": 512}"
}}, metadata={op_name="a"}
  %splash_mha_dkv_no_residuals.1 = (f32[4,512,64]{2,1,0}, bf16[4,6,1024,64]{3,2,1,0}) \
custom-call(%mask, %mask, %q, %q, %q), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q_dkv\\": 256, \\"block_kv_dkv\\": 256}"
}}, metadata={op_name="b"}
  ROOT %out = bf16[4,6,1024,64]{3,2,1,0} get-tuple-element(%splash_mha_fwd_residuals.1), index=1
}
"""


def test_kernels_are_charged_for_the_tiles_that_they_compute():
    program = Program(KERNELS)
    costs, entry = Costs(program), program.entry
    found = {one.name: costs.flops(entry, one) for one in entry.instructions}
    assert entry.root.name == "out"
    product = 2 * 4 * 6 * 1024 * 1024 * 64
    assert found["splash_mha_fwd_residuals.1"] == 2 * product * 0.75  # 3 of 4 tiles
    assert found["splash_mha_dkv_no_residuals.1"] == 4 * product * 10 / 16
    (forward,) = (one for one in entry.instructions if one.name.startswith("splash_mha_fwd"))
    assert forward.source == "a"
    array, scratch = 4 * 6 * 1024 * 64 * 2, 4 * 512 * 128 * 4
    assert costs.memory_bytes(entry, forward) == 3 * array + array + scratch + 2 * 4


@pytest.mark.parametrize(
    ("heads", "length", "window"),
    [(4, 20, None), (2, 150, None), (1, 70, None), (2, 150, 17), (1, 150, 100), (4, 20, 20)],
)
def test_blocked_attention_equals_dense(heads, length, window):
    """Value and gradients, several blocks, grouped queries, with and without segments."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(2, length, 4, 8), (2, length, heads, 8), (2, length, heads, 8)]
    qkv = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
    for segment_BL in (None, jnp.cumsum(jnp.arange(2 * length).reshape(2, length) % 13 == 0, 1)):

        def loss(qkv, implementation, segment_BL=segment_BL):
            return jnp.sum(jnp.sin(causal_attention(*qkv, segment_BL, implementation, window)))

        both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
        value, grads = both(qkv, "blocked")
        expected, expected_grads = both(qkv, "xla")
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        for a, b in zip(grads, expected_grads, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
