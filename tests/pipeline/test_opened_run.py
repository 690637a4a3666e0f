"""A finished run as Python objects, in a process of its own where that matters."""

import subprocess
import sys

import numpy as np
import pytest

import mlpmem_jax as mm
from mlpmem_jax.config.schema import Config
from mlpmem_jax.errors import ArtifactError, ConfigError
from mlpmem_jax.generation.language_model import _windows
from mlpmem_jax.pipeline.scoring import memory_scores, stored_split
from mlpmem_jax.stats.mixing import mixture_logprob

SCRIPT = """
import sys
import mlpmem_jax as mm
assert "jax" not in sys.modules
run = mm.open_run(sys.argv[1])
print(run.results()["systems"]["memory"]["interpolation"])
model = run.model()
scores = model.score("def read(path):\\n    return path")
print(len(scores.token_T), scores.nats, repr(model.generate(["def read("], 8)[0]))
"""


def test_a_script_opens_a_run_scores_and_generates(tiny_run: Config):
    command = [sys.executable, "-c", SCRIPT, tiny_run.workdir]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    weight, found = done.stdout.splitlines()
    run = mm.open_run(tiny_run.workdir)
    assert run.config == tiny_run
    assert float(weight) == run.results()["systems"]["memory"]["interpolation"]
    model = run.model()
    scores = model.score("def read(path):\n    return path")
    expected = f"{len(scores.token_T)} {scores.nats} {model.generate(['def read('], 8)[0]!r}"
    assert found == expected


def test_scores_of_a_text_are_those_of_evaluation(tiny_run: Config):
    """The first document of the test split, which nothing stands before."""
    run = mm.open_run(tiny_run.workdir)
    tokens = run.tokens("test")
    read = tokens.read(0, 1 + 2 * tiny_run.decoder.context_tokens)
    ends = np.flatnonzero(read[1:] == tokens.separator_id)
    document = read[1 : ends[0] + 1] if len(ends) else read[1:]
    text = run.tokenizer().decode(document.tolist())
    model = run.model()
    scores = model.score(text)
    np.testing.assert_array_equal(scores.token_T, document)
    stored = stored_split(run.artifacts, "test")
    networks = run.decoder(), run.memory()
    remembered = memory_scores(run.artifacts, "test", *networks, run.mesh, None)
    weight = run.results()["systems"]["memory"]["interpolation"]
    expected = mixture_logprob(remembered.logprob_N, stored.logprob_N, weight)
    # The first window of both begins here. Evaluation reads states that are stored as float16.
    first = min(len(document), tiny_run.embedding_stride_tokens)
    np.testing.assert_allclose(scores.logprob_T[:first], expected[:first], atol=2e-3)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 12, 13, 40])
def test_windows_score_every_label_once(length: int):
    seen = [row for start, first in _windows(length, 8) for row in range(first, start + 8)]
    assert seen[:length] == list(range(length))
    assert all(0 <= first - start < 8 for start, first in _windows(length, 8))


def test_what_is_missing_is_named(tiny_run: Config, tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        mm.open_run(str(tmp_path / "nowhere"))
    run = mm.open_run(tiny_run.workdir, ["memory.num_layers=3"])
    where = run.artifacts.memory.path
    differing = r"\(the nearest is \w{8}: memory.num_layers=2, now 3\)"
    with pytest.raises(ArtifactError, match=f"{where}: .*not trained yet.* {differing}"):
        run.model()
    where = run.artifacts.results.path
    with pytest.raises(ArtifactError, match=f"{where}: .*command `evaluate` {differing}"):
        run.results()
    assert run.model(with_memory=False).generate(["x"], 3)
