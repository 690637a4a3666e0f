"""Text as typed, paths, what a file must hold, and messages of bounded length."""

import os
import re
from pathlib import Path

import pytest

from mlpmem_jax.config.keys import all_keys, holds_path
from mlpmem_jax.config.load import changed_config, dump_config, load_config
from mlpmem_jax.config.schema import Config
from mlpmem_jax.errors import ConfigError, UserError, one_line

BASE = "corpus: {source: text, paths: [a]}\n"
# What YAML would cut, drop, or take for something else.
TEXTS = [
    "---", "^Chapter #", "> ", "runs/exp #3", " lead and trail ", "~", "Null", "yes", "1e3", "7",
    "[a", "{a: b}", "a: b", "- x", "&a", "*a", "!x", "%", "@", "|", ">", "'a' 'b'", '"a" # b"', "'",
    '"""', "a=b=c", "\\d+", "tab\there", "é…🙂", "# all", "2026-01-01", "0x10", ".", "...", "? x",
]  # fmt: skip


@pytest.fixture
def load(tmp_path):
    def load_text(*overrides, text=BASE, assigned=None):
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides, assigned)

    return load_text


@pytest.fixture
def refused(load):
    def collect(*overrides, text=BASE):
        with pytest.raises(ConfigError) as caught:
            load(*overrides, text=text)
        return list(caught.value.messages)

    return collect


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_as_typed(load, text):
    config = load(
        f"tokenizer.separator={text}.",
        f"generate.prompts.0={text}",
        f"corpus.dataset={text}",
        f"compare.recipes.0={{overrides: [{_quoted('corpus.dataset=' + text)}]}}",
        f"compare.recipes.0.label={text}",
    )
    assert config.tokenizer.separator == f"{text}."
    assert config.generate.prompts == (text,)
    assert config.corpus.dataset == text
    assert config.compare.recipes[0].label == text
    again = changed_config(load(), {}, config.compare.recipes[0].overrides)
    assert again.corpus.dataset == text


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_resolved_configuration(load, text):
    config = load(f"corpus.dataset={text}", f"generate.prompts.0={text}", f"corpus.field={text}")
    assert load(text=dump_config(config)) == config


@pytest.mark.parametrize("text", ["---", "^Chapter #", "> ", "~", "(?m)^x$", "\\d+: "])
def test_the_issue_s_patterns_are_taken_as_typed(load, text):
    assert load(f"corpus.document_regex={text}").corpus.document_regex == text


def _quoted(text):
    return "'" + text.replace("'", "''") + "'"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("null", None),
        ('"null"', "null"),
        ("'null'", "null"),
        ('"^ = [^=]"', "^ = [^=]"),
        ("'it''s'", "it's"),
        (r'"a\tb\"c"', 'a\tb"c'),
    ],
)
def test_null_and_quoted_texts_are_yaml(load, typed, meant):
    assert load(f"corpus.dataset={typed}").corpus.dataset == meant


def test_a_quoted_text_that_yaml_cannot_read_is_refused(refused):
    (line,) = refused(r'corpus.document_regex="\d+"')
    assert "unknown escape character" in line and "no quotes keep everything" in line


def test_lists_stay_yaml_and_their_entries_are_text(load):
    config = load('corpus.paths=["a # b", c]', "corpus.paths.1=d # e")
    assert config.corpus.paths == ("a # b", "d # e")


