"""From prompts to text on the terminal."""

import ast
import itertools
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from mlpmem_jax.__main__ import main
from mlpmem_jax.commands import run_command
from mlpmem_jax.config.schema import Config
from mlpmem_jax.corpus.tokenizer import load_tokenizer
from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.generation.interpolated import InterpolatedModel
from mlpmem_jax.models.decoder import Site
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.interpolation import interpolation
from mlpmem_jax.pipeline.networks import finished_networks
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.scoring import memory_scores, stored_split
from mlpmem_jax.stats.mixing import mixture_logprob

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny.yaml"


def _with(config: Config, **settings: object) -> Config:
    section = config.generate.model_copy(update=settings)
    return config.model_copy(update={"generate": section})


def _shown(
    config: Config, capsys: pytest.CaptureFixture[str], *, without_memory: bool = False
) -> tuple[str, str]:
    capsys.readouterr()
    options = Options(workdir=config.workdir, without_memory=without_memory)
    assert run_command("generate", config, options) == 0
    shown = capsys.readouterr()
    return shown.out, shown.err


def _stored_weight(config: Config) -> float:
    results = json.loads((Artifacts(config).results.path / "evaluate.json").read_text())
    return float(results["systems"]["memory"]["interpolation"])


def test_prompts_are_continued(tiny_run: Config, capsys: pytest.CaptureFixture[str]):
    prompts = ("def read(", "", "import é")
    out, err = _shown(_with(tiny_run, prompts=prompts, interpolation=0.25), capsys)
    assert "def read(" in out
    assert "import é" in out
    assert out.startswith("sample (λ = 0.250")
    assert interpolation(Artifacts(tiny_run)) == _stored_weight(tiny_run)
    assert "tokens/s" in err


def test_a_tiny_temperature_writes_what_greedy_writes(
    tiny_run: Config, capsys: pytest.CaptureFixture[str]
):
    settings = {"prompts": ("def ",), "interpolation": 0.25, "max_new_tokens": 12}
    greedy, _ = _shown(_with(tiny_run, sampling="greedy", **settings), capsys)
    cold, _ = _shown(_with(tiny_run, sampling="random", temperature=1e-40, **settings), capsys)
    assert len(cold) > len("sample (λ = 0.250, random):\ndef ")
    assert cold.splitlines()[1:] == greedy.splitlines()[1:]


