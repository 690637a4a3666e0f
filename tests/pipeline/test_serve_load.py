"""The server under load: some hundred requests of `benchmarks/serve_load.py`."""

import os

import pytest

from benchmarks.serve_load import SHARES, Server, begin
from mlpmem_jax.config.schema import Config
from tests.conftest import ROOT

CLIENTS, REQUESTS = 16, 400


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_answer_changes_and_no_slot_stays_in_use(
    tiny_run: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    workdir = os.path.abspath(tiny_run.workdir)
    server = Server(workdir, str(ROOT / "configs" / "tiny.yaml"), CLIENTS, slots=4)
    try:
        load = begin(server, seed=0)
        cases = load.cases(REQUESTS, seed=0)
        assert {case.kind for case in cases} == set(SHARES)
        for kind, bad in load.bad.items():
            assert {case.what for case in cases if case.kind == kind} == set(bad)
        load.run(cases, CLIENTS)
        load.settle()
    finally:
        code = server.end()
    assert not load.wrong
    assert sum(load.counts.values()) == REQUESTS
    assert len(load.seconds) == load.counts["good", 200] > 0.7 * REQUESTS
    assert code == 0
