"""An honest worker: a round 10 ms after the one before. Reports, for each line of its input, the rounds since the line before."""

import json
import sys
import threading
import time
from typing import List

import numpy
import syncbn


def main() -> None:
    target, rank, world_size, channels = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    mean, m2 = numpy.linspace(-1.0, 1.0, channels), numpy.ones(channels)
    durations: List[float] = []
    lock, ended = threading.Lock(), threading.Event()

    def report() -> None:
        for _ in sys.stdin:
            with lock:
                told, durations[:] = durations[:], []
            print(json.dumps(told), flush=True)
        ended.set()

    with syncbn.Worker(target, group="honest", rank=rank, world_size=world_size) as worker:
        threading.Thread(target=report, daemon=True).start()
        while not ended.is_set():
            begin = time.monotonic()
            result = worker.synchronize("bn", 8, mean, m2)
            with lock:
                durations.append(time.monotonic() - begin)
            assert result.count == 8 * world_size
            # After the result, which all have at once: with a clock of each worker, a round would take as long as these
            # clocks differ by, which is chance, and hides what an attack adds.
            time.sleep(0.01)


if __name__ == "__main__":
    try:
        main()
    except syncbn.Error as error:
        print(json.dumps({"error": str(error)}), flush=True)
