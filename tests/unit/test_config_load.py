"""Reading configurations: merging, overrides, and the words for every kind of mistake."""

import re

import pytest

from mlpmem_jax.config.load import dump_config, load_config
from mlpmem_jax.config.schema import Config
from mlpmem_jax.errors import ConfigError


@pytest.fixture
def load(tmp_path):
    def load_text(*overrides, text="seed: 0\n", assigned=None):
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides, assigned)

    return load_text


@pytest.fixture
def mistakes(load):
    def collect(*overrides, text="seed: 0\n"):
        with pytest.raises(ConfigError) as caught:
            load(*overrides, text=text)
        assert all("\n" not in message for message in caught.value.messages)
        return list(caught.value.messages)

    return collect


def test_what_a_file_leaves_out_keeps_its_default(load):
    assert load() == Config()


def test_file_and_overrides_and_assigned_win_in_this_order(load):
    text = "seed: 1\ndecoder: {width: 64, num_layers: 2}\nworkdir: a\n"
    config = load("seed=2", "seed=3", "workdir=b", text=text, assigned={"workdir": "c"})
    assert (config.seed, config.workdir) == (3, "c")
    assert (config.decoder.width, config.decoder.num_layers) == (64, 2)


def test_a_nested_key_leaves_its_siblings_defaults_alone(load):
    # TrainConfig overrides the optimiser's default weight decay; so must a partial section.
    config = load(
        text="train: {optimizer: {learning_rate: 1e-3}}\ndatastore: {input: {site: residual}}"
    )
    assert config.train.optimizer.learning_rate == 1e-3
    assert config.train.optimizer.weight_decay == 0.0
    assert config.datastore.input.layer == 0.7


def test_numbers_and_text(load):
    config = load(
        "pretrain.optimizer.learning_rate=1e-3",
        "train.num_steps=2e3",
        "train.alpha=1",
        "corpus.dataset_split=7",
        "workdir=2026-01-01",
        "corpus.field=no",
        "corpus.max_bytes=10_000",
        text="train: {optimizer: {learning_rate: 5E-4, epsilon: 1e-9}}",
    )
    assert config.pretrain.optimizer.learning_rate == 1e-3
    assert config.train.num_steps == 2000 and isinstance(config.train.num_steps, int)
    assert config.train.optimizer.learning_rate == 5e-4
    assert (config.workdir, config.corpus.field) == ("2026-01-01", "no")
    assert config.corpus.dataset_split == "7"
    assert config.corpus.max_bytes == 10_000


def test_layers_are_blocks_or_shares(load):
    config = load("datastore.key.layer=3", "datastore.input.layer=0.5")
    assert config.datastore.key.block(6) == 3
    assert config.datastore.input.block(6) == 3
    assert load("datastore.key.layer=1").datastore.key.block(6) == 1
    assert load("datastore.key.layer=1.0").datastore.key.block(6) == 6


def test_lists_null_and_entries(load):
    config = load(
        'corpus.paths=["a", "b"]',
        "corpus.paths.2=c",
        "corpus.source=text",
        "corpus.max_bytes=null",
        "corpus.more.0.paths=[d]",
        "corpus.more.0.weight=0.5",
        "corpus.more.1={source: stdlib}",
        "generate.prompts.0=def f(x): return {",
        "generate.top_p=null",
        text="corpus: {max_bytes: 5}",
    )
    assert config.corpus.paths == ("a", "b", "c")
    assert config.corpus.max_bytes is None and config.generate.top_p is None
    assert [(s.source, s.weight) for s in config.corpus.more] == [("text", 0.5), ("stdlib", 1.0)]
    assert config.generate.prompts == ("def f(x): return {",)


def test_list_in_file_then_entry_in_override(load):
    text = "corpus: {more: [{source: text, paths: [a]}, {source: stdlib}]}"
    config = load("corpus.more.0.paths.0=b", text=text)
    assert config.corpus.more[0].paths == ("b",)
    assert config.corpus.more[1].source == "stdlib"


