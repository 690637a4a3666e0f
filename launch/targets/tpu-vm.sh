# shellcheck shell=bash disable=SC2034,SC2154
# Sourced by run.sh: a Cloud TPU VM of any number of hosts, through gcloud.
#
# Makes it or uses the one of that name, copies the tracked files to all workers, starts the
# command on all of them in the background, and follows the log of worker 0. The run does not
# depend on the connection. After a preemption everything from the TPU on is done again.

switches="--dry-run --spot --queued --keep"
values="--name --zone --project --accelerator-type --runtime-version --timeout"
remote=mlpmem # in the home directory of each worker

target_usage() {
  cat <<'USAGE'
flags of tpu-vm:
  --name NAME               of the TPU; one that exists is used
  --zone ZONE               for example us-east5-a
  --accelerator-type TYPE   for example v5p-128, v5litepod-256, v6e-8
  --runtime-version V       of the machine; chosen by the type if not given
  --project PROJECT         otherwise gcloud's own
  --spot                    cheaper, and may be taken away at any time
  --queued                  as a queued resource: waits until there is one
  --timeout SECS            longest wait for the TPU; 86400
  --keep                    do not delete it at the end
  --dry-run                 print the commands, run nothing
USAGE
}

# gcloud_tpu GROUP VERB ARGUMENT…: the words of a gcloud command, in `words`.
gcloud_tpu() {
  words=(gcloud compute tpus "$@" --zone "$(flag --zone)")
  [ -z "$(flag --project)" ] || words+=(--project "$(flag --project)")
}

# on_workers WHICH COMMAND…: runs a command on worker 0 or on all; ssh hands one string to the
# shell there, so the words are quoted for it.
on_workers() {
  local which="$1"
  shift
  gcloud_tpu tpu-vm ssh "$name" --worker "$which" --command "$(quoted "$@")"
  step "${words[@]}" </dev/null
}

# runtime_of TYPE: the software of a TPU VM that fits the type of its chips.
runtime_of() {
  case "$1" in
    v6e-*) printf 'v2-alpha-tpuv6e\n' ;;
    v5p-*) printf 'v2-alpha-tpuv5\n' ;;
    v5litepod-*) printf 'v2-alpha-tpuv5-lite\n' ;;
    v[234]-*) printf 'tpu-ubuntu2204-base\n' ;;
    *) fail "--accelerator-type=$1: name its --runtime-version too" ;;
  esac
}

# tpu_state ANSWER: prints the state of the TPU, nothing if there is none.
tpu_state() {
  gcloud_tpu tpu-vm describe "$name" --format 'value(state)'
  ask "$1" "${words[@]}"
}

# request_state ANSWER: prints the state of the queued resource, nothing if there is none.
request_state() {
  gcloud_tpu queued-resources describe "$name" --format 'value(state.state)'
  ask "$1" "${words[@]}"
}

create() {
  local spot=()
  [ "$(flag --spot)" != yes ] || spot=(--spot)
  if [ "$(flag --queued)" = yes ]; then
    gcloud_tpu queued-resources create "$name" --node-id "$name" \
      --accelerator-type "$accelerator" --runtime-version "$runtime" ${spot[@]+"${spot[@]}"}
  else
    gcloud_tpu tpu-vm create "$name" \
      --accelerator-type "$accelerator" --version "$runtime" ${spot[@]+"${spot[@]}"}
  fi
  step "${words[@]}"
}

delete() {
  if [ "$(flag --queued)" = yes ]; then
    gcloud_tpu queued-resources delete "$name" --force --quiet
  else
    gcloud_tpu tpu-vm delete "$name" --quiet
  fi
  step "${words[@]}"
}

# settled_state: prints the state of the TPU or, where there is none, of its request, once it
# is not about to change by itself into something else.
settled_state() {
  local state
  while :; do
    state="$(tpu_state "")"
    if [ -z "$state" ] && [ "$(flag --queued)" = yes ]; then state="$(request_state "")"; fi
    case "$state" in
      DELETING | STOPPING | SUSPENDING) sleep "$poll_secs" ;;
      *) break ;;
    esac
  done
  printf '%s\n' "$state"
}

# ready: makes or finds the TPU and waits for it; `fresh` says whether the code must be copied.
ready() {
  local state waited=0 limit
  limit="$(flag --timeout 86400)"
  state="$(settled_state)"
  case "$state" in
    READY)
      say "using $name, which exists"
      return 0
      ;;
    PREEMPTED | TERMINATED | STOPPED | SUSPENDED | FAILED)
      say "$name is $state: making it again"
      delete || return
      state=""
      ;;
  esac
  fresh=yes
  if [ -z "$state" ]; then create || return; fi
  while :; do
    state="$(tpu_state READY)"
    [ "$state" != READY ] || return 0
    if [ "$(flag --queued)" = yes ]; then
      state="$(request_state ACTIVE)"
      case "$state" in
        FAILED | SUSPENDED)
          complain "request $name did not get a TPU: it is $state"
          return 1
          ;;
      esac
    fi
    if [ "$waited" -ge "$limit" ]; then
      complain "$name is not ready after $limit s (${state:-it does not exist})"
      return 1
    fi
    sleep "$poll_secs"
    waited=$((waited + poll_secs))
  done
}

