"""A lease in a bucket: one holder, however slow, dead or deaf the others are."""

import json
import threading

import pytest
import tensorstore as ts
from etils import epath

from mlpmem_jax.errors import ArtifactError, TryAgain, UserError
from mlpmem_jax.store import lease as leases
from mlpmem_jax.store import lock
from mlpmem_jax.store.lease import LEASE_SECS, Lease
from mlpmem_jax.store.manifest import Artifact

PATH = epath.Path("gs://bucket/run/.locks/decoder.base")


class Clock:
    """Seconds that pass when a test says so."""

    now = 1000.0

    def __call__(self):
        return self.now


class LosesAnswers:
    """A store that makes every write and repeats it, as TensorStore does after a lost answer."""

    def __init__(self, store):
        self._store = store
        self.read = store.read

    def write(self, key, value, if_equal):
        self._store.write(key, value, if_equal=if_equal).result()
        return self._store.write(key, value, if_equal=if_equal)


@pytest.fixture
def store():
    return ts.KvStore.open({"driver": "memory"}).result()


@pytest.fixture
def make(store):
    """Returns a maker of leases on one object, which are given up in the end."""
    made = []

    def lease(holder, clock=None, store=store, on_loss=lambda lost: None):
        made.append(Lease(PATH, holder, on_loss, store, clock or Clock()))
        return made[-1]

    yield lease
    for one in made:
        one.release()


def test_one_holds_and_the_next_follows(make, store):
    first, second = make("process 1 on a"), make("process 2 on b")
    assert first.take() is None
    assert second.take() == second.take() == "process 1 on a"
    first.confirm()
    first.release()
    assert not store.list().result()
    assert second.take() is None
    second.confirm()


def test_a_lease_that_is_renewed_is_never_taken_over(make):
    clock = Clock()
    first, second = make("first"), make("second", clock)
    assert first.take() is None
    for _ in range(50):
        assert second.take() == "first"
        clock.now += LEASE_SECS - 1
        assert second.take() == "first"
        first.confirm()


def test_one_that_is_not_renewed_is_taken_over_by_the_clock_of_who_waits(make, store):
    clock = Clock()
    first, second, third = make("first"), make("second", clock), make("third", clock)
    assert first.take() is None
    clock.now += 10 * LEASE_SECS  # Before they looked for the first time: it does not count.
    assert second.take() == third.take() == "first"
    clock.now += LEASE_SECS - 1
    assert second.take() == third.take() == "first"
    clock.now += 1
    assert second.take() is None
    assert third.take() == "second"  # It has seen the old one long enough, and is refused.
    for _ in range(2):
        with pytest.raises(TryAgain, match=rf"^{PATH}: another run has taken over"):
            first.confirm()
    second.confirm()
    first.release()  # Which leaves the other's alone.
    assert json.loads(store["decoder.base"])["holder"] == "second"
    assert third.take() == "second"


def test_a_lease_that_somebody_removed_is_lost(make, store):
    first = make("first")
    assert first.take() is None
    store["decoder.base"] = None
    with pytest.raises(TryAgain):
        first.confirm()


def test_of_two_that_see_the_same_one_gets_it(make, store):
    """The other one asked before and writes after."""

    class Asked:
        def __init__(self):
            self.write, self.reads = store.write, 0

        def read(self, key):
            found = store.read(key)
            self.reads += 1
            if self.reads == 1:
                found.result()
                assert make("faster").take() is None
            return found

    slower = make("slower", store=Asked())
    assert slower.take() == "faster"


def test_a_write_whose_answer_was_lost_counts(make, store):
    lease = make("first", store=LosesAnswers(store))
    assert lease.take() is None
    for _ in range(3):
        lease.confirm()
    assert make("second").take() == "first"


def test_the_heartbeat_renews_and_tells_of_a_loss(make, store, monkeypatch):
    monkeypatch.setattr(leases, "HEARTBEAT_SECS", 0.01)
    lost, told = threading.Event(), []

    def on_loss(error):
        told.append(str(error))
        lost.set()

    first = make("first", on_loss=on_loss)
    assert first.take() is None
    generations = set()
    while len(generations) < 3:
        generations.add(store.read("decoder.base").result().stamp.generation)
    assert not told
    store["decoder.base"] = json.dumps({"holder": "second", "token": "other"})
    assert lost.wait(60)
    assert told[0].startswith(f"{PATH}: another run has taken over")
    assert json.loads(store["decoder.base"])["holder"] == "second"


def test_a_bucket_that_does_not_answer_for_a_while_is_asked_again(make, store, monkeypatch):
    monkeypatch.setattr(leases, "HEARTBEAT_SECS", 0.01)
    told = []
    lease = make("first", on_loss=told.append)
    assert lease.take() is None
    failures = threading.Semaphore(0)

    def fail(self, expected):
        failures.release()
        raise OSError("connection reset")

    with monkeypatch.context() as patch:
        patch.setattr(Lease, "_write", fail)
        for _ in range(3):
            assert failures.acquire(timeout=60)
    before = store.read("decoder.base").result().stamp.generation
    while store.read("decoder.base").result().stamp.generation == before:
        assert lease._heartbeat.is_alive()
    assert not told


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        ("NOT_FOUND: Not Found", UserError, "cannot be written (there is no such bucket)"),
        ("UNAVAILABLE: reset", UserError, "cannot be reached (UNAVAILABLE: reset"),
        ("PERMISSION_DENIED: Forbidden", PermissionError, "Permission denied"),
    ],
)
def test_a_bucket_that_takes_nothing_is_named(make, store, answer, kind, message):
    class Refuses:
        read = store.read

        def write(self, *_, **__):
            raise ValueError(f"{answer} [http_response_code='404']")

    with pytest.raises(kind) as refused:
        make("first", store=Refuses()).take()
    assert str(PATH) in str(refused.value)
    assert message in str(refused.value)


@pytest.mark.parametrize("content", ["mine", "[]", '{"holder": "me"}'])
def test_an_object_of_the_users_in_the_place_of_a_lease(make, store, content):
    store["decoder.base"] = content
    with pytest.raises(ArtifactError, match=f"^{PATH}: not written by this program"):
        make("first").take()
    assert store["decoder.base"] == content.encode()


def test_where_there_are_no_conditional_writes_one_warning_says_so(monkeypatch, capsys):
    """As TensorStore answers for stores that it cannot write to under a condition."""

    class Store:
        def __init__(self, held):
            self.read = held.read

        def write(self, *_, **__):
            raise NotImplementedError("KeyValueStore does not support writing")

    held = ts.KvStore.open({"driver": "memory"}).result()
    monkeypatch.setattr(lock, "_warned", set())
    monkeypatch.setattr(lock, "Lease", lambda *about: Lease(*about, store=Store(held)))
    for name in ("decoder/base", "memory/base"):
        with lock.only_maker(Artifact("gs://bucket/run", name, "decoder")) as confirm:
            confirm()
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "warning: gs://bucket/run: this bucket has no conditional writes: two runs in it at the "
        "same time are not kept apart"
    )
