"""What `evaluate-tasks` found, as text and CSV."""

from collections.abc import Iterator, Mapping
from typing import Any

from mlpmem_jax.evaluation.table import DASH, csv_text, note_lines, number, render

Results = Mapping[str, Any]
_MODELS = {
    "decoder": "decoder alone",
    "memory": "decoder + memory",
    "knn": "decoder + kNN-LM",
    "rag": "decoder with passages (BM25)",
}
_COLUMNS = (
    "task", "version", "filter", "num_fewshot", "records", "metric", "value", "standard_error",
    "higher_is_better",
)  # fmt: skip


def _rows(results: Results) -> Iterator[dict[str, Any]]:
    for name, task in results["tasks"].items():
        shared = {key: task[key] for key in ("version", "num_fewshot", "records")}
        for metric in task["metrics"]:
            yield {"task": name, **shared, **metric}


def as_csv(results: Results) -> str:
    """Returns one line a metric, numbers in full."""
    return csv_text(_COLUMNS, _rows(results))


def as_text(results: Results) -> str:
    """Returns the table, with the model and what limits the numbers."""
    rows = [
        [
            row["task"],
            DASH if row["num_fewshot"] is None else str(row["num_fewshot"]),
            DASH if row["records"] is None else f"{row['records']:,}",
            row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})",
            number(row["value"], 4),
            DASH if row["standard_error"] is None else f"± {number(row['standard_error'], 4)}",
        ]
        for row in _rows(results)
    ]
    header = ["task", "shots", "records", "metric", "value", "standard\nerror"]
    return "\n".join([_model_line(results), render(header, rows), *note_lines(_notes(results))])


def _model_line(results: Results) -> str:
    line = _MODELS[results["model"]]
    if "interpolation" in results:
        weight = results["interpolation"]
        line += ", λ of the gate" if weight is None else f", λ = {weight:.3f}"
    if "temperature" in results:
        line += f", τ = {results['temperature']:.3g}"
    return f"{line}; lm_eval {results['lm_eval']}"


def _notes(results: Results) -> Iterator[str]:
    cut = [
        name
        for name, task in results["tasks"].items()
        if task["records"] is not None and task["records"] < task["records_of_task"]
    ]
    if cut:
        yield f"tasks.limit={results['limit']}: only the first records of {', '.join(cut)}"
