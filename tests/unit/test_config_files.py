"""The configurations that are shipped, the reference page, and the help texts."""

import re

import pytest

from mlpmem_jax.command_reference import markdown as commands_markdown
from mlpmem_jax.commands import COMMANDS
from mlpmem_jax.config.describe import describe, markdown, select
from mlpmem_jax.config.keys import all_keys
from mlpmem_jax.config.load import dump_config, load_config
from tests.conftest import ROOT, load_shipped

SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
# Configurations that share the run directory of another, which their headers name.
SHARED = {
    **dict.fromkeys(("ablate", "joint_recipes", "search_quality"), "compare_paper"),
    **dict.fromkeys(("changes", "targets"), "inputs"),
}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configuration_loads_and_says_what_it_is_for(path):
    config = load_shipped(path)
    header = re.match(r"(?:#.*\n)+", path.read_text(encoding="utf-8"))
    assert header, "no header"
    name = SHARED.get(path.stem, path.stem)
    assert config.workdir == f"runs/{name}"
    assert f"configs/{name}.yaml" in header[0]
    for word in ("command:", "hardware:", "time:", "result:"):
        assert word in header[0]
    assert f"configs/{path.name}" in header[0]
    assert re.search(r"\((estimated|measured)\b", header[0])


def test_resolved_quickstart_is_as_stored(check_golden):
    check_golden("quickstart.yaml", dump_config(load_config(ROOT / "configs" / "quickstart.yaml")))


def test_reference_page_is_current(check_golden):
    check_golden(ROOT / "docs" / "configuration.md", markdown())


def test_commands_page_is_current(check_golden):
    check_golden(ROOT / "docs" / "commands.md", commands_markdown())


def test_commands_page_lists_every_flag():
    page = commands_markdown()
    for flag in ("--config FILE", "--prompt TEXT", "--without-memory", "--topology NAME"):
        assert f"`{flag}`" in page
    assert "--help`" not in page.split("Flags of every command")[1]


def test_every_key_has_a_meaning():
    assert [key.path for key in all_keys().values() if not key.description.strip()] == []


def test_every_key_is_read_by_a_command():
    read = {key.path for name, c in COMMANDS.items() if name != "run" for key in select(c.sections)}
    assert set(all_keys()) == read
    assert set(all_keys()) == {key.path for key in select(COMMANDS["run"].sections)}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_each_key_with_type_default_and_meaning(name):
    text = " ".join(describe(COMMANDS[name].sections, width=100).split())
    for key in select(COMMANDS[name].sections):
        assert f" {key.path} " in f" {text} "
        assert " ".join(key.description.split()) in text
    assert "seed int 0 to 4294967295, default 0" in text


def test_help_names_what_commands_read_of_other_sections():
    """Each of these changes what the command does, or what it finds."""
    model = {"train.mode", "train.interpolation", "train.joint_weight"}
    reads = {
        "tokenize": {"decoder.context_tokens", "pretrain.window_tokens"},
        "train": {"retrieval.num_neighbors"},  # the refreshes of joint training
        "evaluate": model,
        "generate": model,
    }
    for command, paths in reads.items():
        assert paths <= {key.path for key in select(COMMANDS[command].sections)}


@pytest.mark.parametrize("width", [80, 100])
def test_help_fits_its_width(width):
    lines = describe(COMMANDS["run"].sections, width).splitlines()
    assert max(map(len, lines)) <= width
