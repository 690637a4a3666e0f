"""Which λ a finished run is used with."""

from mlpmem_jax.config.schema import Config
from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.pipeline.evaluate import RESULTS
from mlpmem_jax.store.files import read_json
from mlpmem_jax.store.layout import Layout


def interpolation(config: Config) -> float | None:
    """Returns λ as configured, as trained, or as `evaluate` chose it; None: the gate's.

    Raises:
        ArtifactError: The memory is not trained, or λ was never chosen.
    """
    layout = Layout(config)
    trained = layout.trained
    if not trained.is_complete():
        raise ArtifactError(
            f"{trained.path}: the memory is not trained yet; train it with the command "
            "`train`, or generate with --without-memory"
        )
    if config.generate.interpolation != "auto":
        return config.generate.interpolation
    if config.memory.gate == "learned":
        return None
    if config.trained_interpolation is not None:
        return config.trained_interpolation
    results = layout.results
    if not results.is_complete():
        raise ArtifactError(
            f"{results.path}: generate.interpolation=auto takes λ from the results of "
            "`evaluate`, and there are none; run `evaluate`, or set generate.interpolation "
            "to a number from 0 to 1"
        )
    made_from = results.verify().made_from
    if made_from.get(trained.relative) != trained.load().fingerprint:
        raise ArtifactError(
            f"{results.path}: λ was chosen for another memory than {trained.path}; run "
            "`evaluate --rebuild`, or set generate.interpolation"
        )
    return float(read_json(results.path / RESULTS)["systems"]["memory"]["interpolation"])
