"""Memories from and to the tensors of the official release, and of our own exports.

Blocks, norms and head have the names of the official release (docs/pretrained.md); what only a
memory of ours has (statistics of the input, tables of tokens, a gate) stands beside them.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from mlpmem_jax.config.networks import MemoryConfig
from mlpmem_jax.errors import ConfigError, UserError
from mlpmem_jax.interop.families import HEAD, Entry, Shape, Tensor
from mlpmem_jax.interop.huggingface import load_network, network_tensors
from mlpmem_jax.interop.tensors import TensorFiles, check_names
from mlpmem_jax.models.layers import ffn_width, padded_vocab_size
from mlpmem_jax.models.memory import Memory

# Of a block of each form: our name, the official one, and which of its tensors are transposed.
_GPT2 = {"ffn_norm": "ln_1", "up": "mlp.c_fc", "down": "mlp.c_proj"}
_LLAMA = {
    "ffn_norm": "input_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def memory_entries(
    config: MemoryConfig, decoder_width: int, vocab_size: int, head_rows: int | None = None
) -> Iterator[Entry]:
    """Yields every parameter of a memory, and the tensor that it is.

    Args:
        head_rows: Rows of the head in a file, which may be more than V.
    """
    width, input_width = config.width, config.input_width(decoder_width)
    if input_width != width:
        matrix = Tensor(
            "embedding_transform.weight", (width, input_width), np.transpose, np.transpose
        )
        yield Entry("projection/projection", None, matrix)
        if config.projection_bias == "learned":
            bias = Tensor("embedding_transform.bias", (width,))
            yield Entry("projection/projection_bias", None, bias)
    yield from _blocks(config)
    final = "ln_f" if config.block == "gelu" else "norm"
    yield Entry("final/final_scale", None, Tensor(f"{final}.weight", (width,)))
    if config.resolved_biases == "all":
        yield Entry("final/final_bias", None, Tensor(f"{final}.bias", (width,)))
    if config.head == "untied":
        yield Entry("head", None, _first(HEAD, head_rows or vocab_size, vocab_size, width))
    yield from _own_parts(config, decoder_width, vocab_size)


def _blocks(config: MemoryConfig) -> Iterator[Entry]:
    is_gelu, width = config.block == "gelu", config.width
    hidden = ffn_width(config.ffn_width, width, config.block)
    biases = config.resolved_biases
    for layer in range(config.num_layers):
        for ours, theirs in (_GPT2 if is_gelu else _LLAMA).items():
            name = f"{'h' if is_gelu else 'layers'}.{layer}.{theirs}"
            if ours == "ffn_norm":
                yield Entry("blocks/ffn_norm_scale", layer, Tensor(f"{name}.weight", (width,)))
                if biases == "all":
                    yield Entry("blocks/ffn_norm_bias", layer, Tensor(f"{name}.bias", (width,)))
                continue
            shape = (hidden, width) if ours == "down" else (width, hidden)
            matrix = Tensor(f"{name}.weight", shape)
            if not is_gelu:
                matrix = Tensor(f"{name}.weight", shape[::-1], np.transpose, np.transpose)
            yield Entry(f"blocks/{ours}", layer, matrix)
            if biases != "none":
                yield Entry(f"blocks/{ours}_bias", layer, Tensor(f"{name}.bias", shape[-1:]))


def _own_parts(config: MemoryConfig, decoder_width: int, vocab_size: int) -> Iterator[Entry]:
    """Yields what no official memory has."""
    input_width = config.input_width(decoder_width)
    vectors: dict[str, str] = {}
    if config.input_norm == "standardize":
        vectors |= {"input_mean": "input_mean", "input_inverse_std": "input_inverse_std"}
    elif config.input_norm == "rms":
        vectors["input/input_norm_scale"] = "input_norm.weight"
    if config.has_gate:
        row = (1, input_width)
        yield Entry("gate", None, Tensor("gate.weight", row, np.ravel, lambda x: x.reshape(row)))
        yield Entry("gate_bias", None, Tensor("gate.bias", (1,)))
    for parameter, name in vectors.items():
        yield Entry(parameter, None, Tensor(name, (input_width,)))
    if config.recent_tokens and config.recent_table == "own":
        table = _first("recent.weight", vocab_size, vocab_size, config.table_width(decoder_width))
        yield Entry("recent", None, table)
    if config.ngram_orders:
        rows = len(config.ngram_orders) * padded_vocab_size(config.ngram_rows)
        yield Entry("ngrams", None, Tensor("ngrams.weight", (rows, config.ngram_width)))


def _first(name: str, rows: int, count: int, width: int) -> Tensor:
    # Spare rows belong to no token; padding of the vocabulary is not written.
    shape: Shape = (max(rows, count), width)
    return Tensor(name, shape, lambda table: table[:count], lambda table: table[:count])


def memory_tensors(memory: Memory, decoder_width: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of a memory by name."""
    entries = memory_entries(memory.config, decoder_width, memory.vocab_size)
    return network_tensors(memory, entries)


