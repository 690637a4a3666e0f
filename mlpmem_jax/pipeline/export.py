"""Decoder and memory of a run as a directory that `transformers` loads."""

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlpmem_jax.console import say
from mlpmem_jax.corpus.tokenizer import TextTokenizer, load_tokenizer
from mlpmem_jax.errors import ArtifactError, UserError
from mlpmem_jax.pipeline.execute import execute
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.interpolation import check_finished, interpolation
from mlpmem_jax.pipeline.options import Exported, Options
from mlpmem_jax.store import nearest

if TYPE_CHECKING:
    from mlpmem_jax.models.decoder import Site
    from mlpmem_jax.pipeline.opened_run import Run


def main(run: Artifacts, options: Options) -> int:
    """Runs the command."""
    folder = _free_directory(options.output)
    what = options.what or ("model" if run.trained.is_complete() else "decoder")
    if options.dry_run:
        _settings(run, what)
        return execute(lambda _: [], run, options)
    export(run, folder, what)
    return 0


def export(artifacts: Artifacts, folder: Path, what: Exported = "decoder") -> None:
    """Writes networks and tokenizer into a directory, whole or not at all.

    Args:
        folder: A directory that does not exist.
        what: decoder: alone, as a model of its family; model: decoder and memory; memory: alone,
            in the layout of the official release.

    Raises:
        ConfigError: No family of `transformers` has such a decoder, or no official memory is such
            a memory.
        ArtifactError: A network is missing or damaged, or λ was never chosen.
    """
    from mlpmem_jax.pipeline.opened_run import Run

    run, config = Run(artifacts), artifacts.config
    settings, tokenizer = _settings(artifacts, what)
    writers = {"decoder": _decoder, "model": _model, "memory": _memory}
    write: Callable[[Path], str] = functools.partial(writers[what], run, settings)
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.separator,
        "eos_token": tokenizer.separator,
        "model_max_length": config.decoder.context_tokens,
    }
    unfinished = Path(tempfile.mkdtemp(prefix=".export-", dir=folder.parent))
    try:
        written = write(unfinished)
        (unfinished / "tokenizer.json").write_bytes(tokenizer.to_json())
        (unfinished / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    say(f"{folder}: {written}")


def _settings(artifacts: Artifacts, what: Exported) -> tuple[dict[str, Any], TextTokenizer]:
    """Returns the settings of `transformers` for the decoder, and the tokenizer, after all checks.

    Raises:
        ConfigError, ArtifactError: See `export`.
    """
    from mlpmem_jax.interop.settings import huggingface_settings

    if what != "decoder" and not artifacts.trained.is_complete():
        raise ArtifactError(
            f"{artifacts.trained.path}: the memory is not trained yet; train it with the command "
            f"`train`, or use `export --what decoder`{nearest.in_words(artifacts.trained)}"
        )
    if what == "model":
        interpolation(artifacts)
    check_finished(artifacts, with_memory=what != "decoder")
    tokenizer, decoder = load_tokenizer(artifacts.tokenizer), artifacts.config.decoder
    settings = huggingface_settings(decoder, tokenizer.vocab_size, tokenizer.separator_id)
    return settings, tokenizer


def _decoder(run: Any, settings: dict[str, Any], folder: Path) -> str:
    from mlpmem_jax.interop.huggingface import save_decoder

    save_decoder(run.decoder(), folder, settings)
    return f"a decoder of the family {settings['model_type']}, for transformers"


def _model(run: "Run", settings: dict[str, Any], folder: Path) -> str:
    from mlpmem_jax.interop.exports import model_settings, save_model
    from mlpmem_jax.pipeline.networks import finished_networks

    config, weight = run.config, interpolation(run.artifacts)
    about = model_settings(settings, config.memory, config.decoder.width, _site(run), weight)
    save_model(*finished_networks(run.artifacts, run.mesh), folder, about)
    share = "λ of its gate" if weight is None else f"λ = {weight:.4g}"
    return (
        f"a decoder of the family {settings['model_type']} with its memory ({share}), for "
        "transformers with trust_remote_code=True"
    )


def _memory(run: "Run", settings: dict[str, Any], folder: Path) -> str:
    from mlpmem_jax.interop.huggingface import save_tensors
    from mlpmem_jax.interop.memories import memory_tensors, official_settings

    config, site = run.config, _site(run)
    about = official_settings(config.memory, config.decoder.width, site.kind, settings)
    save_tensors(memory_tensors(run.memory(), config.decoder.width), folder)
    (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    return (
        f"a memory in the official layout ({about['model_type']}); it reads the input of the "
        f"feed-forward layer of block {site.block} of {config.decoder.num_layers}"
    )


def _site(run: "Run") -> "Site":
    from mlpmem_jax.models.decoder import Site

    return Site.of(run.config.datastore.input, run.config.decoder.num_layers)


def _free_directory(output: str | None) -> Path:
    """Returns where to write.

    Raises:
        UserError: No directory is named, or something is there.
    """
    if output is None:
        raise UserError("export: name a new directory with --output DIR")
    folder = Path(output).absolute()
    if folder.exists() or folder.is_symlink():
        raise UserError(f"--output {output}: exists; export writes a new directory")
    if not folder.parent.is_dir() or not os.access(folder.parent, os.W_OK):
        raise UserError(
            f"--output {output}: {folder.parent} is no directory that can be written to"
        )
    return folder
