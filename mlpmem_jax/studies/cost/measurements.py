"""Measures every system on the first rows of a datastore, round after round.

A size is prepared once (its index is built, its recall measured) and timed in every
round. What was prepared or timed lies in small files, so that a start after a kill goes on.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from mlpmem_jax.console import say
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.evaluation.timed_decoding import (
    CompiledModel,
    Spent,
    System,
    Writer,
    in_turns,
    make_search,
)
from mlpmem_jax.parallel.hardware import check_host_memory
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.retrieval import approximate, index_files, recall
from mlpmem_jax.retrieval.approximate import ApproximateEngine, SearchSettings
from mlpmem_jax.retrieval.engine import Engine, SomeKeys, StoredKeys
from mlpmem_jax.retrieval.exact import ExactEngine
from mlpmem_jax.retrieval.index_builder import MEASUREMENT_SEED, choose_settings
from mlpmem_jax.store.checked_json import read_checked_json, write_checked_json
from mlpmem_jax.store.files import check_free_space

PLAIN = ("decoder", "memory")  # systems that search nothing


def sizes(num_rows: int, doublings: int, num_neighbors: int) -> list[int]:
    """Returns numbers of rows, each about twice the one before, up to all rows.

    Raises:
        ConfigError: The smallest has no K neighbours.
    """
    found = [num_rows >> power for power in range(doublings, -1, -1)]
    if found[0] < num_neighbors + 1:
        raise ConfigError(
            f"cost.doublings={doublings}: the smallest of the datastore's parts has {found[0]} "
            f"of {num_rows} rows, too few for retrieval.num_neighbors={num_neighbors}; "
            "choose fewer doublings"
        )
    return found


@dataclasses.dataclass(frozen=True)
class Timer:
    """What is timed, the same at every size.

    Attributes:
        path: Where files of the measurement lie.
        models: Compiled models: "decoder" and "memory".
        train_label: Labels of all training rows.
        temperature: τ of the kNN-LM.
        weight: λ of the kNN-LM.
    """

    run: Artifacts
    mesh: jax.sharding.Mesh
    path: epath.Path
    models: Mapping[str, CompiledModel]
    train_label: np.ndarray
    temperature: float
    weight: float

    def prepare(self, num_rows: int) -> dict[str, Any]:
        """Builds the index over the first rows and measures its recall, once."""
        file = self.path / f"prepared-{num_rows}.json"
        if file.exists():
            if self._index(num_rows).exists():  # Of an earlier start, which was interrupted.
                index_files.verify_shards(self._index(num_rows))
            return read_checked_json(file)
        about: dict[str, Any] = {"rows": num_rows}
        key_bytes = 4 * num_rows * (self._keys(num_rows).width + 1)
        # Both engines are open while they are timed; building an index needs as much.
        check_host_memory(3 * key_bytes, f"timing {num_rows} rows", "change cost.engines")
        if "scann" in self.run.config.cost.engines:
            about |= self._prepare_index(num_rows)
        write_checked_json(file, about)
        return about

    def _prepare_index(self, num_rows: int) -> dict[str, Any]:
        retrieval, seed = self.run.config.retrieval, self.run.config.seed
        keys = self._keys(num_rows)
        path = self._index(num_rows)
        path.mkdir(parents=True, exist_ok=True)
        index_files.remove_unfinished(path)
        needed = approximate.index_bytes(num_rows, keys.width, retrieval.dims_per_block)
        check_free_space(path, needed, f"the index of {num_rows} rows")
        num_shards = len(list(approximate.build_shards(keys, path, retrieval)))
        files = [path / name for name in index_files.shard_files(path, num_shards)]
        engine = ExactEngine(keys, self.mesh, retrieval.key_chunk_rows)
        settings, _ = choose_settings(path, keys, lambda: engine, retrieval, seed)
        sample = recall.draw_sample(
            keys,
            engine.search,
            retrieval.recall_queries,
            retrieval.num_neighbors,
            (seed, MEASUREMENT_SEED),
        )
        found = recall.measure(ApproximateEngine(path, settings, alone=True), sample)
        say(
            f"cost: index of {num_rows:,} rows: {settings.num_leaves_to_search} leaves, "
            f"{settings.num_reorder} candidates, recall {found:.4f}"
        )
        return {
            "settings": dataclasses.asdict(settings),
            "recall": found,
            "index_bytes": sum(file.stat().length for file in files),
        }

    def _keys(self, num_rows: int) -> SomeKeys:
        return SomeKeys(StoredKeys(self.run.datastore("train")), 0, num_rows)

    def _index(self, num_rows: int) -> epath.Path:
        return self.path / f"index-{num_rows}"

    def time(self, round_number: int, num_rows: int, prepared: Mapping[str, Any]) -> dict[str, Any]:
        """Times every system over the first rows in one round, once.

        Returns:
            For each system lists of milliseconds: `token`, `search` (of these tokens),
            `first` (prompt to first token) and `step` (one token of each text of a batch).
        """
        file = self.path / f"round-{round_number}-{num_rows}.json"
        if file.exists():
            return read_checked_json(file)
        systems, cost, prompt = (
            self._systems(num_rows, prepared),
            self.run.config.cost,
            self._prompt(),
        )
        seed = (self.run.config.seed, round_number, num_rows)

        def timed(
            batch: int, work: Callable[[Writer], Spent], count: int
        ) -> Iterator[tuple[str, Spent]]:
            """The systems take turns."""
            writers = {name: Writer(system, batch) for name, system in systems.items()}
            return in_turns(writers, work, count, seed)

        names = ("token", "search", "first", "step")
        found: dict[str, Any] = {system: {name: [] for name in names} for system in systems}
        for name, spent in timed(1, Writer.write, cost.num_tokens):  # One text.
            found[name]["token"].append(1000 * spent.total)
            found[name]["search"].append(1000 * spent.search)
        for name, spent in timed(1, lambda writer: writer.read(prompt), cost.num_prompts):
            found[name]["first"].append(1000 * spent.total)
        for name, spent in timed(cost.batch_size, Writer.write, cost.batch_steps):
            found[name]["step"].append(1000 * spent.total)
        write_checked_json(file, found)
        return found

    def _systems(self, num_rows: int, prepared: Mapping[str, Any]) -> dict[str, System]:
        systems = {name: System(self.models[name]) for name in PLAIN}
        for name in self.run.config.cost.engines:
            engine: Engine
            if name == "scann":
                settings = SearchSettings(**prepared["settings"])
                engine = ApproximateEngine(self._index(num_rows), settings, alone=True)
            else:
                chunk = self.run.config.retrieval.key_chunk_rows
                engine = ExactEngine(self._keys(num_rows), self.mesh, chunk)
            search = make_search(
                engine,
                self.train_label,
                self.run.config.retrieval.num_neighbors,
                self.temperature,
                self.weight,
            )
            systems[name] = System(self.models["decoder"], search)
        return systems

    def _prompt(self) -> np.ndarray:
        """Returns random tokens, int32 [1, L]."""
        config, vocab_size = self.run.config, self.models["decoder"].model.vocab_size
        rng = np.random.default_rng(config.seed)
        return rng.integers(0, vocab_size, (1, config.cost.prompt_tokens)).astype(np.int32)

    def remove_indices(self) -> None:
        """Removes what was built only to be measured."""
        for left in self.path.iterdir():
            if re.fullmatch(r"index-[0-9]+", left.name):
                left.rmtree()