def test_values_of_sweeps_are_numbers_where_they_look_like_it(load):
    typed = ("1e-3", "4", "null", "---", '"4"', "auto", "true")
    config = load(*(f"ablate.sweeps.0.values.{n}={value}" for n, value in enumerate(typed)))
    assert config.ablate.sweeps[0].values == (0.001, 4, None, "---", "4", "auto", "true")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("corpus.dataset=", "must be text that is not empty, or null"),
        ("corpus.document_regex=", "must be text that is not empty, or null"),
        ("tokenizer.path=", "must be a path, and this one is empty"),
        ("tokenizer.separator=", "must be text that is not empty"),
        ("corpus.field=null", "null"),
    ],
)
def test_no_text_is_no_value(refused, load, override, expected):
    if override == "corpus.field=null":  # the key has a value always, so this is a name
        assert load(override).corpus.field == "null"
        return
    (line,) = refused(override)
    assert line.startswith(override.replace("=", '=""')) and expected in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.alpha: 0.3", "train.alpha=0.3: write it nested: train: {alpha: 0.3}"),
        ("train: {optimizer.beta1: 0.5}", "write it nested: train: {optimizer: {beta1: 0.5}}"),
        ("train.optimizer: {beta1: 0.5}", "write it nested: train: {optimizer: {beta1: 0.5}}"),
        ("corpus.more.0.weight: 0.5", "write it nested: corpus: {more: [{weight: 0.5}]}"),
        ("corpus: {more.0.weight: 1}", "write it nested: corpus: {more: [{weight: 1}]}"),
        ("train.alhpa: 0.3", "unknown key; did you mean train: {alpha: 0.3}?"),
        ("zz.y: 3", "zz.y=3: unknown key; the sections are: workdir"),
        ("mesh: {a.b: 3}", "mesh.a.b=3: unknown key; mesh has: data"),
    ],
)
def test_dots_in_a_file_are_nested_instead(refused, text, expected):
    (line,) = refused(text=f"{text}\n")
    assert expected in line


@pytest.mark.parametrize(
    "text",
    ["", "\n\n", "# a comment\n", "---\n", "{}", "null", "decoder:\n", "decoder: {}\nseed:\n"],
)
def test_a_file_that_sets_nothing_is_refused(refused, text):
    """Else the defaults begin: a run that nobody asked for, in runs/quickstart."""
    (line,) = refused("seed=1", text=text)
    assert line.endswith("config.yaml: sets no key; configs/quickstart.yaml is an example")


def test_an_endless_file_is_refused():
    if Path("/dev/zero").exists():
        with pytest.raises(ConfigError, match="/dev/zero: larger than 4 MiB"):
            load_config("/dev/zero")


PATH_KEYS = [path for path in all_keys() if holds_path(path)]


ARROW = ("targets.train_arrow", "targets.valid_arrow")


def test_the_schema_knows_its_paths():
    assert set(PATH_KEYS) == {
        "workdir", "store", "tokenizer.path", "targets.workdir", "corpus.paths",
        "corpus.more.N.paths", "corpus.train.paths", "corpus.valid.paths", "corpus.test.paths",
        "decoder.pretrained", "memory.pretrained", "tasks.data_path", "tasks.include_path",
        "targets.train_arrow", "targets.valid_arrow",
    }  # fmt: skip
    named = {path for path in all_keys() if re.search("dir$|path|file", path.rsplit(".", 1)[-1])}
    unlike = {"decoder.pretrained", "memory.pretrained", "store", *ARROW}
    assert named == set(PATH_KEYS) - unlike
    assert holds_path("corpus.more.3.paths") and not holds_path("corpus.field")


def _override(path, value):
    is_list = "items" in all_keys()[path].schema
    return f"{path.replace('.N', '.0')}{'.0' * is_list}={value}"


def _value(config, path):
    for part in path.replace(".N", ".0").split("."):
        config = config[int(part)] if part.isdigit() else getattr(config, part)
    return config[0] if isinstance(config, tuple) else config


