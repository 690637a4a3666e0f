"""The table: decoder, + kNN-LM, + memory on held-out text."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from mlpmem_jax.config.schema import Config
from mlpmem_jax.console import is_speaker, say
from mlpmem_jax.errors import MadeOtherwise
from mlpmem_jax.parallel.hardware import Machine
from mlpmem_jax.pipeline import embed, train
from mlpmem_jax.pipeline.checks import check_devices, check_keys
from mlpmem_jax.pipeline.execute import execute_and_report
from mlpmem_jax.pipeline.fitting import Need, RowCounter
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.stats.bootstrap import INTERVALS
from mlpmem_jax.store.array_specs import SPLITS
from mlpmem_jax.store.files import read_json, write_bytes, write_json
from mlpmem_jax.store.layout import Layout
from mlpmem_jax.store.manifest import Artifact, Completion, differences

# Scores, counts and curves: a function of the run directory, bit for bit on CPU.
RESULTS = "evaluate.json"
# Times, which differ from one run to the next.
MEASURED = "measured.json"
TABLE = "evaluate.csv"
PICTURE = "evaluate.png"


def recipe(config: Config) -> dict[str, Any]:
    """Returns what decides the results, besides what they are about."""
    return {
        "seed": config.seed,
        "evaluate": config.evaluate.recipe() | {"intervals": INTERVALS},
        # Whose λ is used; what the networks are is said by what the results are made from.
        "train": {"mode": config.train.mode, "interpolation": config.trained_interpolation},
        "memory": {"gate": config.memory.gate, "compute_dtype": config.memory.compute_dtype},
        # What the run must have been made with; see `_refuse_other_settings`.
        **_asked(config),
    }


def _asked(config: Config) -> dict[str, Any]:
    return {
        "retrieval": {"num_neighbors": config.retrieval.num_neighbors},
        **embed.recipe(config),
    }


def _refuse_other_settings(config: Config) -> None:
    """Refuses stored rows and neighbours that were made otherwise than the configuration says.

    Raises:
        MadeOtherwise: Names the artifact, the keys, and both values of each.
    """
    layout, asked = Layout(config), _asked(config)
    for split in ("valid", "test"):
        for artifact in (layout.datastore(split), layout.neighbors(split)):
            recipe = artifact.load().recipe
            known = {
                section: {key: value for key, value in of.items() if key in asked[section]}
                for section, of in recipe.items()
                if section in asked
            }
            wanted = {
                section: {key: asked[section][key] for key in of} for section, of in known.items()
            }
            _refuse(artifact, differences(known, wanted))


def _refuse_mixed(upstream: Sequence[Artifact]) -> None:
    """Refuses artifacts of which one was made from an earlier version of another.

    Raises:
        MadeOtherwise: Names both, with the fingerprints of the other then and now.
    """
    now = {artifact.relative: artifact for artifact in upstream}
    for artifact in upstream:
        then = {
            name: fingerprint
            for name, fingerprint in artifact.load().made_from.items()
            # A teacher's targets are made from what lies in its own run directory.
            if name in now and now[name].workdir == artifact.workdir
        }
        _refuse(artifact, differences(then, {name: now[name].load().fingerprint for name in then}))


def _refuse(artifact: Artifact, lines: Sequence[str]) -> None:
    if lines:
        raise MadeOtherwise(
            f"{artifact.path}: was made otherwise: {'; '.join(lines)}; give the settings that it "
            f"was made with, or make it again with `{artifact.command} --rebuild`"
        )


def stages(config: Config) -> list[Stage]:
    """Returns the one stage of this command."""
    layout = Layout(config)
    return [
        Stage(
            artifact=layout.results,
            recipe=recipe(config),
            upstream=functools.partial(_upstream, config),
            build=functools.partial(_build, config),
            check=functools.partial(_check, config),
            estimate=functools.partial(_estimate, config),
            need=functools.partial(_need, config),
            is_report=True,
        )
    ]


def _check(config: Config) -> None:
    check_keys(config)
    check_devices(config, _batches(config))


def _upstream(config: Config) -> Sequence[Artifact]:
    """Returns what the results are made from; asked once the stages before are done.

    Raises:
        MadeOtherwise: Something of it was; the results that there are stay.
        ArtifactError: The memory has another shape, or was trained with another λ; they stay too.
    """
    layout = Layout(config)
    upstream: Sequence[Artifact] = (
        layout.tokens,
        layout.decoder,
        *(layout.datastore(split) for split in SPLITS),
        layout.index,
        layout.neighbors("valid"),
        layout.neighbors("test"),
        layout.targets("valid"),
        layout.trained,
    )
    if all(artifact.is_complete() for artifact in upstream):
        from mlpmem_jax.training.networks import check_interpolation, check_shape

        _refuse_mixed(upstream)
        _refuse_other_settings(config)
        check_shape(config, layout.trained, "memory")
        check_interpolation(config, layout.trained)
    return upstream


def check_current(config: Config) -> None:
    """Refuses results from which something else would take λ and τ, and that are not of this run.

    Raises:
        MadeOtherwise: Decoder, memory or datastore were made anew since; it is named.
        ArtifactError: The memory was trained with another λ than the configuration's.
    """
    from mlpmem_jax.training.networks import check_interpolation

    layout = Layout(config)
    if layout.trained.is_complete():
        check_interpolation(config, layout.trained)
    if not layout.results.is_complete():
        return
    made_from = layout.results.load().made_from
    for artifact in (layout.decoder, layout.datastore("train"), layout.trained):
        now = artifact.load().fingerprint
        if made_from.get(artifact.relative) != now:
            raise MadeOtherwise(
                f"{layout.results.path}: λ and τ were chosen with another {artifact.path} "
                f"({made_from.get(artifact.relative)}, now {now}); run `evaluate --rebuild`"
            )


def _batches(config: Config) -> str:
    """Returns the section whose batches are cut over the mesh."""
    return "datastore" if config.train.mode == "joint" else "evaluate"


def _estimate(config: Config) -> Mapping[str, Any]:
    rows = config.evaluate.knn_valid_rows
    return {"neighbours of validation rows": "all" if rows is None else f"at most {rows:,}"}


def _build(config: Config) -> Completion:
    from mlpmem_jax.evaluation.picture import draw
    from mlpmem_jax.evaluation.report import as_csv
    from mlpmem_jax.parallel.mesh import make_mesh
    from mlpmem_jax.pipeline.scoring import evaluate_run

    mesh = make_mesh(config.mesh)
    results, latency = evaluate_run(config, mesh)
    measured = {"latency_ms": latency}
    path = Layout(config).results.path
    if is_speaker():
        write_json(path / RESULTS, results)
        write_json(path / MEASURED, measured)
        write_bytes(path / TABLE, as_csv(results, measured).encode())
        write_bytes(path / PICTURE, draw(results))
    memory = results["systems"]["memory"]
    counts = {"test_tokens": results["test"]["tokens"], "test_nats": memory["test_nats"]}
    return Completion(counts=counts, files=[RESULTS], measured=measured)


def print_report(config: Config) -> None:
    """Prints the table of finished results, the time of each stage, and where files lie."""
    from mlpmem_jax.evaluation.report import as_text

    layout = Layout(config)
    path = layout.results.path
    measured = {**layout.results.verify().measured, "seconds": stage_seconds(config)}
    say()
    say(as_text(read_json(path / RESULTS), measured))
    say()
    for name in (RESULTS, TABLE, PICTURE):
        say(f"  {path / name}")
    say()


def stage_seconds(config: Config) -> dict[str, float]:
    """Returns how long each command took, by the manifests that there are."""
    layout = Layout(config)
    artifacts: list[Artifact] = [
        layout.tokenizer,
        layout.tokens,
        layout.decoder,
        *(layout.datastore(split) for split in SPLITS),
        layout.index,
        *(layout.neighbors(split) for split in SPLITS),
        *(layout.targets(split) for split in SPLITS),
        *(stage.artifact for stage in train.stages(config)),  # All phases of a joint run.
        layout.results,
    ]
    seconds: dict[str, float] = {}
    for artifact in artifacts:
        if artifact.is_complete():
            spent = float(artifact.load().measured.get("seconds", 0.0))
            seconds[artifact.command] = seconds.get(artifact.command, 0.0) + spent
    return seconds


def _need(config: Config, machine: Machine, count: RowCounter) -> Need:
    from mlpmem_jax.pipeline.needs import evaluation_need

    return evaluation_need(config, machine, count)


def main(config: Config, options: Options) -> int:
    """Runs the command."""
    return execute_and_report(stages, print_report, config, options)
