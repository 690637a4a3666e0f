"""When a stage makes its artifact, and when it makes it again."""

import contextlib
import functools
import time

import pytest

from mlpmem_jax.errors import ArtifactError, ConfigError, UserError
from mlpmem_jax.parallel.preemption import RUN_ID
from mlpmem_jax.pipeline import stopwatch
from mlpmem_jax.pipeline.plan import intention
from mlpmem_jax.pipeline.stage import Rebuild, Stage, run_stage, run_stages
from mlpmem_jax.store import lock
from mlpmem_jax.store.manifest import Artifact, Completion


@pytest.fixture
def make(tmp_path):
    built = []

    def run(recipe, rebuild=Rebuild.REFUSE, fails=False):
        # An input that was rebuilt with other bits makes its successor stale.
        first = Artifact(tmp_path / "run", "decoder/1", "decoder", recipe={}, label="decoder")
        if first.is_complete() and first.load().counts != {"size": recipe}:
            first.remove()
        if not first.is_complete():
            first.begin({})
            first.finish(counts={"size": recipe})
        artifact = Artifact.of(tmp_path / "run", "memory", {}, (first,))

        def build():
            built.append(recipe)
            (artifact.path / "part.bin").write_bytes(b"content")
            if fails:
                raise KeyboardInterrupt
            return Completion(counts={"rows": 3}, files=["part.bin"])

        run_stage(Stage(artifact, build), rebuild)
        return len(built)

    return run


def test_made_once_refused_if_stale_and_made_again_when_asked(make):
    assert make(1) == make(1) == 1
    with pytest.raises(ArtifactError, match="memory is stale, built from another decoder"):
        make(2)
    assert make(2, Rebuild.STALE) == 2
    assert make(2, Rebuild.STALE) == 2
    assert make(2, Rebuild.ALWAYS) == 3


def test_what_another_run_has_rebuilt_meanwhile_is_not_rebuilt_again(make, tmp_path, monkeypatch):
    assert make(1) == 1
    (place,) = (tmp_path / "run" / "memory").iterdir()
    artifact = Artifact(tmp_path / "run", f"memory/{place.name}", "memory", recipe={})
    source = Artifact(tmp_path / "run", "decoder/1", "decoder")
    other = contextlib.ExitStack()
    other.enter_context(lock.only_maker(artifact))

    def sleep(_):
        artifact.remove()
        artifact.begin({source.relative: source.load().fingerprint})
        artifact.finish()
        other.close()

    monkeypatch.setattr(lock.time, "sleep", sleep)
    assert make(2, Rebuild.STALE) == 1
    assert artifact.load().made_from == {source.relative: source.load().fingerprint}


def test_a_rebuild_mends_a_damaged_report(tmp_path):
    """Of large artifacts, what has been made is kept unread: checksums would take hours."""
    artifact = Artifact(tmp_path / "run", "results/base", "results")
    file = artifact.path / "table.json"

    def build():
        file.write_bytes(b"content")
        return Completion(files=["table.json"])

    for is_report in (False, True):
        report = Stage(artifact, build, is_report=is_report)
        run_stage(report, Rebuild.ALWAYS)
        assert not run_stage(report, Rebuild.STALE)
        file.write_bytes(b"damaged")
        assert not run_stage(report, Rebuild.REFUSE)  # Whoever reads it says so.
        assert ("made again" in intention(report, Rebuild.STALE)) == is_report
        assert run_stage(report, Rebuild.STALE) == is_report
    assert file.read_bytes() == b"content"


def test_after_a_preemption_what_the_run_has_made_again_is_kept(make, monkeypatch):
    make(1)
    assert make(1, Rebuild.ALWAYS) == 2  # Runs without a name keep nothing,
    monkeypatch.setenv(RUN_ID, "first")
    assert make(1, Rebuild.ALWAYS) == 3  # nor does the first start of one with a name.
    assert make(1, Rebuild.ALWAYS) == 3
    monkeypatch.setenv(RUN_ID, "second")
    with pytest.raises(KeyboardInterrupt):
        make(1, Rebuild.ALWAYS, fails=True)
    assert make(1, Rebuild.ALWAYS) == 5  # begun by it, and continued
    assert make(1, Rebuild.ALWAYS) == 5


def test_mistakes_of_all_stages_come_together_and_before_anything_is_made(tmp_path):
    made = []

    def stage(name, mistakes):
        def check():
            if mistakes and (made or name != "c"):
                raise ConfigError(mistakes)

        def build():
            made.append(name)
            return Completion()

        return Stage(Artifact(tmp_path / "run", name, "memory"), build, check=check)

    with pytest.raises(ConfigError) as refused:
        run_stages([stage("a", ["first"]), stage("b", ["first", "second"]), stage("d", [])])
    assert refused.value.messages == ("first", "second") and not made
    # What a stage can say only once the one before it is made costs nothing in between.
    with pytest.raises(UserError, match="third"):
        run_stages([stage("a", []), stage("b", []), stage("c", ["third"])])
    assert made == ["a"]


def test_seconds_are_those_of_all_starts_also_of_one_that_was_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(stopwatch, "_RECORD_SECS", 0.02)
    artifact = Artifact(tmp_path / "run", "memory/base", "memory")
    recorded = []

    def build(fails):
        time.sleep(0.3)
        recorded.append(artifact.spent())  # What a kill would leave here.
        if fails:
            raise KeyboardInterrupt
        return Completion()

    for fails in (True, True, False):
        one = Stage(artifact, functools.partial(build, fails))
        if fails:
            with pytest.raises(KeyboardInterrupt):
                run_stage(one)
        else:
            run_stage(one)
    assert 0.1 < recorded[0] < recorded[1] - 0.2 < recorded[2] - 0.4
    assert artifact.load().measured["seconds"] >= 0.9
    assert not (artifact.path / "building.json").exists()


def test_a_disk_that_takes_no_record_does_not_stop_what_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(stopwatch, "_RECORD_SECS", 0.01)
    artifact = Artifact(tmp_path / "run", "memory/base", "memory")

    def full(*_):
        raise OSError(28, "No space left on device")

    def build():
        monkeypatch.setattr(Artifact, "record_spent", full)
        time.sleep(0.1)
        return Completion()

    run_stage(Stage(artifact, build))
    assert artifact.load().measured["seconds"] >= 0.1
