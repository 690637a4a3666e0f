"""Prints what an import of a decoder takes of memory, in bytes; see test_import_memory.py.

    python import_script.py DIR VOCAB

Twice, in a process of its own: the first time programs are compiled.
"""

import gc
import json
import sys

import jax

from mlpmem_jax.config.pretrained import pretrained_decoder
from mlpmem_jax.interop.huggingface import load_decoder
from mlpmem_jax.parallel.mesh import single_device_mesh

path, vocab_size = sys.argv[1], int(sys.argv[2])


def resident(name: str) -> int:
    """Returns a line of /proc/self/status in bytes."""
    with open("/proc/self/status") as lines:
        (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


for _ in range(2):
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # The largest size so far is that of now.
    before = resident("VmRSS")
    decoder = load_decoder(path, pretrained_decoder(path), vocab_size, single_device_mesh())
    held = sum(array.nbytes for array in jax.live_arrays())
    peak = resident("VmHWM")
    del decoder
print(json.dumps({"beyond": peak - before - held, "held": held}))
