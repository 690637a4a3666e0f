"""Run by test_generate_mesh.py: generation on a mesh, against one device."""

import jax
import numpy as np
from flax import nnx

from mlpmem_jax.config.networks import DecoderConfig, MemoryConfig, MeshConfig
from mlpmem_jax.generation.decode import Generator
from mlpmem_jax.generation.interpolated import InterpolatedModel
from mlpmem_jax.generation.sampling import Sampling
from mlpmem_jax.models.decoder import Decoder, Site
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.parallel.mesh import make_mesh, single_device_mesh
from mlpmem_jax.parallel.sharding import state_shardings

config = DecoderConfig(width=32, num_layers=1, num_heads=4, context_tokens=16)
builders = (
    lambda: Decoder(config, 61, rngs=nnx.Rngs(0)),
    lambda: Memory(MemoryConfig(width=16, num_layers=1), 32, 61, rngs=nnx.Rngs(0)),
)


def networks(mesh):
    made, rng = [], np.random.default_rng(0)
    for build in builders:
        graphdef, abstract = nnx.split(nnx.eval_shape(build))
        state = jax.tree.map(
            lambda leaf, where: jax.device_put(
                0.4 * rng.standard_normal(leaf.shape, np.float32), where
            ),
            abstract,
            state_shardings(abstract, mesh),
        )
        made.append(nnx.merge(graphdef, state))
    return made


def drawn(mesh):
    decoder, memory = networks(mesh)
    model = InterpolatedModel(
        decoder, memory, site=Site("ffn_input", 1), weight=0.4, separator=0, mesh=mesh
    )
    generator = Generator(model, Sampling(top_p=0.9))
    return list(generator.stream(["a", "b"], [[5, 6], [7]], 20, 0)), decoder


cut = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
tokens, decoder = drawn(cut)
assert decoder.head.get_raw_value().sharding.shard_shape((128, 32)) == (64, 16)
assert tokens == drawn(single_device_mesh())[0]
assert max(token for _, token in tokens if token is not None) < 61
