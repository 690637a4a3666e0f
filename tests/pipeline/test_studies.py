"""analyze, cost and search-quality on a tiny finished run."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from mlpmem_jax.__main__ import main
from mlpmem_jax.config.load import load_config
from mlpmem_jax.config.schema import Config
from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.resolve import resolved
from mlpmem_jax.retrieval.engine import is_approximate_installed
from mlpmem_jax.store.arrays import open_array, read_rows
from mlpmem_jax.studies.analyze.command import analysis
from mlpmem_jax.studies.cost.command import measurement
from mlpmem_jax.studies.cost.quality import with_rows
from mlpmem_jax.studies.search_quality.command import comparison
from tests.pipeline.conftest import TINY

# Where ScaNN has no wheels, the exact engine alone is measured.
ENGINES = ("scann", "exact") if is_approximate_installed() else ("exact",)
SHORT = [
    f"cost.engines=[{', '.join(ENGINES)}]", "cost.doublings=2", "cost.rounds=3",
    "cost.num_tokens=4", "cost.num_prompts=2", "cost.prompt_tokens=16", "cost.batch_size=2",
    "cost.batch_steps=2", "analyze.sharpness_rows=300", "analyze.chunk_rows=128",
    "analyze.read_tokens=5000", "search_quality.sample_rows=200",
]  # fmt: skip
if is_approximate_installed():
    SHORT.append(
        "search_quality.settings=[{name: coarse, num_leaves_to_search: 1}, "
        "{name: exact, engine: exact}]"
    )
else:
    SHORT.append("search_quality.settings=[{name: exact, engine: exact}]")


@pytest.fixture(scope="module")
def run(tiny_run: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A copy of the finished tiny run, with short studies."""
    workdir = tmp_path_factory.mktemp("studies") / "run"
    shutil.copytree(tiny_run.workdir, workdir)
    return _configured(str(workdir))


def _configured(workdir: str, *more: str) -> Config:
    return resolved(load_config(TINY, [*SHORT, *more], {"workdir": workdir}))


def _start(command: str, config: Config, *more: str) -> int:
    arguments = ["--config", str(TINY), "--workdir", config.workdir]
    return main([command, *arguments, *SHORT, *more])


