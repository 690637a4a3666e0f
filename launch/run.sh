#!/usr/bin/env bash
# Runs a command here, on a TPU VM, on GKE or under SLURM, and installs what it needs first.
# Paths are relative to where it is called.
#
#   bash launch/run.sh                                  the quickstart
#   bash launch/run.sh corpus.max_bytes=2_000_000       the quickstart, changed
#   bash launch/run.sh generate --config FILE --prompt "def "
#   bash launch/run.sh --processes 4 --devices-per-process 2 pretrain --config FILE
#   bash launch/run.sh --target tpu-vm --help           docs/launching.md says more
set -euo pipefail

targets="local, tpu-vm, gke, slurm"

usage() {
  cat <<USAGE
usage: bash launch/run.sh [--target T] [flags of the target] [COMMAND] [arguments of the command]

Installs what is needed where it runs, and runs COMMAND. Without COMMAND it is \`run\`, and
without --config it is then configs/quickstart.yaml.

  --target T       where to run: $targets (default: local)
  --restarts N     starts again at most N times after a preemption (exit code $PREEMPTED); 100
  --help           this text; \`bash launch/run.sh COMMAND --help\` for a command's

$(target_usage)

environment: MLPMEM_PYTHON (interpreter), MLPMEM_VENV (directory of the environment),
MLPMEM_RESTARTS (as --restarts), MLPMEM_BACKOFF_SECS (wait before the first restart; doubles)
USAGE
}

launch="$(dirname -- "${BASH_SOURCE[0]}")"
# shellcheck source=launch/environment.sh
. "$launch/environment.sh"
# shellcheck source=launch/restarts.sh
. "$launch/restarts.sh"
# shellcheck source=launch/steps.sh
. "$launch/steps.sh"

# The target decides which flags there are, so it is found before they are read.
target=local
case "${1:-}" in
  --target)
    [ "$#" -gt 1 ] || fail "--target needs a value; targets: $targets"
    target="$2"
    shift 2
    ;;
  --target=*)
    target="${1#--target=}"
    shift
    ;;
esac
case "$target" in
  local)
    # shellcheck source=launch/targets/local.sh
    . "$launch/targets/local.sh"
    ;;
  tpu-vm)
    # shellcheck source=launch/targets/tpu-vm.sh
    . "$launch/targets/tpu-vm.sh"
    ;;
  gke)
    # shellcheck source=launch/targets/gke.sh
    . "$launch/targets/gke.sh"
    ;;
  slurm)
    # shellcheck source=launch/targets/slurm.sh
    . "$launch/targets/slurm.sh"
    ;;
  *) fail "--target=$target: unknown target; targets: $targets" ;;
esac

# Flags of the launcher, up to the first word that is none: the command, or what is its own.
while [ "$#" -gt 0 ]; do
  case "$1" in
    -h | --help)
      usage
      exit 0
      ;;
    --target | --target=*) fail "${1%%=*}: must come first, and once" ;;
  esac
  name="${1%%=*}"
  case "$(flag_kind "$name")" in
    switch)
      [ "$name" = "$1" ] || fail "$1: $name takes no value"
      set_flag "$name" yes
      shift
      ;;
    value)
      if [ "$name" != "$1" ]; then
        set_flag "$name" "${1#*=}"
        shift
      else
        [ "$#" -gt 1 ] || fail "$name needs a value"
        set_flag "$name" "$2"
        shift 2
      fi
      ;;
    *)
      # Elsewhere a misspelt flag may cost money: what belongs to the command comes after it.
      case "$target $1" in
        local* | *' '[!-]*) break ;;
        *) fail "$1: no flag of --target $target; what is the command's comes after COMMAND" \
          "(\`launch/run.sh --target $target --help\`)" ;;
      esac
      ;;
  esac
done

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

run_target "$@"
