"""Time to the first token and tokens/s: decoder, memory, explicit kNN-LM, RAG with BM25.

    .venv/bin/python -m benchmarks.generation_baselines --workdir runs/quickstart [--batch N]

All systems of one finished run, in one process and in turns, on the same prompts of its test
split. RAG finds passages of the training text for each prompt and reads them before it: its time to
the first token holds both, and its further tokens are those of the decoder, with a longer text
behind them. Needs requirements-tasks.txt (bm25s).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from benchmarks.program import run_main
from mlpmem_jax.console import quiet_libraries, say
from mlpmem_jax.corpus.tokenizer import TextTokenizer
from mlpmem_jax.evaluation.table import number, render
from mlpmem_jax.evaluation.timed_decoding import Spent, System, Writer, in_turns
from mlpmem_jax.pipeline.evaluate import RESULTS
from mlpmem_jax.pipeline.networks import finished_networks
from mlpmem_jax.pipeline.opened_run import Run, open_run
from mlpmem_jax.pipeline.scoring import compiled_models
from mlpmem_jax.store.files import read_json
from mlpmem_jax.studies.tasks.models import knn_mixture
from mlpmem_jax.studies.tasks.passages import Passages

LABELS = {"decoder": "decoder", "memory": "+ memory", "knn": "+ kNN-LM", "rag": "+ RAG, BM25"}


class RagWriter(Writer):
    """The decoder, with passages before each prompt: as many tokens for every prompt."""

    def __init__(
        self, system: System, batch: int, passages: Passages, tokenizer: TextTokenizer, room: int
    ):
        super().__init__(system, batch)
        self._passages, self._tokenizer, self._room = passages, tokenizer, room

    def read(self, token_BL: np.ndarray) -> Spent:
        started = time.perf_counter()
        filler = self._tokenizer.separator_id
        before_BR = np.full((len(token_BL), self._room), filler, np.int32)
        for row, tokens in enumerate(token_BL):
            found = self._passages.find(self._tokenizer.decode(tokens))
            ids = self._tokenizer.encode(["\n\n".join(reversed(found)) + "\n\n"])[0][-self._room :]
            before_BR[row, self._room - len(ids) :] = ids
        searched = time.perf_counter() - started
        spent = super().read(np.concatenate([before_BR, token_BL], axis=1))
        return Spent(spent.total + searched, searched)


def prompts_of(run: Run, batch: int, length: int, seed: int) -> Iterator[np.ndarray]:
    """Yields prompts [B, L] from random places of the test split."""
    split, rng = run.tokens("test"), np.random.default_rng(seed)
    while True:
        yield split.read_windows(rng.integers(0, split.num_tokens - length, batch), length)


def writers_of(run: Run, batch: int, room: int, passage_tokens: int) -> dict[str, Writer]:
    """Returns the systems, with λ and τ as `evaluate` chose them."""
    artifacts = run.artifacts
    evaluated = read_json(artifacts.results.path / RESULTS)["systems"]
    models = compiled_models(
        artifacts, *finished_networks(artifacts, run.mesh, frozen=True), evaluated, run.mesh
    )
    knn, _ = knn_mixture(artifacts)
    tokenizer = run.tokenizer()
    count = max(1, room // passage_tokens)
    passages = Passages.of(run.tokens("train"), tokenizer, passage_tokens, count)
    decoder = System(models["decoder"])
    return {
        "decoder": Writer(decoder, batch),
        "memory": Writer(System(models["memory"]), batch),
        "knn": Writer(System(models["decoder"], knn.search), batch),
        "rag": RagWriter(decoder, batch, passages, tokenizer, room),
    }


def measured(
    writers: Mapping[str, Writer], work: Callable[[Writer], Spent], count: int
) -> dict[str, dict[str, float]]:
    """Returns median and deciles of milliseconds, and the median of the search's share."""
    spent: dict[str, list[Spent]] = {name: [] for name in writers}
    for name, one in in_turns(writers, work, count):
        spent[name].append(one)
    found = {}
    for name, each in spent.items():
        total = [1000 * one.total for one in each]
        low, *_, high = statistics.quantiles(total, n=10)
        found[name] = {
            "median_ms": statistics.median(total),
            "decile_1_ms": low,
            "decile_9_ms": high,
            "search_median_ms": statistics.median(1000 * one.search for one in each),
        }
    return found


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    run = open_run(arguments.workdir)
    room = run.config.decoder.context_tokens - arguments.prompt_tokens - arguments.tokens
    room = min(room, arguments.passages * arguments.passage_tokens)
    if room < arguments.passage_tokens:
        raise SystemExit(
            f"decoder.context_tokens={run.config.decoder.context_tokens} leaves {room} tokens for "
            "passages: use shorter prompts, texts or passages"
        )
    batch = arguments.batch
    writers = writers_of(run, batch, room, arguments.passage_tokens)
    sources = {
        id(writer): prompts_of(run, batch, arguments.prompt_tokens, run.config.seed)
        for writer in writers.values()
    }
    first = measured(
        writers, lambda writer: writer.read(next(sources[id(writer)])), arguments.prompts
    )
    for writer in writers.values():  # So that each text is as long as it would be.
        writer.read(next(sources[id(writer)]))
    token = measured(writers, Writer.write, arguments.tokens)
    for name in writers:
        token[name]["tokens_per_second"] = 1000 * batch / token[name]["median_ms"]
    return {"batch": batch, "passage_room": room, "first": first, "token": token}


def as_text(found: Mapping[str, Any]) -> str:
    header = ["system", "first token\nms", "deciles\n1 and 9", "search\nms", "token\nms",
              "search\nms", "tokens/s"]  # fmt: skip
    rows = []
    for name, first in found["first"].items():
        token = found["token"][name]
        spread = f"{number(first['decile_1_ms'], 1)}, {number(first['decile_9_ms'], 1)}"
        rows.append(
            [LABELS[name], number(first["median_ms"], 1), spread,
             number(first["search_median_ms"], 1), number(token["median_ms"], 2),
             number(token["search_median_ms"], 2), number(token["tokens_per_second"], 0)]
        )  # fmt: skip
    return render(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", required=True)
    numbers = {"batch": 1, "prompts": 24, "prompt-tokens": 64, "tokens": 64, "passages": 3,
               "passage-tokens": 32}  # fmt: skip
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", help="also write the numbers to a JSON file")
    arguments = parser.parse_args()
    quiet_libraries()
    found = measure(arguments)
    say(as_text(found))
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            json.dump(vars(arguments) | found, file, indent=2)


if __name__ == "__main__":
    run_main(main)
