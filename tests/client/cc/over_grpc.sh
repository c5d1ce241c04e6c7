#!/bin/bash
# Runs a test whose workers share no memory with their masters.
export SYNCBN_SHARED_MEMORY=off
exec "$1"