def _report(path: Path, name: str) -> tuple[dict, list[dict[str, str]]]:
    assert (path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with (path / f"{name}.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return json.loads((path / f"{name}.json").read_text()), rows


def _second_start_is_complete(command: str, config: Config, capsys, name: str) -> None:
    """Starts a command again; its report, by its title, is there."""
    capsys.readouterr()
    assert _start(command, config) == 0
    shown = capsys.readouterr().out
    assert f"{name}: complete" in shown
    assert ": making" not in shown
    lines = shown.splitlines()
    assert all(len(line) <= 100 for line in lines if line.startswith(("┌", "│", "└")))


def test_analyze(run: Config, capsys: pytest.CaptureFixture[str]):
    assert _start("analyze", run) == 0
    layout = Artifacts(run)
    results, rows = _report(analysis(layout).path, "analyze")
    evaluated = json.loads((layout.results.path / "evaluate.json").read_text())["systems"]
    for system in ("knn", "memory"):
        gain = -evaluated[system]["difference_nats"]
        assert results["all"][system]["gain"] == pytest.approx(gain, abs=1e-6)
        for groups in (results["frequency"], *(one["groups"] for one in results["ngrams"])):
            within = sum(group["token_share"] for group in groups)
            if within == pytest.approx(1):  # Every scored token has a label that has a bin.
                parts = sum(group[system]["contribution"] for group in groups)
                assert parts == pytest.approx(gain, abs=1e-6)
    assert sum(group["tokens"] for group in results["frequency"]) == results["test"]["tokens"]
    sharp = results["sharpness"]
    # The decoder run again gives the log-probabilities that were stored.
    assert sharp["decoder_label_nats_difference"] < 1e-3
    assert sharp["systems"]["knn"]["kl_from_knn"] == 0
    decoder = sharp["systems"]["decoder"]
    assert decoder["mean_tokens"] == sorted(decoder["mean_tokens"])
    assert decoder["kl_from_knn"] > 0
    assert {row["table"] for row in rows} >= {"all", "frequency", "2-gram", "sharpness"}
    _second_start_is_complete("analyze", run, capsys, analysis(layout).title)


def test_seen_bigrams_are_those_of_a_set(run: Config):
    assert _start("analyze", run) == 0
    results = json.loads((analysis(Artifacts(run)).path / "analyze.json").read_text())
    streams = {}
    for split in ("train", "test"):
        tokens = TokenSplit.open(Artifacts(run).tokens, split)
        streams[split] = tokens.read(0, tokens.num_tokens).tolist()
    separator = tokens.separator_id
    seen = {
        pair for pair in zip(streams["train"], streams["train"][1:], strict=False)
        if pair[1] != separator
    }  # fmt: skip
    pairs = [
        pair for pair in zip(streams["test"], streams["test"][1:], strict=False)
        if pair[1] != separator
    ]  # fmt: skip
    unseen, known = results["ngrams"][0]["groups"]
    assert known["tokens"] == sum(pair in seen for pair in pairs)
    assert unseen["tokens"] == len(pairs) - known["tokens"]


def test_cost(run: Config, capsys: pytest.CaptureFixture[str]):
    assert _start("cost", run) == 0
    layout = Artifacts(run)
    report = measurement(layout)
    results, rows = _report(report.path, "cost")
    num_rows = layout.datastore("train").load().counts["rows"]
    assert results["rows"] == [num_rows // 4, num_rows // 2, num_rows]
    assert list(results["systems"]) == ["decoder", "memory", *ENGINES]
    for name, system in results["systems"].items():
        assert min(system["token_ms_p50"]) > 0
        assert all(
            a <= b for a, b in zip(system["token_ms_p50"], system["token_ms_p95"], strict=True)
        )
        assert min(system["tokens_per_sec"]) > 0
        times = np.asarray(results["milliseconds"][name]["token"])
        assert times.shape == (3, 3, 4)
        middle = np.median(times.reshape(3, -1), axis=1)
        np.testing.assert_allclose(system["token_ms_p50"], middle)
        slope = system["slopes"]["token_ms_p50"]
        assert slope["low"] <= slope["high"]
        assert ("search_ms_p50" in system["slopes"]) == (name in ENGINES)
    assert results["systems"]["memory"]["slopes"]["bytes"]["slope"] == pytest.approx(0)
    assert 0.3 < results["systems"]["exact"]["slopes"]["bytes"]["slope"] < 1
    assert not list(report.path.glob("index-*"))
    assert len(rows) > 3 * len(results["systems"])
    _second_start_is_complete("cost", run, capsys, report.title)


def test_cost_goes_on_from_what_was_measured(run: Config):
    assert _start("cost", run) == 0
    path = measurement(Artifacts(run)).path
    (path / "manifest.json").rename(path / "building.json")  # As a kill before the end leaves it.
    kept = {file: file.read_bytes() for file in path.glob("round-*.json")}
    assert len(kept) == 9
    assert _start("cost", run) == 0
    assert {file: file.read_bytes() for file in path.glob("round-*.json")} == kept


@pytest.mark.parametrize(
    ("command", "names"),
    [("cost", ("round-0-*.json", "prepared-*.json")), ("search-quality", ("setting-*.json",))],
)
def test_what_was_measured_before_a_kill_is_not_believed_where_it_was_changed(
    run: Config, capsys: pytest.CaptureFixture[str], command: str, names: tuple[str, ...]
):
    assert _start(command, run) == 0
    path = {"cost": measurement, "search-quality": comparison}[command](Artifacts(run)).path
    whole = (path / "manifest.json").read_bytes()
    (path / "manifest.json").rename(path / "building.json")  # As a kill leaves it.
    for name in names:
        file = sorted(path.glob(name))[0]
        text = file.read_text()
        file.write_text(re.sub(r"[0-9]", lambda digit: str(9 - int(digit[0])), text, count=3))
        capsys.readouterr()
        assert _start(command, run) == 2
        assert f"error: {file}: damaged" in capsys.readouterr().err
        file.write_text(text)
    (path / "building.json").unlink()
    (path / "manifest.json").write_bytes(whole)


def test_search_quality(run: Config, tiny_run: Config, capsys: pytest.CaptureFixture[str]):
    assert _start("search-quality", run) == 0
    layout = Artifacts(run)
    results, rows = _report(comparison(layout).path, "search-quality")
    *coarse, exact = results["settings"]
    assert exact["recall"] == 1
    assert exact["skew_kl"] == pytest.approx(0, abs=1e-6)
    assert exact["missed_mass"] == 0
    # The kNN-LM of the exact setting is the one of the main table.
    evaluated = json.loads((layout.results.path / "evaluate.json").read_text())["systems"]
    assert exact["knn"]["test_nats"] == pytest.approx(evaluated["knn"]["test_nats"], rel=1e-5)
    assert exact["memory"]["test_nats"] == pytest.approx(evaluated["memory"]["test_nats"], rel=1e-5)
    for one in coarse:
        assert one["recall"] < 1
        assert one["skew_kl"] > 0
        assert one["memory"]["against_exact"]["low"] <= one["memory"]["against_exact"]["high"]
    assert [row["name"] for row in rows] == [one["name"] for one in results["settings"]]
    # Neighbours of valid and test are exact, and so shared by all settings.
    before, after = (
        {path.name for path in (Artifacts(one).store / "neighbors").iterdir()}
        for one in (tiny_run, run)
    )
    assert before == after
    _second_start_is_complete("search-quality", run, capsys, comparison(layout).title)


@pytest.mark.slow
def test_quality_of_memories_of_growing_datastores(run: Config):
    more = ("cost.quality=train", "cost.doublings=1")
    assert _start("cost", run, *more) == 0
    layout = Artifacts(_configured(run.workdir, *more))
    results = json.loads((measurement(layout).path / "cost.json").read_text())
    half, whole = results["quality"]["sizes"]
    assert half["rows"] == whole["rows"] // 2
    evaluated = json.loads((Artifacts(run).results.path / "evaluate.json").read_text())["systems"]
    for system, nats in whole["test_nats"].items():
        assert nats == pytest.approx(evaluated[system]["test_nats"], rel=1e-6)
    part = with_rows(layout, half["rows"]).datastore("train").path
    for name in ("key", "label"):
        copied = open_array(part / name)
        original = open_array(Artifacts(run).datastore("train").path / name)
        np.testing.assert_array_equal(
            read_rows(copied, 0, copied.shape[0]), read_rows(original, 0, half["rows"])
        )


def test_parts_are_not_trained_otherwise_than_the_whole(
    run: Config, capsys: pytest.CaptureFixture[str]
):
    store = Artifacts(run).store
    before = {path.name for path in (store / "datastore").iterdir()}
    capsys.readouterr()
    for override, said in (
        ("train.num_steps=6", "train.num_steps=8, now 6"),
        ("retrieval.num_neighbors=8", "retrieval.num_neighbors=16, now 8"),
    ):
        more = ("cost.quality=train", "cost.doublings=1", override)
        assert _start("cost", run, *more) == 2
        assert said in capsys.readouterr().err
    assert {path.name for path in (store / "datastore").iterdir()} == before


def test_weights_of_another_memory_are_refused(
    tiny_run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run.workdir, workdir)
    config = tiny_run.model_copy(update={"workdir": str(workdir)})
    # Another memory beside the first: nothing evaluated it, and the first is as it was.
    assert _start("train", config, "train.num_steps=6") == 0
    capsys.readouterr()
    for command in ("analyze", "cost"):
        assert _start(command, config, "train.num_steps=6") == 2
        told = capsys.readouterr().err
        assert "results/evaluate does not exist" in told and "command `evaluate`" in told
        assert "train.num_steps=8, now 6" in told
    # The same one with other bits, as sums in another order leave them.
    before = Artifacts(config).memory.load().fingerprint
    assert _start("train", config, "train.loss_chunk_tokens=16", "--rebuild") == 0
    assert Artifacts(config).memory.load().fingerprint != before
    capsys.readouterr()
    for command in ("analyze", "cost"):
        assert _start(command, config) == 2
        told = capsys.readouterr().err
        assert "results/evaluate is stale, built from another memory/" in told
        assert "evaluate --rebuild" in told


@pytest.mark.parametrize(
    ("command", "override", "said"),
    [
        ("cost", "cost.prompt_tokens=33", "cost.prompt_tokens=33 is longer than"),
        ("cost", "cost.doublings=20", "cost.doublings=20"),
        ("analyze", "analyze.masses=[2.0]", "analyze.masses"),
    ],
)
def test_bad_input_is_one_line(
    tiny_run: Config, command: str, override: str, said: str, capsys: pytest.CaptureFixture[str]
):
    assert _start(command, tiny_run, override) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert len(shown) == 1
    assert said in shown[0]
    assert not (Path(tiny_run.workdir) / command).exists()
