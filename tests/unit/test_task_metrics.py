"""Prompts and metrics of the paper's tasks, on records made up here."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlpmem_jax.errors import UserError
from mlpmem_jax.studies.tasks import classification, metrics, questions, records
from mlpmem_jax.studies.tasks.table import as_csv, as_text

DEFINITIONS = Path(records.__file__).parent / "definitions"


def test_answers_are_compared_without_articles_punctuation_and_case():
    assert metrics.exact_match(" The Blue, whale! ", ["red fox", "a blue whale"]) == 1
    assert metrics.exact_match("blue whales", ["blue whale"]) == 0
    assert metrics.exact_match("anything", []) == 0


def test_f1_counts_words_with_repetition():
    # Two of three words are right, two of four are found.
    assert metrics.token_f1("x y z", ["x y v w"]) == pytest.approx(
        2 * (2 / 3) * 0.5 / (2 / 3 + 0.5)
    )
    assert metrics.token_f1("x x", ["x"]) == pytest.approx(2 * 0.5 / 1.5)
    assert metrics.token_f1("none of it", ["x", "it"]) == pytest.approx(2 * (1 / 3) / (4 / 3))
    assert metrics.token_f1("", ["x"]) == 0


@pytest.mark.parametrize(
    ("prediction", "answer", "defined", "published"),
    [
        ("yes", "yes", 1, 1),
        ("yes it is", "yes", 0, 1),  # contained is not equal
        ("yesterday", "yes", 0, 1),  # not even a word
        ("no", "north pole", 0, 0),
        ("north pole", "north pole", 1, 1),
        ("north", "north pole", 2 / 3, 2 / 3),
    ],
)
def test_yes_and_no_of_hotpotqa(prediction: str, answer: str, defined: float, published: float):
    assert metrics.hotpot_f1(prediction, [answer]) == pytest.approx(defined)
    assert metrics.published_hotpot_f1(prediction, [answer]) == pytest.approx(published)


@pytest.mark.parametrize(
    ("answers", "text", "found"),
    [
        (["São Paulo"], "It is in SÃO  PAULO, Brazil.", 1),
        (["Sa\u0303o Paulo"], "in São Paulo", 1),
        (["art"], "a party", 0),  # whole words
        (["3.5"], "it costs 3.5 dollars", 1),
        (["3.5"], "it costs 35 dollars", 0),
        (["U.S."], "the U.S. army", 1),
        (["blue whale"], "blue, whale", 0),
        (["", " "], "text", 0),
        (["red", "blue"], "the blue one", 1),
    ],
)
def test_contained_answers(answers: list[str], text: str, found: float):
    assert metrics.has_answer(answers, text) == found


def test_multiple_choice_of_truthfulqa():
    true, false = [-2.0, -1.0], [-1.5, -3.0]
    assert metrics.mc1(-1.2, false) == 1
    assert metrics.mc1(-1.5, false) == 0
    assert metrics.mc3(true, false) == 0.5
    mass = [math.exp(value) for value in (*true, *false)]
    assert metrics.mc2(true, false) == pytest.approx(sum(mass[:2]) / sum(mass))
    # Where every probability is 0 in double precision.
    low = [value - 2000 for value in (*true, *false)]
    assert metrics.mc2(low[:2], low[2:]) == pytest.approx(sum(mass[:2]) / sum(mass))


def test_domain_pmi_is_a_difference_and_as_published_a_ratio():
    conditional, domain = [-1.0, -6.0], [-2.0, -9.0]
    assert metrics.domain_pmi(conditional, domain) == 1  # 1 and 3 nats
    assert metrics.published_domain_pmi(conditional, domain) == 0  # 2 and 1.5
    assert metrics.published_domain_pmi([0.0, -1.0], [-1.0, -9.0]) == 0
    doc = {"label": 1}
    found = classification.results(doc, [(value, False) for value in (*conditional, *domain)])
    assert found == {"acc": 0.0, "dcpmi": 1.0, "dcpmi_published": 0.0}


def test_prompts_of_questions():
    doc = {"question": "Who wrote it", "answers": ["x"]}
    assert questions.short_answer_prompt(doc) == (
        "Answer these questions:\nQuestion: who wrote it?\nAnswer:"
    )
    asked = {"question": "Who wrote it?"}
    assert questions.short_answer_prompt(asked) == questions.short_answer_prompt(doc)
    start = "Answer the questions:\n\nQuestion: Who wrote it"
    assert questions.containing_prompt(asked) == f"{start}? The answer is:"
    assert questions.published_containing_prompt(asked) == f"{start}?? The answer is:"


def test_records_of_questions():
    assert questions.nq({"question": "q", "answer": ["a", "b", "a"]}) == [
        {"question": "q", "answers": ["a", "b"]}
    ]
    assert questions.nq({"question": "q", "answer": ["a", ")"]}) == []
    assert questions.open_question({"question": "q", "answer": ")"})[0]["answers"] == [")"]
    assert questions.open_question({"question": "q", "answer": []}) == []


def test_only_the_first_line_of_a_short_answer_counts():
    doc = {"answers": ["Paris"]}
    assert questions.nq_results(doc, [" Paris\nQuestion: x"]) == {"em": 1.0, "f1": 1.0}
    assert questions.containing_results(doc, ["no,\nParis"]) == {"has_answer": 1.0}


TRUTHFUL = {
    "Question": "What is it? ",
    "Best Answer": "A stone",
    "Correct Answers": "A stone.; A rock; ",
    "Incorrect Answers": "Cheese",
}


def test_truthfulqa_from_its_table_and_from_the_hub():
    [doc] = questions.truthful(TRUTHFUL)
    assert doc == {
        "question": "What is it?",
        "choices": ["A stone.", "A stone.", "A rock.", "Cheese."],
        "num_true": 2,
    }
    of_hub = {
        "question": "What is it?",
        "best_answer": "A stone",
        "correct_answers": ["A stone", "A rock"],
        "incorrect_answers": ["Cheese"],
    }
    assert questions.truthful(of_hub) == [doc]
    prompt = questions.truthful_prompt(doc)
    assert prompt.startswith("Interpret each question literally")
    assert prompt.count("\nA: ") == 6
    assert prompt.endswith("\n\nQ: What is it?\nA:")
    found = questions.truthful_results(
        doc, [(-1.0, False), (-1.0, False), (-9.0, False), (-2.0, True)]
    )
    assert (found["mc1"], found["mc3"]) == (1.0, 0.5)
    assert questions.truthful(TRUTHFUL | {"Incorrect Answers": " ; "}) == []


def test_halueval_judges_both_texts_of_a_record():
    record = {"knowledge": "K", "question": "Q", "right_answer": "R", "hallucinated_answer": "H"}
    right, hallucinated = questions.halueval_qa(record)
    assert right["text"].startswith("Knowledge: K\nQuestion: Q\nAnswer: R\n")
    assert "Answer: H\n" in hallucinated["text"]
    assert [right["label"], hallucinated["label"]] == [1, 0]
    dialogue = {"knowledge": "K", "dialogue_history": "D", "right_response": "R",
                "hallucinated_response": "H"}  # fmt: skip
    assert [doc["label"] for doc in questions.halueval_dialogue(dialogue)] == [1, 0]
    summary = {"document": "D", "right_summary": "R", "hallucinated_summary": "H"}
    assert [doc["label"] for doc in questions.halueval_summarization(summary)] == [1, 0]


def test_strategyqa():
    [doc] = questions.strategy({"question": "Is it? ", "answer": True})
    assert doc == {"text": "Question: Is it?\nAnswer:", "label": 1}
    with pytest.raises(ValueError, match="true or false"):
        questions.strategy({"question": "Is it?", "answer": "yes"})


CLASSIFIED: list[tuple[str, dict[str, Any], str, str, int]] = [
    ("sst2", {"level": "__label__5", "text": "good film"}, "good film It was", " It was", 1),
    ("sst2", {"label": 0, "text": "bad"}, "bad It was", " It was", 0),
    ("mr", {"label": "1", "text": "fine"}, "fine It was", " It was", 1),
    ("cr", {"label": "0", "text": "poor"}, "poor It was", " It was", 0),
    ("rt", {"input": "dull", "output": "negative"}, "dull It was", " It was", 0),
    ("hyp", {"label": "1", "text": " news "}, "news\n neutral or partisan? Answer:",
     "\n neutral or partisan? Answer:", 1),
    ("rte", {"premise": "P", "hypothesis": "H", "label": "not_entailment"},
     " P\n question: H  true or false?\n answer:", " true or false?\n answer:", 1),
    ("cb", {"premise": "P", "hypothesis": "H", "label": "neutral"},
     ' question: Given that "P" Is "H" true, false, or neither?\n answer:', " the answer is:", 2),
    ("yahoo", {"question_title": "T", "question_content": "C", "best_answer": "A", "topic": 9},
     "title: T content: C answer: A topic:", " topic:", 9),
    ("agn", {"Class Index": "4", "Title": "T", "Description": "D"}, "T \n D topic:", " topic:", 3),
]  # fmt: skip


@pytest.mark.parametrize(("name", "record", "text", "domain", "label"), CLASSIFIED)
def test_prompts_of_classification(
    name: str, record: dict[str, Any], text: str, domain: str, label: int
):
    assert classification.DOCS[name](record) == [{"text": text, "domain": domain, "label": label}]


def test_labels_in_the_middle_are_left_out_and_others_refused():
    assert classification.DOCS["sst2"]({"level": "__label__3", "text": "so so"}) == []
    with pytest.raises(ValueError, match="label 4 is none of 0 to 1"):
        classification.DOCS["mr"]({"label": 4, "text": "x"})


def test_every_definition_names_records_choices_and_metrics():
    tagged = {}

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    for file in sorted(DEFINITIONS.glob("*.yaml")):
        task = yaml.load(file.read_text(encoding="utf-8"), Loader)
        name = task["dataset_kwargs"]["name"]
        assert task["task"] == f"mlpmem_{file.stem}"
        assert name in records.SOURCES
        assert file.stem.removesuffix("_published") == name
        tagged.setdefault(task.get("tag"), []).append(name)
        for key in ("custom_dataset", "doc_to_text", "process_results"):
            if str(task.get(key)).startswith("mlpmem_jax."):
                module, _, function = task[key].rpartition(".")
                modules = {one.__name__: one for one in (records, questions, classification)}
                assert hasattr(modules[module], function)
        if name in classification.DOCS:
            examples = [one for one in CLASSIFIED if one[0] == name]
            assert all(label < len(task["doc_to_choice"]) for *_, label in examples)
    assert sorted(tagged["mlpmem_classification"]) == sorted(classification.DOCS)
    assert len(tagged["mlpmem_halueval"]) == 3


def test_records_are_read_from_every_kind_of_file(tmp_path: Path):
    one, two = {"question": "q", "answer": ["a"]}, {"question": "r", "answer": "b"}
    files = {
        "a.jsonl": f"{json.dumps(one)}\n\n{json.dumps(two)}\n",
        "b.json": json.dumps([one, two]),
        "c.json": f"{json.dumps(one)}\n{json.dumps(two)}",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert records.read_records(tmp_path / name) == [one, two]
    (tmp_path / "d.csv").write_text('label,text\n1,"a ""b"",\nc"\n', encoding="utf-8")
    assert records.read_records(tmp_path / "d.csv") == [{"label": "1", "text": 'a "b",\nc'}]
    (tmp_path / "e.tsv").write_text('__label__1\ta "quoted\n', encoding="utf-8")
    assert records.read_records(tmp_path / "e.tsv") == [
        {"level": "__label__1", "text": 'a "quoted'}
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1: is no JSON"),
        ('{"question": "q"}\n3\n', "record 2 is no JSON object"),
        ("\xff", "is not UTF-8 text"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: str, message: str):
    (tmp_path / "nq.jsonl").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        records.read_records(tmp_path / "nq.jsonl")


RESULTS = {
    "lm_eval": "0.4.13",
    "limit": 2,
    "model": "knn",
    "interpolation": 0.25,
    "temperature": 3.0,
    "tasks": {
        "t": {
            "version": 1.0,
            "num_fewshot": 0,
            "records": 2,
            "records_of_task": 5,
            "metrics": [
                {"metric": "em", "filter": "none", "value": 0.5, "standard_error": 0.25,
                 "higher_is_better": True},
                {"metric": "f1", "filter": "strict", "value": 0.75, "standard_error": None,
                 "higher_is_better": True},
            ],
        }
    },
}  # fmt: skip


def test_the_table_says_model_records_and_limits():
    text = as_text(RESULTS)
    assert text.startswith("decoder + kNN-LM, λ = 0.250, τ = 3; lm_eval 0.4.13\n")
    assert "0.5000" in text
    assert "± 0.2500" in text
    assert "f1 (strict)" in text
    assert "tasks.limit=2: only the first records of t" in text
    lines = as_csv(RESULTS).splitlines()
    assert lines[0].startswith("task,version,filter")
    assert lines[1] == "t,1.0,none,0,2,em,0.5,0.25,True"
    assert "λ of the gate" in as_text(RESULTS | {"model": "memory", "interpolation": None})
