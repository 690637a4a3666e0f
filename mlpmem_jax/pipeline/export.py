"""The decoder of a run as a directory that `transformers` loads."""

import json
import os
import shutil
import tempfile
from pathlib import Path

from mlpmem_jax.console import say
from mlpmem_jax.errors import UserError
from mlpmem_jax.pipeline.execute import execute
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.options import Options


def main(run: Artifacts, options: Options) -> int:
    """Runs the command."""
    if options.dry_run:
        return execute(lambda _: [], run, options)
    export(run, _free_directory(options.output))
    return 0


def export(artifacts: Artifacts, folder: Path) -> None:
    """Writes decoder and tokenizer into a directory, whole or not at all.

    Args:
        artifacts: Those of the configuration.
        folder: A directory that does not exist.

    Raises:
        ConfigError: No family of `transformers` has such a decoder.
        ArtifactError: The decoder is missing or damaged.
    """
    from mlpmem_jax.interop.huggingface import save_decoder
    from mlpmem_jax.interop.settings import huggingface_settings
    from mlpmem_jax.pipeline.opened_run import Run

    run, config = Run(artifacts), artifacts.config
    tokenizer = run.tokenizer()
    settings = huggingface_settings(config.decoder, tokenizer.vocab_size, tokenizer.separator_id)
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.separator,
        "eos_token": tokenizer.separator,
        "model_max_length": config.decoder.context_tokens,
    }
    unfinished = Path(tempfile.mkdtemp(prefix=".export-", dir=folder.parent))
    try:
        save_decoder(run.decoder(), unfinished, settings)
        (unfinished / "tokenizer.json").write_bytes(tokenizer.to_json())
        (unfinished / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    say(f"{folder}: a decoder of the family {settings['model_type']}, for transformers")


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
