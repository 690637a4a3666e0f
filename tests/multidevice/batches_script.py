"""Prints a digest of every global batch. Not a test itself.

python batches_script.py DATA FSDP TENSOR, with the variables of a launcher.
"""

import hashlib
import sys

import numpy as np

from mlpmem_jax.parallel import multihost


class Windows:
    num_windows = 37

    def read(self, windows):
        steps = np.arange(5, dtype=np.int32)
        row = windows[:, None] * len(steps) + steps
        return {"token": windows[:, None].astype(np.int32) * 1000 + steps, "row": row}


def main():
    from mlpmem_jax.config.networks import MeshConfig
    from mlpmem_jax.console import say
    from mlpmem_jax.input.feed import Feed
    from mlpmem_jax.parallel.mesh import make_mesh
    from mlpmem_jax.parallel.sharing import whole

    data, fsdp, tensor = map(int, sys.argv[1:])
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    for mix_windows in (1, 3):
        steps = range(2, 12)
        feed = Feed(Windows(), mesh, batch_size=8, seed=3, steps=steps, mix_windows=mix_windows)
        for batch in feed:
            digest = hashlib.sha256()
            for name in sorted(batch):
                digest.update(np.ascontiguousarray(whole(batch[name])).tobytes())
            say(digest.hexdigest())


if __name__ == "__main__":
    with multihost.joined():
        main()
