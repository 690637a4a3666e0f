"""Prints a digest of arrays that lie on all devices of all processes. Not a test itself."""

from mlpmem_jax.parallel import multihost


def main():
    import jax
    import ml_dtypes
    import numpy as np
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from mlpmem_jax.training.content import digest_of

    devices = np.array(jax.devices())
    mesh = Mesh(devices.reshape(-1, 2) if len(devices) > 1 else devices[:, None], ("a", "b"))
    rng = np.random.default_rng(0)
    arrays = {
        "matrix": (rng.standard_normal((8, 16, 6)).astype(np.float32), P("a", None, "b")),
        "half": (rng.standard_normal((16, 4)).astype(ml_dtypes.bfloat16), P(("b", "a"))),
        "vector": (rng.standard_normal(10).astype(np.float32), P("b")),
        "step": (np.int32(7), P()),
    }

    def laid(value, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(value.shape, sharding, lambda place: value[place])

    print(digest_of({"params": {name: laid(*about) for name, about in arrays.items()}}))


if __name__ == "__main__":
    with multihost.joined():
        main()
