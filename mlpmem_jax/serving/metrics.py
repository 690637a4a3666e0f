"""Counters of a server, as text that Prometheus reads."""

import collections
import threading
from collections.abc import Mapping

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Histogram:
    """How often a duration was at most so many seconds."""

    def __init__(self) -> None:
        self.counts = [0] * len(_SECONDS)
        self.count, self.total = 0, 0.0

    def add(self, seconds: float) -> None:
        """Counts one duration."""
        self.count += 1
        self.total += seconds
        for place, limit in enumerate(_SECONDS):
            self.counts[place] += seconds <= limit

    def lines(self, name: str) -> list[str]:
        """Returns it in Prometheus' form."""
        buckets = zip(_SECONDS, self.counts, strict=True)
        return [
            *(f'{name}_bucket{{le="{limit:g}"}} {count}' for limit, count in buckets),
            f'{name}_bucket{{le="+Inf"}} {self.count}',
            f"{name}_sum {self.total:.6f}",
            f"{name}_count {self.count}",
        ]


class Metrics:
    """What has happened since the start. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: collections.Counter[tuple[str, int]] = collections.Counter()
        self._tokens: collections.Counter[str] = collections.Counter()
        self._first, self._whole = Histogram(), Histogram()

    def answered(self, path: str, status: int) -> None:
        """Counts a request by its path and the status of its answer."""
        with self._lock:
            self._requests[path, status] += 1

    def read(self, tokens: int) -> None:
        """Counts tokens of prompts."""
        with self._lock:
            self._tokens["prompt"] += tokens

    def first(self, seconds: float) -> None:
        """Counts the time from a request to its first token."""
        with self._lock:
            self._first.add(seconds)

    def finished(self, tokens: int, seconds: float) -> None:
        """Counts a completion request that was answered, with the tokens drawn for it."""
        with self._lock:
            self._tokens["generated"] += tokens
            self._whole.add(seconds)

    def text(self, gauges: Mapping[str, int]) -> str:
        """Returns everything.

        Args:
            gauges: Further numbers, as they are now.
        """
        with self._lock:
            lines = ["# TYPE mlpmem_requests_total counter"]
            for (path, status), count in sorted(self._requests.items()):
                lines.append(f'mlpmem_requests_total{{path="{path}",status="{status}"}} {count}')
            lines.append("# TYPE mlpmem_tokens_total counter")
            for kind in ("prompt", "generated"):
                lines.append(f'mlpmem_tokens_total{{kind="{kind}"}} {self._tokens[kind]}')
            for name, histogram in (
                ("mlpmem_first_token_seconds", self._first),
                ("mlpmem_completion_seconds", self._whole),
            ):
                lines += [f"# TYPE {name} histogram", *histogram.lines(name)]
        for name, value in gauges.items():
            lines += [f"# TYPE mlpmem_{name} gauge", f"mlpmem_{name} {value}"]
        return "\n".join(lines) + "\n"
