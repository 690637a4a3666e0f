"""What an import takes of host memory: a tensor at a time, however many files there are.

A decoder of the shape of a 7B one, reduced: many files, none of them kept in memory. Of Llama-2-7B,
imported as float32, the largest tensor is 32,000 · 4,096 · 4 bytes = 0.49 GiB.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.conftest import ROOT

VOCAB, WIDTH, HIDDEN, LAYERS = 8000, 512, 1376, 12
SETTINGS = {
    "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS, "num_attention_heads": 8, "max_position_embeddings": 64,
}  # fmt: skip


def _write(folder: Path) -> tuple[int, int]:
    """Writes a file for each layer; returns float32 bytes of the largest tensor and of all."""
    files = [{"model.norm": (WIDTH,)}, {"model.embed_tokens": (VOCAB, WIDTH)}]
    files.append({"lm_head": (VOCAB, WIDTH)})
    for layer in range(LAYERS):
        shapes = {
            "input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,),
            **{f"self_attn.{part}_proj": (WIDTH, WIDTH) for part in "qkvo"},
            "mlp.gate_proj": (HIDDEN, WIDTH), "mlp.up_proj": (HIDDEN, WIDTH),
            "mlp.down_proj": (WIDTH, HIDDEN),
        }  # fmt: skip
        files.append({f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()})
    places, sizes = {}, []
    for number, shapes in enumerate(files):
        tensors = {
            f"{name}.weight": np.full(shape, 0.5, ml_dtypes.bfloat16)
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / f"model-{number:05d}.safetensors")
        places |= dict.fromkeys(tensors, f"model-{number:05d}.safetensors")
        sizes += [4 * math.prod(shape) for shape in shapes.values()]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps(SETTINGS))
    return max(sizes), sum(sizes)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone")
def test_it_takes_twice_the_largest_tensor_beyond_the_parameters(tmp_path: Path):
    largest, total = _write(tmp_path)
    script = Path(__file__).with_name("import_script.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(VOCAB)],
        # What is freed goes back to the system at once.
        env=os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "1000000"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["held"] == pytest.approx(total, rel=0.02)
    # The files together would be more: half of the parameters.
    assert found["beyond"] <= 2 * largest + (16 << 20) < total / 2, found
