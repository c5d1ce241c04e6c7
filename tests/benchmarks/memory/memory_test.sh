#!/bin/bash
# The memory benchmark runs and its results are right; how much it finds, is not looked at.
set -eu
export SYNCBN_MASTER=server/syncbn-master
export SYNCBN_MEMORY_WORKERS=tests/benchmarks/memory/workers
exec /usr/bin/python3 tests/benchmarks/memory/memory.py --workers 8 --layers 3 --channels 5 --rounds 2 --without-python
