"""Decoders from and to Hugging Face directories.

Tensors are read one at a time and go straight to their place on the mesh: the host holds one of
them. They are written in files of a bounded size, which the host holds one at a time.
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from mlpmem_jax.config.networks import DecoderConfig
from mlpmem_jax.config.weight_files import INDEX, ONE_FILE
from mlpmem_jax.errors import UserError
from mlpmem_jax.interop.families import HEAD, Entry, family_of
from mlpmem_jax.interop.gguf import GgufTensors, tensor_files
from mlpmem_jax.interop.tensors import TensorFiles, check_names
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.parallel.sharding import create_sharded
from mlpmem_jax.parallel.sharing import whole
from mlpmem_jax.training.state import flatten, split_module, unflatten

# Masks and frequencies: no parameters.
_IGNORED = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
_FILE_BYTES = 2 << 30
Network = TypeVar("Network", bound=nnx.Module)


def load_decoder(
    path: str, config: DecoderConfig, vocab_size: int, mesh: jax.sharding.Mesh
) -> Decoder:
    """Reads a pretrained decoder.

    Args:
        path: The directory, GGUF file or Hub id.
        config: Its shape, as `config.pretrained` reads it. Of learned positions, the first
            `context_tokens` are taken.
        vocab_size: V of its tokenizer. Embeddings beyond it belong to no token and are left out.
        mesh: Where the parameters go.

    Returns:
        The decoder, in float32.

    Raises:
        UserError: A file is missing or damaged; or tensors are missing, unexpected or of another
            shape, all of them named.
    """
    files, tensors, entries = checked_tensors(path, config, vocab_size)

    def build() -> Decoder:
        return Decoder(config, vocab_size, rngs=nnx.Rngs(0))

    return load_network(build, entries, lambda name: files.read(tensors[name]), mesh)


def load_network(
    build: Callable[[], Network],
    entries: Iterable[Entry],
    read: Callable[[str], np.ndarray],
    mesh: jax.sharding.Mesh,
) -> Network:
    """Makes a network of tensors, which are read one at a time.

    Args:
        build: Makes it with any parameters.
        entries: Where each parameter stands.
        read: Reads a tensor by its name.
        mesh: Where the parameters go.
    """
    graphdef, params, fixed = _empty(build, mesh)
    flat = flatten(params)
    with jax.set_mesh(mesh):
        for entry in entries:
            part = entry.tensor.turn(read(entry.tensor.name))
            start = [0] * part.ndim
            if entry.layer is not None:
                part, start = part[None], [entry.layer, *start]
            # Rows beyond the vocabulary stay zero.
            key = f"{entry.parameter}/value"
            flat[key] = _writer(flat[key].sharding)(flat[key], part, start)
            # Otherwise the host reads ahead, and holds every tensor that is not yet written.
            jax.block_until_ready(flat[key])
    return nnx.merge(graphdef, unflatten(params, flat), fixed)


def checked_tensors(
    path: str, config: DecoderConfig, vocab_size: int
) -> tuple[TensorFiles | GgufTensors, dict[str, str], list[Entry]]:
    """Compares the tensors of a directory with a decoder; reads headers alone.

    Args:
        path: The directory, GGUF file or Hub id.
        config: The decoder's shape.

    Returns:
        The files, the name in them of each tensor, and where each parameter stands.

    Raises:
        UserError: As `load_decoder`.
    """
    files = tensor_files(path)
    prefix = family_of(config).prefix
    kept = [name for name in files.shapes if not name.endswith(_IGNORED)]
    tensors = {name.removeprefix(prefix): name for name in kept}
    if len(tensors) < len(kept):
        raise UserError(f"decoder.pretrained={path}: holds tensors with and without {prefix!r}")
    if config.head == "tied":
        tensors.pop(HEAD, None)
    shapes = {bare: files.shapes[name] for bare, name in tensors.items()}
    family = family_of(config)(config, vocab_size, shapes)
    if (rows := family.rows(family.table, vocab_size)) < vocab_size:
        raise UserError(
            f"decoder.pretrained={path}: {rows} embeddings for a tokenizer of {vocab_size} tokens; "
            "use the tokenizer.json of this directory"
        )
    entries = list(family.entries())
    wanted = {entry.tensor.name: entry.tensor.shape for entry in entries}
    check_names(shapes, wanted, f"decoder.pretrained={path}")
    return files, tensors, entries


@functools.cache
def _writer(sharding: jax.sharding.Sharding) -> Any:
    """Returns a function that writes a part of a parameter where it lies on the mesh."""
    return jax.jit(jax.lax.dynamic_update_slice, donate_argnums=0, out_shardings=sharding)


def _empty(build: Callable[[], nnx.Module], mesh: jax.sharding.Mesh) -> tuple[Any, Any, Any]:
    """Returns the structure of a network, and its parameters, all zero."""
    graphdef, _, fixed = split_module(nnx.eval_shape(build))

    def create() -> nnx.State:
        return jax.tree.map(jnp.zeros_like, split_module(build())[1])

    return graphdef, create_sharded(create, mesh), fixed


def save_decoder(
    decoder: Decoder, folder: Path, settings: dict[str, Any], file_bytes: int = _FILE_BYTES
) -> None:
    """Writes a decoder as a directory that `transformers` loads.

    Args:
        folder: An empty directory.
        settings: Its `config.json` (`huggingface_settings`).
        file_bytes: A file is closed once it holds so much.
    """
    save_tensors(decoder_tensors(decoder), folder, file_bytes)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def decoder_tensors(decoder: Decoder) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of a decoder by name, as `transformers` stores them."""
    family = family_of(decoder.config)(decoder.config, decoder.vocab_size)
    for name, tensor in network_tensors(decoder, family.entries()):
        yield name if name == HEAD else f"{family.prefix}{name}", tensor


def save_tensors(
    tensors: Iterable[tuple[str, np.ndarray]], folder: Path, file_bytes: int = _FILE_BYTES
) -> None:
    """Writes tensors into safetensors files, which the host holds one at a time.

    Args:
        tensors: By name.
        file_bytes: A file is closed once it holds so much.
    """
    parts: list[dict[str, np.ndarray]] = [{}]
    names: list[list[str]] = []

    def close() -> None:
        file = folder / f"model-{len(names):05d}.safetensors"
        save_file(parts[0], file, metadata={"format": "pt"})
        file.chmod(0o644)
        names.append(list(parts[0]))
        parts[0] = {}

    for name, tensor in tensors:
        parts[0][name] = np.ascontiguousarray(tensor)
        if sum(each.nbytes for each in parts[0].values()) >= file_bytes:
            close()
    if parts[0]:
        close()
    if len(names) == 1:
        (folder / "model-00000.safetensors").rename(folder / ONE_FILE)
    else:
        places = {
            name: f"model-{number:05d}.safetensors"
            for number, each in enumerate(names)
            for name in each
        }
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}, indent=2))


def network_tensors(
    network: nnx.Module, entries: Iterable[Entry]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields tensors by name; those that several parameters share are put together."""
    _, params, fixed = split_module(network)
    flat = flatten(params) | flatten(fixed)
    shared: dict[str, list[np.ndarray]] = {}
    for entry in entries:
        array = flat[f"{entry.parameter}/value"]
        part = whole(array if entry.layer is None else array[entry.layer])
        parts = shared.setdefault(entry.tensor.name, [])
        parts.append(entry.tensor.back(np.asarray(part, np.float32)))
        if sum(each.shape[-1] for each in parts) >= entry.tensor.shape[-1]:
            yield entry.tensor.name, np.concatenate(shared.pop(entry.tensor.name), axis=-1)
