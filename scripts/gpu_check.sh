#!/bin/sh
# One command on a machine with a GPU: is the Triton backend right there, and how fast is it? Under 8 minutes, no network,
# nothing to build; Python with torch and Triton is all it needs. PYTHON names the interpreter. `--tiny` rehearses on the CPU.
set -eu
cd "$(dirname "$0")/.."
PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
exec "${PYTHON:-python3}" benchmarks/run.py --device cuda "$@"