def test_without_memory_needs_none(
    tiny_run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(tiny_run.workdir, tmp_path / "run")
    config = tiny_run.model_copy(update={"workdir": str(tmp_path / "run")})
    Artifacts(config).memory.remove()
    out, _ = _shown(config, capsys, without_memory=True)
    assert out.startswith("sample (decoder alone")
    with pytest.raises(ArtifactError, match="not trained yet.*`train`.*--without-memory"):
        run_command("generate", config, Options(workdir=config.workdir))


@pytest.mark.parametrize("prompt", ["---", "-x", "x" * 20_000, "null", " #"])
def test_a_prompt_is_taken_as_typed(tiny_run: Config, capsys, prompt: str):
    """One that is longer than the context keeps its last tokens."""
    arguments = ["generate", "--config", str(TINY), "--workdir", tiny_run.workdir]
    assert main([*arguments, "generate.max_new_tokens=1", "--prompt", prompt]) == 0
    shown = capsys.readouterr()
    assert f"\n{prompt}" in shown.out
    assert ("tokens, the separator included, the last 32 are read" in shown.err) == (
        len(prompt) > 1000
    )


def test_a_trailing_space_is_left_to_the_next_token(
    tiny_run: Config, capsys: pytest.CaptureFixture[str]
):
    """It makes the same text as the prompt without it, and that is logged once."""
    settings = {"interpolation": 0.25, "max_new_tokens": 12}
    with_blank, logged = _shown(_with(tiny_run, prompts=("def ",), **settings), capsys)
    without, silent = _shown(_with(tiny_run, prompts=("def",), **settings), capsys)
    assert with_blank == without
    assert logged.count("prompt 'def ': its trailing space is left out") == 1
    assert "trailing space" not in silent


def test_the_default_prompt_begins_a_validation_document(
    tiny_run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = _with(tiny_run, interpolation=0.25, max_new_tokens=1)
    assert config.generate.prompts == ()
    shown, logged = _shown(config, capsys)
    prompt = ast.literal_eval(re.search(r"^prompt: (.*) \(generate.prompts", logged, re.M)[1])
    assert len(prompt.split()) == 8
    assert shown.split("\n", 1)[1].startswith(prompt)
    split = TokenSplit(Artifacts(config).tokens, "valid")
    decode = load_tokenizer(Artifacts(config).tokenizer).decode
    texts = [
        decode(split.read(start + 1, stop).tolist())
        for start, stop in itertools.pairwise(split.document_offset.tolist())
    ]
    assert any(text.startswith(prompt) for text in texts)
    assert _shown(config, capsys)[0] == shown
    others = {_shown(_with(config, seed=seed), capsys)[0] for seed in range(4)}
    assert len(others) > 1
    moved = config.model_copy(update={"workdir": str(tmp_path / "run")})
    shutil.copytree(tiny_run.workdir, moved.workdir)
    Artifacts(moved).tokens.remove()
    with pytest.raises(ArtifactError, match="Run `tokenize`, or set generate.prompts"):
        run_command("generate", moved, Options(workdir=moved.workdir))


def test_interpolation_without_results(tiny_run: Config, tmp_path: Path):
    shutil.copytree(tiny_run.workdir, tmp_path / "run")
    config = tiny_run.model_copy(update={"workdir": str(tmp_path / "run")})
    Artifacts(config).results.remove()
    with pytest.raises(ArtifactError, match="run `evaluate`, or set generate.interpolation"):
        run_command("generate", config, Options(workdir=config.workdir))
    assert interpolation(Artifacts(_with(config, interpolation=0.25))) == 0.25


def test_cached_generation_gives_what_evaluation_gives(tiny_run: Config):
    """Token by token with a cache, the first rows of the test split, as `evaluate` scores them."""
    config, mesh = tiny_run, single_device_mesh()
    assert config.memory.recent_tokens > 0
    run = Artifacts(config)
    decoder, memory = finished_networks(run, mesh)
    tokens = TokenSplit.open(run.tokens, "test")
    count = config.embedding_stride_tokens  # of the first window, whose context begins with it
    token_T = tokens.read(0, count + 1)
    weight, scored = 0.3, memory_scores(run, "test", decoder, memory, mesh, None)
    stored_N = stored_split(run, "test").logprob_N[:count]
    expected_N = mixture_logprob(scored.logprob_N[:count], stored_N, weight)
    site = Site.of(config.datastore.input, config.decoder.num_layers)
    model = InterpolatedModel(
        decoder, memory, site=site, weight=weight, separator=tokens.separator_id, mesh=mesh
    )
    extend, cache = jax.jit(model.extend), model.empty_cache(1)
    found = []
    for token, label in itertools.pairwise(token_T.tolist()):
        one = np.array([[token]], np.int32)
        logprob_BV, cache = extend(model.parameters, cache, one, np.ones(1, np.int32))
        found.append(float(logprob_BV[0, label]))
    # States were stored as float16.
    np.testing.assert_allclose(found, expected_N, atol=2e-3)


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("memory.recent_tokens=0", "memory.recent_tokens=2, now 0"),
        ("memory.recent_tokens=3", "memory.recent_tokens=2, now 3"),
        ("memory.recent_table=own", 'memory.recent_table="decoder", now "own"'),
        ("memory.ngram_orders=[2]", "memory.ngram_orders=[], now [2]"),
    ],
)
def test_a_memory_that_reads_other_tokens_is_not_used(
    tiny_run: Config, capsys: pytest.CaptureFixture[str], override: str, difference: str
):
    """It is another memory, which is not trained: the message names the one that is."""
    arguments = ["generate", "--config", str(TINY), "--workdir", tiny_run.workdir]
    assert main([*arguments, override]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    nearest = Artifacts(tiny_run).memory.path.name[:8]
    assert "the memory is not trained yet" in line
    assert line.endswith(f"(the nearest is {nearest}: {difference})")


def test_a_memory_of_before_a_key_existed_is_named_without_it(
    tiny_run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(tiny_run.workdir, tmp_path / "run")
    config = tiny_run.model_copy(update={"workdir": str(tmp_path / "run")})
    memory = Path(Artifacts(config).memory.path)
    old = memory.rename(memory.parent / ("0" * 16))
    manifest = json.loads((old / "manifest.json").read_text())
    del manifest["recipe"]["memory"]["recent_tokens"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    assert main(["generate", "--config", str(TINY), "--workdir", config.workdir]) == 2
    message = capsys.readouterr().err
    assert "(the nearest is 00000000: memory.recent_tokens=null, now 2)" in message


def test_a_workdir_may_be_relative(tiny_run, monkeypatch, capsys):
    """Checkpoints are restored from where the caller stands."""
    workdir = Path(tiny_run.workdir)
    monkeypatch.chdir(workdir.parent)
    arguments = ["generate", "--config", str(TINY), "--workdir", workdir.name]
    assert main([*arguments, "--without-memory", "generate.max_new_tokens=1"]) == 0
