"""One of several processes that write shards of one artifact and read all. Not a test itself.

python writers_script.py DIRECTORY, with the variables of a launcher.
"""

import sys
from pathlib import Path

from mlpmem_jax.parallel import multihost


def main():
    import jax
    import numpy as np

    from mlpmem_jax.parallel.multihost import barrier, is_writer
    from mlpmem_jax.store.array_specs import ArraySpec
    from mlpmem_jax.store.manifest import Artifact
    from mlpmem_jax.store.shards import ShardWriter
    from mlpmem_jax.store.stored_array import StoredArray

    directory = Path(sys.argv[1])
    artifact = Artifact(directory, "datastore/base/train", "datastore")
    specs = {name: ArraySpec(tail, np.int32, 16, 4) for name, tail in (("a", (3,)), ("b", ()))}
    values = {"a": np.arange(300, dtype="i4").reshape(100, 3), "b": np.arange(100, dtype="i4")}
    if is_writer():
        artifact.begin({}, {})
    barrier("begun")
    writer = ShardWriter(artifact.path, specs, 100)
    written = writer.own_rows()
    for rows in written:
        writer.put(rows.start, {name: array[rows] for name, array in values.items()})
    arrays = writer.close()
    barrier("built")
    if is_writer():
        artifact.finish(arrays=arrays)
    barrier("finished")
    for name, array in values.items():
        np.testing.assert_array_equal(StoredArray(artifact, name).read_all(), array)
    (directory / f"wrote-{jax.process_index()}").write_text(str(len(written)))


if __name__ == "__main__":
    with multihost.joined():
        main()