def test_issue_example_reports_both(mistakes):
    assert mistakes("decodr.num_layers=2", "train.batch_size=-1") == [
        "decodr.num_layers=2: unknown key; did you mean decoder.num_layers?",
        "train.batch_size=-1: must be a whole number from 1 to 1e6",
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("decoder.width=x", "must be a whole number from 1 to 1e6"),
        ("decoder.width=1.5", "must be a whole number from 1 to 1e6"),
        ("decoder.width=0", "must be a whole number from 1 to 1e6"),
        ("decoder.width=null", "must be a whole number from 1 to 1e6"),
        ("seed=true", "must be a whole number from 0 to 4294967295"),
        ("seed='3'", "must be a whole number from 0 to 4294967295"),
        ("decoder.num_kv_heads=-1", "must be a whole number from 1 to 1e6, or auto"),
        ("decoder.num_kv_heads=some", "must be a whole number from 1 to 1e6, or auto"),
        ("decoder.norm=batch", "must be rms or layer"),
        ("retrieval.engine=faiss", "must be auto, scann, exact or routed"),
        ("train.alpha=1.5", "must be a number from 0 to 1"),
        ("train.alpha=.nan", "must be a number from 0 to 1"),
        ("train.optimizer.beta1=1", "must be a number from 0 to 0.999999"),
        ("pretrain.optimizer.learning_rate=0", "must be a number from 1e-12 to 1000"),
        ("pretrain.optimizer.learning_rate=.inf", "must be a number from 1e-12 to 1000"),
        ("pretrain.optimizer.clip_norm=no", "must be a number from 1e-9 to 1e9, or null"),
        ("targets.temperature=0", "must be a number from 1e-6 to 1e9, or auto"),
        ("tokenizer.vocab_size=256", "must be a whole number from 257 to 1e7"),
        ("tokenizer.separator=", "must be text that is not empty"),
        ("corpus.paths=a.txt", "must be a list of texts"),
        ("datastore.arrays=key", "must be a list of key, input, label or logprob"),
        ("datastore.arrays=[key, keys]", ".arrays.1=keys: must be key, input, label or logprob"),
        ("search_quality.settings=[{name: a/b}]", "must be text that matches ^[A-Za-z0-9._-]+$"),
        ("train.interpolation=1.5", "must be"),
        (
            "datastore.key.layer=1.5",
            "must be a whole number from 1 to 10000, or a number above 0, at most 1",
        ),
        ("corpus.document_regex=(", "is not a regular expression: missing )"),
        ("corpus.more=[{weight: 2, paths: [a]}]", "corpus.more.0.weight=2: must be a number from"),
        ("corpus.more.3.weight=1", "corpus.more is a list of 0"),
        ("corpus.more.first.weight=1", "corpus.more is a list of 0"),
        ("train=3", "must be a section (keys and values)"),
        ("train=[1]", "must be a section (keys and values)"),
        ("corpus.paths=[a", "the value is not YAML: line 1, column"),
        ("decoder.width.x=1", "unknown key; decoder.width is a value"),
        ("corpus.paths.0.x=1", "unknown key; corpus.paths.0 is a value"),
        ("corpus.more=[{source: stdlib, wight: 1}]", "did you mean corpus.more.0.weight?"),
        ("train.optimiser.beta1=0.5", "unknown key; did you mean train.optimizer.beta1?"),
        ("num_kv_heads=2", "unknown key; did you mean decoder.num_kv_heads?"),
        ("vocab_size=300", "unknown key; did you mean tokenizer.vocab_size?"),
        ("mesh.zzz=1", "unknown key; mesh has: data, fsdp, tensor, dcn_data"),
        ("zzz=1", "unknown key; the sections are: workdir, store, seed, corpus"),
        ("decoder={wdth: 3}", "unknown key; did you mean decoder.width?"),
    ],
)  # fmt: skip
def test_single_mistakes(mistakes, override, expected):
    (message,) = mistakes(override, text="corpus: {source: text, paths: [a], more: []}")
    assert message.split("=")[0].startswith(override.split("=")[0])
    assert expected in message


