"""What `--dry-run` says, before anything exists and afterwards."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mlpmem_jax.config.schema import Config
from mlpmem_jax.corpus.row_estimates import count_rows
from mlpmem_jax.pipeline import run, tokenize
from mlpmem_jax.pipeline.execute import execute
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.sources import Sources
from mlpmem_jax.units import human_bytes

DRY = Options(workdir="", dry_run=True)


def _reading(config: Config) -> Artifacts:
    return Artifacts(config, Sources(config.workdir, reads=True))


def _plan(config: Config, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, str]]:
    """Returns for each artifact its intention (under "") and its estimates, by name."""
    capsys.readouterr()
    assert execute(run.stages, _reading(config), DRY) == 0
    text = capsys.readouterr().out
    first, *lines = text.split("\n\n# this machine\n", 1)[0].splitlines()
    assert first == f"# plan for workdir {config.workdir}"
    plan: dict[str, dict[str, str]] = {}
    for line in lines:
        # "ROLE (ID)  INTENTION", and below it "  NAME  VALUE".
        name, value = re.split(r" \([0-9a-f]{8}\) +| +", line.strip(), maxsplit=1)
        if line.startswith("  "):
            name, value = line[2:36].strip(), line[36:].strip()
            plan[list(plan)[-1]][name] = value
        else:
            plan[name] = {"": value}
    return plan


@pytest.fixture
def text_config(make_config: Callable[..., Config], tmp_path: Path) -> Config:
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text(f"document {number} " * 200, encoding="utf-8")
    return make_config("corpus.source=text", f"corpus.paths=['{tmp_path}/*.txt']")


def test_a_plan_of_a_fresh_directory_has_an_estimate_for_every_stage(text_config, capsys):
    plan = _plan(text_config, capsys)
    assert {"tokens", "decoder", "index", "memory", "results/evaluate"} <= set(plan)
    for name, entry in plan.items():
        assert entry[""].startswith("will be made"), name
    assert plan["decoder"]["parameters"].replace(",", "").isdigit()
    for name in ("datastore/train", "neighbors/valid", "targets/train"):
        (rows,) = (value for key, value in plan[name].items() if key.startswith("rows, about"))
        assert rows.replace(",", "").isdigit(), name
        assert any("bytes" in key for key in plan[name]), name
    assert "model flops" in plan["datastore/train"]
    assert any("memory" in key for key in plan["index"])
    timed = {name for name, entry in plan.items() if "time, about" in entry}
    assert timed == set(plan) - {"tokenizer", "tokens", "results/evaluate"}
    assert plan["neighbors/valid"]["time, about"].endswith("(estimated)")
    assert not Path(text_config.workdir).exists()


def test_guessed_rows_are_near_those_that_come_out(text_config, capsys):
    text = text_config.corpus, Artifacts(text_config).tokens
    guessed = {split: count_rows(*text, split) for split in ("train", "valid", "test")}
    assert all(one is not None and not one[1] for one in guessed.values())
    assert execute(tokenize.stages, _reading(text_config), Options(workdir="")) == 0
    rows, known = count_rows(*text, "train")
    assert known and rows == Artifacts(text_config).tokens.load().counts["train_tokens"] - 1
    total = 60 * len("document 10 " * 200) / 3
    assert sum(one[0] for one in guessed.values()) == pytest.approx(total, rel=0.02)
    plan = _plan(text_config, capsys)
    assert plan["tokens"][""] == "complete; nothing to do"
    assert "time, about" not in plan["tokens"]
    assert plan["datastore/train"]["rows"] == f"{rows:,}"


def test_how_much_max_bytes_allows_is_planned_and_logged(text_config, capsys):
    """It stops before the first document that would exceed it: not at the limit."""
    size = len("document 10 " * 200)
    corpus = text_config.corpus.model_copy(update={"max_bytes": 50 * size})
    config = text_config.model_copy(update={"corpus": corpus})
    sizes = [len(f"document {n} " * 200) for n in sorted(range(60), key=lambda n: f"{n}.txt")]
    documents = next(n for n in range(60) if sum(sizes[: n + 1]) > 50 * size)
    taken = sum(sizes[:documents])
    plan = _plan(config, capsys)
    assert plan["tokens"]["documents"] == f"{documents}"
    assert plan["tokens"]["text_bytes"] == human_bytes(taken)
    assert plan["tokens"]["next document, beyond max_bytes"] == human_bytes(sizes[documents])
    assert execute(tokenize.stages, _reading(config), Options(workdir="")) == 0
    assert (
        f"tokens: {documents} documents, {taken:,} bytes (corpus.max_bytes={50 * size:,}); "
        f"the next document ({sizes[documents]:,} bytes) would exceed it\n"
    ) in capsys.readouterr().out
    plan = _plan(config, capsys)
    assert plan["tokens"]["documents"] == f"{documents}"
    assert plan["tokens"]["text_bytes"] == human_bytes(taken)


def test_explicit_splits_are_counted_apart(make_config, tmp_path):
    sizes = {"train": 3000, "valid": 600, "test": 900}
    for split, size in sizes.items():
        (tmp_path / f"{split}.txt").write_text("x" * size)
    splits = [f"corpus.{split}.paths=['{tmp_path}/{split}.txt']" for split in sizes]
    config = make_config("corpus.source=text", "corpus.paths=[]", "corpus.max_bytes=null", *splits)
    for split, size in sizes.items():
        assert count_rows(config.corpus, Artifacts(config).tokens, split) == (size // 3, False)


def test_what_would_be_refused_says_so(make_config, capsys):
    plan = _plan(make_config("mesh.data=3", "mesh.fsdp=1"), capsys)
    refused = [name for name, entry in plan.items() if entry[""].startswith("REFUSED: ")]
    assert {"decoder", "datastore/train", "index", "memory"} <= set(refused)
    assert "need 3 devices" in plan["decoder"][""]
    assert plan["tokens"][""].startswith("will be made")
