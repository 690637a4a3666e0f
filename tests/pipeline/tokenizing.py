"""What tests of `tokenize` share: a tiny corpus, settings, and what a run leaves."""

from pathlib import Path
from typing import Any

import numpy as np

from mlpmem_jax.config.schema import Config
from mlpmem_jax.corpus import writer
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.stage import run_stages
from mlpmem_jax.pipeline.tokenize import stages
from mlpmem_jax.store import array_specs

WORDS = ["def", "class", "return", "for", "'é'", "🙂", "value", "(", ")", ":", "<|endoftext|>"]


def shrink(assign: Any) -> None:
    """Makes shards and batches so small that a tiny corpus has many."""
    assign(array_specs, "TOKEN_SHARD_ROWS", 256)
    assign(array_specs, "TOKEN_CHUNK_ROWS", 64)
    assign(array_specs, "DOCUMENT_SHARD_ROWS", 16)
    assign(array_specs, "DOCUMENT_CHUNK_ROWS", 8)
    assign(writer, "_batch_bytes", lambda: 1500)


def write_corpus(folder: Path) -> None:
    draw = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(60):
        lines = [" ".join(draw.choice(WORDS, 6)) for _ in range(draw.integers(1, 20))]
        (folder / f"{number:02}.txt").write_text("\n".join(lines) + "\n")


def settings(tmp_path: Path, workdir: str = "run", **changes: Any) -> dict[str, Any]:
    corpus = {
        "source": "text",
        "paths": [f"{tmp_path}/text/*.txt"],
        "valid_fraction": 0.1,
        "test_fraction": 0.15,
        **changes.pop("corpus", {}),
    }
    return {
        "workdir": str(tmp_path / workdir),
        "corpus": corpus,
        "tokenizer": {"vocab_size": 300, **changes.pop("tokenizer", {})},
        "decoder": {"context_tokens": 32, **changes.pop("decoder", {})},
        **changes,
    }


def make(values: dict[str, Any]) -> Artifacts:
    config = Config(**values)
    run_stages(stages(config))
    return Artifacts(config)


def contents(workdir: Path) -> dict[str, bytes]:
    """Everything that must be the same in two runs, by path."""
    return {
        str(path.relative_to(workdir)): path.read_bytes()
        for path in sorted(workdir.rglob("*"))
        if path.is_file()
        and path.name not in ("manifest.json", "text-digests.json")
        and path.suffix != ".mlpmem-tmp"
    }


def failing_at(call: int) -> Any:
    calls = iter(range(1, 1000))
    real = writer.TokenWriter.save

    def save(self: Any) -> None:
        if next(calls) == call:
            raise OSError(28, "No space left on device")
        real(self)

    return save
