"""Tensors of a GGUF file by the names of `transformers`, read one at a time.

Quantised tensors become float32 by the package `gguf`.
"""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from mlpmem_jax.config.gguf import TensorInfo, is_gguf, read_header
from mlpmem_jax.config.gguf_settings import FREQUENCIES, HEAD
from mlpmem_jax.config.hub import local_path
from mlpmem_jax.errors import UserError
from mlpmem_jax.interop.tensors import TensorFiles, check_finite, digest_of

_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1",
          "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")  # fmt: skip
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_LLAMA = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    **{f"attn_{name}": f"self_attn.{name}_proj" for name in "qkv"},
    **{f"attn_{name}_norm": f"self_attn.{name}_norm" for name in "qk"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
_GPT2 = {
    "token_embd": "wte",
    "position_embd": "wpe",
    "output_norm": "ln_f",
    "output": "lm_head",
    "attn_norm": "ln_1",
    "ffn_norm": "ln_2",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
# Stored as [out, in], while GPT-2's own files have [in, out].
_TURNED = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")


def tensor_files(path: str) -> "TensorFiles | GgufTensors":
    """Opens the tensors that `decoder.pretrained` names.

    Raises:
        UserError: They are missing or damaged.
    """
    where = local_path(path)
    return GgufTensors(where) if is_gguf(where) else TensorFiles(where)


class GgufTensors:
    """The tensors of a file by the names that `transformers` gives them.

    Attributes:
        shapes: Shape of each, as `transformers` has it.
    """

    def __init__(self, path: str):
        """Opens a file; reads its header alone.

        Raises:
            UserError: The package `gguf` is missing, or a tensor is of a type that it does not
                turn into numbers.
        """
        self._path = Path(path).expanduser()
        self._package = _package(path)
        header = read_header(path)
        self._metadata = header.metadata
        self._architecture = header.metadata["general.architecture"]
        self._info = {
            self._name(name): (name, info)
            for name, info in header.tensors.items()
            if name != FREQUENCIES
        }
        types = self._package.GGMLQuantizationType
        known = {int(types[name]) for name in _TYPES}
        for name, info in self._info.values():
            if info.kind not in known:
                raise UserError(
                    f"decoder.pretrained={path}: {name} is of the type {self._type(info.kind)}; "
                    f"supported are {', '.join(_TYPES)}"
                )
        self.shapes = {
            ours: info.shape[::-1] if self._is_turned(name) else info.shape
            for ours, (name, info) in self._info.items()
        }

    def files(self) -> list[str]:
        """Returns the name of the file."""
        return [self._path.name]

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor in float32.

        Raises:
            UserError: The file is cut off, or holds values that are not finite.
        """
        stored, info = self._info[name]
        found = self._dequantized(stored, info)
        check_finite(found, f"{self._path}: {stored}")
        if self._is_turned(stored):
            return found.T
        if self._architecture == "llama" and (match := _BLOCK.fullmatch(stored)):
            heads = {"attn_q": "head_count", "attn_k": "head_count_kv"}.get(match[2])
            if heads is not None:
                return _paired_by_halves(found, self._heads(heads))
        return found

    def digest(self) -> str:
        """Returns a digest of name, size and samples of the bytes of the file."""
        return digest_of([self._path])

    def _dequantized(self, name: str, info: TensorInfo) -> np.ndarray:
        quants = self._package.GGMLQuantizationType(info.kind)
        block, block_bytes = self._package.GGML_QUANT_SIZES[quants]
        if info.shape[-1] % block:
            raise UserError(f"{self._path}: {name} has rows that are no whole blocks")
        row_bytes = info.shape[-1] // block * block_bytes
        rows = int(np.prod(info.shape[:-1]))
        content = np.fromfile(self._path, np.uint8, rows * row_bytes, offset=info.offset)
        if content.size < rows * row_bytes:
            raise UserError(f"{self._path}: cut off, {name} is not whole")
        content = content.reshape(*info.shape[:-1], row_bytes)
        found = self._package.quants.dequantize(content, quants)
        return np.asarray(found, np.float32).reshape(info.shape)

    def _heads(self, key: str) -> int:
        prefix = f"{self._architecture}.attention."
        heads = self._metadata[f"{prefix}head_count"]
        return int(self._metadata.get(prefix + key, heads))

    def _is_turned(self, name: str) -> bool:
        match = _BLOCK.fullmatch(name)
        is_matrix = match is not None and match[3] == "weight" and match[2] in _TURNED
        return self._architecture == "gpt2" and is_matrix

    def _name(self, name: str) -> str:
        """Returns the name in `transformers`; one that it does not have stays."""
        names = _GPT2 if self._architecture == "gpt2" else _LLAMA
        match = _BLOCK.fullmatch(name)
        if match is None:
            stem, _, kind = name.rpartition(".")
            if name == HEAD or stem not in ("token_embd", "position_embd", "output_norm"):
                return f"{names['output']}.weight" if name == HEAD else name
            return f"{names.get(stem, stem)}.{kind}"
        layers = "h" if self._architecture == "gpt2" else "layers"
        stem = names.get(match[2], match[2])
        return f"{layers}.{match[1]}.{stem}.{match[3]}"

    def _type(self, kind: int) -> str:
        try:
            return str(self._package.GGMLQuantizationType(kind).name)
        except ValueError:
            return str(kind)


def _paired_by_halves(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Undoes the order of llama.cpp, which rotates pairs of neighbours: (0, A/2, 1, A/2 + 1, …)."""
    pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)


def _package(path: str) -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError(
            f"decoder.pretrained={os.fspath(path)}: GGUF files require the package gguf "
            "(pip install -r requirements-gguf.txt)"
        ) from None
    return gguf
