"""Metrics of the paper's tasks, each a plain function.

Where the released evaluation code computes something else than the benchmark defines, there are
two: as published, and corrected.
"""

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CLOSED = frozenset({"yes", "no", "noanswer"})


def normalized_answer(text: str) -> str:
    """Returns an answer in lower case without punctuation, articles and extra blanks (SQuAD)."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", kept).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1 if the prediction is one of the answers, both normalised."""
    found = normalized_answer(prediction)
    return float(any(found == normalized_answer(answer) for answer in answers))


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Returns the best F1 of words over the answers (SQuAD)."""
    return max((_f1(prediction, answer) for answer in answers), default=0.0)


def hotpot_f1(prediction: str, answers: Sequence[str]) -> float:
    """Returns F1 of words as HotpotQA defines it: yes, no and noanswer match only themselves."""
    return max((_hotpot_f1(prediction, answer) for answer in answers), default=0.0)


def published_hotpot_f1(prediction: str, answers: Sequence[str]) -> float:
    """Returns F1 as the released code has it: a gold yes, no or noanswer need only be contained."""
    found = normalized_answer(prediction)
    scores = [
        float(normalized_answer(answer) in found)
        if normalized_answer(answer) in _CLOSED
        else _f1(prediction, answer)
        for answer in answers
    ]
    return max(scores, default=0.0)


def _hotpot_f1(prediction: str, answer: str) -> float:
    pair = (normalized_answer(prediction), normalized_answer(answer))
    if _CLOSED & set(pair) and pair[0] != pair[1]:
        return 0.0
    return _f1(prediction, answer)


def _f1(prediction: str, answer: str) -> float:
    found, wanted = (normalized_answer(text).split() for text in (prediction, answer))
    common = sum((Counter(found) & Counter(wanted)).values())
    if not common:
        return 0.0
    precision, recall = common / len(found), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def has_answer(answers: Sequence[str], text: str) -> float:
    """Returns 1 if the words of an answer occur in a text one after the other (DPR).

    Case and the form of accents do not matter; every other sign is a word of its own.
    """
    words = _words(text)
    for answer in answers:
        wanted = _words(answer)
        starts = range(len(words) - len(wanted) + 1)
        if wanted and any(words[start : start + len(wanted)] == wanted for start in starts):
            return 1.0
    return 0.0


def _words(text: str) -> list[str]:
    """Returns runs of letters, numbers and marks, and other visible signs one by one."""
    words: list[str] = []
    in_run = False
    for character in unicodedata.normalize("NFD", text):
        kind = unicodedata.category(character)[0]
        if kind in "LNM":
            if in_run:
                words[-1] += character
            else:
                words.append(character)
        elif kind not in "ZC":
            words.append(character)
        in_run = kind in "LNM"
    return [word.lower() for word in words]


def mc1(best: float, false: Sequence[float]) -> float:
    """Returns 1 if the best answer has a higher log-probability than every false one."""
    return float(best > max(false))


def mc2(true: Sequence[float], false: Sequence[float]) -> float:
    """Returns the share of the true answers in the probability of all answers.

    Computed from differences, so that long answers do not end as 0 / 0.
    """
    highest = max(*true, *false)
    mass = [sum(math.exp(logprob - highest) for logprob in each) for each in (true, false)]
    return mass[0] / sum(mass)


def mc3(true: Sequence[float], false: Sequence[float]) -> float:
    """Returns the share of true answers that are more probable than every false one."""
    return sum(logprob > max(false) for logprob in true) / len(true)


def largest(values: Sequence[float]) -> int:
    """Returns the place of the largest value, the first of several."""
    return max(range(len(values)), key=values.__getitem__)


def domain_pmi(conditional: Sequence[float], domain: Sequence[float]) -> int:
    """Returns the label with the largest log p(label | text) - log p(label | domain premise)."""
    return largest([each - prior for each, prior in zip(conditional, domain, strict=True)])


def published_domain_pmi(conditional: Sequence[float], domain: Sequence[float]) -> int:
    """Returns the label with the largest ratio of cross-entropies, domain to conditional."""
    ratios = [
        prior / each if each else math.inf for each, prior in zip(conditional, domain, strict=True)
    ]
    return largest(ratios)
