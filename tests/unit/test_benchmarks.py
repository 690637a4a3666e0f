"""What benchmarks do with a path at which there is nothing: one line, exit code 2."""

import importlib
import sys
from pathlib import Path

import pytest

from benchmarks.program import run_main


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("exact_search", "--against"),
        ("generation_baselines", "--workdir"),
        ("joint_step", "--config"),
        ("memory_inputs", "--config"),
        ("mixed_rows", "--config"),
        ("pretrained", None),
        ("restart", "--config"),
        ("scale_rates", "--paths"),
    ],
)
def test_a_wrong_path(monkeypatch, tmp_path: Path, capsys, name: str, flag: str | None):
    path = str(tmp_path / "none")
    monkeypatch.setattr(sys, "argv", [name, *filter(None, [flag]), path])
    with pytest.raises(SystemExit) as end:
        run_main(importlib.import_module(f"benchmarks.{name}").main)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and path in line
    assert not list(tmp_path.iterdir())
