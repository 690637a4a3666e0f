"""A pretrained decoder against `transformers`: logits, and time and memory to load.

    .venv/bin/python -m pip install torch transformers
    .venv/bin/python -m benchmarks.pretrained DIR [--text TEXT]

DIR is a Hugging Face directory or a GGUF file. Both run in float32 on CPU.
"""

import argparse
import os
import resource
import time

import jax
import numpy as np
from flax import nnx

from benchmarks.program import run_main
from mlpmem_jax.config.gguf import is_gguf
from mlpmem_jax.config.pretrained import pretrained_decoder, pretrained_keys
from mlpmem_jax.console import quiet_libraries
from mlpmem_jax.corpus.tokenizer import read_tokenizer
from mlpmem_jax.interop.huggingface import load_decoder
from mlpmem_jax.parallel.mesh import single_device_mesh

TEXT = "The Eiffel Tower is located in the city of Paris. It was built for the fair of 1889."


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ours(path: str, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens of the text [1, L] and logits [1, L, V]; prints what loading took."""
    keys, config = pretrained_keys(path), pretrained_decoder(path)
    tokenizer = read_tokenizer(keys["tokenizer.path"], keys["tokenizer.separator"])
    before, started = peak_mib(), time.perf_counter()
    decoder = load_decoder(path, config, tokenizer.vocab_size, single_device_mesh())
    secs = time.perf_counter() - started
    print(f"loaded in {secs:.1f} s, peak memory {before:.0f} to {peak_mib():.0f} MiB")
    graphdef, state = nnx.split(decoder)

    @jax.jit
    def logits(state, tokens_BL):
        decoder = nnx.merge(graphdef, state)
        return decoder.logits(decoder.hidden(tokens_BL)[0])

    tokens_BL = tokenizer.encode([text])[0][None].astype(np.int32)
    return tokens_BL, np.asarray(logits(state, tokens_BL))[..., : tokenizer.vocab_size]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", metavar="DIR")
    parser.add_argument("--text", default=TEXT)
    flags = parser.parse_args()
    quiet_libraries()
    tokens_BL, found = ours(flags.path, flags.text)
    import torch
    from transformers import AutoModelForCausalLM

    folder, file = os.path.split(flags.path) if is_gguf(flags.path) else (flags.path, None)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor(tokens_BL)).logits.numpy()[..., : found.shape[-1]]
    off, largest = np.abs(found - expected).max(), np.abs(expected).max()
    same = np.mean(found.argmax(-1) == expected.argmax(-1))
    print(
        f"{tokens_BL.shape[1]} tokens: largest difference of a logit {off:.2g} (largest logit "
        f"{largest:.3g}), same first choice {100 * same:.0f} %"
    )


if __name__ == "__main__":
    run_main(main)
