"""The nine classification tasks, with prompts and label words of kNN-Prompt (Shi et al. 2022).

Each record becomes a prompt, the domain premise (the end of the prompt, without the text) and the
place of its label among the label words, which stand in `definitions/*.yaml`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlpmem_jax.studies.tasks import metrics

Record = Mapping[str, Any]

_REVIEW = " It was"
_PARTISAN = "\n neutral or partisan? Answer:"
_ENTAILED = " true or false?\n answer:"
_TOPIC = " topic:"


def _doc(text: str, domain: str, label: int) -> list[Record]:
    return [{"text": text, "domain": domain, "label": label}]


def _review(record: Record) -> list[Record]:
    """Fields `text` and `label`, 0 or 1."""
    return _doc(f"{record['text']}{_REVIEW}", _REVIEW, _one_of(record["label"], 2))


def _sst2(record: Record) -> list[Record]:
    """As `_review`; or a line of SST with five levels, of which the middle one is left out."""
    if "level" not in record:
        return _review(record)
    level = int(str(record["level"]).strip()[-1]) - 3
    return _review({"text": record["text"], "label": int(level > 0)}) if level else []


def _tomatoes(record: Record) -> list[Record]:
    """Fields `input` and `output`, negative or positive."""
    label = ("negative", "positive").index(record["output"].strip())
    return _review({"text": record["input"], "label": label})


def _hyperpartisan(record: Record) -> list[Record]:
    """Fields `text` and `label`, 0 (neutral) or 1 (partisan)."""
    text = f"{record['text'].strip()}{_PARTISAN}"
    return _doc(text, _PARTISAN, _one_of(record["label"], 2))


def _rte(record: Record) -> list[Record]:
    """Fields `premise`, `hypothesis`, `label` (entailment or another word)."""
    text = f" {record['premise']}\n question: {record['hypothesis']} {_ENTAILED}"
    return _doc(text, _ENTAILED, int(record["label"] != "entailment"))


def _cb(record: Record) -> list[Record]:
    """Fields `premise`, `hypothesis`, `label` (entailment, contradiction or neutral)."""
    label = ("entailment", "contradiction", "neutral").index(record["label"])
    text = (
        f' question: Given that "{record["premise"]}" Is "{record["hypothesis"]}" true, false, or '
        "neither?\n answer:"
    )
    return _doc(text, " the answer is:", label)


def _yahoo(record: Record) -> list[Record]:
    """Fields `question_title`, `question_content`, `best_answer`, `topic` (0 to 9)."""
    text = (
        f"title: {record['question_title']} content: {record['question_content']} "
        f"answer: {record['best_answer']}{_TOPIC}"
    )
    return _doc(text, _TOPIC, _one_of(record["topic"], 10))


def _news(record: Record) -> list[Record]:
    """Columns `Class Index` (1 to 4), `Title`, `Description`."""
    text = f"{record['Title']} \n {record['Description']}{_TOPIC}"
    return _doc(text, _TOPIC, _one_of(int(record["Class Index"]) - 1, 4))


DOCS: dict[str, Callable[[Record], list[Record]]] = {
    "sst2": _sst2,
    "mr": _review,
    "cr": _review,
    "rt": _tomatoes,
    "hyp": _hyperpartisan,
    "rte": _rte,
    "cb": _cb,
    "yahoo": _yahoo,
    "agn": _news,
}


def _one_of(label: Any, count: int) -> int:
    if int(label) not in range(count):
        raise ValueError(f"label {label} is none of 0 to {count - 1}")
    return int(label)


def results(doc: Record, found: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Accuracy by probability, by domain-conditional PMI, and by it as published.

    Args:
        doc: As `DOCS` makes it.
        found: Log-probabilities of the label words after the prompt, then after the domain premise.
    """
    logprobs = [logprob for logprob, _ in found]
    half = len(logprobs) // 2
    conditional, domain = logprobs[:half], logprobs[half:]
    return {
        "acc": float(metrics.largest(conditional) == doc["label"]),
        "dcpmi": float(metrics.domain_pmi(conditional, domain) == doc["label"]),
        "dcpmi_published": float(metrics.published_domain_pmi(conditional, domain) == doc["label"]),
    }
