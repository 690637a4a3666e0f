"""What tests of `tokenize` share: a tiny corpus, settings, and what a run leaves."""

from pathlib import Path
from typing import Any

import numpy as np

from mlpmem_jax.commands import run_command
from mlpmem_jax.config.schema import Config
from mlpmem_jax.corpus import writer
from mlpmem_jax.pipeline import tokenize
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.sources import Sources
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.store import array_specs
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.run_record import ARTIFACTS, FILE, RUNS, RunRecord

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


def planned(values: dict[str, Any]) -> list[Stage]:
    """Returns the stages of `tokenize`; the text is read, and nothing is written."""
    config = Config(**values)
    return tokenize.stages(Artifacts(config, Sources(config.workdir, reads=True)))


def make(values: dict[str, Any]) -> Artifacts:
    """Runs `tokenize`; returns the artifacts that it has made or found."""
    config = Config(**values)
    assert run_command("tokenize", config, Options(workdir=config.workdir)) == 0
    run = Artifacts(config)
    assert run.tokens.is_complete()  # Known from here on, whatever becomes of the text.
    return run


def contents(workdir: Path) -> dict[str, bytes]:
    """Everything that must be the same in two runs, by path; what `run.json` names, by role."""
    roles = {relative: role for role, relative in RunRecord.read(workdir).roles.items()}
    found = {}
    for path in sorted(workdir.rglob("*")):
        parts = path.relative_to(workdir).parts
        if not path.is_file() or parts[:2] == (ARTIFACTS, RUNS):
            continue
        if path.name in ("manifest.json", "text-digests.json", "config.yaml", FILE):
            continue
        if path.suffix == ".mlpmem-tmp":
            continue
        role = roles.get("/".join(parts[1:3])) if parts[0] == ARTIFACTS else None
        name = "/".join(parts) if role is None else "/".join((role, *parts[3:]))
        found[name] = path.read_bytes()
    return found


def files_of(artifact: Artifact) -> dict[str, bytes]:
    """All files of an artifact, its records included."""
    folder = Path(artifact.path)
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def failing_at(call: int) -> Any:
    calls = iter(range(1, 1000))
    real = writer.TokenWriter.save

    def save(self: Any) -> None:
        if next(calls) == call:
            raise OSError(28, "No space left on device")
        real(self)

    return save
