"""Puts load on the command `serve`, and compares every answer with the same request alone.

    .venv/bin/python -m benchmarks.serve_load --workdir RUN [--config configs/tiny.yaml]
        [--clients 64] [--requests 10000] [--slots 8] [--seed 0]

RUN is a finished run. Of the requests, drawn by the seed, 80 % are good, 8 % malformed, 4 %
oversized, and in 8 % the client hangs up midway. All run on this machine. Afterwards no slot may be
in use and nothing may wait, every good request alone must still have its answer, and SIGTERM must
end the server with 0. Prints latencies, tokens per second and the server's memory. Exit code 1 if
anything is wrong, with the first cases.
"""

import argparse
import collections
import dataclasses
import http.client
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.program import run_main
from benchmarks.serve_requests import (
    BODY_BYTES,
    MAX_TOKENS,
    Answer,
    Body,
    ask,
    good_bodies,
    hang_up,
    malformed,
    oversized,
    send,
)

ROOT = Path(__file__).resolve().parent.parent
SHARES = {"good": 0.8, "malformed": 0.08, "oversized": 0.04, "hung up": 0.08}
_SETTLE_SECS = 60.0
_SHOWN = 5


class Server:
    """The command as a process."""

    def __init__(self, workdir: str, config: str, clients: int, slots: int):
        """Starts it, and waits until it listens."""
        limits = [
            f"serve.slots={slots}", f"serve.max_queue={4 * clients}", "serve.port=0",
            f"serve.max_body_bytes={BODY_BYTES}", f"serve.max_tokens={MAX_TOKENS}",
        ]  # fmt: skip
        command = ["serve", "--config", config, "--workdir", workdir, *limits]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlpmem_jax", *command],
            cwd=ROOT,
            env={key: value for key, value in os.environ.items() if key != "MLPMEM_API_KEY"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:(\d+)", self.process.stdout.readline())
        if found is None:
            raise subprocess.CalledProcessError(self.process.wait(), command)
        self.port = int(found[1])

    def get(self, path: str) -> tuple[int, bytes]:
        """Returns status and body of a page."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()

    def metric(self, name: str) -> float:
        """Returns a number of `/metrics`."""
        lines = self.get("/metrics")[1].decode().splitlines()
        return float(dict(line.rsplit(" ", 1) for line in lines if line[0] != "#")[name])

    def context(self) -> int:
        """Returns how many tokens the model reads."""
        return int(json.loads(self.get("/v1/models")[1])["data"][0]["max_model_len"])

    def megabytes(self) -> float:
        """Returns its memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found
        return int(found[1]) / 1e3

    def end(self) -> int:
        """Sends SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=120)
        return self.process.returncode


class Case(NamedTuple):
    """A request to send.

    Attributes:
        kind: One of `SHARES`.
        what: Number of the good request, or name of the bad one.
        seed: Of what else is drawn.
    """

    kind: str
    what: Any
    seed: int


@dataclasses.dataclass
class Load:
    """What clients send, and what came back.

    Attributes:
        server: What is under load.
        bodies: The good requests.
        bad: The bad ones by kind and name: what is sent, and the status that must answer.
        alone: The answers to the good ones, each sent alone.
        seconds: How long answers to good requests took.
        first_seconds: The same to the first event, of those that are streams.
        tokens: Tokens drawn for good requests.
        counts: Requests by kind and status.
        wrong: What was not as it must be.
    """

    server: Server
    bodies: Sequence[Body]
    bad: dict[str, dict[str, tuple[bytes, int]]]
    alone: list[Any]
    seconds: list[float] = dataclasses.field(default_factory=list)
    first_seconds: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0
    counts: collections.Counter[tuple[str, int]] = dataclasses.field(
        default_factory=collections.Counter
    )
    wrong: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def cases(self, count: int, seed: int) -> list[Case]:
        """Draws requests; bad ones of a kind come in turn."""
        draw = random.Random(seed)
        kinds = draw.choices(list(SHARES), weights=list(SHARES.values()), k=count)
        names = {kind: itertools.cycle(bad) for kind, bad in self.bad.items()}
        found = []
        for kind in kinds:
            what = draw.randrange(len(self.bodies)) if kind == "good" else None
            if kind in names:
                what = next(names[kind])
            found.append(Case(kind, what, draw.getrandbits(32)))
        return found

    def run(self, cases: Sequence[Case], clients: int) -> float:
        """Sends all, by so many clients at once; returns the seconds it took."""
        waiting = collections.deque(cases)

        def work() -> None:
            while True:
                with self._lock:
                    if not waiting:
                        return
                    case = waiting.popleft()
                try:
                    self.send(case)
                except Exception as error:
                    self._note(case, f"{type(error).__name__}: {error}")

        threads = [threading.Thread(target=work) for _ in range(clients)]
        begun = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.monotonic() - begun

    def send(self, case: Case) -> None:
        """Sends one request and judges the answer."""
        port = self.server.port
        if case.kind == "hung up":
            hang_up(port, random.Random(case.seed))
            with self._lock:
                self.counts[case.kind, 0] += 1
            return
        begun = time.monotonic()
        if case.kind == "good":
            answer, needed = ask(port, self.bodies[case.what]), 200
        else:
            sent, needed = self.bad[case.kind][case.what]
            answer = send(port, sent)
        self._judge(case, answer, needed, time.monotonic() - begun)

    def _judge(self, case: Case, answer: Answer, needed: int, seconds: float) -> None:
        with self._lock:
            self.counts[case.kind, answer.status] += 1
        if answer.status != needed:
            self._note(case, f"status {answer.status} and not {needed}: {answer.content}")
        elif case.kind == "good":
            if answer.content != self.alone[case.what]:
                self._note(case, f"another answer than alone: {answer.content}")
            with self._lock:
                self.seconds.append(seconds)
                self.tokens += answer.tokens
                if answer.first_secs is not None:
                    self.first_seconds.append(answer.first_secs)

    def _note(self, case: Case, what: str) -> None:
        with self._lock:
            self.wrong.append(f"{case.kind} {case.what}: {what[:400]}")

    def settle(self) -> None:
        """Waits until nothing is under way, and asks everything once more, alone."""
        limit = time.monotonic() + _SETTLE_SECS
        gauges = ("mlpmem_slots_used", "mlpmem_queue_length")
        while (left := {name: self.server.metric(name) for name in gauges}) and any(left.values()):
            if time.monotonic() > limit:
                self.wrong.append(f"slots are stuck: {left}")
                break
            time.sleep(0.1)
        for number, expected in enumerate(self.alone):
            if ask(self.server.port, self.bodies[number]).content != expected:
                self.wrong.append(f"good {number}: another answer alone than before the load")
        if self.server.get("/health")[0] != 200:
            self.wrong.append("/health: the engine has failed")


def begin(server: Server, seed: int) -> Load:
    """Asks each good request alone."""
    context = server.context()
    bodies = good_bodies(random.Random(seed), context)
    alone = [ask(server.port, body) for body in bodies]
    for body, answer in zip(bodies, alone, strict=True):
        if answer.status != 200:
            raise SystemExit(f"{body}: {answer}")
    bad = {"malformed": malformed(), "oversized": oversized(context)}
    return Load(server, bodies, bad, [answer.content for answer in alone])


def report(load: Load, spent: float) -> list[str]:
    """Returns what is printed."""
    lines = [f"{sum(load.counts.values()):,} requests in {spent:.0f} s"]
    for kind in SHARES:
        found = {status: n for (one, status), n in sorted(load.counts.items()) if one == kind}
        named = ", ".join(f"{n:,} of status {status}" for status, n in found.items())
        lines.append(f"  {kind}: {sum(found.values()):,}" + f" ({named})" * (kind != "hung up"))
    for name, values in (("answer", load.seconds), ("first event", load.first_seconds)):
        shares = " ".join(f"p{n} {np.percentile(values, n):.3f}" for n in (50, 90, 99))
        lines.append(f"seconds to the {name}: {shares}")
    lines.append(
        f"good answers: {len(load.seconds) / spent:.1f} /s, {load.tokens / spent:.0f} tokens/s"
    )
    return lines


def main() -> int:
    """Runs the load; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--config", default="configs/tiny.yaml")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    server = Server(os.path.abspath(asked.workdir), asked.config, asked.clients, asked.slots)
    try:
        load = begin(server, asked.seed)
        before = server.megabytes()
        spent = load.run(load.cases(asked.requests, asked.seed), asked.clients)
        load.settle()
        after = server.megabytes()
    finally:
        code = server.end()
    if code != 0:
        load.wrong.append(f"SIGTERM: exit code {code}")
    print("\n".join(report(load, spent)))
    print(f"memory of the server: {before:.0f} MB before, {after:.0f} MB after")
    print(f"wrong: {len(load.wrong):,}", *load.wrong[:_SHOWN], sep="\n")
    return 1 if load.wrong else 0


if __name__ == "__main__":
    run_main(main)
