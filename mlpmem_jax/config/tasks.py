"""The section of the command `evaluate-tasks`."""

from typing import Literal

from mlpmem_jax.config.base import Section, runtime, setting
from mlpmem_jax.config.types import (
    Count,
    ListOf,
    NonNegativeInt,
    PathText,
    PositiveInt,
    Text,
    Tokens,
)

TaskModel = Literal["decoder", "memory", "knn", "rag"]


class TasksConfig(Section):
    """Tasks of lm-evaluation-harness."""

    names: ListOf[Text] = setting(
        (), "tasks, groups or tags: of the harness, of include_path, or this package's (mlpmem_…)"
    )
    model: TaskModel = setting(
        "memory",
        "decoder: alone; memory: with it; knn: with the explicit kNN-LM; rag: passages of the "
        "training text before each prompt (BM25)",
    )
    limit: PositiveInt | None = setting(None, "records of each task, the first; not set: all")
    num_fewshot: NonNegativeInt | None = setting(
        None, "examples in each prompt; not set: as the task has it"
    )
    include_path: PathText | None = runtime(
        None, "directory with task files of your own, and what they read"
    )
    data_path: PathText | None = runtime(
        None, "directory with the records of this package's tasks, as NAME.jsonl, .json, .csv, .tsv"
    )
    batch_size: Count = runtime(16, "rows scored, or texts continued, at the same time")
    passages: Count = setting(3, "model=rag: passages before a prompt, as far as they fit")
    passage_tokens: Tokens = setting(128, "model=rag: tokens of a passage")
