"""Search in keys that are loaded some shards at a time: equal to the search with all in memory."""

import numpy as np
import pytest
from etils import epath

from mlpmem_jax.config.data import RetrievalConfig
from mlpmem_jax.errors import ArtifactError, ConfigError, UserError
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.retrieval import approximate, estimates, key_major
from mlpmem_jax.retrieval.approximate import ApproximateEngine, SearchSettings
from mlpmem_jax.retrieval.engine import ArrayKeys, SomeKeys
from mlpmem_jax.retrieval.estimates import exact_bytes, exact_plan, index_plan, routed_plan
from mlpmem_jax.retrieval.exact import ExactEngine
from mlpmem_jax.retrieval.index_files import leaf_order
from mlpmem_jax.retrieval.key_major import search_by_shards
from mlpmem_jax.retrieval.key_shards import KeyShards
from mlpmem_jax.retrieval.merge import Neighbors
from mlpmem_jax.retrieval.neighbors import SplitSearch, search_split
from mlpmem_jax.retrieval.queries import Queries
from mlpmem_jax.retrieval.running_lists import RunningLists
from mlpmem_jax.store.array_specs import ArraySpec
from mlpmem_jax.store.arrays import open_array, read_rows
from mlpmem_jax.store.contents import RUNNING, foreign_file
from mlpmem_jax.store.shards import ShardWriter

ROWS, WIDTH, SHARD = 3000, 16, 256
KILLED_AT = ["_search", "write", "put"]