@pytest.mark.parametrize("override", ["seed", "=3", ""])
def test_what_is_no_override(mistakes, override):
    assert mistakes(override) == [f"{override}: not an override; write section.key=value"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["decoder.num_heads=3"], "decoder.num_heads=3 must divide decoder.width=128"),
        (["retrieval.exclude=all"], "retrieval.exclude=all: must be row or document"),
        (
            ["targets.workdir=a", "targets.share=0.5", "targets.min_mass=0.9"],
            "targets.share=0.5 has no effect with targets.workdir=a: set it in the run that makes",
        ),
        (
            ["targets.share=0.5", "retrieval.keep_train=all"],
            "targets.share=0.5 saves the search for the other rows, and retrieval.keep_train=all",
        ),
        (
            ["retrieval.exact_rows=0"],
            "retrieval.exact_rows=0: must be a whole number from 1 to 1e12, or all",
        ),
        (
            ["targets.teacher=ngram", "retrieval.exclude=document"],
            "retrieval.exclude=document has no effect with targets.teacher=ngram",
        ),
        (
            ["targets.teacher=ngram", "retrieval.exclude_repeats_tokens=5"],
            "retrieval.exclude_repeats_tokens=5 has no effect with targets.teacher=ngram",
        ),
        (
            ["targets.teacher=ngram", "train.mode=joint", "train.refresh_interval_steps=100"],
            "train.refresh_interval_steps=100 rebuilds targets from the current decoder, and",
        ),
        (["decoder.num_kv_heads=3"], "decoder.num_kv_heads=3 must divide decoder.num_heads=4"),
        (["decoder.head_width=33"], "decoder.head_width=33 must be even"),
        (
            ["decoder.rope_scaling.kind=linear", "decoder.positions=learned"],
            "decoder.rope_scaling.kind=linear requires decoder.positions=rope, not learned",
        ),
        (
            ["decoder.rope_scaling.kind=yarn", "decoder.rope_theta=1"],
            "decoder.rope_scaling.kind=yarn requires decoder.rope_theta=1 to be larger",
        ),
        (
            ["decoder.rope_scaling.fast_turns=1"],
            "decoder.rope_scaling.fast_turns=1.0 must be more than",
        ),
        (["memory.width=64", "memory.head=tied"], "memory.head=tied requires memory.width=64 to"),
        (["memory.recent_tokens=-1"], "memory.recent_tokens=-1: must be a whole number from 0 to"),
        (
            ["memory.recent_tokens=9", "decoder.context_tokens=16"],
            "memory.recent_tokens=9 is more than half of decoder.context_tokens=16: at most 8",
        ),
        (
            ["memory.ngram_orders=[2, 9]", "decoder.context_tokens=16"],
            "memory.ngram_orders=[2, 9]: 9 is more than half of decoder.context_tokens=16: at most",
        ),
        (["memory.ngram_orders=[2, 2]"], "memory.ngram_orders=[2, 2] repeats an order"),
        (
            ["decoder.ngram_orders=[9]", "decoder.context_tokens=16"],
            "decoder.ngram_orders=[9]: 9 is more than half of decoder.context_tokens=16: at most",
        ),
        (["train.mix_windows=4", "train.mode=joint"], "train.mix_windows=4 mixes stored rows"),
        (["train.mix_windows=4", "train.inputs=online"], "reads windows of tokens"),
        (["datastore.key.layer=7"], "datastore.key.layer=7 exceeds decoder.num_layers=6"),
        (["train.accumulation_steps=5"], "accumulation_steps=5 must divide train.batch_size=32"),
        (["pretrain.window_tokens=512"], "=512 is longer than decoder.context_tokens=256"),
        (["datastore.stride_tokens=100"], "=100 must divide datastore.window_tokens=256"),
        (["datastore.arrays=[key]"], "must hold label and logprob: ['label', 'logprob'] missing"),
        (["mesh.fsdp=auto"], "only one mesh size may be auto, not mesh.data and mesh.fsdp"),
        (["mesh.data=3", "mesh.dcn_data=2"], "mesh.dcn_data=2 must divide mesh.data=3"),
        (["corpus.source=text"], "corpus.source=text requires corpus.paths"),
        (["corpus.source=huggingface"], "corpus.source=huggingface requires corpus.dataset"),
        (["corpus.train.paths=[a]"], "corpus.train.paths, corpus.valid.paths and corpus.test"),
        (["corpus.valid_fraction=0.6", "corpus.test_fraction=0.6"], "leave nothing to train on"),
        (
            ["train.mode=joint", "train.num_steps=8", "train.decoder_optimizer.warmup_steps=9"],
            "train.decoder_optimizer.warmup_steps=9 is more than train.num_steps=8",
        ),
        (["pretrain.optimizer.warmup_steps=601"], "=601 is more than pretrain.num_steps=600"),
        (["train.memory_weight=0"], "are all 0: nothing would be trained"),
        (["train.lm_weight=1"], "train.lm_weight=1.0 requires train.mode=joint"),
        (["memory.gate=learned"], "set train.joint_weight above 0"),
        (
            ["train.head_start=checkpoint", "memory.width=48"],
            "requires memory.width=48 to equal decoder.width=",
        ),
        (["train.head_start=checkpoint", "memory.head=tied"], "uses the decoder's head already"),
        (
            ["train.mode=joint", "train.decoder_start=fresh", "train.memory_start=checkpoint"],
            "requires train.decoder_start=checkpoint",
        ),
        (["train.refresh_interval_steps=5"], "requires train.mode=joint"),
        (["train.inputs=online", "train.joint_weight=1"], "requires train.inputs=stored"),
        (
            ["train.mode=joint", "memory.gate=learned", "train.interpolation_final=1.0"],
            "use one of the two",
        ),
        (["retrieval.num_reorder=256"], "must be more than retrieval.num_neighbors=256"),
    ],
)
def test_rules_that_span_keys(mistakes, overrides, expected):
    assert any(expected in message for message in mistakes(*overrides))


