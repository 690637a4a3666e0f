"""Finds tasks of lm-evaluation-harness and runs them; importing this module needs lm_eval."""

import contextlib
import difflib
import functools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Bootstraps in processes forked from one with JAX's threads may hang; read when it is imported.
os.environ.setdefault("LMEVAL_DISABLE_MULTIPROC", "1")

import datasets
from lm_eval import simple_evaluate
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from mlpmem_jax.config.tasks import TasksConfig
from mlpmem_jax.errors import ConfigError, UserError
from mlpmem_jax.studies.tasks.adapter import HarnessModel
from mlpmem_jax.studies.tasks.text_model import TextModel

DEFINITIONS = Path(__file__).parent / "definitions"
_BOOTSTRAPS = 1000  # of metrics whose standard error has no formula
_SUGGESTIONS = 5


def load_tasks(config: TasksConfig) -> list[Task | Group]:
    """Loads tasks with their records; groups stay together, tags are the tasks that have them.

    Raises:
        ConfigError: A name is unknown.
        UserError: A task cannot be loaded.
    """
    datasets.disable_progress_bars()
    manager = task_manager(config)
    found: dict[str, Task | Group] = {}
    for name in config.names:
        with _told_of(name):
            loaded = manager.load([name])
        groups = loaded.get("groups", {})
        found |= {name: groups[name]} if name in groups else loaded["tasks"]
    with _told_of(", ".join(config.names)):
        manager.load(list(found.values()))  # Refuses a task that is in two groups.
    return list(found.values())


@contextlib.contextmanager
def _told_of(name: str) -> Iterator[None]:
    """Names the task in whatever goes wrong: task files are code of others."""
    try:
        yield
    except UserError as error:
        raise UserError(f"tasks.names: {name}: {error}") from None
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        raise UserError(f"tasks.names: {name} cannot be loaded ({message})") from error


@functools.lru_cache(maxsize=1)
def task_manager(config: TasksConfig) -> TaskManager:
    """Returns what knows the tasks: the harness's own take half a minute, so only if asked for.

    Raises:
        ConfigError: A name is unknown.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    paths = [str(DEFINITIONS), *([config.include_path] if config.include_path else [])]
    about = {} if config.data_path is None else {"data_path": config.data_path}
    for defaults in (False, True):
        manager = TaskManager(include_path=paths, include_defaults=defaults, metadata=about)
        unknown = [name for name in config.names if name not in manager.task_index]
        if not unknown:
            return manager
    raise ConfigError([_unknown(name, manager.all_tasks) for name in unknown])


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=_SUGGESTIONS)
    hint = f"did you mean {', '.join(near)}?" if near else "lm_eval ls tasks lists those there are"
    return f"tasks.names: {name} is no task of lm-evaluation-harness or tasks.include_path; {hint}"


def evaluate_tasks(
    tasks: Sequence[Task | Group], model: TextModel, config: TasksConfig, seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Evaluates a model.

    Args:
        tasks: Loaded tasks and groups.
        seed: Of the examples in prompts and of the bootstrap.

    Returns:
        By task and group: version, number of records (None of groups), examples in prompts, and
        metrics with standard error; and what each record gave.
    """
    found = simple_evaluate(
        model=HarnessModel(model),
        tasks=list(tasks),
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        bootstrap_iters=_BOOTSTRAPS,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    assert found is not None  # of the first process, and there is one
    return {name: _task(name, found) for name in found["results"]}, list(_samples(found))


def _task(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    values = found["results"][name]
    higher = found["higher_is_better"].get(name, {})
    metrics = []
    for key, value in values.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr"):
            continue
        error = values.get(f"{metric}_stderr,{filtered}")
        metrics.append(
            {
                "metric": metric,
                "filter": filtered,
                "value": _number(value),
                "standard_error": _number(error),
                "higher_is_better": higher.get(metric),
            }
        )
    counts = found["n-samples"].get(name, {})
    return {
        "version": found["versions"].get(name),
        "num_fewshot": found["n-shot"].get(name),
        "records": counts.get("effective"),
        "records_of_task": counts.get("original"),
        "metrics": metrics,
    }


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _samples(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name, samples in found["samples"].items():
        for sample in samples:
            yield {
                "task": name,
                "record": sample["doc_id"],
                "prompt": sample["arguments"][0][0],
                "target": sample["target"],
                "answers": sample["filtered_resps"],
                "filter": sample["filter"],
                **{metric: sample[metric] for metric in sample["metrics"]},
            }