def _keys(num_rows=ROWS, seed=0):
    key = np.random.default_rng(seed).normal(size=(num_rows, WIDTH)).astype(np.float32)
    key[50 : 50 + num_rows // 20] = key[50]  # More equal rows than neighbours, over shards.
    return key


def _exact(key, at_once, shard_rows=SHARD):
    keys, shards = ArrayKeys(key, "train/key"), -(-len(key) // shard_rows)
    budget = exact_bytes(at_once * shard_rows, WIDTH, 1)
    plan = exact_plan(len(key), WIDTH, shard_rows, RetrievalConfig(memory_bytes=budget), 1, None)
    assert (plan.num_shards, plan.at_once) == (shards, min(shards, at_once))
    loaded = []

    def load(some):
        loaded.append(some)
        first, stop = some.start * shard_rows, min(some.stop * shard_rows, len(key))
        part = SomeKeys(keys, first, stop - first)
        return ExactEngine(part, single_device_mesh(), 1024, first_row=first)

    engine = KeyShards("exact", len(key), plan, load, spans_processes=False)
    return engine, loaded


def _search(search, engine, key, path, *, own=True, num_neighbors=30, batch=300):
    specs = {
        "row": ArraySpec((num_neighbors,), np.int64, 1024, 128),
        "distance": ArraySpec((num_neighbors,), np.float32, 1024, 128),
    }
    writer = ShardWriter(epath.Path(path), specs, len(key), refuse_non_finite=False)
    numbers = search(
        engine,
        SplitSearch(
            keys=ArrayKeys(key),
            writer=writer,
            consume=lambda row, found: {"row": found.row_QK, "distance": found.distance_QK},
            num_neighbors=num_neighbors,
            query_batch=batch,
            queries=Queries(are_keys=own),
            description="test",
        ),
    )
    return numbers, _stored(path)


def _stored(path):
    stores = (open_array(epath.Path(path) / name) for name in ("row", "distance"))
    return [read_rows(store, 0, store.shape[0]) for store in stores]


def _assert_equal(found, expected):
    for ours, others in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, others)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What today's search with all keys in memory finds."""
    engine = ExactEngine(ArrayKeys(_keys()), single_device_mesh(), 1024)
    return _search(search_split, engine, _keys(), tmp_path_factory.mktemp("all"))[1]


@pytest.mark.parametrize("at_once", [1, 5, 11])
def test_some_shards_at_a_time_find_what_all_in_memory_do(tmp_path, expected, at_once):
    engine, loaded = _exact(_keys(), at_once)
    numbers, found = _search(search_by_shards, engine, _keys(), tmp_path)
    _assert_equal(found, expected)
    assert [each for some in loaded for each in some] == list(range(12))  # Each once.
    assert max(map(len, loaded)) == at_once and len(loaded) == -(-12 // at_once)
    assert numbers["queries"] == ROWS and numbers["key_shards"] == 12
    assert not (tmp_path / RUNNING).exists()


def test_queries_of_another_split_and_waves(tmp_path, monkeypatch):
    """Waves, here of one output shard, bound what lies on disk; each loads all keys."""
    monkeypatch.setattr(estimates, "_SPILLED_BYTES", 1024 * 30 * 12)
    queries = _keys(2500, seed=1)
    memory = ExactEngine(ArrayKeys(_keys()), single_device_mesh(), 1024)
    _, whole = _search(search_split, memory, queries, tmp_path / "all", own=False)
    engine, loaded = _exact(_keys(), 7)
    _, found = _search(search_by_shards, engine, queries, tmp_path / "parts", own=False)
    _assert_equal(found, whole)
    assert len(loaded) == 2 * 3


def test_queries_in_memory_are_searched_in_all_shards():
    key = _keys()
    whole = ExactEngine(ArrayKeys(key), single_device_mesh(), 1024).search(key[::7], 40)
    engine, loaded = _exact(key, 4)
    found = engine.search(key[::7], 40)
    _assert_equal((found.row_QK, found.distance_QK), (whole.row_QK, whole.distance_QK))
    assert len(loaded) == 3 and engine._loaded is None


def test_more_neighbours_than_a_key_shard_has_rows(tmp_path):
    key = _keys(1000)
    memory = ExactEngine(ArrayKeys(key), single_device_mesh(), 1024)
    _, whole = _search(search_split, memory, key, tmp_path / "all", num_neighbors=400)
    engine, _ = _exact(key, 1)
    _, found = _search(search_by_shards, engine, key, tmp_path / "parts", num_neighbors=400)
    _assert_equal(found, whole)


def test_all_keys_equal(tmp_path):
    key = np.ones((1000, WIDTH), np.float32)
    engine, _ = _exact(key, 1)
    _, (row, distance) = _search(search_by_shards, engine, key, tmp_path)
    assert not distance.any()
    # Of equal distances the smallest rows, without the own one.
    np.testing.assert_array_equal(row[40:], np.broadcast_to(np.arange(30), (960, 30)))
    np.testing.assert_array_equal(row[3], np.delete(np.arange(31), 3))


def test_keys_that_are_not_finite_are_named_with_their_block(tmp_path):
    key = _keys()
    key[1234, 3] = np.nan
    engine, _ = _exact(key, 2)
    with pytest.raises(ArtifactError, match=r"train/key: row 1234 is not finite .*\[1024, 1536\)"):
        _search(search_by_shards, engine, _keys(), tmp_path)


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("where", KILLED_AT)
def test_a_search_stopped_anywhere_continues_to_the_same_bits(
    tmp_path, monkeypatch, expected, where
):
    owner = {"_search": key_major._Wave, "write": RunningLists, "put": ShardWriter}[where]
    original, count = getattr(owner, where), 0

    def killed(self, *arguments):
        nonlocal count
        count += 1
        if count in (2, 7):
            raise _Killed
        return original(self, *arguments)

    monkeypatch.setattr(owner, where, killed)
    kills, searched = 0, []
    while True:
        engine, loaded = _exact(_keys(), 4)
        try:
            _, found = _search(search_by_shards, engine, _keys(), tmp_path)
        except _Killed:
            kills += 1
            assert foreign_file(epath.Path(tmp_path), "neighbors") is None
            searched += loaded
            continue
        break
    assert kills == (1 if where == "_search" else 2)
    _assert_equal(found, expected)
    if where == "put":  # What is before the last shards is not searched again.
        assert [some.start for some in loaded] == [8]


def test_other_memory_and_other_batches_after_a_kill(tmp_path, monkeypatch, expected):
    """Blocks cover different numbers of key shards; lists of other blocks are not used."""
    write, count = RunningLists.write, 0

    def killed(self, *arguments):
        nonlocal count
        count += 1
        if count == 15:  # In the second round of eleven blocks.
            raise _Killed
        write(self, *arguments)

    monkeypatch.setattr(RunningLists, "write", killed)
    with pytest.raises(_Killed):
        _search(search_by_shards, _exact(_keys(), 4)[0], _keys(), tmp_path)
    engine, loaded = _exact(_keys(), 3)
    _, found = _search(search_by_shards, engine, _keys(), tmp_path)
    _assert_equal(found, expected)
    assert [(some.start, some.stop) for some in loaded] == [(4, 7), (7, 8), (8, 11), (11, 12)]


def test_a_changed_batch_starts_over(tmp_path, monkeypatch, expected):
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "put", lambda *_: (_ for _ in ()).throw(_Killed))
        with pytest.raises(_Killed):
            _search(search_by_shards, _exact(_keys(), 4)[0], _keys(), tmp_path)
    left = {file.name for file in (tmp_path / RUNNING).iterdir()}
    assert left and all(name.endswith(".lists") for name in left)
    engine, loaded = _exact(_keys(), 4)
    _, found = _search(search_by_shards, engine, _keys(), tmp_path, batch=500)
    _assert_equal(found, expected)
    assert len(loaded) == 3


def test_damaged_lists_are_named(tmp_path):
    lists = RunningLists(epath.Path(tmp_path), 3)
    block = slice(7, 9)
    assert lists.prepare([block]) == [0]
    found = Neighbors(
        np.array([[0, 1, np.inf], [0, 0, 2]], np.float32), np.array([[2**33, 1, -1], [1, 2, 3]])
    )
    lists.write(block, 5, found)
    assert lists.prepare([block]) == [5]
    again = lists.read(block, 2)
    _assert_equal((again.row_QK, again.distance_QK), (found.row_QK, found.distance_QK))
    file = tmp_path / RUNNING / "7-9.lists"
    whole = file.read_bytes()
    for place in range(len(whole)):  # Any byte, those of the head included.
        data = bytearray(whole)
        data[place] ^= 1
        file.write_bytes(data)
        with pytest.raises(ArtifactError, match=r"7-9.lists: damaged running lists"):
            lists.read(block, 2)
        if place < 36:
            with pytest.raises(ArtifactError, match=r"7-9.lists: damaged running lists"):
                lists.prepare([block])
    for length in (0, 35, 36, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ArtifactError, match=r"7-9.lists: damaged running lists"):
            lists.read(block, 2)
    file.write_bytes(whole)
    with pytest.raises(ArtifactError, match="damaged running lists"):
        RunningLists(epath.Path(tmp_path), 4).read(block, 2)
    (tmp_path / RUNNING / "own.txt").write_text("a note")  # Not ours: it stays.
    assert lists.prepare([]) == []
    assert [one.name for one in (tmp_path / RUNNING).iterdir()] == ["own.txt"]


def test_no_room_for_the_lists_is_said_before_anything_is_loaded(tmp_path, monkeypatch):
    engine, loaded = _exact(_keys(), 4)

    def no_space(path, needed, what):
        if "in parts" in what:
            # Lists of K neighbours, and the results.
            assert needed == 2 * ROWS * 30 * 12
            raise UserError(f"{what} needs {needed}")

    monkeypatch.setattr(key_major, "check_free_space", no_space)
    with pytest.raises(UserError, match="search in parts"):
        _search(search_by_shards, engine, _keys(), tmp_path)
    assert loaded == []


def test_lists_of_an_interrupted_start_need_no_room_again(tmp_path, monkeypatch, expected):
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "put", lambda *_: (_ for _ in ()).throw(_Killed))
        with pytest.raises(_Killed):
            _search(search_by_shards, _exact(_keys(), 6)[0], _keys(), tmp_path)
    asked = []
    monkeypatch.setattr(key_major, "check_free_space", lambda path, size, what: asked.append(size))
    _, found = _search(search_by_shards, _exact(_keys(), 6)[0], _keys(), tmp_path)
    _assert_equal(found, expected)
    assert asked == [ROWS * 30 * 12]  # The results alone.


