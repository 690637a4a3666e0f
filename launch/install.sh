#!/usr/bin/env bash
# Makes the virtual environment and installs requirements files into it; starts nothing.
#
#   bash launch/install.sh requirements.txt requirements-gpu.txt
set -euo pipefail

# shellcheck source=launch/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

[ "$#" -gt 0 ] || set -- requirements.txt
ensure_environment "$@"
