#!/usr/bin/env bash
# Runs the tests, and installs what they need first. Arguments are pytest's.
#
#   bash launch/test.sh                      everything but what is slow or needs hardware
#   bash launch/test.sh -m slow              the slow ones
#   bash launch/test.sh tests/unit -k config
set -euo pipefail

# shellcheck source=launch/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

ensure_environment requirements.txt requirements-test.txt
cd "$root"
exec "$venv/bin/python" -m pytest -m "not slow and not tpu and not gpu" "$@"