@pytest.mark.parametrize("path", PATH_KEYS)
def test_the_home_directory_is_found_in_every_path(load, refused, path, monkeypatch, tmp_path):
    splits = [f"corpus.{split}.paths.0=x" for split in ("train", "valid", "test")]
    others = splits if path.split(".")[1:2] in (["train"], ["valid"], ["test"]) else []
    others += ["tokenizer.path=x"] if path == "decoder.pretrained" else []
    if path in ARROW:
        others += ["targets.teacher=arrow", *(f"{other}=x" for other in ARROW if other != path)]
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for module in ("load", "checks"):  # No such directories are there to be read.
        monkeypatch.setattr(f"mlpmem_jax.config.{module}.pretrained_keys", lambda path: {})
        monkeypatch.setattr(f"mlpmem_jax.config.{module}.memory_keys", lambda path: {})
    monkeypatch.setattr("mlpmem_jax.config.checks.state_width", lambda path: 128)
    monkeypatch.setattr("mlpmem_jax.config.checks.longest_context", lambda path: 10**6)
    for typed, meant in (
        ("~/a b/*.txt", f"{tmp_path}/home/a b/*.txt"),
        ("~", f"{tmp_path}/home"),
        ("~root/x", f"{os.path.expanduser('~root')}/x"),
        ("./~/x", "./~/x"),
        ("a/~/x", "a/~/x"),
        ("gs://bucket/~x", "gs://bucket/~x"),
        ("runs/exp #3", "runs/exp #3"),
    ):
        config = load(*others, _override(path, typed))
        assert _value(config, path) == meant
        assert load(text=dump_config(config)) == config
    for typed, expected in (
        ("", "must be a path, and this one is empty"),
        ("  ", "must be a path, and this one is empty"),
        ("~nobody-here/x", "~nobody-here: no such user has a home directory"),
        ("a\n", "holds a line break or another control character"),
        ("a\0b", "holds a line break or another control character"),
        ("a/" * 3000, "longer than the 4096 bytes of a path"),
        ("a/" + "b" * 256, "holds a name of more than 255 bytes"),
        ("a\udcff", "is not valid UTF-8 text"),
    ):
        line = refused(*others, _override(path, typed))[0]
        assert expected in line and len(line) < 300 and line.isprintable()


def test_a_home_directory_with_brackets_is_no_pattern(load, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "a[1]"))
    assert load("workdir=~/x").workdir == f"{tmp_path}/a[1]/x"
    assert load("corpus.paths=['~/x[12]']").corpus.paths == (f"{tmp_path}/a[[]1]/x[12]",)


@pytest.mark.parametrize(
    "text",
    [
        "seed: " + "9" * 5000,
        "seed: 1e400",
        "workdir: " + "x" * 20_000,
        "x" * 1000 + ": 1",
        "x" * 20_000 + ": 1",
        "seed: 0\n" + "y" * 5000 + ": 1\n" + "y" * 5000 + ": 2",
        "seed: 0\n" + "y" * 500 + ": 1\n" + "y" * 500 + ": 2",
        "seed: !" + "t" * 5000 + " x",
        "workdir: !!timestamp abc",
        "seed: !!bool abc",
        "seed: !!int abc",
        "seed: !!float abc",
        "workdir: !!binary abc",
        "workdir: !!set {a, b}",
        'workdir: "\\ud800"',
        'workdir: "a\\0b"',
        '"\\ud800": 1',
        "generate: {prompts: [{a: b}]}",
        'generate: {prompts: [ok, "\\udfff"]}',
        "[" * 300 + "]" * 300,
        "x: " + "[" * 200 + "]" * 200,
        "corpus: {paths: " + "[" * 250 + "]" * 250 + "}",
        "x: " + "[" * 100_000,
        "x: " + "{a: " * 100_000,
        "a: &a [*a]",
        "decoder: &d {decoder: *d}",
        "a: &a {<<: *a}",
        "<<: 3",
        "x: {? [1] : 2}",
        "{1: 2, null: 3, true: 4, 1.5: 6}",
        "corpus: {more: {0: {weight: 1}}}",
        "\0",
        "\ufeff\ufeff",
        "x: \x1b[31m",
        "seed: 0\nmesh: [" + "1, " * 5_000 + "]",
    ],
    ids=lambda text: repr(text[:30]),
)
def test_mistakes_of_files_are_short_lines(refused, text):
    for line in refused(text=text):
        assert len(line) <= 620 and line.isprintable()


