"""Where the artifacts of a work directory lie, by the role that its `run.json` gives them."""

from pathlib import Path

from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.run_record import RunRecord


def place_of(workdir: Path | str, role: str) -> Path:
    """Returns the directory of an artifact, of the table of `evaluate` for "results"."""
    if role == "results":
        (found,) = (Path(workdir) / "results").glob("evaluate-*")
        return found
    return Path(RunRecord.read(workdir).artifact(role, "test").path)


def metrics_file(run: Artifacts, artifact: Artifact) -> Path:
    """Returns the file of the training metrics of a network."""
    name = artifact.relative.replace("/", "-")
    return Path(run.workdir) / "results" / "metrics" / name / "metrics.jsonl"
