#!/usr/bin/env bash
# What run.sh --target tpu-vm does on each worker. A run goes on when the connection is lost:
# it is started in the background, and followed.
#
#   worker.sh start RUN COMMAND…    starts it, unless a run is going on; RUN names it and its
#                                   restarts (MLPMEM_RUN_ID)
#   worker.sh restart RUN COMMAND…  the same, once the run before has ended
#   worker.sh follow LINES          prints the log (from line +1, or its last LINES) until the run
#                                   has ended, and exits as it did
#   worker.sh running               succeeds while a run is going on
#   worker.sh failed                prints "1 SECS HOST" if this worker's run failed and its log
#                                   says why (0: it does not), SECS ago
#   worker.sh failure HOST          prints the end of the log, on that host alone
#   worker.sh stop                  asks the run to save and end; kills it after a while
#
# Beside the code: .run/log, .run/log.before, .run/pid, .run/exit_code, .run/run_id, .run/code (its
# files, so that the next copy removes those alone).
set -euo pipefail

here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
state="$here/.run"
stop_secs="${MLPMEM_STOP_SECS:-120}"
case "$stop_secs" in
  *[!0-9]*)
    echo "error: MLPMEM_STOP_SECS=$stop_secs: must be a whole number" >&2
    exit 2
    ;;
esac
mkdir -p "$state"

running() {
  [ -e "$state/pid" ] && [ ! -e "$state/exit_code" ] && kill -0 "$(cat "$state/pid")" 2>/dev/null
}

start() {
  if running; then
    echo "launch: a run is going on here (process $(cat "$state/pid"))" >&2
    return 0
  fi
  export MLPMEM_RUN_ID="$1"
  echo "$1" >"$state/run_id"
  shift
  rm -f "$state/exit_code" "$state/pid"
  [ ! -e "$state/log" ] || mv "$state/log" "$state/log.before"
  cd "$here"
  nohup setsid bash "$here/launch/worker.sh" run "$@" >"$state/log" 2>&1 </dev/null &
  echo "$!" >"$state/pid"
}

# Here the run may still be ending when the launcher, which follows another worker, starts again.
restart() {
  local waited=0
  while running && [ "$waited" -lt "$stop_secs" ]; do
    sleep 1
    waited=$((waited + 1))
  done
  stop
  # The launcher may have found the run here, under the name that another launcher gave it.
  [ ! -e "$state/run_id" ] || set -- "$(cat "$state/run_id")" "${@:2}"
  start "$@"
}

# find_or_get_python: TPU VMs come with Python 3.10; a newer one is fetched if there is none.
find_or_get_python() {
  # shellcheck source=launch/environment.sh
  if (. "$here/launch/environment.sh" && venv_fits || find_python) >/dev/null 2>&1; then
    return 0
  fi
  echo "launch: no Python of 3.11 or newer here: fetching 3.12 with uv" >&2
  python3 -m pip install --quiet --user uv && python3 -m uv python install 3.12 &&
    MLPMEM_PYTHON="$(python3 -m uv python find 3.12)" && export MLPMEM_PYTHON
}

# run COMMAND…: in the background. Signals to this script's group reach Python itself.
run() {
  local code=0
  trap : TERM # Python answers it; this script stays to write down how it ended.
  {
    find_or_get_python && bash launch/install.sh requirements.txt requirements-tpu.txt requirements-remote.txt &&
      PYTHONPATH="$here" "${MLPMEM_VENV:-$here/.venv}/bin/python" -P -m mlpmem_jax "$@"
  } || code=$?
  echo "$code" >"$state/exit_code.new"
  mv "$state/exit_code.new" "$state/exit_code"
}

follow() {
  local tail_process
  while [ ! -e "$state/log" ]; do sleep 1; done
  tail -n "$1" --pid "$$" -F "$state/log" 2>/dev/null & # ends with this script at the latest
  tail_process=$!
  while running; do sleep 1; done
  sleep 1 # for the last lines
  kill "$tail_process" 2>/dev/null || true
  if [ ! -e "$state/exit_code" ]; then
    echo "launch: the run on this worker ended without a word (killed, or the worker restarted)" >&2
    return 1
  fi
  return "$(cat "$state/exit_code")"
}

failed() {
  local says=0
  [ -e "$state/log" ] && ! running || return 0
  [ ! -e "$state/exit_code" ] || [ "$(cat "$state/exit_code")" != 0 ] || return 0
  ! grep -q -e '^error: ' -e '^Traceback' "$state/log" || says=1
  # For how long, and not since when: clocks differ.
  echo "$says $(($(date +%s) - $(stat -c %Y "$state/log"))) $(hostname)"
}

failure() {
  [ "$1" = "$(hostname)" ] || return 0
  echo "--- $1: exit code $(cat "$state/exit_code" 2>/dev/null || echo none)"
  tail -n 20 "$state/log"
}

stop() {
  local group waited=0
  running || return 0
  group="$(cat "$state/pid")"
  kill -s TERM -- "-$group" 2>/dev/null || true
  while running && [ "$waited" -lt "$stop_secs" ]; do
    sleep 1
    waited=$((waited + 1))
  done
  ! running || kill -s KILL -- "-$group" 2>/dev/null || true
  waited=0
  while running && [ "$waited" -lt 10 ]; do # until it is gone
    sleep 1
    waited=$((waited + 1))
  done
}

verb="${1:-}"
case "$verb" in
  start | restart | run | follow | running | failed | failure | stop)
    shift
    "$verb" "$@"
    ;;
  *)
    echo "usage: worker.sh start RUN COMMAND… | restart RUN COMMAND… | follow LINES | running |" \
      "failed | failure HOST | stop" >&2
    exit 2
    ;;
esac
