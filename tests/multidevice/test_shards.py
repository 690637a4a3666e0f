"""An approximate index whose shards are spread over processes finds what one process finds."""

from pathlib import Path

import numpy as np
import pytest

SCRIPT = str(Path(__file__).with_name("shards_script.py"))

pytestmark = pytest.mark.multidevice


@pytest.mark.parametrize(("processes", "held"), [(2, [2, 1]), (4, [1, 1, 1, 0])])
def test_shards_of_several_processes_are_searched_together(on_processes, tmp_path, processes, held):
    pytest.importorskip("scann")
    found = {}
    for number in (1, processes):
        directory = tmp_path / str(number)
        directory.mkdir()
        done = on_processes(number, 1, SCRIPT, str(directory))
        assert done.returncode == 0, done.stderr
        found[number] = np.load(directory / "found.npz")
    parts = [(tmp_path / str(processes) / f"held-{k}").read_text() for k in range(processes)]
    assert [int(part) for part in parts] == held
    one, several = found[1], found[processes]
    assert one["row-0"].shape == (300, 20) and one["row-2"].shape == (0, 20)
    assert one["row-0"][3, :2].tolist() == [3, 1700]
    for name in one.files:
        np.testing.assert_array_equal(several[name], one[name])
