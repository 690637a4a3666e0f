"""Run by test_generate_mesh.py: generation on a mesh, against one device; slots too."""

import jax
import numpy as np
from flax import nnx

from mlpmem_jax.config.networks import DecoderConfig, MemoryConfig, MeshConfig
from mlpmem_jax.generation.decode import Generator
from mlpmem_jax.generation.engine import Engine
from mlpmem_jax.generation.interpolated import InterpolatedModel
from mlpmem_jax.generation.sampling import Sampling
from mlpmem_jax.generation.slots import Rule, text_keys
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
    return list(generator.stream(["a", "b"], [[5, 6], [7]], 20, 0)), served(model), decoder


def served(model):
    """Texts that come and go, past the end of the context; and how the cache is cut."""
    engine, found = Engine(model, 4, 3), []
    for slot, prompt in enumerate([[0, 5, 6], [0, *range(1, 16)], [0, 7]]):
        rule = Rule(Sampling(top_p=0.9), text_keys(0, [str(slot)])[0])
        first, scores = engine.insert(slot, prompt, rule, scored=True)
        found += [first.token, *(score.token for score in scores)]
        found += [drawn.token for _, drawn in sorted(engine.step().items())]
    engine.evict(1)
    for _ in range(15):
        found += [drawn.token for _, drawn in sorted(engine.step(scored=True).items())]
    key = engine._slots.cache.decoder.key
    return found, key.sharding.shard_shape(key.shape)


cut = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
tokens, (slots, piece), decoder = drawn(cut)
assert decoder.head.get_raw_value().sharding.shard_shape((128, 32)) == (64, 16)
assert piece == (1, 1, 2, 16, 8)  # of [layers, slots, heads, context, width]
expected, (alone, whole), _ = drawn(single_device_mesh())
assert whole == (1, 4, 4, 16, 8)
assert tokens == expected
assert slots == alone and len(set(slots)) > 10
assert max(token for _, token in tokens if token is not None) < 61
