"""Attention implementations side by side: forward and backward, in turns, in one run.

    .venv/bin/python -m benchmarks.attention [--batch 16] [--length 256] [--heads 4] [--width 32]

Prints milliseconds (median of the rounds) and the ratio to `xla`.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from mlpmem_jax.models.attention import causal_attention
from mlpmem_jax.parallel.host import keep_freed_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    flags = parser.parse_args()
    keep_freed_memory()
    fused = {"gpu": ["cudnn"], "tpu": ["flash"]}.get(jax.default_backend(), [])
    names = ["xla", "blocked", *fused]
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    shape = (flags.batch, flags.length, flags.heads, flags.width)
    qkv = [jax.random.normal(jax.random.key(n), shape, dtype) for n in range(3)]

    def step(name: str):
        def loss(q, k, v):
            return jnp.sum(jnp.square(causal_attention(q, k, v, None, name)))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))

    steps = {name: step(name) for name in names}
    for run in steps.values():
        jax.block_until_ready(run(*qkv))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(flags.rounds):
        for name, run in steps.items():
            started = time.perf_counter()
            jax.block_until_ready(run(*qkv))
            seconds[name].append(time.perf_counter() - started)
    for name in names:
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["xla"], strict=True))
        median = 1e3 * statistics.median(seconds[name])
        print(f"{name:<8} {median:8.2f} ms  {ratio:5.2f} of xla")


if __name__ == "__main__":
    main()
