# shellcheck shell=bash disable=SC2034,SC2154
# Sourced by run.sh: starts a command again after a preemption, with back-off.
#
#   MLPMEM_RESTARTS      how often at most (--restarts); 100 by default
#   MLPMEM_BACKOFF_SECS  wait before the first restart, doubled each time; 10 by default
#   MLPMEM_RUN_ID        names the run, so that restarts with --rebuild keep what it has made
#
# A run that lasted ten minutes resets the back-off: a preemption a day is no crash loop.

PREEMPTED=75 # "saved, start me again": mlpmem_jax/errors.py
LONGEST_BACKOFF_SECS=300
HEALTHY_SECS=600

restarts="${MLPMEM_RESTARTS:-100}"
backoff_secs="${MLPMEM_BACKOFF_SECS:-10}"
run_id="${MLPMEM_RUN_ID:-$(date +%Y%m%d-%H%M%S)-${HOSTNAME:-host}-$$}"

# need_number NAME VALUE [LEAST]: refuses what is not a whole number of at least LEAST (0).
need_number() {
  local least="${3:-0}"
  case "$2" in
    # Bash takes a leading 0 for octal, and cannot compare more than 64 bits.
    '' | *[!0-9]* | 0?* | ??????????*) ;;
    *) [ "$2" -lt "$least" ] || return 0 ;;
  esac
  fail "$1=$2: must be a whole number of at least $least" \
    "and at most 999999999"
}

# check_restarts: refuses settings that make no sense, before anything runs.
check_restarts() {
  need_number --restarts "$restarts"
  need_number MLPMEM_BACKOFF_SECS "$backoff_secs"
  restarts_done=0 next_backoff_secs="$backoff_secs"
}

# may_restart CODE SECONDS: after a run that ended with CODE after SECONDS; waits and succeeds
# where it is to be started again.
may_restart() {
  [ "$1" -eq "$PREEMPTED" ] || return 1
  if [ "$restarts_done" -ge "$restarts" ]; then
    say "preempted (exit code $PREEMPTED); not started again after $restarts restarts"
    return 1
  fi
  [ "$2" -lt "$HEALTHY_SECS" ] || next_backoff_secs="$backoff_secs"
  restarts_done=$((restarts_done + 1))
  say "preempted (exit code $PREEMPTED); restart $restarts_done of $restarts" \
    "in $next_backoff_secs s"
  sleep "$next_backoff_secs" &
  wait "$!" || true # so that a signal is answered at once
  next_backoff_secs=$((next_backoff_secs * 2))
  [ "$next_backoff_secs" -le "$LONGEST_BACKOFF_SECS" ] || next_backoff_secs=$LONGEST_BACKOFF_SECS
}

# forward SIGNAL: passes a signal on, and remembers that the launcher itself was told to stop.
forward() {
  told_to_stop="$1"
  [ -z "${child:-}" ] || kill -s "$1" "$child" 2>/dev/null || true
}

# run_once COMMAND…: runs a command so that signals to this script reach it; returns its code.
run_once() {
  local code again=0
  # Job control gives it a process group of its own, so that Ctrl-C comes from here alone, and
  # does not make it deaf to Ctrl-C, as bash makes other background commands.
  set -m
  "$@" <&0 &
  child=$!
  set +m
  while :; do
    code=0
    wait "$child" || code=$?
    # A trapped signal ends `wait` too.
    kill -0 "$child" 2>/dev/null || break
  done
  # The child may have ended just when a signal came: ask again (127: it was told already).
  wait "$child" 2>/dev/null || again=$?
  [ "$again" -eq 127 ] || code=$again
  child=""
  return "$code"
}

# with_restarts COMMAND…: runs a command, again after each preemption; returns its last code.
# A signal to this script stops for good: whoever sent it may start the script again.
with_restarts() {
  local code started
  told_to_stop="" child=""
  trap 'forward INT' INT
  trap 'forward TERM' TERM
  trap 'forward HUP' HUP
  while :; do
    started=$SECONDS code=0
    run_once "$@" || code=$?
    [ -z "$told_to_stop" ] || return "$code"
    may_restart "$code" $((SECONDS - started)) || return "$code"
    [ -z "$told_to_stop" ] || return "$code"
  done
}
