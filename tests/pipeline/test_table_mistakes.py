"""Mistakes in the configurations of tables are named before anything is written."""

from pathlib import Path

import pytest

from tests.pipeline.test_compare import run


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["ablate.sweeps=[]"], "ablate.sweeps=[]: names no sweep"),
        (
            ["ablate.sweeps=[{key: decodr.width, values: [1, 2]}]"],
            "ablate.sweeps.0: decodr.width=1: unknown key; did you mean decoder.width?",
        ),
        (
            ["ablate.sweeps=[{key: evaluate.confidence, values: [0.9]}]"],
            "ablate.sweeps.0: evaluate.confidence: cannot differ between the rows of a table",
        ),
        (
            ["ablate.sweeps=[{key: train.alpha, values: [0.5, 3.0]}]"],
            "ablate.sweeps.0: train.alpha=3.0: must be a number from 0 to 1",
        ),
        (
            ["ablate.sweeps=[{key: train.log_interval_steps, values: [1, 2]}]"],
            "ablate.sweeps.0.key=train.log_interval_steps has no effect on any artifact",
        ),
        (["ablate.seeds=[1,1]"], "ablate.seeds=[1, 1] repeats an entry"),
        (["ablate.name=base"], "ablate.name=base: artifacts have no names"),
        (
            ["compare.recipes=[{name: memory, overrides: [train.alpha=1]}]"],
            "compare.recipes.0.name=memory is the name of another row",
        ),
        (
            ["compare.recipes=[{name: none}]"],
            "compare.recipes.0.overrides=[] must change at least one key",
        ),
        (
            ["compare.recipes=[{name: a, overrides: [train.alpa=1, train.num_steps]}]"],
            "compare.recipes.0: train.alpa=1: unknown key; did you mean train.alpha?",
        ),
        (
            ["compare.recipes=[{name: a, overrides: [train.log_interval_steps=3]}]"],
            "compare.recipes.0.overrides=['train.log_interval_steps=3'] have no effect",
        ),
        (
            ["compare.recipes=[{name: a, parts: beside, overrides: [train.num_steps=3]}]"],
            "compare.recipes.0.overrides=['train.num_steps=3'] have no effect",
        ),
        (
            ["compare.recipes=[{name: a, teacher: wider}]"],
            "compare.recipes.0.teacher=wider is none of compare.teachers (wide)",
        ),
        (
            ["compare.recipes=[{name: a, teacher: wide, parts: decoder}]"],
            "compare.recipes.0.teacher=wide teaches a memory: compare.recipes.0.parts must be all",
        ),
        (
            ["compare.recipes=[{name: a, teacher: wide, overrides: [tokenizer.vocab_size=290]}]"],
            "compare.recipes.0: a teacher must have the tokens of what it teaches",
        ),
        (
            ["compare.recipes=[{name: a, base: b}, {name: b, overrides: [train.alpha=1]}]"],
            "compare.recipes.0.base=b is none of the rows before it (there are none)",
        ),
        (
            ["compare.recipes=[{name: a, teacher: wide}, {name: b, base: a, teacher: wide}]"],
            "compare.recipes.1.teacher=wide: with compare.recipes.1.base it is",
        ),
        (
            [
                "compare.recipes=[{name: a, overrides: [decoder.width=16]}, {name: b, base: a, "
                "parts: beside}]"
            ],
            "compare.recipes.1.overrides=[] have no effect: a decoder is mixed with itself",
        ),
        (
            [
                "compare.recipes=[{name: a, overrides: [train.alpha=1]}, {name: b, base: a, "
                "overrides: [train.log_interval_steps=3]}]"
            ],
            "compare.recipes.1.overrides=['train.log_interval_steps=3'] have no effect: the row is",
        ),
        (
            [
                "compare.recipes=[{name: a, parts: beside, overrides: [decoder.width=24]}, "
                "{name: b, base: a}]"
            ],
            "compare.recipes.1.base=a mixes two decoders (parts=beside)",
        ),
        (
            [
                "compare.recipes=[{name: a, parts: decoder, overrides: [pretrain.alpha=0.4]}, "
                "{name: b, base: a, parts: decoder, overrides: [decoder.num_layers=1]}]"
            ],
            "compare.recipes.1: base=a has pretrain.alpha=0.4: rows cannot start from a row whose",
        ),
        (
            [
                "compare.recipes=[{name: a, overrides: [pretrain.alpha=0.4, "
                "targets.temperature=2.0]}, {name: b, overrides: [train.x=1]}]"
            ],
            "compare.recipes.0: pretrain.alpha=0.4: a decoder cannot learn from targets",
        ),
        (
            [
                "compare.recipes=[{name: a, overrides: [train.mode=joint, "
                "train.decoder_optimizer.warmup_steps=1]}, "
                "{name: b, base: a, parts: beside, overrides: [decoder.width=24]}]"
            ],
            "compare.recipes.1: base=a has train.mode=joint: rows cannot start from a row whose",
        ),
        (
            ["compare.recipes=[{name: a, overrides: [train.x=1]}, {name: b, base: a}]"],
            "compare.recipes.0: train.x=1: unknown key",
        ),
        (
            ["compare.recipes=[{name: a, parts: beside, overrides: [corpus.max_bytes=70_000]}]"],
            "compare.recipes.0: parts=beside mixes networks, which need the same tokens",
        ),
        (
            ["compare.teachers=[{name: wide, overrides: [train.alpha=1]}]"],
            "compare.teachers.0: overrides=['train.alpha=1'] have no effect on targets",
        ),
        (
            ["compare.recipes=[{name: a, overrides: [targets.workdir=/elsewhere]}]"],
            "compare.recipes.0: targets.workdir: rows of a table learn from compare.teachers",
        ),
        (
            ["compare.seeds=[0]", "targets.workdir=/elsewhere"],
            "targets.workdir=/elsewhere: tables of several runs make all targets themselves",
        ),
        (
            ["compare.seeds=[0]", "train.mode=joint", "train.decoder_optimizer.warmup_steps=1"],
            "train.mode=joint: compare is about a memory beside a frozen decoder",
        ),
        (
            ["overfitting.seeds=[0]", "train.mode=joint", "train.decoder_optimizer.warmup_steps=1"],
            "train.mode=joint: overfitting is about a memory beside a frozen decoder",
        ),
        (
            [
                "ablate.sweeps=[{key: train.alpha, values: [0.5]}]",
                "train.mode=joint",
                "train.memory_start=checkpoint",
                "train.decoder_optimizer.warmup_steps=1",
            ],
            "train.memory_start=checkpoint: the configuration of a table of several runs says",
        ),
        (
            [
                "compare.recipes=[{name: a, teacher: wide, overrides: [train.mode=joint, "
                "train.refresh_interval_steps=2, train.decoder_optimizer.warmup_steps=1]}]",
            ],
            "compare.recipes.0: train.refresh_interval_steps=2 makes targets from the current",
        ),
        (
            [
                "compare.seeds=[0]",
                "train.mode=joint",
                "train.decoder_freeze_steps=4",
                "train.memory_freeze_steps=5",
            ],
            "train.memory_freeze_steps=5: nothing is trained in train.num_steps=4",
        ),
        (
            [
                "ablate.sweeps=[{key: decoder.width, values: [16, 24], role: teacher}]",
                "train.mode=joint",
                "train.refresh_interval_steps=2",
                "train.decoder_optimizer.warmup_steps=1",
            ],
            "train.refresh_interval_steps=2 makes targets from the current",
        ),
        (["compare.teachers=[{name: memory}]"], "compare.teachers.0.name=memory is the name of"),
        (["compare.teachers=[{name: b}]"], "compare.teachers.0.overrides=[] must change"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], expected: str
):
    command = overrides[0].split(".")[0]
    assert run(command, tmp_path / "none", *overrides) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
