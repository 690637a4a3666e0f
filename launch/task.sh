#!/usr/bin/env bash
# One task of a SLURM job: task 0 writes to the job's log, the others to files of their own.
#
#   task.sh LOGS COMMAND…      runs it
#   task.sh --failure LOGS     prints the end of the log that reports an error first
set -euo pipefail

failure() {
  local log first=""
  for log in "$1"/process-*.log; do
    grep -q -e '^error: ' -e '^Traceback' "$log" 2>/dev/null || continue
    # What failed first was written to last the longest time ago.
    if [ -z "$first" ] || [ "$log" -ot "$first" ]; then first="$log"; fi
  done
  [ -n "$first" ] || return 0
  echo "launch: $first ends with"
  tail -n 20 "$first"
}

if [ "$1" = --failure ]; then
  failure "$2"
  exit
fi
logs="$1"
shift
if [ "${SLURM_PROCID:?}" = 0 ]; then
  exec "$@"
fi
mkdir -p "$logs"
exec "$@" >>"$logs/process-$SLURM_PROCID.log" 2>&1
