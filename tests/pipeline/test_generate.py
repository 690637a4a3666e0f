"""From prompts to text on the terminal."""

import shutil
from pathlib import Path

import pytest

from mlpmem_jax.config.schema import Config
from mlpmem_jax.datastore.layout import Layout
from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.pipeline import generate
from mlpmem_jax.pipeline.options import Options


def _with(config: Config, **settings: object) -> Config:
    section = config.generate.model_copy(update=settings)
    return config.model_copy(update={"generate": section})


def _shown(
    config: Config, capsys: pytest.CaptureFixture[str], *, without_memory: bool = False
) -> tuple[str, str]:
    capsys.readouterr()
    options = Options(workdir=config.workdir, without_memory=without_memory)
    assert generate.main(config, options) == 0
    shown = capsys.readouterr()
    return shown.out, shown.err


def test_prompts_are_continued(tiny_run: Config, capsys: pytest.CaptureFixture[str]):
    config = _with(tiny_run, prompts=("def read(", "", "import é"))
    out, err = _shown(config, capsys)
    assert "def read(" in out
    assert "import é" in out
    assert out.startswith("sample (λ = ")
    assert "tokens/s" in err
    assert _shown(config, capsys)[0] == out


def test_without_memory_needs_none(
    tiny_run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(tiny_run.workdir, tmp_path / "run")
    config = tiny_run.model_copy(update={"workdir": str(tmp_path / "run")})
    Layout(config).memory.remove()
    out, _ = _shown(config, capsys, without_memory=True)
    assert out.startswith("sample (decoder alone")
    with pytest.raises(ArtifactError, match="not trained yet.*`train`.*--without-memory"):
        generate.main(config, Options(workdir=config.workdir))


def test_interpolation_without_results(
    tiny_run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(tiny_run.workdir, tmp_path / "run")
    config = tiny_run.model_copy(update={"workdir": str(tmp_path / "run")})
    Layout(config).results.remove()
    with pytest.raises(ArtifactError, match="run `evaluate`, or set generate.interpolation"):
        generate.main(config, Options(workdir=config.workdir))
    out, _ = _shown(_with(config, interpolation=0.25), capsys)
    assert out.startswith("sample (λ = 0.250")
