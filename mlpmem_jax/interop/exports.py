"""Decoder and memory as a directory that `transformers` loads, with a modelling file of ours."""

import itertools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlpmem_jax.config.networks import MemoryConfig
from mlpmem_jax.interop.huggingface import decoder_tensors, save_tensors
from mlpmem_jax.interop.memories import memory_tensors
from mlpmem_jax.models.decoder import Decoder, Site
from mlpmem_jax.models.layers import ffn_width, padded_vocab_size
from mlpmem_jax.models.memory import Memory

MODEL_TYPE, MODELLING = "mlpmem", "modeling_mlpmem.py"


def model_settings(
    decoder: Mapping[str, Any],
    memory: MemoryConfig,
    decoder_width: int,
    site: Site,
    weight: float | None,
) -> dict[str, Any]:
    """Returns the `config.json` of decoder and memory.

    Args:
        decoder: That of the decoder alone.
        site: The state that the memory reads.
        weight: λ; None: the memory's gate gives it.
    """
    module = MODELLING.removesuffix(".py")
    kept = ("vocab_size", "bos_token_id", "eos_token_id", "tie_word_embeddings", "dtype")
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["MlpMemForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.MlpMemConfig",
            "AutoModelForCausalLM": f"{module}.MlpMemForCausalLM",
        },
        **{key: decoder[key] for key in kept},
        "text_config": dict(decoder),
        "mlp_memory": {
            "width": memory.width,
            "num_layers": memory.num_layers,
            "ffn_width": ffn_width(memory.ffn_width, memory.width, memory.block),
            "block": memory.block,
            "biases": memory.resolved_biases,
            "projection_bias": memory.projection_bias,
            "norm_epsilon": memory.norm_epsilon,
            "input_norm": memory.input_norm,
            "input_width": memory.input_width(decoder_width),
            "recent_tokens": memory.recent_tokens,
            "recent_table": memory.recent_table,
            "recent_width": memory.table_width(decoder_width),
            "ngram_orders": list(memory.ngram_orders),
            "ngram_rows": padded_vocab_size(memory.ngram_rows),
            "ngram_width": memory.ngram_width,
            "head": memory.head,
            "gate": "learned" if memory.has_gate else "none",
            "gate_floor": memory.gate_floor,
            "temperature": memory.temperature,
            "interpolation": weight,
            "site": site.kind,
            "layer": site.block,
            "separator_id": decoder["bos_token_id"],
        },
    }


def save_model(decoder: Decoder, memory: Memory, folder: Path, settings: dict[str, Any]) -> None:
    """Writes decoder and memory.

    Args:
        decoder: Its tensors have the names of its family.
        memory: The same below `memory.`, with the official names where it has an official form.
        folder: An empty directory.
        settings: `model_settings`.
    """
    prefixed = (
        (f"memory.{name}", tensor) for name, tensor in memory_tensors(memory, decoder.config.width)
    )
    save_tensors(itertools.chain(decoder_tensors(decoder), prefixed), folder)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    shutil.copyfile(Path(__file__).with_name("exported") / MODELLING, folder / MODELLING)
    ids = {key: settings[key] for key in ("bos_token_id", "eos_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
