"""Tasks of lm-evaluation-harness over a finished run."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlpmem_jax.errors import ConfigError, UserError
from mlpmem_jax.pipeline.checks import check_trained_apart, check_unchanged_text
from mlpmem_jax.pipeline.evaluate import check_current
from mlpmem_jax.pipeline.execute import execute
from mlpmem_jax.pipeline.graph import Artifacts, Report
from mlpmem_jax.pipeline.interpolation import interpolation
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.recipes import Recipe, compute_dtypes
from mlpmem_jax.pipeline.reports import print_files, write_files
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.store.manifest import Artifact, Completion
from mlpmem_jax.studies.tasks.table import as_csv, as_text

NAME: Report = "evaluate-tasks"
SCHEMA_VERSION = 1
SAMPLES = "samples.jsonl"
_FILES = (f"{NAME}.json", f"{NAME}.csv", SAMPLES)
_READ_BYTES = 1 << 20


def results(run: Artifacts) -> Artifact:
    """Returns what the harness finds, in `results/`."""
    config = run.config
    tasks = config.tasks
    recipe: Recipe = {
        "seed": config.seed,
        "tasks": tasks.recipe(),
        "lm_eval": _version(),
        "task_files": _digest(tasks.include_path),
        "records": _digest(tasks.data_path),
        "generate": {"interpolation": config.generate.interpolation},
        **compute_dtypes(config, "decoder", "memory"),
    }
    return run.report(NAME, recipe, _inputs(run))


def _inputs(run: Artifacts) -> list[Artifact]:
    """Returns what the model is made from."""
    config, model = run.config, run.config.tasks.model
    joint = config.train.mode == "joint"
    inputs = [run.tokenizer, run.joint if joint else run.decoder]
    if model == "memory":
        inputs += [] if joint else [run.memory]
        chosen = config.generate.interpolation == "auto" and not config.brings_interpolation
        inputs += [run.results] if chosen else []
    if model == "knn":
        inputs += [run.datastore("train"), run.index, run.results]
    if model == "rag":
        inputs.append(run.tokens)
    return inputs


def _version() -> str | None:
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        return None


def _digest(folder: str | None) -> str | None:
    """Returns a digest of the names and contents of the files in a directory."""
    if folder is None:
        return None
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(Path(folder).rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(str(file.relative_to(folder)).encode() + b"\0")
            for piece in _pieces(file):
                digest.update(piece)
    return digest.hexdigest()


def _pieces(file: Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while piece := opened.read(_READ_BYTES):
            yield piece


def stages(run: Artifacts) -> list[Stage]:
    """Returns the one stage of this command."""
    build, check = functools.partial(_build, run), functools.partial(_check, run)
    return [Stage(results(run), build, check=check)]


def _check(run: Artifacts) -> None:
    """Refuses what is known to fail.

    Raises:
        UserError: A package is missing.
        ConfigError: A task is unknown, there is none, or no such directory or model.
        ArtifactError: λ was never chosen, or what it was chosen with was rebuilt since.
    """
    config = run.config
    check_packages(run)
    if not config.tasks.names:
        raise ConfigError("tasks.names=[]: name at least one task, as in tasks.names='[arc_easy]'")
    for key in ("include_path", "data_path"):
        path = getattr(config.tasks, key)
        if path is not None and not Path(path).is_dir():
            raise ConfigError(f"tasks.{key}={path}: is no directory")
    from mlpmem_jax.studies.tasks.harness import task_manager

    task_manager(config.tasks)
    if config.tasks.model == "knn":
        check_trained_apart(run, f"{NAME} with tasks.model=knn", "use tasks.model=memory")
        run.results.load()
        check_current(run)
    if config.tasks.model == "memory":
        interpolation(run)


def check_packages(run: Artifacts) -> None:
    """Refuses to run without the packages that are needed.

    Raises:
        UserError: One is not installed; it is named.
    """
    needed = ["lm_eval", *(["bm25s"] if run.config.tasks.model == "rag" else [])]
    for name in needed:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"{NAME}: the package {name} is not installed; install what {NAME} needs with "
                "`pip install -r requirements-tasks.txt`"
            )


def _build(run: Artifacts) -> Completion:
    from mlpmem_jax.studies.tasks.harness import evaluate_tasks, load_tasks
    from mlpmem_jax.studies.tasks.models import model_of

    config = run.config
    tasks = load_tasks(config.tasks)  # Before networks are read: records may be missing.
    model, about = model_of(run)
    found, samples = evaluate_tasks(tasks, model, config.tasks, config.seed)
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "lm_eval": _version(),
        "limit": config.tasks.limit,
        **about,
        "tasks": found,
    }
    _write(results(run), report, samples)
    return Completion(counts={"tasks": len(found)}, files=[f"{NAME}.json", SAMPLES])


def _write(artifact: Artifact, report: dict[str, Any], samples: Sequence[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(one, ensure_ascii=False, default=str) + "\n" for one in samples)
    write_files(artifact.path, dict(zip(_FILES, (report, as_csv(report), lines), strict=True)))


def main(run: Artifacts, options: Options) -> int:
    """Runs the command."""
    if run.config.tasks.model == "rag":
        why = "passages are cut from the text as it was first read"
        check_unchanged_text(run, f"{NAME} with tasks.model=rag", why)
    return execute(
        stages, run, options, report=lambda run: print_files(results(run), _FILES, as_text)
    )