def test_all_kinds_of_mistakes_come_together(mistakes):
    found = mistakes(
        "decoder.num_heads=3",  # spans keys
        "train.batch_size=-1",  # out of range
        "retrieval.engine=faiss",  # not among the choices
        "decodr.norm=rms",  # unknown
        "corpus.document_regex=(",  # refused by a validator
        "seed",  # no override
        text="seed: 1\nseed: 2\nmesh: {fsdp: auto}\n",
    )
    assert len(found) == 8
    assert any("must divide decoder.width" in message for message in found)
    assert any("line 2: key seed is given twice" in message for message in found)


def test_a_wrong_key_does_not_break_the_rules_it_takes_part_in(mistakes):
    # The meant value is unknown, so nothing is said about how it fits others.
    assert len(mistakes("decoder.context_tokens=0", "pretrain.window_tokens=512")) == 1
    assert len(mistakes("decoder.contxt_tokens=512", "pretrain.window_tokens=512")) == 1
    assert len(mistakes("corpus.more=[{weight: 2, paths: [a]}, {weight: 3, wight: 1}]")) == 3


def test_unknown_section_in_the_file_is_one_mistake(mistakes):
    (message,) = mistakes(text="decodr:\n  width: 64\n  norm: layer\n")
    assert message.endswith("unknown key; did you mean decoder?")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"seed: [1\ndecoder: 2\n", r"config.yaml: not YAML: line 2, column \d+: "),
        (b"seed: 1\n\tdecoder: 2\n", r"config.yaml: not YAML: line 2, column \d+: "),
        (b"- a\n- b\n", r"config.yaml: must hold sections .*, not \[a, b\]"),
        (b"just text\n", r"config.yaml: must hold sections .*, not just text"),
        (b"seed: \xff\n", r"config.yaml: not UTF-8 text \(byte 6\)"),
        (b"a: 1\n---\nb: 1\n", r"config.yaml: not YAML: line 2"),
        (b"seed: !!python/object:os.system 1\n", r"config.yaml: not YAML: line 1"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, content, expected):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert re.search(expected, caught.value.messages[0]), caught.value.messages


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(ConfigError, match="none.yaml: no such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="a directory"):
        load_config(tmp_path)


def test_repeated_keys_are_found_in_nested_sections(mistakes):
    found = mistakes(text="decoder:\n  width: 64\n  num_layers: 2\n  width: 32\n")
    assert [m.split("config.yaml: ")[1] for m in found] == ["line 4: key width is given twice"]


def test_resolved_configuration_round_trips(load, tmp_path):
    config = load(
        "corpus.more.0.paths=[é, 'no', '1e3', ': #']",
        "train.optimizer.epsilon=1e-9",
        "datastore.key.layer=1.0",
        "generate.prompts=['def f():\n    return 1\n', '']",
        "generate.top_k=3",
    )
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
    assert isinstance(load_config(path).datastore.key.layer, float)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["corpus.more.0.paths.first=b"], ["corpus.more.0.paths is a list of 0 entries"]),
        (
            ["corpus.more.0.paths.5=b", "corpus.more.2.weight=1"],
            ["corpus.more.0.paths.0 adds one", "a list of 1 entry; corpus.more.1 adds one"],
        ),
        (["corpus.paths=a.txt", "corpus.paths.0=b"], ["corpus.paths=a.txt: must be a list"]),
        (["train=3", "train.alpha=0.5"], ["train=3: must be a section"]),
        (["corpus.more=[{1: 2}]"], ["corpus.more.0.1=2: unknown key; corpus.more.0 has: source"]),
        (["corpus.more.0=null"], ["corpus.more.0=null: must be a section"]),
    ],
)
def test_entries_and_sections_of_the_wrong_type(mistakes, overrides, expected):
    found = mistakes(*overrides)
    assert len(found) == len(expected)
    assert all(text in message for text, message in zip(expected, found, strict=True))


def test_values_that_an_anchor_shares_are_set_one_by_one(load):
    text = "corpus: {train: {paths: &p [a]}, valid: {paths: *p}, test: {paths: *p}, source: text}"
    corpus = load("corpus.valid.paths.0=b", text=text).corpus
    assert (corpus.train.paths, corpus.valid.paths) == (("a",), ("b",))


@pytest.mark.parametrize("key", ["decoder.name", "retrieval.exact_name", "train.name"])
def test_a_name_of_an_artifact_says_that_there_are_none(make_config, key):
    with pytest.raises(ConfigError, match=f"^{key}=x: artifacts have no names"):
        make_config(f"{key}=x")