def load_memory(
    path: str,
    config: MemoryConfig,
    decoder_width: int,
    vocab_size: int,
    mesh: jax.sharding.Mesh,
    decoder_rows: int | None = None,
) -> Memory:
    """Reads a memory of an official form, or one that `export` wrote alone.

    Args:
        config: Its shape, as `config.pretrained_memory` reads it.
        mesh: Where the parameters go.
        decoder_rows: Embeddings of the decoder in its own files, with spare ones.

    Raises:
        UserError: See `checked_memory_tensors`.
    """
    files, entries = checked_memory_tensors(path, config, decoder_width, vocab_size, decoder_rows)

    def build() -> Memory:
        return Memory(config, decoder_width, vocab_size, rngs=nnx.Rngs(0))

    return load_network(build, entries, files.read, mesh)


def checked_memory_tensors(
    path: str,
    config: MemoryConfig,
    decoder_width: int,
    vocab_size: int,
    decoder_rows: int | None = None,
) -> tuple[TensorFiles, list[Entry]]:
    """Compares the tensors of a directory with a memory; reads headers alone.

    Args:
        config: The memory's shape.
        decoder_rows: See `load_memory`.

    Raises:
        UserError: A file is missing, damaged or a pickle; the vocabulary is another one; tensors
            are missing, unexpected or of another shape, all of them named.
    """
    files = TensorFiles(path)
    rows = (files.shapes.get(HEAD) or (vocab_size,))[0]
    if rows not in (vocab_size, decoder_rows or vocab_size) or rows < vocab_size:
        raise UserError(
            f"memory.pretrained={path}: {HEAD} has {rows} rows for a tokenizer of {vocab_size} "
            "tokens; a memory needs the vocabulary of its decoder"
        )
    entries = list(memory_entries(config, decoder_width, vocab_size, rows))
    wanted = {entry.tensor.name: entry.tensor.shape for entry in entries}
    check_names(files.shapes, wanted, f"memory.pretrained={path}", "a memory of this form")
    return files, entries


def official_settings(
    config: MemoryConfig, decoder_width: int, site: str, decoder: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the `config.json` of a memory in the official layout: the decoder's, with its depth.

    Args:
        site: Kind of the state that it reads.
        decoder: `huggingface_settings` of the decoder.

    Raises:
        ConfigError: The official release has no such memory; names all keys.
    """
    if reasons := _unofficial(config, decoder_width, site):
        raise ConfigError(
            f"export --what memory: no official memory has {', '.join(reasons)}; "
            "--what model exports any memory, with its decoder"
        )
    hidden = ffn_width(config.ffn_width, config.width, config.block)
    families: tuple[str, ...] = ("llama", "mistral")
    shape: dict[str, Any] = {
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "intermediate_size": hidden,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "mlp_bias": config.resolved_biases == "ffn",
    }
    if config.block == "gelu":
        families = ("gpt2",)
        shape = {
            "n_embd": config.width,
            "n_layer": config.num_layers,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": config.norm_epsilon,
        }
    kept = dict(decoder)
    if decoder["model_type"] not in families:
        names = ("vocab_size", "bos_token_id", "eos_token_id", "dtype")
        kept = {"model_type": families[0]} | {key: decoder[key] for key in names}
    kept.pop("architectures", None)
    return kept | shape | {"tie_word_embeddings": False}


def _unofficial(config: MemoryConfig, decoder_width: int, site: str) -> list[str]:
    """Returns the keys that no official memory has."""
    hidden = ffn_width(config.ffn_width, config.width, config.block)
    is_gelu = config.block == "gelu"
    projects = config.input_width(decoder_width) != config.width
    expected: dict[str, tuple[Any, bool]] = {
        "input_norm": (config.input_norm, config.input_norm == "none"),
        "recent_tokens": (config.recent_tokens, not config.recent_tokens),
        "ngram_orders": (list(config.ngram_orders), not config.ngram_orders),
        "head": (config.head, config.head == "untied"),
        "gate": (config.gate, config.gate == "none"),
        "biases": (config.biases, (config.resolved_biases == "all") == is_gelu),
        "projection_bias": (
            config.projection_bias, not projects or config.projection_bias == "learned"
        ),
        "ffn_width": (config.ffn_width, not is_gelu or hidden == 4 * config.width),
    }  # fmt: skip
    reasons = [f"memory.{key}={value}" for key, (value, usual) in expected.items() if not usual]
    return reasons + ([f"datastore.input.site={site}"] if site != "ffn_input" else [])
