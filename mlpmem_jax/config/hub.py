"""Models of the Hugging Face Hub, as local directories."""

import functools
import os
import re

from mlpmem_jax.errors import ConfigError
from mlpmem_jax.failures import first_line

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
# No pickles, and no second copies of the weights for other software.
_WANTED = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json"]
_UNWANTED = ["*/*", "consolidated*"]


def local_path(given: str) -> str:
    """Returns where the files of a pretrained decoder are.

    Args:
        given: `decoder.pretrained`: a path, or an id of the Hub (org/name or org/name@revision)
            where there is no such path.

    Returns:
        The path as given, or the directory that the model has been downloaded to.

    Raises:
        ConfigError: The model cannot be downloaded and has not been before.
    """
    if os.path.exists(os.path.expanduser(given)) or not _ID.fullmatch(given):
        return given
    return _downloaded(given)


@functools.lru_cache(maxsize=8)
def _downloaded(given: str) -> str:
    name, _, revision = given.partition("@")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(
            f"decoder.pretrained={given}: no such path, and ids of the Hugging Face Hub require "
            "the package huggingface_hub (pip install huggingface_hub)"
        ) from None
    try:
        return str(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=_WANTED,
                ignore_patterns=_UNWANTED,
            )
        )
    except Exception as error:  # Its errors share no class: of HTTP, of files, of names.
        raise ConfigError(
            f"decoder.pretrained={given}: no such path, and no download from the Hugging Face "
            f"Hub (offline, or no such model): {first_line(error)}"
        ) from None
