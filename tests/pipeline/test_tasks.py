"""evaluate-tasks on a tiny finished run; what runs the harness needs the package lm_eval."""

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mlpmem_jax.__main__ import main
from mlpmem_jax.config.load import load_config
from mlpmem_jax.config.schema import Config
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.opened_run import open_run
from mlpmem_jax.pipeline.resolve import resolved
from mlpmem_jax.studies.tasks.command import results
from tests.conftest import ROOT

TINY = ROOT / "configs" / "tiny.yaml"
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm_eval is not installed (requirements-tasks.txt)",
)
WEIGHT = "generate.interpolation=0.3"
CHOICES = [
    {"text": "def read(self", "options": ["):", " import"], "gold": 0},
    {"text": "import", "options": [" os", " sys", "):"], "gold": 1},
    {"text": "return", "options": [" x", " self"], "gold": 0},
]
YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: {kind}
test_split: test
doc_to_text: {text}
doc_to_target: {target}
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with task files, and one with records of the package's tasks."""
    folder = tmp_path_factory.mktemp("own")
    tasks, data = folder / "tasks", folder / "data"
    tasks.mkdir()
    data.mkdir()
    file = tasks / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in CHOICES), encoding="utf-8")
    choice = YAML.format(
        name="own_choice", file=file, kind="multiple_choice", text="text", target="gold"
    )
    (tasks / "choice.yaml").write_text(
        choice + 'doc_to_choice: options\ntarget_delimiter: ""\n', encoding="utf-8"
    )
    rolling = YAML.format(
        name="own_text", file=file, kind="loglikelihood_rolling", text='""', target="text"
    )
    (tasks / "rolling.yaml").write_text(
        rolling + "metric_list: [{metric: bits_per_byte}]\n", encoding="utf-8"
    )
    written = YAML.format(
        name="own_written", file=file, kind="generate_until", text="text", target="text"
    )
    (tasks / "written.yaml").write_text(
        written + 'generation_kwargs: {until: ["\\n"], max_gen_toks: 5}\n'
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
        encoding="utf-8",
    )
    (data / "nq.jsonl").write_text(
        '{"question": "What is it", "answer": ["x", "y"]}\n', encoding="utf-8"
    )
    (data / "sst2.tsv").write_text("__label__5\tgood\n__label__1\tbad\n", encoding="utf-8")
    return folder


def _start(run: Config, *overrides: str) -> int:
    return main(
        ["evaluate-tasks", "--config", str(TINY), "--workdir", run.workdir, WEIGHT, *overrides]
    )


def _report(run: Config, overrides: Sequence[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    config = resolved(load_config(TINY, [WEIGHT, *overrides], {"workdir": run.workdir}))
    path = results(Artifacts(config)).path
    lines = (path / "samples.jsonl").read_text().splitlines()
    return json.loads((path / "evaluate-tasks.json").read_text()), list(map(json.loads, lines))


def _metric(report: dict[str, Any], task: str, name: str) -> float:
    found = [one for one in report["tasks"][task]["metrics"] if one["metric"] == name]
    return float(found[0]["value"])


def _own(own: Path, names: str, *more: str) -> list[str]:
    return [
        f"tasks.names=[{names}]", f"tasks.include_path={own / 'tasks'}",
        f"tasks.data_path={own / 'data'}", "tasks.batch_size=4", *more,
    ]  # fmt: skip


@needs_harness
def test_a_local_task_gives_the_numbers_of_the_python_interface(
    tiny_run: Config, own: Path, capsys: pytest.CaptureFixture[str]
):
    overrides = _own(own, "own_choice,own_text,own_written")
    assert _start(tiny_run, *overrides) == 0
    out = capsys.readouterr().out
    assert "decoder + memory, λ = 0.300" in out
    report, samples = _report(tiny_run, overrides)
    model = open_run(tiny_run.workdir).model(weight=0.3)

    def logprob(text: str, option: str) -> float:
        count = len(model.tokenizer.encode([text])[0])
        return float(model.score(text + option).logprob_T[count:].sum(dtype="float64"))

    right = []
    for record, sample in zip(CHOICES, samples, strict=False):
        expected = [logprob(record["text"], option) for option in record["options"]]
        found = [logprob for logprob, _ in sample["answers"]]
        assert found == pytest.approx(expected, abs=1e-4)
        right.append(expected.index(max(expected)) == record["gold"])
    assert _metric(report, "own_choice", "acc") == pytest.approx(sum(right) / 3)
    texts = [record["text"] for record in CHOICES]
    nats = sum(model.score(text).nats for text in texts)
    num_bytes = sum(len(text.encode()) for text in texts)
    bits = nats / num_bytes / 0.6931471805599453
    assert _metric(report, "own_text", "bits_per_byte") == pytest.approx(bits, abs=1e-4)
    # The second start finds everything complete.
    assert _start(tiny_run, *overrides) == 0
    assert "own_choice" in capsys.readouterr().out


@needs_harness
@pytest.mark.parametrize("model", ["decoder", "knn", "rag"])
def test_other_models_and_tasks_of_the_package(
    tiny_run: Config, own: Path, capsys: pytest.CaptureFixture[str], model: str
):
    if model == "rag" and importlib.util.find_spec("bm25s") is None:
        pytest.skip("bm25s is not installed (requirements-tasks.txt)")
    names = "mlpmem_nq,mlpmem_nq_published,mlpmem_sst2,own_written"
    overrides = _own(
        own, names, f"tasks.model={model}", "tasks.passage_tokens=4", "decoder.context_tokens=32"
    )
    assert _start(tiny_run, *overrides) == 0, capsys.readouterr().err
    report, samples = _report(tiny_run, overrides)
    assert report["model"] == model
    assert report["tasks"]["mlpmem_nq"]["records"] == 1
    assert 0 <= _metric(report, "mlpmem_nq", "f1") <= 1
    [good, bad] = [one for one in samples if one["task"] == "mlpmem_sst2"]
    assert good["prompt"] == "good It was"
    assert len(good["answers"]) == len(bad["answers"]) == 4  # two words, after two premises
    # The domain premise is the same for both records.
    assert good["answers"][2:] == bad["answers"][2:] or model == "rag"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tasks.names=[]"], "tasks.names=[]: name at least one task"),
        (["tasks.include_path=/no/such"], "tasks.include_path=/no/such: is no directory"),
        (["tasks.model=other"], "tasks.model=other"),
        (["tasks.names=[mlpmem_webqa]"], "mlpmem_webqa|webqa.jsonl"),
        (["tasks.names=[mlpmem_hotpotq]"], "did you mean mlpmem_hotpotqa"),
    ],
)
@needs_harness
def test_refusals(
    tiny_run: Config, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
):
    assert _start(tiny_run, "tasks.names=[mlpmem_nq]", *overrides) == 2
    err = capsys.readouterr().err
    assert any(part in err for part in message.split("|")), err


