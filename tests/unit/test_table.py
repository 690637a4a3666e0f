"""The table is aligned, fits the terminal, and says the right thing."""

import csv
import io
from typing import Any

import pytest
from matplotlib.colors import to_hex

from mlpmem_jax.evaluation import picture, report, table
from mlpmem_jax.evaluation.style import COLORS, new_figure


def _system(label: str, nats: float, **more: Any) -> dict[str, Any]:
    system: dict[str, Any] = dict.fromkeys(report.COLUMNS)
    del system["system"], system["ms_per_token"]
    return (
        system
        | {
            "label": label,
            "test_nats": nats,
            "valid_nats": nats - 0.1,
            "token_perplexity": 44.1234,
            "word_perplexity": 1234.5,
            "bits_per_byte": 1.91,
            "parameters": 1_700_000,
            "non_embedding_parameters": 1_200_000,
            "parameter_bytes": 6_800_000,
            "datastore_bytes": 0,
            "stored_bytes": 6_800_000,
        }
        | more
    )


def make_results(difference: float = -0.26, low: float = -0.285, high: float = -0.24) -> dict:
    interval = {"difference_low": low, "difference_high": high}
    return {
        "confidence": 0.95,
        "notes": [],
        "test": {
            "tokens": 123_456, "documents": 60, "files": 60, "words": 60_000, "bytes": 456_789,
        },
        "retrieval": {"engine": "scann", "num_neighbors": 256, "recall": 0.9912},
        "systems": {
            "decoder": _system("decoder", 3.95),
            "knn": _system(
                "+ kNN-LM", 3.58, difference_nats=-0.37, difference_low=-0.4,
                difference_high=-0.34, interpolation=0.5, temperature=5.1, gain_recovered=1.0,
            ),
            "memory": _system(
                "+ memory", 3.95 + difference, difference_nats=difference, interpolation=0.6,
                gain_recovered=0.703, gain_recovered_low=0.66, gain_recovered_high=0.742,
                **interval,
            ),
        },
        "curves": {
            "interpolation": [0.0, 0.5, 1.0], "knn": [3.8, 3.5, 4.0], "memory": [3.8, 3.6, 3.9],
        },
        "documents": {
            "tokens": [10, 20, 30], "decoder": [40.0, 79.0, 121.0],
            "knn": [36.0, 70.0, 110.0], "memory": [37.0, 74.0, 112.0],
        },
    }  # fmt: skip


MEASURED = {
    "latency_ms": {"decoder": {"p50": 0.41}, "knn": {"p50": 1.9}, "memory": {"p50": 0.52}},
    "seconds": dict.fromkeys(
        ("tokenize", "pretrain", "embed", "index", "retrieve", "train", "evaluate"), 123.4
    ),
}


@pytest.mark.parametrize("low", [-0.285, -1.285])
def test_lines_are_aligned_and_fit(low: float):
    results = make_results(low=low)
    results["systems"]["decoder"]["word_perplexity"] = 3.9e13
    lines = report.as_text(results, MEASURED).splitlines()
    assert all(table.display_width(line) <= 100 for line in lines)
    drawn = [line for line in lines if line.startswith(("┌", "│", "├", "└"))]
    assert len(drawn) == 2 * 8
    for block in (drawn[:8], drawn[8:]):
        assert len({table.display_width(line) for line in block}) == 1


def test_wide_and_combining_characters_stay_aligned():
    text = table.render(["", "n"], [["a", "1"], ["日本", "22"], ["e\u0301", "3"]])
    assert len({table.display_width(line) for line in text.splitlines()}) == 1


def test_ascii_in_numbers_becomes_a_true_minus():
    assert table.number(-0.25, 2) == "−0.25"
    assert table.number(0.25, 2, sign=True) == "+0.25"
    assert table.number(-1e-9, 3) == "0.000"
    assert table.number(None, 2) == table.number(float("nan"), 2) == "–"


@pytest.mark.parametrize(
    ("difference", "low", "high", "said"),
    [
        (-0.26, -0.285, -0.24, "better than the decoder by 0.260 nats per token (95 % interval"),
        (0.05, 0.01, 0.09, "worse than the decoder by 0.050 nats"),
        (
            -0.01,
            -0.05,
            0.03,
            "is not significantly different from the decoder (95 % interval of",
        ),
    ],
)
def test_the_sentence(difference: float, low: float, high: float, said: str):
    text = report.sentence(make_results(difference, low, high))
    assert said in text
    assert "recovers 70.3 % of what the explicit kNN-LM gains [66.0, 74.2]." in text


def test_the_sentence_without_weight():
    results = make_results()
    memory = results["systems"]["memory"]
    memory |= {"interpolation": 0.0, "interpolation_source": "training"}
    # The decoder that was trained with the memory is another one.
    assert "decoder + memory is better" in report.sentence(results)
    memory |= {"interpolation_source": "validation", "difference_nats": 0.0}
    assert "the memory got no weight (λ = 0)" in report.sentence(results)


def test_a_share_without_interval_is_no_empty_cell():
    results = make_results()
    memory = results["systems"]["memory"]
    memory |= {"gain_recovered_low": None, "gain_recovered_high": None}
    lines = report.as_text(results, MEASURED).splitlines()
    of_memory, of_knn = (
        next(line.rstrip(" │") for line in lines if share in line)
        for share in ("70.3 %", "100.0 %")
    )
    assert of_memory.endswith("undefined")
    assert of_knn.endswith("100.0 %")  # by definition


def test_the_sentence_without_a_gain_to_recover():
    results = make_results()
    results["systems"]["memory"]["gain_recovered"] = None
    assert "nothing to recover" in report.sentence(results)


def test_csv_has_the_same_systems_in_full():
    rows = list(csv.DictReader(io.StringIO(report.as_csv(make_results(), MEASURED))))
    assert [row["system"] for row in rows] == ["decoder", "+ kNN-LM", "+ memory"]
    assert tuple(rows[0]) == report.COLUMNS
    assert float(rows[2]["ms_per_token"]) == 0.52
    assert rows[0]["difference_nats"] == ""


def test_what_the_memory_gains_has_the_memory_s_colour():
    axes = new_figure(4, 4).subplots()
    picture._draw_documents(axes, make_results())
    shown = [to_hex(text.get_color()) for text in axes.texts]
    shown += [to_hex(line.get_color()) for line in axes.lines]
    shown += [to_hex(color[:3]) for each in axes.collections for color in each.get_facecolor()]
    assert COLORS["memory"] in shown
    others = {color for name, color in COLORS.items() if name not in ("memory", "decoder")}
    assert others.isdisjoint(shown)


def test_the_picture_is_a_png_and_can_be_drawn_again():
    drawn = picture.draw(make_results())
    assert drawn.startswith(b"\x89PNG")
    assert drawn == picture.draw(make_results())
