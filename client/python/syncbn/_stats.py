"""The cost of a worker's rounds: `Worker.stats`."""

import math
import threading
import time
from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Optional

from syncbn import errors

# Times are counted in classes whose bounds are this factor apart, so that a quantile is known to within 5 %.
_STEPS_OF_DOUBLING = 8
_SHOWN = 5
_MOST_WAITS = 256  # Times of a layer that are kept before they are counted.


class LayerStats(NamedTuple):
    """The rounds of one layer, or of one named sum. Times are in seconds."""

    rounds: int
    failed: int
    seconds_waited: float
    p50: float
    """Half of the rounds were waited for as long, or less; to within 5 %. NaN without a round."""
    p99: float


class Stats(NamedTuple):
    """The cost of a worker's rounds to its calling threads. `str` and a notebook show a table.

    A round counts once its outcome is known to this worker. The time of a round is what its threads have waited: for other
    workers, for the master and for the network. CUDA streams that wait instead of a thread are not counted.
    """

    rounds: int
    failed: int
    """Rounds that ended with an error."""
    seconds_waited: float
    p50: float
    p99: float
    layers: Mapping[str, LayerStats]
    """By name, beginning with the layer that was waited for longest."""
    missing: Mapping[int, int]
    """By rank: the number of rounds that failed because of it or went on without it, as far as this worker was told."""
    transport: Optional[str] = None
    """"shared memory" or "gRPC": the worker's way to its master now. None once it has ended."""

    def __str__(self) -> str:
        lines = [f"{'layer':<40} {'rounds':>9} {'failed':>7} {'waited':>10} {'p50':>10} {'p99':>10}"]
        for name, row in [("all", self)] + list(self.layers.items())[:_SHOWN]:
            lines.append(
                f"{name[-40:]:<40} {row.rounds:>9} {row.failed:>7} {row.seconds_waited:>8.3f} s {row.p50 * 1e3:>7.3f} ms "
                f"{row.p99 * 1e3:>7.3f} ms"
            )
        if len(self.layers) > _SHOWN:
            lines.append(f"and {len(self.layers) - _SHOWN} layers more")
        if self.transport is not None:
            lines.append(f"by {self.transport}")
        if self.missing:
            lines.append("missing: " + ", ".join(f"rank {rank} in {n} rounds" for rank, n in self.missing.items()))
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)


class _Times:
    """Counts of rounds and of their times, in bounded memory."""

    def __init__(self) -> None:
        self.waits: List[int] = []  # Times that are not counted yet, as `Recorder.waits` has them.
        self.failed = 0
        self.nanoseconds = 0
        self._classes: Dict[int, int] = {}

    @property
    def rounds(self) -> int:
        return sum(self._classes.values())

    def add(self, nanoseconds: int, failed: bool) -> None:
        self.failed += failed
        self.nanoseconds += nanoseconds
        step = round(math.log2(max(1, nanoseconds)) * _STEPS_OF_DOUBLING)
        self._classes[step] = self._classes.get(step, 0) + 1

    def count_waits(self) -> None:
        """Counts `waits`, to which other threads append meanwhile."""
        while self.waits:
            nanoseconds = self.waits.pop()
            self.add(max(nanoseconds, ~nanoseconds), nanoseconds < 0)

    def merge(self, other: "_Times") -> None:
        self.failed += other.failed
        self.nanoseconds += other.nanoseconds
        for step, number in other._classes.items():
            self._classes[step] = self._classes.get(step, 0) + number

    def quantile(self, share: float) -> float:
        """In seconds."""
        wanted = math.ceil(share * self.rounds)
        for step in sorted(self._classes):
            wanted -= self._classes[step]
            if wanted <= 0:
                return float(2 ** (step / _STEPS_OF_DOUBLING) * 1e-9)
        return math.nan

    def stats(self) -> LayerStats:
        return LayerStats(self.rounds, self.failed, self.nanoseconds * 1e-9, self.quantile(0.5), self.quantile(0.99))


class Stopwatch:
    """The time that a thread of a worker waits for one round: within `with` blocks."""

    __slots__ = ("_recorder", "_layer", "_begun", "_nanoseconds", "_recorded")

    def __init__(self, recorder: "Recorder", layer: str) -> None:
        self._recorder, self._layer = recorder, layer
        self._begun = self._nanoseconds = 0
        self._recorded = False

    def __enter__(self) -> None:
        """Begins a wait for the round, which ends with the block. An error ends the round."""
        self._begun = time.monotonic_ns()

    def __exit__(self, kind: Any, error: Optional[BaseException], traceback: Any) -> None:
        if error is None or isinstance(error, errors.Error):
            self._nanoseconds += time.monotonic_ns() - self._begun
        if isinstance(error, errors.Error):
            self.ended(error.ranks, failed=True)

    def ended(self, missing: Iterable[int] = (), failed: bool = False) -> None:
        """The outcome is known. Only the first call counts."""
        if not self._recorded:
            self._recorded = True
            self._recorder.add(self._layer, self._nanoseconds, failed, missing)


class Recorder:
    """All rounds of a worker. Thread safety: any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # A signal's handler may ask on the thread that adds.
        self._layers: Dict[str, _Times] = {}
        self._missing: Dict[int, int] = {}

    def stopwatch(self, layer: str) -> Stopwatch:
        return Stopwatch(self, layer)

    def add(self, layer: str, nanoseconds: int, failed: bool, missing: Iterable[int]) -> None:
        with self._lock:
            self._times(layer).add(nanoseconds, failed)
        self.add_missing(missing)

    def add_missing(self, ranks: Iterable[int]) -> None:
        """Blames them for one round."""
        with self._lock:
            for rank in ranks:
                self._missing[rank] = self._missing.get(rank, 0) + 1

    def waits(self, layer: str) -> List[int]:
        """A list to which each round of the layer that has ended appends the nanoseconds that it was waited for, or
        ~nanoseconds if it has failed. They are counted later.
        """
        times = self._layers.get(layer)
        if times is None or len(times.waits) >= _MOST_WAITS:
            with self._lock:
                times = self._times(layer)
                times.count_waits()
        return times.waits

    def _times(self, layer: str) -> _Times:
        times = self._layers.get(layer)
        if times is None:
            times = self._layers[layer] = _Times()
        return times

    def stats(self) -> Stats:
        total = _Times()
        with self._lock:
            for times in self._layers.values():
                times.count_waits()
            found: List[Any] = [(name, times.stats()) for name, times in self._layers.items()]
            for times in self._layers.values():
                total.merge(times)
            missing = dict(sorted(self._missing.items()))
        found.sort(key=lambda item: -item[1].seconds_waited)
        return Stats(*total.stats(), dict(found), missing)
