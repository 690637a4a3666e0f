"""The table: decoder, + kNN-LM, + memory on held-out text."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from mlpmem_jax.errors import StaleArtifact
from mlpmem_jax.pipeline import exact_sample, needs, train
from mlpmem_jax.pipeline.checks import check_devices, check_keys
from mlpmem_jax.pipeline.execute import execute
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.reports import print_files, write_files
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.store.array_specs import SPLITS
from mlpmem_jax.store.differences import differences
from mlpmem_jax.store.manifest import Artifact, Completion

# Scores, counts and curves: a function of the run directory, bit for bit on CPU.
RESULTS = "evaluate.json"
# Times, which differ from one run to the next.
MEASURED = "measured.json"
TABLE = "evaluate.csv"
PICTURE = "evaluate.png"


def stages(run: Artifacts) -> list[Stage]:
    """Returns the one stage of this command."""
    return [
        Stage(
            artifact=run.results,
            upstream=functools.partial(_upstream, run),
            build=functools.partial(_build, run),
            check=functools.partial(_check, run),
            estimate=functools.partial(_estimate, run),
            need=functools.partial(needs.evaluation_need, run),
            is_report=True,
        )
    ]


def _check(run: Artifacts) -> None:
    check_keys(run)
    # Windows of a decoder that was trained jointly are those of `embed`.
    check_devices(run, "datastore" if run.config.train.mode == "joint" else "evaluate")


def _upstream(run: Artifacts) -> Sequence[Artifact]:
    """Returns the inputs of the results; asked once the stages before are done.

    Raises:
        StaleArtifact: One was made from an earlier build of another; the results that there are
            stay.
    """
    inputs = run.results.inputs
    if all(artifact.is_complete() for artifact in inputs):
        _refuse_mixed(inputs)
    return inputs


def _refuse_mixed(inputs: Sequence[Artifact]) -> None:
    """Refuses artifacts of which one was made from an earlier build of another.

    Raises:
        StaleArtifact: Names both, with the fingerprints of the other then and now.
    """
    now = {artifact.relative: artifact for artifact in inputs}
    for artifact in inputs:
        then = {
            name: fingerprint
            for name, fingerprint in artifact.load().made_from.items()
            # A teacher's targets are made from what lies in its own store.
            if name in now and now[name].root == artifact.root
        }
        lines = differences(then, {name: now[name].load().fingerprint for name in then})
        if lines:
            raise StaleArtifact(
                f"{artifact.path}: {artifact.label} is stale, built from another "
                f"{'; '.join(lines)}; rebuild it with `{artifact.command} --rebuild`"
            )


def check_current(run: Artifacts) -> None:
    """Refuses results from which something else would take λ and τ, and that are stale.

    Raises:
        ArtifactError: An input was rebuilt since; it is named.
    """
    artifact = run.results
    if artifact.is_complete():
        artifact.status({one.relative: one.load().fingerprint for one in artifact.inputs})


def _estimate(run: Artifacts) -> Mapping[str, Any]:
    rows = run.config.evaluate.knn_valid_rows
    return {"neighbours of validation rows": "all" if rows is None else f"at most {rows:,}"}


def _build(run: Artifacts) -> Completion:
    from mlpmem_jax.evaluation.picture import draw
    from mlpmem_jax.evaluation.report import as_csv
    from mlpmem_jax.parallel.mesh import make_mesh
    from mlpmem_jax.pipeline.scoring import evaluate_run

    found, latency = evaluate_run(run, make_mesh(run.config.mesh))
    measured = {"latency_ms": latency}
    path = run.results.path
    files = {RESULTS: found, MEASURED: measured, TABLE: as_csv(found, measured)}
    write_files(path, files | {PICTURE: draw(found)})
    memory = found["systems"]["memory"]
    counts = {"test_tokens": found["test"]["tokens"], "test_nats": memory["test_nats"]}
    return Completion(counts=counts, files=[RESULTS], measured=measured)


def print_report(run: Artifacts) -> None:
    """Prints the table of finished results, the time of each stage, and where files lie."""
    from mlpmem_jax.evaluation.report import as_text

    artifact = run.results
    measured = {**artifact.load().measured, "seconds": stage_seconds(run)}
    print_files(artifact, (RESULTS, TABLE, PICTURE), lambda found: as_text(found, measured))


def stage_seconds(run: Artifacts) -> dict[str, float]:
    """Returns how long each command took, by the manifests that there are."""
    artifacts: list[Artifact] = [
        run.tokenizer,
        run.tokens,
        run.decoder,
        *(run.datastore(split) for split in SPLITS),
        run.index,
        *(run.neighbors(split) for split in SPLITS),
        *exact_sample.artifacts(run),
        *(run.targets(split) for split in ("train", "valid")),
        *(stage.artifact for stage in train.stages(run)),  # All phases of a joint run.
        run.results,
    ]
    seconds: dict[str, float] = {}
    for artifact in artifacts:
        if artifact.is_complete():
            spent = float(artifact.load().measured.get("seconds", 0.0))
            seconds[artifact.command] = seconds.get(artifact.command, 0.0) + spent
    return seconds


def main(run: Artifacts, options: Options) -> int:
    """Runs the command."""
    return execute(stages, run, options, report=print_report)