def test_missing_packages_are_named(
    tiny_run: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    found = importlib.util.find_spec

    def find(name: str, *more: Any) -> Any:
        return None if name == "lm_eval" else found(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert _start(tiny_run, "tasks.names=[arc_easy]") == 2
    err = capsys.readouterr().err
    assert "the package lm_eval is not installed" in err
    assert "pip install -r requirements-tasks.txt" in err


@needs_harness
@pytest.mark.slow
def test_the_harness_finds_the_same_through_serve(tiny_run: Config, own: Path):
    import logging

    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from tests.pipeline.test_serve import KEY, Server

    overrides = _own(own, "own_choice,own_written")
    assert _start(tiny_run, *overrides) == 0
    report, samples = _report(tiny_run, overrides)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    server = Server(tiny_run.workdir, WEIGHT)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OPENAI_API_KEY", KEY)
            found = simple_evaluate(
                model="local-completions",
                model_args={
                    "model": "run",
                    "base_url": f"http://127.0.0.1:{server.port}/v1/completions",
                    "tokenizer_backend": "remote",
                    "max_length": 31,
                    "num_concurrent": 1,
                    "auth_token": KEY,
                },
                tasks=["own_choice", "own_written"],
                task_manager=TaskManager(include_path=str(own / "tasks"), include_defaults=False),
                bootstrap_iters=0,
            )
    finally:
        server.end()
    assert found is not None
    assert found["results"]["own_choice"]["acc,none"] == _metric(report, "own_choice", "acc")
    _check_answers(samples, found["samples"])


def _check_answers(ours: list[dict[str, Any]], theirs: dict[str, list[dict[str, Any]]]) -> None:
    """Compares what each record of tasks gave."""
    for name, found in theirs.items():
        own = [one["answers"] for one in ours if one["task"] == name]
        for answers, others in zip(own, (one["filtered_resps"] for one in found), strict=True):
            if name == "own_choice":
                for (logprob, greedy), (other, other_greedy) in zip(answers, others, strict=True):
                    assert other == pytest.approx(logprob, abs=1e-4)
                    assert other_greedy == greedy
            elif name == "own_text":
                assert others == pytest.approx(answers, abs=1e-4)
            else:
                assert others == answers


@needs_harness
@pytest.mark.slow
@pytest.mark.parametrize("model", ["decoder", "memory"])
def test_the_harness_finds_the_same_of_an_export(
    tiny_run: Config, own: Path, tmp_path: Path, model: str
):
    """By its own code for `transformers`, on the decoder alone and with its memory."""
    for name in ("torch", "transformers", "accelerate"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    names = ["own_choice", "own_text", "own_written"]
    overrides = _own(own, ",".join(names), f"tasks.model={model}")
    assert _start(tiny_run, *overrides) == 0
    report, samples = _report(tiny_run, overrides)
    folder = str(tmp_path / "exported")
    what = "model" if model == "memory" else "decoder"
    export = ["export", "--config", str(TINY), "--workdir", tiny_run.workdir, WEIGHT]
    assert main([*export, "--output", folder, "--what", what]) == 0
    # The harness begins texts that it reads whole with the separator by itself.
    for tasks, begins in ((["own_choice", "own_written"], True), (["own_text"], False)):
        about = {"pretrained": folder, "dtype": "float32", "trust_remote_code": True}
        found = simple_evaluate(
            model="hf",
            model_args={**about, "add_bos_token": begins},
            device="cpu",
            batch_size=1,
            tasks=tasks,
            task_manager=TaskManager(include_path=str(own / "tasks"), include_defaults=False),
            bootstrap_iters=0,
        )
        assert found is not None
        _check_answers(samples, found["samples"])
        for task in tasks:
            for metric in report["tasks"][task]["metrics"]:
                value = found["results"][task][f"{metric['metric']},{metric['filter']}"]
                assert value == pytest.approx(metric["value"], abs=1e-4)
