"""Greedy generation against `transformers`: prefill and decode, in one interleaved run.

    .venv/bin/python -m benchmarks.generation_throughput DIR|FILE.gguf|gpt2-small [--python PYTHON]

DIR is a Hugging Face directory; gpt2-small is that shape with random weights. `transformers` runs
in a process of its own, of an interpreter that has it and torch (--python), on what our `export`
writes: the same prompts and numbers of tokens, in turns. The time of the first token is prefill;
what further tokens take is decode. Third in turn is the decoder with a memory of random weights.
Printed are medians of the ratios of one round, by the clock and of processor time.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.program import run_main
from mlpmem_jax.config.networks import DecoderConfig, MemoryConfig
from mlpmem_jax.config.pretrained import pretrained_decoder, pretrained_keys
from mlpmem_jax.console import quiet_libraries, say
from mlpmem_jax.corpus.tokenizer import read_tokenizer
from mlpmem_jax.errors import UserError
from mlpmem_jax.evaluation.table import number, render
from mlpmem_jax.generation.decode import Generator
from mlpmem_jax.generation.interpolated import InterpolatedModel
from mlpmem_jax.generation.sampling import Sampling
from mlpmem_jax.interop.huggingface import load_decoder, save_decoder
from mlpmem_jax.interop.settings import huggingface_settings
from mlpmem_jax.models.decoder import Decoder, Site
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.parallel.mesh import single_device_mesh

ROOT = Path(__file__).resolve().parent.parent
GPT2_SMALL = DecoderConfig(
    width=768, num_layers=12, num_heads=12, context_tokens=1024, norm="layer", positions="learned",
    activation="gelu", biases="all", head="tied",
)  # fmt: skip
GPT2_VOCAB = 50257
HEADER = ["batch", "system", "prefill\nms", "token\nms", "tokens/s", "prefill\nratio",
          "of\nprocessors", "token\nratio", "of\nprocessors", "same\ntexts"]  # fmt: skip
# Reads requests, one of JSON a line: prompts and how many tokens to add; answers with the tokens.
WORKER = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
model.eval()
print(json.dumps({}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    prompts = torch.tensor(asked["prompts"])
    wall, cpu = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        found = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False,
                               min_new_tokens=asked["count"], max_new_tokens=asked["count"],
                               pad_token_id=0)
    spent = [time.perf_counter() - wall, time.process_time() - cpu]
    tokens = found[:, prompts.shape[1]:].tolist()
    print(json.dumps({"tokens": tokens, "spent": spent}), flush=True)
"""

# Continues prompts [B][L] by so many tokens; returns them, and seconds by the clock and of
# processors.
Continue = Callable[[list[list[int]], int], tuple[list[list[int]], np.ndarray]]


def networks(name: str, dtype: str, memory_layers: int) -> tuple[Decoder, Memory, int, list[int]]:
    """Returns decoder, memory, the separator's id, and a stream of tokens for prompts."""
    if name == "gpt2-small":
        config, separator = GPT2_SMALL.model_copy(update={"compute_dtype": dtype}), 50256
        make = nnx.jit(lambda: Decoder(config, GPT2_VOCAB, rngs=nnx.Rngs(0)))
        decoder = make()
        stream = np.random.default_rng(0).integers(0, separator, 1 << 14).tolist()
    else:
        config = pretrained_decoder(name, compute_dtype=dtype)
        keys = pretrained_keys(name)
        tokenizer = read_tokenizer(keys["tokenizer.path"], keys["tokenizer.separator"])
        decoder = load_decoder(name, config, tokenizer.vocab_size, single_device_mesh())
        texts = [page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))]
        stream, separator = tokenizer.encode(["".join(texts)])[0].tolist(), tokenizer.separator_id
    block = "gelu" if config.activation == "gelu" else "swiglu"
    shape = MemoryConfig(
        width=config.width, num_layers=memory_layers, block=block, compute_dtype=dtype
    )
    make_memory = nnx.jit(lambda: Memory(shape, config.width, decoder.vocab_size, rngs=nnx.Rngs(1)))
    return decoder, make_memory(), separator, stream


def ours(model: InterpolatedModel) -> Continue:
    """Returns our `generate`, without the tokenizer."""
    generator = Generator(model, Sampling("greedy"))

    def work(prompts: list[list[int]], count: int) -> tuple[list[list[int]], np.ndarray]:
        started = np.array([time.perf_counter(), time.process_time()])
        tokens: list[list[int]] = [[] for _ in prompts]
        # The generator puts the separator before each.
        for row, token in generator.stream([""] * len(prompts), [p[1:] for p in prompts], count, 0):
            if token is not None:
                tokens[row].append(token)
        return tokens, np.array([time.perf_counter(), time.process_time()]) - started

    return work


