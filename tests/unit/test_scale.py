"""The plan on paper: its arithmetic, and that the page shows what the script prints."""

import dataclasses

import pytest

from benchmarks.scale import SIZES, Inputs, main, plan, table
from tests.conftest import ROOT

GIVEN = Inputs()


def test_the_page_shows_the_script():
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    shown = page.split("<!-- table -->\n")[1].split("\n<!-- /table -->")[0]
    assert shown == table([plan(size, GIVEN) for size in SIZES])


def test_keys_of_the_paper():
    """40 TB at 5 B tokens of width 4096 (paper)."""
    assert plan(5e9, GIVEN).keys_bytes == pytest.approx(41e12, rel=0.01)


def test_what_is_quadratic_and_what_is_not():
    small, large = plan(1e9, GIVEN), plan(1e10, GIVEN)
    for field in ("search_all_secs", "exact_secs"):
        # (Hosts hold whole shards, so not to the last digit.)
        assert getattr(large, field) == pytest.approx(100 * getattr(small, field), rel=0.01)
    for field in ("embed_secs", "keys_bytes", "train_stored_secs"):
        assert getattr(large, field) == pytest.approx(10 * getattr(small, field))
    # Routed: what a query visits is the same until there are as many cells as there can be.
    times = [plan(size, GIVEN).search_routed_secs / size for size in (1e7, 1e9, 1e10, 1e11)]
    assert times[0] < times[1] < 1.3 * times[0] and times[3] > 9 * times[2]


def test_measured_search_rate_is_reproduced():
    """The pilot: 2.29M rows of width 128 on 2 cores, 4,000 queries a second."""
    pilot = dataclasses.replace(
        GIVEN, width=128, hosts=1, host_cores=2, leaf_share=60 / 1513, shard_rows=4e6
    )
    assert 2.29e6 / plan(2.29e6, pilot).search_all_secs == pytest.approx(4000, rel=0.01)


def test_numbers_can_be_replaced(capsys):
    assert main(["width=2048", "tokens=1e9"]) == 0
    assert "4.1 TB" in capsys.readouterr().out
    assert main(["with=1"]) == 2
    assert "names: tokens" in capsys.readouterr().err


def test_inputs_are_printed_with_their_sources(capsys):
    assert main(["--inputs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    fields = dataclasses.fields(Inputs)
    assert [line.split(" = ")[0].strip() for line in lines] == [field.name for field in fields]
    origins = (
        "measured", "assumed", "chosen", "data sheet", "the paper", "Llama-2-7B", "our format",
        "its default", "configs/llama2_7b.yaml",
    )  # fmt: skip
    for line, field in zip(lines, fields, strict=True):
        value, source = line.split(" = ")[1].split(maxsplit=1)
        assert float(value) == pytest.approx(field.default, rel=1e-5)
        assert any(origin in source for origin in origins), line
