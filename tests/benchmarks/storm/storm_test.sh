#!/bin/bash
# A small storm: nothing hangs, and every bit is right.
set -eu
export SYNCBN_MASTER=server/syncbn-master
export SYNCBN_STORM_WORKER=tests/benchmarks/storm/worker
exec /usr/bin/python3 tests/benchmarks/storm/storm.py --masters 10 --workers 4 --both 4
