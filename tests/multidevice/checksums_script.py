"""Checksums in one of several processes: what each has read goes to a file. Not a test itself.

python checksums_script.py DIRECTORY, with the variables of a launcher.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mlpmem_jax.parallel import multihost


def main():
    import jax
    from etils import epath

    from mlpmem_jax.errors import ArtifactError
    from mlpmem_jax.parallel.multihost import barrier
    from mlpmem_jax.store import verification
    from mlpmem_jax.training import checksums

    directory = Path(sys.argv[1])
    root, file = epath.Path(directory / "4"), epath.Path(directory / "4.json")
    read = {"described": [], "verified": []}

    def recorded(kind, function):
        def call(path, *rest):
            read[kind].append(path.name)
            return function(path, *rest)

        return call

    checksums.describe_file = recorded("described", checksums.describe_file)
    verification.verify_file = recorded("verified", verification.verify_file)
    with ThreadPoolExecutor(1) as background:
        for repetition in range(2):  # The name of the exchange is free again.
            writing = background.submit(checksums.write_checksums, file, root)
            for step in range(5):  # Meanwhile the devices are used.
                barrier(f"step {repetition} {step}")
            writing.result()
            barrier(f"written {repetition}")
    del read["described"][: len(read["described"]) // 2]
    expected = checksums.read_checksums(file)
    verification.verify_together(root, expected)
    if jax.process_index() == 0:
        (directory / "4" / "b").write_bytes(b"changed")
    barrier("changed")
    try:
        verification.verify_together(root, expected)
        read["said"] = "nothing"
    except ArtifactError as error:
        read["said"] = str(error)
    (directory / f"read-{jax.process_index()}.json").write_text(json.dumps(read))


if __name__ == "__main__":
    with multihost.joined():
        main()
