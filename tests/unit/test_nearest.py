"""The message about a missing artifact: which one is nearest, and the keys that differ."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.nearest import in_words, nearest


def _of(root: Path, kind: str, recipe: dict[str, Any], inputs: Sequence[Artifact] = ()) -> Artifact:
    return Artifact.of(root, kind, recipe, inputs)


def _made(artifact: Artifact) -> Artifact:
    artifact.begin({one.relative: one.load().fingerprint for one in artifact.inputs})
    artifact.finish()
    return artifact


def _rows(root: Path, decoder: Artifact, width: int) -> list[Artifact]:
    return [
        _of(root, "datastore", {"split": split, "datastore": {"width": width}}, [decoder])
        for split in ("train", "valid")
    ]


def test_keys_of_inputs_are_named_once_whatever_they_decide(tmp_path: Path):
    """Of several inputs of a kind, those of the same split are held against each other."""
    decoder = _made(_of(tmp_path, "decoder", {"seed": 1}))
    rows = [_made(one) for one in _rows(tmp_path, decoder, 8)]
    memory = _made(_of(tmp_path, "memory", {"train": {"num_steps": 4}}, rows))
    asked = _of(tmp_path, "memory", {"train": {"num_steps": 4}}, _rows(tmp_path, decoder, 16))
    assert nearest(asked) == (memory.path.name, ["datastore.width=8, now 16"])
    other = _of(tmp_path, "decoder", {"seed": 2})
    asked = _of(tmp_path, "memory", {"train": {"num_steps": 5}}, _rows(tmp_path, other, 8))
    assert nearest(asked) == (
        memory.path.name,
        ["train.num_steps=4, now 5", "seed=1, now 2"],
    )
    assert in_words(asked) == (
        f" (the nearest is {memory.path.name[:8]}: train.num_steps=4, now 5; seed=1, now 2)"
    )


def test_the_one_with_the_fewest_differences_and_of_the_same_split_is_nearest(tmp_path: Path):
    near = _made(_of(tmp_path, "datastore", {"split": "train", "a": 1, "b": 1}))
    _made(_of(tmp_path, "datastore", {"split": "train", "a": 1, "b": 2}))
    _made(_of(tmp_path, "datastore", {"split": "valid", "a": 2, "b": 1}))
    asked = _of(tmp_path, "datastore", {"split": "train", "a": 2, "b": 1})
    assert nearest(asked) == (near.path.name, ["a=1, now 2"])
    assert nearest(_of(tmp_path, "datastore", {"split": "test", "a": 1})) is None
    assert in_words(_of(tmp_path, "tokens", {})) == ""


@pytest.mark.parametrize("command", ["evaluate", "search-quality"])
def test_reports_of_other_commands_are_not_near_and_inputs_lie_in_the_store(
    tmp_path: Path, command: str
):
    store, workdir = tmp_path / "store", tmp_path / "run"
    memories = [_of(store, "memory", {"memory": {"num_layers": n}}) for n in (2, 3)]
    _made(memories[0])

    def report(name: str, recipe: dict[str, Any], memory: Artifact) -> Artifact:
        number = _of(store, "results", recipe, [memory]).path.name
        where = f"results/{name}-{number}"
        return Artifact(workdir, where, "results", recipe=recipe, inputs=[memory])

    made = _made(report(command, {"seed": 1}, memories[0]))
    _made(report("cost", {"seed": 2}, memories[0]))
    asked = report(command, {"seed": 2}, memories[1])
    number = made.path.name.rpartition("-")[2]
    assert nearest(asked) == (number, ["seed=1, now 2", "memory.num_layers=2, now 3"])


def test_an_input_of_unknown_settings_is_named_as_another(tmp_path: Path):
    """A memory that `run.json` names: its settings are not those of the configuration."""
    memory = _made(_of(tmp_path, "memory", {"seed": 1}))
    joint = _made(_of(tmp_path, "joint", {"seed": 1}, [memory]))
    given = Artifact(tmp_path, f"memory/{'0' * 16}", "memory", label="memory")
    asked = _of(tmp_path, "joint", {"seed": 1}, [given])
    assert nearest(asked) == (joint.path.name, ["another memory"])
