"""The package's task files in the harness itself, over a model that follows a rule."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlpmem_jax.config.tasks import TasksConfig
from mlpmem_jax.errors import ConfigError, UserError
from mlpmem_jax.studies.tasks.scoring import Score

pytest.importorskip("lm_eval", reason="lm_eval is not installed (requirements-tasks.txt)")
QUESTION = {"question": "What is it", "answer": ["x", "y"]}
PAIR = {"premise": "P", "hypothesis": "H"}
RECORDS: dict[str, list[dict[str, Any]]] = {
    "nq": [QUESTION],
    "triviaqa": [QUESTION],
    "webqa": [QUESTION],
    "hotpotqa": [{"question": "Is it?", "answer": "yes"}],
    "truthfulqa": [
        {"Question": "What?", "Best Answer": "A", "Correct Answers": "A; Bb",
         "Incorrect Answers": "Ccc"},
    ],
    "halueval_qa": [
        {"knowledge": "K", "question": "Q", "right_answer": "R", "hallucinated_answer": "H"},
    ],
    "halueval_dialogue": [
        {"knowledge": "K", "dialogue_history": "D", "right_response": "R",
         "hallucinated_response": "H"},
    ],
    "halueval_summarization": [
        {"document": "D", "right_summary": "R", "hallucinated_summary": "H"},
    ],
    "strategyqa": [{"question": "Is it?", "answer": True}],
    "sst2": [{"level": "5", "text": "good"}, {"level": "3", "text": "middling"}],
    "mr": [{"label": 1, "text": "fine"}, {"label": 0, "text": "bad"}],
    "cr": [{"label": 1, "text": "fine"}],
    "rt": [{"input": "dull", "output": "negative"}],
    "hyp": [{"label": 0, "text": "news"}],
    "rte": [PAIR | {"label": "not_entailment"}],
    "cb": [PAIR | {"label": "neutral"}],
    "yahoo": [{"question_title": "T", "question_content": "C", "best_answer": "A", "topic": 9}],
    "agn": [{"Class Index": "4", "Title": "T", "Description": "D"}],
}  # fmt: skip
NAMES = [
    "mlpmem_nq", "mlpmem_nq_published", "mlpmem_hotpotqa", "mlpmem_hotpotqa_published",
    "mlpmem_triviaqa", "mlpmem_triviaqa_published", "mlpmem_webqa", "mlpmem_webqa_published",
    "mlpmem_truthfulqa", "mlpmem_halueval", "mlpmem_strategyqa", "mlpmem_classification",
]  # fmt: skip


class Ruled:
    """A continuation loses a nat a letter, less after long contexts; it writes ` yes, x`."""

    context_tokens = 64
    tokenizer = SimpleNamespace(separator_id=0, content_digest=lambda: "none")

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def extended_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        return list(pairs)

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        return [Score(-len(rest) / len(context), False) for context, rest in pairs]

    def write(self, prompts: Sequence[tuple[str, Any]]) -> list[str]:
        self.asked += prompts
        return [" yes, x" for _ in prompts]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    for name, records in RECORDS.items():
        if name == "sst2":
            text = "".join(f"{record['level']}\t{record['text']}\n" for record in records)
            (folder / "sst2.tsv").write_text(text, encoding="utf-8")
            continue
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def found(data: str) -> tuple[dict[str, dict[str, float]], Any, Ruled]:
    from mlpmem_jax.studies.tasks.harness import evaluate_tasks, load_tasks

    config, model = TasksConfig(names=tuple(NAMES), data_path=data), Ruled()
    tasks, samples = evaluate_tasks(load_tasks(config), model, config, seed=0)  # type: ignore[arg-type]
    values = {
        name: {metric["metric"]: metric["value"] for metric in task["metrics"]}
        for name, task in tasks.items()
    }
    return values, samples, model


def test_question_answering(found: Any):
    values, _, model = found
    assert values["mlpmem_nq"] == {"em": 0.0, "f1": pytest.approx(2 / 3)}
    assert values["mlpmem_nq_published"] == values["mlpmem_nq"]
    assert values["mlpmem_hotpotqa"] == {"em": 0.0, "f1": 0.0}
    assert values["mlpmem_hotpotqa_published"] == {"em": 0.0, "f1": 1.0}
    for name in ("triviaqa", "webqa"):
        assert values[f"mlpmem_{name}"] == {"has_answer": 1.0}
        assert values[f"mlpmem_{name}_published"] == {"has_answer": 1.0}
    lengths = [how["max_gen_toks"] for _, how in model.asked]
    assert lengths == [15, 16, 15, 16, 100, 101, 100, 101]
    assert [bool(how.get("ignore_eos")) for _, how in model.asked] == [False, True] * 4
    assert [how["until"] for _, how in model.asked[3:6]] == [["\n"], ["\n", ".", ","], []]


def test_multiple_choice(found: Any):
    values, samples, _ = found
    # Shorter answers are more probable.
    assert values["mlpmem_truthfulqa"]["mc1"] == 1.0
    assert values["mlpmem_truthfulqa"]["mc3"] == 1.0
    assert values["mlpmem_strategyqa"] == {"acc": 0.0}
    for name in ("qa", "dialogue", "summarization"):
        assert values[f"mlpmem_halueval_{name}"] == {"acc": 0.5}
    [sample] = [one for one in samples if one["task"] == "mlpmem_truthfulqa"]
    assert len(sample["answers"]) == 4


def test_classification_after_prompt_and_domain_premise(found: Any):
    values, samples, _ = found
    names = [name for name in values if len(values[name]) == 3 and "truthful" not in name]
    assert len(names) == 9
    [good] = [one for one in samples if one["task"] == "mlpmem_sst2"]  # the middle is left out
    words, prompt, domain = (" terrible", " great"), "good It was", " It was"
    expected = [-len(word) / len(text) for text in (prompt, domain) for word in words]
    assert [logprob for logprob, _ in good["answers"]] == pytest.approx(expected)
    # The longer word gains more from the text.
    assert values["mlpmem_sst2"]["acc"] == 1.0
    assert values["mlpmem_sst2"]["dcpmi"] == 0.0


def test_unknown_tasks_are_named_with_near_ones(data: str):
    from mlpmem_jax.studies.tasks.harness import load_tasks

    with pytest.raises(
        ConfigError, match=r"mlpmem_hotpotq is no task.*did you mean mlpmem_hotpotqa"
    ):
        load_tasks(TasksConfig(names=("mlpmem_nq", "mlpmem_hotpotq"), data_path=data))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("webqa", None, r"mlpmem_webqa: the task reads webqa.jsonl .* has none"),
        ("webqa", '{"question": "q"}', r"webqa.jsonl: record 1 has no field 'answer'"),
        ("mr", '{"text": "x", "label": 7}', r"record 1 cannot be used \(label 7 is none of 0 to 1"),
        ("nq", '{"question": "q", "answer": [")"]}', "holds no record that can be evaluated"),
    ],
)
def test_records_that_cannot_be_used(tmp_path: Path, name: str, content: str | None, message: str):
    from mlpmem_jax.studies.tasks.harness import load_tasks

    if content is not None:
        (tmp_path / f"{name}.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_tasks(TasksConfig(names=(f"mlpmem_{name}",), data_path=str(tmp_path)))


def test_groups_stay_together(tmp_path: Path, data: str):
    from mlpmem_jax.studies.tasks.harness import evaluate_tasks, load_tasks

    (tmp_path / "group.yaml").write_text(
        "group: own_group\ntask: [mlpmem_nq, mlpmem_hotpotqa_published]\n"
        "aggregate_metric_list: [{metric: f1, aggregation: mean}]\nmetadata: {version: 1.0}\n",
        encoding="utf-8",
    )
    config = TasksConfig(names=("own_group",), data_path=data, include_path=str(tmp_path))
    found, _ = evaluate_tasks(load_tasks(config), Ruled(), config, seed=0)  # type: ignore[arg-type]
    assert set(found) == {"own_group", "mlpmem_nq", "mlpmem_hotpotqa_published"}
    group = found["own_group"]
    assert group["records"] is None
    [metric] = [one for one in group["metrics"] if one["metric"] == "f1"]
    assert metric["value"] == pytest.approx((2 / 3 + 1) / 2)
    both = TasksConfig(names=("own_group", "mlpmem_nq"), data_path=data, include_path=str(tmp_path))
    with pytest.raises(UserError, match="Duplicate task 'mlpmem_nq'"):
        load_tasks(both)