@dataclasses.dataclass
class Transformers:
    """A process that generates with `transformers`."""

    process: subprocess.Popen[str]

    @classmethod
    def start(cls, python: str, folder: str, dtype: str) -> "Transformers | None":
        """Starts it; None, with a line, where its packages are missing."""
        has = [python, "-c", "import torch, transformers"]
        if subprocess.run(has, capture_output=True, check=False).returncode:
            say(f"{python}: has no torch and transformers; ours are measured alone")
            return None
        process = subprocess.Popen(
            [python, "-c", WORKER, folder, dtype], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        found = cls(process)
        found.answer()
        return found

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise subprocess.CalledProcessError(self.process.wait(), "transformers")
        return json.loads(line)

    def __call__(self, prompts: list[list[int]], count: int) -> tuple[list[list[int]], np.ndarray]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompts": prompts, "count": count}) + "\n")
        self.process.stdin.flush()
        found = self.answer()
        return found["tokens"], np.array(found["spent"])


def measured(
    systems: dict[str, Continue], prompts: list[list[int]], count: int, rounds: int
) -> tuple[dict[str, np.ndarray], dict[str, list[list[int]]]]:
    """Returns seconds [round, prefill or a token, clock or processors], and tokens."""
    spent: dict[str, list[np.ndarray]] = {name: [] for name in systems}
    tokens = {}
    for turn in range(-1, rounds):
        for name in list(systems)[:: -1 if turn % 2 else 1]:
            _, first = systems[name](prompts, 1)
            tokens[name], whole = systems[name](prompts, count + 1)
            if any(len(row) != count + 1 for row in tokens[name]):
                raise UserError(f"{name}: a text ended early: use fewer --tokens")
            if turn >= 0:  # Before that everything is compiled.
                spent[name].append(np.stack([first, (whole - first) / count]))
    return {name: np.stack(each) for name, each in spent.items()}, tokens


def weight_bytes(network: Decoder | Memory, item: int) -> int:
    """Returns bytes of the weights that a step reads: of tables only a few rows are."""
    size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)))
    if isinstance(network, Decoder) and network.config.head == "untied":
        size -= network.embedding[...].size
    return item * size


def rows_of(batch: int, spent: dict[str, np.ndarray], same: float | None) -> Iterable[list[str]]:
    base = spent["decoder"]
    for name, seconds in spent.items():
        ratio = np.median(seconds / base, axis=0)
        prefill, token = 1000 * np.median(seconds[:, :, 0], axis=0)
        equal = f"{100 * same:.0f} %" if name == "transformers" and same is not None else ""
        yield [
            str(batch), name, number(prefill, 1), number(token, 1), number(1000 * batch / token, 1),
            *(f"{value:.2f}" for value in (*ratio[0], *ratio[1])), equal,
        ]  # fmt: skip


def measure(flags: argparse.Namespace, dtype: str) -> None:
    mesh = single_device_mesh()
    decoder, memory, separator, stream = networks(flags.model, dtype, flags.memory_layers)
    config = decoder.config
    site = Site("ffn_input", config.num_layers)
    item = np.dtype(decoder.dtype).itemsize
    sizes = [weight_bytes(network, item) for network in (decoder, memory)]
    with tempfile.TemporaryDirectory(prefix="mlpmem-throughput-") as folder:
        settings = huggingface_settings(config, decoder.vocab_size, separator)
        save_decoder(decoder, Path(folder), settings)
        theirs = Transformers.start(flags.python, folder, dtype)
    systems: dict[str, Any] = {}
    for name, second in (("decoder", None), ("+ memory", memory)):
        model = InterpolatedModel(
            decoder, second, site=site, weight=0.25, separator=separator, mesh=mesh
        )
        systems[name] = ours(model)
    if theirs is not None:
        systems["transformers"] = theirs
    say(f"\n{flags.model}, {dtype}, {flags.prompt_tokens} tokens of prompt, {flags.tokens} further")
    for batch in flags.batch:
        starts = np.random.default_rng(batch).integers(0, len(stream) - flags.prompt_tokens, batch)
        prompts = [[separator, *stream[at : at + flags.prompt_tokens - 1]] for at in starts]
        spent, tokens = measured(systems, prompts, flags.tokens, flags.rounds)
        same = None
        if theirs is not None:
            pairs = zip(tokens["decoder"], tokens["transformers"], strict=True)
            same = statistics.mean(float(own == other) for own, other in pairs)
        say(render(HEADER, list(rows_of(batch, spent, same))))
    say(f"bytes of decoder and memory / bytes of the decoder: {sum(sizes) / sizes[0]:.2f}")
    if theirs is not None:
        theirs.process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="DIR|FILE.gguf|gpt2-small")
    parser.add_argument("--python", default=sys.executable, help="with torch and transformers")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    numbers = {"prompt-tokens": 128, "tokens": 32, "rounds": 5, "memory-layers": 8}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    flags = parser.parse_args()
    quiet_libraries()
    for dtype in flags.dtype:
        measure(flags, dtype)


if __name__ == "__main__":
    run_main(main)