copy_code() {
  local archive="$root/build/mlpmem-$name.tar.gz"
  step bash "$root/launch/pack.sh" "$archive" || return
  gcloud_tpu tpu-vm scp "$archive" "$name:$remote.tar.gz" --worker all
  step "${words[@]}" || return
  # Only files of the code that was copied before go: whatever else lies there is not ours. A run
  # that is going on keeps its code.
  on_workers all bash -c "if bash $remote/launch/worker.sh running 2>/dev/null; then exit; fi; \
mkdir -p $remote/.run && cd $remote && { [ ! -e .run/code ] || xargs -d '\\n' rm -f -- <.run/code; } \
&& tar -xzf ../$remote.tar.gz && tar -tzf ../$remote.tar.gz >.run/code"
}

# follow: prints the log of worker 0 until the run ends; returns its exit code. A connection
# that breaks (255) is made again as long as the TPU is there.
follow() {
  local code lines=+1
  while :; do
    code=0
    on_workers 0 bash "$remote/launch/worker.sh" follow "$lines" || code=$?
    [ "$code" -eq 255 ] && [ -z "$told_to_stop" ] || return "$code"
    if [ "$(tpu_state READY)" != READY ]; then
      lost=yes
      return "$PREEMPTED"
    fi
    say "connection to $name lost; connecting again"
    sleep "$poll_secs"
    lines=20
  done
}

# attempt COMMAND…: one start, from the TPU to the end of the run.
attempt() {
  local code=0 verb=start
  fresh=no
  ready || return
  if [ "$fresh" = yes ] || [ "$copied" = no ]; then copy_code || return; fi
  copied=yes
  # After a run has ended by itself. One that was lost sight of may be going on.
  [ "$restarts_done" -eq 0 ] || [ "$lost" = yes ] || verb=restart
  lost=no
  on_workers all bash "$remote/launch/worker.sh" "$verb" "$run_id" "$@" || return
  follow || code=$?
  if [ -n "$told_to_stop" ]; then return "$code"; fi
  case "$code" in
    0 | 2 | "$PREEMPTED") return "$code" ;;
  esac
  # A worker that was taken away makes the others fail.
  if [ "$(tpu_state READY)" != READY ]; then
    lost=yes
    return "$PREEMPTED"
  fi
  show_failure
  return "$code"
}

# show_failure: prints the end of one log: of the worker that said first why it ends. The others
# ended because it did.
show_failure() {
  local first
  gcloud_tpu tpu-vm ssh "$name" --worker all --command "bash $remote/launch/worker.sh failed"
  first="$(ask "" "${words[@]}" </dev/null | grep '^[01] ' | sort -k1,1nr -k2,2nr | head -n 1)"
  [ -z "$first" ] || on_workers all bash "$remote/launch/worker.sh" failure "${first##* }" || true
}

# finish: stops the workers if the launcher was told to stop, and deletes the TPU.
finish() {
  if [ -n "$told_to_stop" ] && [ "$copied" = yes ]; then
    say "stopping the run on $name"
    on_workers all bash "$remote/launch/worker.sh" stop || true
  fi
  if [ "$(flag --keep)" = yes ]; then
    [ "$dry_run" = yes ] || say "$name is kept, and costs money until it is deleted"
  else
    delete
  fi
}

# warn_of_lost_results: where nothing of the command names a bucket.
warn_of_lost_results() {
  local word
  [ "$(flag --keep)" != yes ] || return 0
  for word in "${arguments[@]}"; do
    case "$word" in *://*) return 0 ;; esac
    if [ -f "$root/$word" ] && grep -q '^workdir: *.*://' "$root/$word"; then return 0; fi
  done
  say "warning: the work directory is on the disk of $name, which is deleted at the end;" \
    "use --workdir gs://… or --keep"
}

run_target() {
  local code started accelerator runtime
  need_flags --name --zone --accelerator-type
  check_restarts
  name="$(flag --name)"
  accelerator="$(flag --accelerator-type)"
  runtime="$(flag --runtime-version)"
  [ -n "$runtime" ] || runtime="$(runtime_of "$accelerator")" || exit $?
  need_number --timeout "$(flag --timeout 86400)" 1
  poll_secs="${MLPMEM_POLL_SECS:-30}"
  need_number MLPMEM_POLL_SECS "$poll_secs" 1
  need_program gcloud "install the Google Cloud CLI"
  need_checkout
  project_arguments "$@"
  (cd -- "$root" && check_command "${arguments[@]}") || exit $?
  warn_of_lost_results
  exec 3>&1
  copied=no told_to_stop="" lost=no
  trap 'told_to_stop=INT' INT
  trap 'told_to_stop=TERM' TERM
  while :; do
    started=$SECONDS code=0
    attempt "${arguments[@]}" || code=$?
    [ -z "$told_to_stop" ] || break
    may_restart "$code" $((SECONDS - started)) || break
  done
  finish
  return "$code"
}
