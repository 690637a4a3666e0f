"""Rows of a table that differ in text and tokenizer, compared on the same documents."""

from pathlib import Path

import numpy as np
import pytest

from mlpmem_jax.config.load import load_config
from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.stats.mixing import solve
from mlpmem_jax.store.array_specs import Split
from mlpmem_jax.store.arrays import open_array, read_rows
from mlpmem_jax.studies.tables.part_scores import Part
from mlpmem_jax.studies.tables.rows import planned_row
from mlpmem_jax.studies.tables.seed_plan import SeedPlan
from tests.pipeline.conftest import TINY
from tests.pipeline.test_compare import SMALL, json_of, run


def _texts(folder: Path) -> list[str]:
    """Writes texts, those of each split in a folder of their own; returns keys that name them."""
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, size))) for size in rng.integers(2, 9, 300)]
    for split, number in (("train", 60), ("valid", 20), ("test", 20)):
        (folder / split).mkdir()
        for place in range(number):
            text = " ".join(words[word] for word in rng.geometric(0.02, 200) % 300)
            (folder / split / f"{place:02}.txt").write_text(text)
    splits = [
        f"corpus.{split}.paths=['{folder / split}/*.txt']" for split in ("train", "valid", "test")
    ]
    return [
        "corpus.source=text", *splits, "compare.seeds=[0]", "compare.rows=[memory]",
        "compare.teachers=[]",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_row_of_other_tokens_is_compared_on_the_same_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Less text to train on and another tokenizer: both have the test documents in common."""
    workdir = tmp_path / "run"
    row = "{name: fewer, overrides: [corpus.max_bytes=40_000, tokenizer.vocab_size=400]}"
    texts = [*_texts(tmp_path), f"compare.recipes=[{row}]"]
    assert run("compare", workdir, *texts) == 0
    out = capsys.readouterr().out
    assert "with tokens of their own: fewer;" in " ".join(out.split())
    for kind in ("tokenizer", "tokens", "decoder", "memory"):
        assert len(list((workdir / "artifacts" / kind).iterdir())) == 2, kind
    results = json_of(workdir, "compare.json")
    rows = {row["key"]: row for row in results["rows"]}
    config = load_config(TINY, [*SMALL, *texts], {"workdir": str(workdir)})
    found = planned_row(SeedPlan(config, 0), "fewer")
    assert found is not None
    decoder, memory = found.parts
    own, base = (TokenSplit.open(one.tokens, "test") for one in (decoder.run, Artifacts(config)))
    assert own.vocab_size > base.vocab_size and own.num_tokens < base.num_tokens
    assert own.num_bytes == base.num_bytes
    tokens = {one: one.load().counts["train_tokens"] for one in (own.artifact, base.artifact)}
    assert tokens[own.artifact] < 0.8 * tokens[base.artifact]

    def scores(part: Part, split: Split) -> np.ndarray:
        stores = [open_array(part.scores(split).path / name) for name in ("label", "logprob")]
        label, logprob = (read_rows(store, 0, store.shape[0]) for store in stores)
        return logprob[label != own.separator_id].astype(np.float64)

    weight = solve(scores(memory, "valid"), scores(decoder, "valid")).weight
    assert rows["fewer"]["weights"] == [pytest.approx(weight, abs=1e-6)]
    mixed = weight * np.exp(scores(memory, "test")) + (1 - weight) * np.exp(scores(decoder, "test"))
    nats = -np.log(mixed).sum()
    # Of the same text: by the tokens of the table, and by bytes.
    value = rows["fewer"]["test_nats"]["value"]
    assert value == pytest.approx(nats / results["test"]["tokens"], rel=1e-6)
    bits = nats / own.num_bytes / np.log(2)
    assert rows["fewer"]["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert rows["fewer"]["difference"]["value"] == pytest.approx(
        value - rows["decoder"]["test_nats"]["value"], rel=1e-6
    )
    measured = json_of(workdir, "measured.json")["rows"]
    assert measured["fewer"]["0"]["parameters"] > measured["memory"]["0"]["parameters"]
    capsys.readouterr()
    assert run("compare", workdir, *texts) == 0
    assert ": making" not in capsys.readouterr().out


def test_rows_of_other_documents_are_refused_before_networks_are_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    workdir = tmp_path / "run"
    texts = [
        *_texts(tmp_path),
        "compare.recipes=[{name: cut, overrides: [corpus.max_bytes=9_000]}]",
    ]
    for _ in range(2):  # Again, when the tokens are there.
        assert run("compare", workdir, *texts) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2
        for line, split in zip(lines, ("valid", "test"), strict=True):
            assert line.startswith("error: tokens [seed 0, cut] (")
            assert f"other {split} documents than those of the configuration" in line
    assert not (workdir / "artifacts" / "decoder").exists()