@pytest.mark.parametrize(
    "override",
    [
        "seed=" + "x" * 20_000,
        "corpus.document_regex=(" + "x" * 20_000,
        "corpus.document_regex=" + "(" * 5000,
        "corpus.document_regex=a{99999999999}",
        "corpus.paths=[" + "x" * 20_000,
        "search_quality.settings.0.name=" + "x" * 20_000,
        "corpus.more." + "9" * 5000 + ".weight=1",
        "corpus.more.²=1",
        "corpus.more.٣=1",
        "x" * 20_000 + "=1",
        ".".join("a" * 20_000) + "=1",
        "train." + "é" * 400 + "=1",
        "\udcff=1",
        "seed=\udcff",
        "..=1",
        "seed.=1",
        "corpus.more.-1.weight=1",
        "corpus.more={}",
        "x\ny=1",
        " " * 20_000 + "x",
        "corpus.paths=" + " " * 20_000 + "x",
    ],
    ids=lambda text: ascii(text[:30]),
)
def test_mistakes_of_overrides_are_short_lines(refused, override):
    (line,) = refused(override)
    assert len(line) <= 400 and line.isprintable()


def test_many_mistakes_are_counted(refused):
    lines = refused(text="\n".join(f"k{n}: {n}" for n in range(100)))
    assert len(lines) == 21 and lines[-1] == "and 80 more like these"


def test_messages_are_cut_in_the_middle():
    line = one_line("begin " + "x" * 10_000 + " end")
    assert line.startswith("begin ") and line.endswith(" end") and " … " in line
    assert len(line) < 610
    assert one_line("a\n  b\x07") == "a b\\x07"
    assert UserError("a\nb").messages == ("a b",)
    assert one_line("τ = 0.5 …") == "τ = 0.5 …"


def test_entries_that_are_null_stay(load):
    config = load("ablate.sweeps.0.values.0=null", "ablate.sweeps.0.values.1=2")
    assert config.ablate.sweeps[0].values == (None, 2)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["datastore.arrays=[input,label,logprob]"],
            "lacks key, which index, retrieve and evaluate search",
        ),
        (["datastore.arrays=[key,label,logprob]"], "lacks input, which the memory reads"),
        (["corpus.valid_fraction=0"], "corpus.valid_fraction=0 leaves no text for valid"),
        (["corpus.test_fraction=0.0"], "corpus.test_fraction=0 leaves no text for test"),
        (["tokenizer.separator=="], "tokenizer.separator='=' is one character"),
        (["train.memory_weight=1e-9"], "train.memory_weight=1e-09 must be 0 or at least 1e-06"),
        (
            ["train.mode=joint", "train.num_steps=1e6", "train.refresh_interval_steps=1"],
            "into 1000000 phases",
        ),
        (["overfitting.seeds=[]"], "overfitting.seeds=[]: must be a list of whole numbers"),
    ],
)
def test_what_the_configuration_alone_decides_is_refused_with_it(refused, overrides, expected):
    assert any(expected in line for line in refused(*overrides))


def test_a_memory_taught_by_others_needs_no_keys(load):
    arrays = "datastore.arrays=[input,label,logprob]"
    assert "key" not in load(arrays, "targets.workdir=runs/teacher").datastore.arrays


def test_splits_that_are_given_need_no_fractions(load):
    given = [f"corpus.{split}.paths.0={split}" for split in ("train", "valid", "test")]
    assert load(*given, "corpus.valid_fraction=0").corpus.valid_fraction == 0


def test_a_given_tokenizer_may_have_any_separator(load):
    assert load("tokenizer.separator==", "tokenizer.path=t.json").tokenizer.separator == "="


def test_defaults_are_valid():
    assert Config.model_validate(Config().model_dump()) == Config()
