"""Loops and collectives of programs compiled for eight simulated devices."""

import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mlpmem_jax.config.networks import MeshConfig
from mlpmem_jax.parallel.mesh import make_mesh
from mlpmem_jax.roofline.collectives import Fabric
from mlpmem_jax.roofline.hlo import Program
from mlpmem_jax.roofline.schedule import Simulator, by_kind

LAYERS, WIDTH, ROWS = 5, 64, 16


def total_of(compiled, mesh, trips=1):
    return Simulator(Program(compiled.as_text()), None, Fabric(mesh, None), trips).total()


def placed(mesh, shape, *axes):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*axes)))


def check_scan():
    """A product over `tensor` in each round: LAYERS all-reduces of a device's rows."""
    mesh = make_mesh(MeshConfig(data=2, tensor=4))

    def layer(x, pair):
        up, down = pair
        return jax.lax.with_sharding_constraint(jnp.tanh(x @ up) @ down, P("data", None)), None

    def run(x, up, down):
        return jax.lax.scan(layer, x, (up, down))[0]

    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(run)
            .lower(
                placed(mesh, (ROWS, WIDTH), "data", None),
                placed(mesh, (LAYERS, WIDTH, 4 * WIDTH), None, None, "tensor"),
                placed(mesh, (LAYERS, 4 * WIDTH, WIDTH), None, "tensor", None),
            )
            .compile()
        )
    total = total_of(compiled, mesh)
    assert total.unknown_loops == 0
    (row,) = by_kind(total.collectives)
    block = ROWS // 2 * WIDTH * 4
    assert (row["kind"], row["axes"], row["devices"]) == ("all-reduce", "tensor", 4), row
    assert row["count"] == LAYERS, row
    assert row["bytes"] == LAYERS * block, row
    assert row["wire_bytes"] == 2 * 3 / 4 * LAYERS * block, row
    assert total.flops == LAYERS * 2 * 2 * ROWS // 2 * WIDTH * WIDTH, total.flops


def check_nested():
    """Rounds of nested loops multiply; a loop that runs as long as it likes is counted once."""
    mesh = make_mesh(MeshConfig(data=8))

    def inner(carry, _):
        return jnp.tanh(carry @ carry), None

    def outer(carry, _):
        return jax.lax.scan(inner, carry, None, length=3)[0], None

    def run(x, rounds):
        x = jax.lax.scan(outer, x, None, length=7)[0]
        return jax.lax.fori_loop(0, rounds, lambda _, c: inner(c, None)[0], x)

    with jax.set_mesh(mesh):
        rounds = jax.ShapeDtypeStruct((), jnp.int32)
        compiled = jax.jit(run).lower(placed(mesh, (32, 32)), rounds).compile()
    product = 2 * 32**3
    for trips in (1, 8):
        total = total_of(compiled, mesh, trips)
        assert total.unknown_loops == 1
        assert total.flops == (7 * 3 + trips) * product, (total.flops / product, trips)


if __name__ == "__main__":
    assert jax.device_count() == 8
    {"scan": check_scan, "nested": check_nested}[sys.argv[1]]()
    print("ok")
