"""Two processes load key shards together: what one process finds with all keys in memory."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from mlpmem_jax.launching import environments_of
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.retrieval import approximate
from mlpmem_jax.retrieval.approximate import ApproximateEngine, SearchSettings
from mlpmem_jax.retrieval.engine import ArrayKeys
from mlpmem_jax.retrieval.exact import ExactEngine
from mlpmem_jax.retrieval.merge import drop, drop_own_row
from mlpmem_jax.store.arrays import open_array, read_rows
from mlpmem_jax.store.contents import RUNNING
from mlpmem_jax.store.shard_records import recorded_shards
from tests.multidevice import search_in_parts_script as script

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.multidevice


@pytest.mark.parametrize(
    ("engine", "rule"),
    [("exact", "row"), ("scann", "row"), ("routed", "row"), ("exact", "document")],
)
def test_two_processes_find_what_one_does(tmp_path, engine, rule):
    key = script.made_up_keys()
    keys, index = ArrayKeys(key), epath.Path(tmp_path / "index")
    if engine == "scann":
        pytest.importorskip("scann")
        list(approximate.build_shards(keys, index, script.index_config()))
        whole = ApproximateEngine(index, SearchSettings(17, 300))
    else:
        whole = ExactEngine(keys, single_device_mesh(), 64)
    row_N, queries = np.arange(script.ROWS), script.queries(rule)
    if rule == "row":
        expected = drop_own_row(whole.search(key, script.K + 1), row_N)
    else:
        every = whole.search(key, script.ROWS)
        excluded = queries.exclusion.excluded(row_N, every.row_QK)
        excluded |= ~queries.share.holds(row_N)[:, None]
        expected = drop(every, excluded, script.K)
    command = [sys.executable, str(Path(script.__file__)), str(tmp_path), engine, rule]
    started = [
        subprocess.Popen(
            command,
            env=environment | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for environment in environments_of(2, 2, os.environ)
    ]
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert len(list(tmp_path.glob(f"done-{engine}-*"))) == 2
    out = epath.Path(tmp_path / engine)
    assert recorded_shards(out) == frozenset(range(6)) and not (out / RUNNING).exists()
    row, distance = (read_rows(open_array(out / name), 0, script.ROWS) for name in script.specs())
    np.testing.assert_array_equal(row, expected.row_QK)
    if engine != "exact":
        np.testing.assert_array_equal(distance, expected.distance_QK)
    else:  # On a mesh XLA adds the squares in another order.
        np.testing.assert_allclose(distance, expected.distance_QK, rtol=1e-5, atol=1e-6)
