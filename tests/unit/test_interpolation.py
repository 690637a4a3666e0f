"""The mixture of two distributions, at its ends too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlpmem_jax.models.interpolation import interpolate

MEMORY = jnp.log(jnp.array([0.7, 0.2, 0.1]))
DECODER = jnp.log(jnp.array([0.1, 0.3, 0.6]))


@pytest.mark.parametrize("weight", [0.0, 1e-6, 0.3, 1 - 1e-6, 1.0])
def test_equals_the_formula(weight):
    got = interpolate(MEMORY, DECODER, weight)
    expected = weight * np.exp(MEMORY) + (1 - weight) * np.exp(DECODER)
    np.testing.assert_allclose(np.exp(got), expected, rtol=1e-6)


def test_exact_at_the_ends():
    np.testing.assert_array_equal(interpolate(MEMORY, DECODER, 0.0), DECODER)
    np.testing.assert_array_equal(interpolate(MEMORY, DECODER, 1.0), MEMORY)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_gradients(weight):
    """Of all three arguments, against the closed form."""

    def total(*args):
        return jnp.sum(interpolate(*args))

    of_memory, of_decoder, of_weight = jax.grad(total, argnums=(0, 1, 2))(MEMORY, DECODER, weight)
    p_memory, p_decoder = np.exp(MEMORY), np.exp(DECODER)
    p = weight * p_memory + (1 - weight) * p_decoder
    np.testing.assert_allclose(of_memory, weight * p_memory / p, rtol=1e-5)
    np.testing.assert_allclose(of_decoder, (1 - weight) * p_decoder / p, rtol=1e-5)
    np.testing.assert_allclose(of_weight, np.sum((p_memory - p_decoder) / p), rtol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_impossible_tokens(weight):
    """-inf on either side or both gives no nan, in value or gradient."""
    memory = jnp.array([-jnp.inf, 0.0, -jnp.inf])
    decoder = jnp.array([0.0, -jnp.inf, -jnp.inf])
    got = interpolate(memory, decoder, weight)
    np.testing.assert_allclose(np.exp(got), [1 - weight, weight, 0.0], atol=1e-7)
    gradients = jax.grad(lambda *args: jnp.exp(interpolate(*args)).sum(), argnums=(0, 1, 2))(
        memory, decoder, weight
    )
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in gradients)


def test_weight_of_each_token():
    weight = jnp.array([[0.0], [1.0]])
    got = interpolate(jnp.stack([MEMORY] * 2), jnp.stack([DECODER] * 2), weight)
    np.testing.assert_array_equal(got, jnp.stack([DECODER, MEMORY]))
