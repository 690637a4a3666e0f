"""Fused attention on meshes of eight devices; run by test_flash_mesh.py."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from mlpmem_jax.config.networks import MeshConfig
from mlpmem_jax.models import flash
from mlpmem_jax.models.attention import causal_attention
from mlpmem_jax.parallel.mesh import make_mesh

LENGTH, WIDTH = 128, 16


def gradients(qkv, segment_BL, implementation):
    def loss(qkv):
        return jnp.sum(jnp.sin(causal_attention(*qkv, segment_BL, implementation)))

    return jax.jit(jax.value_and_grad(loss))(qkv)


def main(data, fsdp, tensor, heads, groups):
    flash.INTERPRETED = True
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = (heads, groups, groups)
    shapes = [(4, LENGTH, number, WIDTH) for number in sizes]
    qkv = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
    segment_BL = (jnp.arange(4 * LENGTH).reshape(4, LENGTH) // 50).astype(jnp.int32)
    expected = gradients(qkv, segment_BL, "xla")
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    with jax.set_mesh(mesh):
        found = gradients(qkv, segment_BL, "flash")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-5)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
