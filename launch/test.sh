#!/usr/bin/env bash
# Runs the tests, and installs what they need first. Arguments are pytest's.
#
#   bash launch/test.sh                      everything but what is slow or needs hardware
#   bash launch/test.sh -m slow              the slow ones
#   bash launch/test.sh tests/unit -k config
#   bash launch/test.sh -n 0 --pdb           in one process
set -euo pipefail

# shellcheck source=launch/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

ensure_environment requirements.txt requirements-test.txt
cd "$root"
# Two files at a time: much of a test is compiling, which takes one core. More would need the memory
# of more pipelines. In the order of their names the many short files come last, so that no process
# is left alone with a long one.
exec "$venv/bin/python" -m pytest -m "not slow and not tpu and not gpu" -n 2 --dist loadfile \
  --no-loadscope-reorder "$@"
