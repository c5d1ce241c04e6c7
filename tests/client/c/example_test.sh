#!/usr/bin/env bash
# Runs the C example: $1.
exec "$1"