def test_memory_that_holds_no_key_shard_is_refused_with_one_message():
    config = RetrievalConfig(memory_bytes=1000)
    message = (
        r"retrieval.memory_bytes=1000 holds no key shard, which takes 17.0 KiB \(17408 bytes\): "
        r"raise it, or lower datastore.shard_rows=256"
    )
    with pytest.raises(ConfigError, match=message):
        exact_plan(ROWS, WIDTH, SHARD, config, 1, None).check()
    for plan in (index_plan(ROWS, WIDTH, config, 1, None), routed_plan(ROWS, WIDTH, config, None)):
        with pytest.raises(ConfigError, match=r"or lower retrieval.shard_rows=4000000"):
            plan.check()
    exact_plan(ROWS, WIDTH, SHARD, RetrievalConfig(memory_bytes=17408), 1, None).check()


def test_plans_follow_memory_devices_and_processes():
    def exact(memory, devices):
        plan = exact_plan(10**8, 768, 32768, RetrievalConfig(), devices, memory)
        return plan.num_shards, plan.at_once, plan.num_loads

    assert exact(None, 1) == (3052, 3052, 1)
    assert exact(16 << 30, 8) == (3052, 681, 5)  # Half of the memory of each device.
    assert exact(1 << 40, 1) == (3052, 3052, 1)
    assert exact(1 << 20, 1) == (3052, 1, 3052)  # What does not fit is refused elsewhere.
    one, two = (index_plan(10**8, 768, RetrievalConfig(), n, 100 * 10**9) for n in (1, 2))
    assert (one.num_shards, one.at_once, two.at_once) == (25, 3, 6)
    assert one.held_bytes == two.held_bytes <= 50 * 10**9


