"""The public names of workers, masters and rounds, each of which has a module of its own."""

from syncbn import _open
from syncbn._default import default_worker
from syncbn._master import Master
from syncbn._rounds import GradientSums, Moments, Round, wait
from syncbn._stats import LayerStats, Stats
from syncbn._worker import Worker

__all__ = ["GradientSums", "LayerStats", "Master", "Moments", "Round", "Stats", "Worker", "default_worker", "wait"]

_find_worker = _open.find  # Models that earlier versions have pickled name it.
