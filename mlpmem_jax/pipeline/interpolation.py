"""Which λ a finished run is used with."""

from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.pipeline.evaluate import RESULTS, check_current
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.store import nearest
from mlpmem_jax.store.files import read_json


def check_finished(run: Artifacts, *, with_memory: bool) -> None:
    """Refuses a run without the artifacts that its model is read from.

    Raises:
        ArtifactError: Tokenizer or tokens, the decoder, or the memory is missing.
    """
    joint = run.config.train.mode == "joint"
    networks = [run.joint] if joint else [run.decoder, *([run.memory] if with_memory else [])]
    for artifact in (run.tokenizer, run.tokens, *networks):
        artifact.load()


def interpolation(run: Artifacts) -> float | None:
    """Returns λ as configured, as trained, or as `evaluate` chose it; None: the gate's.

    Raises:
        ArtifactError: The memory is not trained, or λ was never chosen.
    """
    config, trained = run.config, run.trained
    if not trained.is_complete():
        raise ArtifactError(
            f"{trained.path}: the memory is not trained yet; train it with the command "
            f"`train`, or use the decoder alone with --without-memory{nearest.in_words(trained)}"
        )
    if config.generate.interpolation != "auto":
        return config.generate.interpolation
    if config.memory.has_gate:
        return None
    if config.trained_interpolation is not None:
        return config.trained_interpolation
    artifact = run.results
    if not artifact.is_complete():
        raise ArtifactError(
            f"{artifact.path}: generate.interpolation=auto takes λ from the results of "
            "`evaluate`, and there are none; run `evaluate`, or set generate.interpolation "
            "to a number from 0 to 1"
        )
    check_current(run)
    artifact.verify()
    return float(read_json(artifact.path / RESULTS)["systems"]["memory"]["interpolation"])