def test_scann_in_parts_finds_what_all_its_shards_do(tmp_path):
    pytest.importorskip("scann")
    key, config = _keys(), RetrievalConfig(num_neighbors=20, shard_rows=700)
    path, settings = epath.Path(tmp_path / "index"), SearchSettings(4, 100)
    list(approximate.build_shards(ArrayKeys(key), path, config))
    _, whole = _search(search_split, ApproximateEngine(path, settings), key, tmp_path / "all")
    held = index_plan(ROWS, WIDTH, config, 1, None).held_bytes
    budget = RetrievalConfig(shard_rows=700, memory_bytes=2 * held // 5)
    plan = index_plan(ROWS, WIDTH, budget, 1, None)
    assert (plan.num_shards, plan.at_once, plan.num_loads) == (5, 2, 3)

    def load(shards):
        engine = ApproximateEngine(path, settings, shards=shards)
        assert engine.num_rows == 600 * len(shards)
        return engine

    engine = KeyShards("scann", ROWS, plan, load, spans_processes=False, order=leaf_order(path))
    memory = ApproximateEngine(path, settings)
    for rows in (slice(0, 300), slice(500, 1300), slice(2990, 3000)):
        np.testing.assert_array_equal(engine.visiting_order(rows), memory.visiting_order(rows))
    _, found = _search(search_by_shards, engine, key, tmp_path / "parts")
    _assert_equal(found, whole)


def test_more_neighbours_than_a_shard_of_scann_has_rows(tmp_path):
    pytest.importorskip("scann")
    key = np.random.default_rng(2).normal(size=(2600, WIDTH)).astype(np.float32)
    config = RetrievalConfig(num_neighbors=1400, shard_rows=1300, num_leaves=20)
    path = epath.Path(tmp_path / "index")
    list(approximate.build_shards(ArrayKeys(key), path, config))
    found = ApproximateEngine(path, SearchSettings(20, 1300)).search(key[::100], 1400)
    whole = ExactEngine(ArrayKeys(key), single_device_mesh(), 1024).search(key[::100], 1400)
    np.testing.assert_allclose(found.distance_QK, whole.distance_QK, rtol=1e-4, atol=1e-4)
    assert (found.row_QK == whole.row_QK).mean() > 0.999
