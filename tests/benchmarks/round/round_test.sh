#!/bin/bash
# The round benchmark runs and its results are right; how fast it is, is not looked at.
set -eu
export SYNCBN_MASTER=server/syncbn-master
export SYNCBN_ROUND_WORKER=tests/benchmarks/round/worker
export SYNCBN_RAW_SERVER=tests/benchmarks/round/raw_server
exec /usr/bin/python3 tests/benchmarks/round/round.py --workers 1,2 --channels 3 --layers 2 --teams 1 --repeats 1 --rounds 4 --without-gloo --without-mpi
