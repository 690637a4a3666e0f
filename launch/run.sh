#!/usr/bin/env bash
# Runs a command, and installs what it needs first. Paths are relative to where it is called.
#
#   bash launch/run.sh                                  the quickstart
#   bash launch/run.sh corpus.max_bytes=2_000_000       the quickstart, changed
#   bash launch/run.sh generate --config FILE --prompt "def "
set -euo pipefail

usage() {
  cat <<'USAGE'
usage: bash launch/run.sh [--target local] [COMMAND] [arguments of the command]

Makes a virtual environment, installs requirements.txt, and runs COMMAND. Without COMMAND it is
`run`, and without --config it is then configs/quickstart.yaml.

  --target T       where to run: local (the default)
  --help           this text; `bash launch/run.sh COMMAND --help` for a command's

environment: MLPMEM_PYTHON (interpreter), MLPMEM_VENV (directory of the environment)
USAGE
}

# shellcheck source=launch/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

target=local
while [ "$#" -gt 0 ]; do
  case "$1" in
    --target)
      [ "$#" -gt 1 ] || fail "--target needs a value; targets: local"
      target="$2"
      shift 2
      ;;
    --target=*)
      target="${1#--target=}"
      shift
      ;;
    -h | --help)
      usage
      exit 0
      ;;
    *) break ;;
  esac
done
[ "$target" = local ] || fail "--target=$target: unknown target; targets: local"

case "${1:---}" in
  -* | *=*)
    # No command: the quickstart, whose paths belong to the project and not to the caller.
    own_config=no own_workdir=no
    for argument in "$@"; do
      case "$argument" in
        --config | --config=*) own_config=yes ;;
        --workdir | --workdir=* | workdir=*) own_workdir=yes ;;
      esac
    done
    if [ "$own_config" = no ]; then
      [ "$own_workdir" = yes ] || set -- --workdir "$root/runs/quickstart" "$@"
      set -- --config "$root/configs/quickstart.yaml" "$@"
    fi
    set -- run "$@"
    ;;
esac

ensure_environment requirements.txt
# Huge pages for what XLA on CPU allocates anew each step (see mlpmem_jax/parallel/host.py).
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
# -P: a folder of the caller that happens to be named like the package is not imported.
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$venv/bin/python" -P -m mlpmem_jax "$@"
