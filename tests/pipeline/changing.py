"""What tests of a training text that changes share: texts, a small run, and what it holds."""

from pathlib import Path

import numpy as np

from mlpmem_jax.__main__ import main
from mlpmem_jax.config.load import load_config
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.resolve import resolved
from mlpmem_jax.retrieval.distances import squared_distances
from mlpmem_jax.retrieval.merge import sort_neighbors
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.stored_array import StoredArray

WORDS = ["river", "stone", "cloud", "winter", "open", "under", "the", "a", "of", "light"]
TEMPLATE = """\
workdir: {folder}/run
corpus:
  source: text
  paths: [{folder}/base/*.txt]
  valid_fraction: 0.2
  test_fraction: 0.15
  attention: within
tokenizer: {{vocab_size: 300}}
decoder: {{width: 32, num_layers: 2, num_heads: 2, context_tokens: 32}}
memory: {{width: 32, num_layers: 2, recent_tokens: 3}}
datastore: {{batch_size: 16, shard_rows: 512, chunk_rows: 32}}
retrieval: {{engine: exact, num_neighbors: 12, recall_queries: 1000, keep_train: all}}
targets: {{num_tokens: 8}}
pretrain: {{num_steps: 4, batch_size: 4, loss_chunk_tokens: 64, eval_batches: 1}}
train: {{num_steps: 4, batch_size: 4, loss_chunk_tokens: 64, eval_batches: 1}}
evaluate: {{bootstrap_samples: 100, latency_tokens: 4}}
"""


def write_documents(folder: Path, numbers: range, *, lines: int = 12) -> list[Path]:
    """Writes one document a file, each with a line that no other has."""
    folder.mkdir(exist_ok=True)
    files = []
    for number in numbers:
        draw = np.random.default_rng(number)
        text = [" ".join(draw.choice(WORDS, 7)) for _ in range(lines)]
        text[lines // 2] = f"zq{number}x{number}zq the code of this text"
        files.append(folder / f"{number:03}.txt")
        files[-1].write_text("\n".join(text) + "\n")
    return files


def write_base(folder: Path) -> Path:
    """Writes a configuration and the text that it names; returns the file."""
    write_documents(folder / "base", range(40))
    (folder / "config.yaml").write_text(TEMPLATE.format(folder=folder))
    return folder / "config.yaml"


def call(command: str, config: Path | str, *more: str) -> int:
    return main([command, "--config", str(config), *more])


def make_base(config: Path) -> None:
    """Makes everything up to the targets."""
    for command in ("tokenize", "pretrain", "embed", "index", "retrieve"):
        assert call(command, config) == 0


def artifacts(config: Path | str, *overrides: str) -> Artifacts:
    return Artifacts(resolved(load_config(str(config), overrides, {})))


def arrays(artifact: Artifact) -> dict[str, np.ndarray]:
    return {name: StoredArray(artifact, name).read_all() for name in artifact.load().arrays}


def searched(
    query_QD: np.ndarray, key_ND: np.ndarray, num_neighbors: int, own: bool
) -> dict[str, np.ndarray]:
    """Returns the nearest keys by plain search, a query at a time."""
    key_ND = key_ND.astype(np.float32)
    place_1N = np.arange(len(key_ND))[None]
    rows, distances = [], []
    for number, query_D in enumerate(query_QD.astype(np.float32)):
        distance_1N = squared_distances(query_D[None], key_ND, place_1N)
        if own:
            distance_1N[0, number] = np.inf
        found = sort_neighbors(distance_1N, place_1N)
        rows.append(found.row_QK[0, :num_neighbors])
        distances.append(found.distance_QK[0, :num_neighbors])
    return {"row": np.stack(rows), "distance": np.stack(distances)}
