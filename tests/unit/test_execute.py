"""What every command does with its configuration: whose config.yaml it is, and what is auto."""

import pytest

from mlpmem_jax.__main__ import main
from mlpmem_jax.commands import run_command
from mlpmem_jax.config.load import dump_config, load_config
from mlpmem_jax.config.schema import Config
from mlpmem_jax.errors import ArtifactError, ConfigError
from mlpmem_jax.models import layers
from mlpmem_jax.pipeline import embed, pretrain, resolve, run, tokenize, train
from mlpmem_jax.pipeline.execute import check_config_file, write_config
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.studies.analyze.command import analysis
from mlpmem_jax.studies.cost.command import measurement
from mlpmem_jax.studies.search_quality.command import comparison

JOINT = ("train.mode=joint", "train.decoder_optimizer.warmup_steps=2")


@pytest.mark.parametrize("command", ["tokenize", "run"])
@pytest.mark.parametrize("flags", [(), ("--rebuild",), ("--dry-run",)])
def test_a_configuration_of_the_users_is_not_replaced(
    tmp_path, monkeypatch, capsys, root, command, flags
):
    monkeypatch.chdir(tmp_path)
    text = (root / "configs" / "tiny.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text)
    assert main([command, "--config", "config.yaml", "--workdir", ".", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/config.yaml: not as this program writes it" in line
    assert (tmp_path / "config.yaml").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    "text",
    [
        "# mine\n{ours}",
        "{ours}# mine\n",
        "{marked}\n# mine\n",
        "seed: 1\n",
        "",
        "\tno yaml",
        "seed:   1\nworkdir: x\n",
    ],
)
def test_what_the_resolved_configuration_would_lose_is_kept(tiny_config, tmp_path, text):
    run = Artifacts(tiny_config)
    write_config(run)
    file = tmp_path / "run" / "config.yaml"
    text = text.format(ours=dump_config(tiny_config), marked=file.read_text())
    file.write_text(text)
    for write in (check_config_file, write_config):
        with pytest.raises(ConfigError, match="config.yaml: not as this program writes it"):
            write(run)
    assert file.read_text() == text


def test_what_a_run_wrote_a_later_one_replaces(tiny_config, make_config, tmp_path):
    file = tmp_path / "run" / "config.yaml"
    for before in (None, dump_config(tiny_config)):  # The second: of an earlier version.
        if before is not None:
            file.write_text(before)
        for config in (tiny_config, make_config("seed=3")):
            write_config(Artifacts(config))
            assert load_config(file) == config


def _recipes(config):
    run = Artifacts(config)
    stages = [*pretrain.stages(run), *embed.stages(run), *train.stages(run)]
    made = [*(stage.artifact for stage in stages), run.results]
    if config.train.mode == "memory":  # Studies of a memory beside its decoder.
        made += [comparison(run), measurement(run), analysis(run)]
    return {one.label: one.recipe for one in made}


def _dtypes(value):
    if not isinstance(value, dict):
        return []
    inner = [one for key, part in value.items() if key != "compute_dtype" for one in _dtypes(part)]
    return inner + ([value["compute_dtype"]] if "compute_dtype" in value else [])


@pytest.mark.parametrize(("platform", "dtype"), [("cpu", "float32"), ("tpu", "bfloat16")])
@pytest.mark.parametrize("overrides", [(), ("train.inputs=online",), JOINT])
def test_recipes_hold_the_dtype_that_is_computed_in(
    make_config, monkeypatch, platform, dtype, overrides
):
    monkeypatch.setattr(layers, "target_platform", lambda: platform)
    config = resolve.resolved(make_config(*overrides))
    for name, recipe in _recipes(config).items():
        assert set(_dtypes(recipe)) == {dtype}, name
    given = make_config("decoder.compute_dtype=bfloat16", "memory.compute_dtype=float32")
    assert resolve.resolved(given) == given


def test_the_shipped_quickstart_names_one_dtype_in_every_stage(root):
    config = resolve.resolved(load_config(root / "configs" / "quickstart.yaml"))
    recipes = _recipes(config)
    assert {dtype for recipe in recipes.values() for dtype in _dtypes(recipe)} == {"float32"}
    decoders = [recipe["decoder"] for recipe in recipes.values() if "decoder" in recipe]
    assert len({one["compute_dtype"] for one in decoders}) == 1 and len(decoders) >= 5


def test_what_one_platform_began_another_does_not_continue(make_config, monkeypatch):
    config = make_config()
    assert run_command("tokenize", config, Options(config.workdir)) == 0
    began = Artifacts(resolve.resolved(config)).decoder
    began.begin({"tokens/1": "1234"})
    (began.path / "checkpoints").mkdir()
    (began.path / "checkpoints" / "state").write_text("half")
    monkeypatch.setattr(layers, "target_platform", lambda: "tpu")
    decoder = Artifacts(resolve.resolved(config)).decoder
    assert decoder.relative != began.relative
    with pytest.raises(ArtifactError, match='decoder.compute_dtype="float32", now "bfloat16"'):
        decoder.load()


def test_commands_resolve_before_they_plan(make_config, monkeypatch):
    seen: dict[str, Config] = {}
    for module in (run, pretrain, embed, tokenize):

        def main(run, options, name=module.__name__):
            seen[name] = run.config
            return 0

        monkeypatch.setattr(module, "main", main, raising=False)
    for name in ("run", "pretrain", "embed", "tokenize"):
        config = make_config()
        assert run_command(name, config, Options(config.workdir, dry_run=True)) == 0
    found = {name.rsplit(".", 1)[1]: one.decoder.compute_dtype for name, one in seen.items()}
    # Tokens have no dtype, and `tokenize` starts no device.
    assert found == {
        "run": "float32",
        "pretrain": "float32",
        "embed": "float32",
        "tokenize": "auto",
    }
