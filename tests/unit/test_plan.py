"""What `--dry-run` says, before anything exists and afterwards."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mlpmem_jax.config.schema import Config
from mlpmem_jax.corpus.row_estimates import count_rows
from mlpmem_jax.pipeline import run, tokenize
from mlpmem_jax.pipeline.execute import execute
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.store.layout import Layout

DRY = Options(workdir="", dry_run=True)


def _plan(config: Config, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, str]]:
    """Returns for each artifact its intention (under "") and its estimates, by name."""
    assert execute(run.stages, config, DRY) == 0
    text = capsys.readouterr().out
    plan: dict[str, dict[str, str]] = {}
    for line in text.split("# plan for workdir", 1)[1].splitlines()[1:]:
        name, value = re.split(r" {1,}", line.strip(), maxsplit=1)
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
    assert {"tokens", "decoder/base", "index/base", "memory/base", "results/base"} <= set(plan)
    for name, entry in plan.items():
        assert entry[""].startswith("will be made"), name
    assert plan["decoder/base"]["parameters"].replace(",", "").isdigit()
    for name in ("datastore/base/train", "neighbors/base/valid", "targets/base/train"):
        (rows,) = (value for key, value in plan[name].items() if key.startswith("rows, about"))
        assert rows.replace(",", "").isdigit(), name
        assert any("bytes" in key for key in plan[name]), name
    assert "model flops" in plan["datastore/base/train"]
    assert any("memory" in key for key in plan["index/base"])
    assert not Path(text_config.workdir).exists()


def test_guessed_rows_are_near_those_that_come_out(text_config, capsys):
    guessed = {split: count_rows(text_config, split) for split in ("train", "valid", "test")}
    assert all(one is not None and not one[1] for one in guessed.values())
    assert execute(tokenize.stages, text_config, Options(workdir="")) == 0
    rows, known = count_rows(text_config, "train")
    assert known and rows == Layout(text_config).tokens.load().counts["train_tokens"] - 1
    total = 60 * len("document 10 " * 200) / 3
    assert sum(one[0] for one in guessed.values()) == pytest.approx(total, rel=0.02)
    plan = _plan(text_config, capsys)
    assert plan["tokens"][""] == "complete; nothing to do"
    assert plan["datastore/base/train"]["rows"] == f"{rows:,}"


def test_explicit_splits_are_counted_apart(make_config, tmp_path):
    sizes = {"train": 3000, "valid": 600, "test": 900}
    for split, size in sizes.items():
        (tmp_path / f"{split}.txt").write_text("x" * size)
    splits = [f"corpus.{split}.paths=['{tmp_path}/{split}.txt']" for split in sizes]
    config = make_config("corpus.source=text", "corpus.paths=[]", "corpus.max_bytes=null", *splits)
    for split, size in sizes.items():
        assert count_rows(config, split) == (size // 3, False)


def test_what_would_be_refused_says_so(make_config, capsys):
    plan = _plan(make_config("mesh.data=3", "mesh.fsdp=1"), capsys)
    refused = [name for name, entry in plan.items() if entry[""].startswith("REFUSED: ")]
    assert {"decoder/base", "datastore/base/train", "index/base", "memory/base"} <= set(refused)
    assert "need 3 devices" in plan["decoder/base"][""]
    assert plan["tokens"][""].startswith("will be made")
