"""The memory of a run, read from files of a trained one in place of training it."""

import functools
import json
from pathlib import Path
from typing import Any

from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.store.manifest import Completion


def import_stage(run: Artifacts, path: str) -> Stage:
    """Returns the stage that imports `memory.pretrained`."""
    run.sources.weights(path, again=True)  # Weights that changed are another memory.
    return Stage(
        artifact=run.memory,
        build=functools.partial(_import, run, path),
        check=functools.partial(_check, run, path),
        estimate=lambda: {"model flops": 0.0},
    )


def _check(run: Artifacts, path: str) -> None:
    """Compares files, decoder and tokenizer, before text is read where the tokenizer is given."""
    from mlpmem_jax.corpus.tokenizer import read_tokenizer
    from mlpmem_jax.interop.memories import checked_memory_tensors
    from mlpmem_jax.pipeline.networks import vocab_size

    config = run.config
    if config.tokenizer.path is not None:
        given = read_tokenizer(config.tokenizer.path, config.tokenizer.separator)
        size = given.vocab_size
    elif run.tokens.is_complete():
        size = vocab_size(run)
    else:
        return
    rows = _decoder_rows(config.decoder.pretrained)
    checked_memory_tensors(path, config.memory, config.decoder.width, size, rows)


def _import(run: Artifacts, path: str) -> Completion:
    from mlpmem_jax.interop.memories import load_memory
    from mlpmem_jax.parallel.mesh import make_mesh
    from mlpmem_jax.pipeline.network_stage import save_imported
    from mlpmem_jax.pipeline.networks import vocab_size

    config = run.config
    mesh, size = make_mesh(config.mesh), vocab_size(run)
    rows = _decoder_rows(config.decoder.pretrained)
    memory = load_memory(path, config.memory, config.decoder.width, size, mesh, rows)
    return save_imported(memory, run.memory, mesh, size, path)


def _decoder_rows(path: str | None) -> int | None:
    """Returns the embeddings of an imported decoder, spare ones included, by its `config.json`."""
    file = Path(path or "").expanduser() / "config.json"
    if path is None or not file.is_file():
        return None
    about: Any = json.loads(file.read_bytes())
    rows = about.get("vocab_size") if isinstance(about, dict) else None
    return rows if isinstance(rows, int) else None
