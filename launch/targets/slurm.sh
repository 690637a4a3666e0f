# shellcheck shell=bash disable=SC2034,SC2154
# Sourced by run.sh: GPU nodes of a SLURM cluster, through sbatch. The project and the
# environment must lie on a file system that the nodes share.
#
# One process a GPU: that is what jax.distributed finds by itself under SLURM (each process
# takes the GPU of its SLURM_LOCALID), and a process then feeds and waits for one GPU only. One
# process a node would be given GPU 0 alone. All tasks must see all GPUs of their node, so
# --gres and not --gpus-per-task, which hides them and breaks NCCL between them.

switches="--dry-run --wait"
values="--name --nodes --gpus-per-node --partition --account --time --sbatch"

target_usage() {
  cat <<'USAGE'
flags of slurm:
  --nodes N             number of nodes
  --gpus-per-node G     GPUs on each, and processes; 8
  --name NAME           of the job; mlpmem
  --partition P, --account A, --time T    as sbatch's
  --sbatch "FLAGS"      further flags for sbatch, quoted as in a shell, for example
                        '--qos long --comment="two words"'
  --wait                wait for the job and exit as it does
  --dry-run             print the script and the commands, write and run nothing
USAGE
}

# directive WORD…: prints the words as one #SBATCH line, as sbatch reads it.
directive() {
  local word line="#SBATCH" name
  for word in "$@"; do
    name=""
    case "$word" in
      --*=*) name="${word%%=*}=" word="${word#*=}" ;;
    esac
    case "$word" in
      *[!A-Za-z0-9_@%+=:,./-]*) word="${word//\\/\\\\}" word="\"${word//\"/\\\"}\"" ;;
      '') [ -n "$name" ] || word='""' ;;
    esac
    line+=" $name$word"
  done
  printf '%s\n' "$line"
}

# further_directives FLAGS: prints a line for each flag, with its value if that is a word of its
# own. The words are those of a shell, but nothing in them is replaced.
further_directives() {
  local word words=() flag_and_value=()
  [ -n "${1//[[:space:]]/}" ] || return 0
  printf '%s\n' "$1" | xargs printf '%s\n' >/dev/null 2>&1 ||
    fail "--sbatch=$1: quotes are not closed"
  while IFS= read -r -d '' word; do words+=("$word"); done \
    < <(printf '%s\n' "$1" | xargs printf '%s\0')
  for word in "${words[@]}"; do
    case "$word" in
      -[!0-9]*)
        [ "${#flag_and_value[@]}" -eq 0 ] || directive "${flag_and_value[@]}"
        flag_and_value=("$word")
        ;;
      *)
        [ "${#flag_and_value[@]}" -eq 1 ] || fail "--sbatch=$1: $word belongs to no flag"
        flag_and_value+=("$word")
        ;;
    esac
  done
  directive "${flag_and_value[@]}"
}

# readable_config PATH: prints the path; refuses one that cannot be read.
readable_config() {
  { [ -r "$1" ] && [ ! -d "$1" ]; } || fail "--config $1: cannot be read"
  printf '%s\n' "$1"
}

# frozen_config PATH: prints where the job reads a configuration: a copy, so that it runs what was
# submitted, however long it waits and however often it is queued again.
frozen_config() {
  if [ "$dry_run" = yes ]; then
    quoted cp -- "$1" "$frozen" >&3
  else
    cat -- "$1" >"$frozen.new"
    if [ -e "$frozen" ] && ! cmp -s "$frozen.new" "$frozen"; then
      rm -f "$frozen.new"
      fail "MLPMEM_RUN_ID=$run_id: was submitted with another configuration ($frozen)"
    fi
    mv "$frozen.new" "$frozen"
  fi
  printf '%s\n' "$frozen"
}

# job_script COMMAND…: prints the batch script.
job_script() {
  local gpus extra
  gpus="$(flag --gpus-per-node 8)"
  cat <<SCRIPT
#!/usr/bin/env bash
#SBATCH --job-name=$name
#SBATCH --nodes=$(flag --nodes)
#SBATCH --ntasks-per-node=$gpus
#SBATCH --gres=gpu:$gpus
#SBATCH --output=$folder/$name-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@180
SCRIPT
  for extra in partition account time; do
    [ -z "$(flag "--$extra")" ] || directive "--$extra=$(flag "--$extra")"
  done
  [ -z "$further" ] || printf '%s\n' "$further"
  cat <<SCRIPT
set -euo pipefail
cd $(quoted "$PWD")
export PYTHONPATH=$(quoted "$root")
logs=$(quoted "$folder")/$name-\$SLURM_JOB_ID
# With --rebuild, a job that is queued again keeps what it has made itself.
export MLPMEM_RUN_ID=$(quoted "$run_id")-\$SLURM_JOB_ID
mkdir -p "\$logs"
code=0
# A task that ends alone takes the others down within --wait seconds; --kill-on-bad-exit would
# not leave the rest the time to save when one is preempted.
srun --kill-on-bad-exit=0 --wait=50 bash $(quoted "$root/launch/task.sh") "\$logs" \\
  $(quoted "$venv/bin/python" -P -m mlpmem_jax "$@") || code=\$?
if [ "\$code" -eq $PREEMPTED ] && [ "\${SLURM_RESTART_COUNT:-0}" -lt $restarts ]; then
  echo "launch: preempted; the job is queued again (\${SLURM_RESTART_COUNT:-0} restarts so far)"
  scontrol requeue "\$SLURM_JOB_ID"
elif [ "\$code" -ne 0 ]; then
  bash $(quoted "$root/launch/task.sh") --failure "\$logs" || true
fi
exit "\$code"
SCRIPT
}

run_target() {
  local name folder script further extra frozen
  need_flags --nodes
  check_restarts
  need_number --nodes "$(flag --nodes)" 1
  need_number --gpus-per-node "$(flag --gpus-per-node 8)" 1
  for extra in partition account time; do
    case "$(flag "--$extra")" in
      *[[:cntrl:]]*) fail "--$extra: must be one line" ;;
    esac
  done
  further="$(further_directives "$(flag --sbatch)")" || exit $?
  name="$(flag --name mlpmem)"
  case "$name" in
    *[!A-Za-z0-9_.-]*) fail "--name=$name: letters, digits, dots, dashes and underscores only" ;;
  esac
  need_program sbatch "run this where jobs are submitted"
  folder="$PWD/slurm"
  case "$folder" in
    *[[:space:]%]*) fail "$PWD: sbatch cannot write logs to a path with spaces or %" ;;
  esac
  script="$folder/$name.sbatch"
  if [ -e "$script" ] && ! grep -qF launch/task.sh "$script"; then
    fail "$script: is not the launcher's, which would replace it; use another --name"
  fi
  frozen="$folder/$name-${run_id//[!A-Za-z0-9_.-]/_}.yaml"
  with_config readable_config "$@"
  exec 3>&1
  step mkdir -p "$folder"
  with_config frozen_config "$@"
  # Here and not in the job: nodes often have no network.
  step bash "$root/launch/install.sh" requirements.txt requirements-gpu.txt \
    requirements-remote.txt
  check_command --shares-files "${arguments[@]}"
  if [ "$dry_run" = yes ]; then
    printf 'cat >%s <<'\''END'\''\n' "$(quoted "$script")"
    job_script "${arguments[@]}"
    printf 'END\n'
  else
    job_script "${arguments[@]}" >"$script"
    say "wrote $script; logs: $folder/$name-JOB.log and $folder/$name-JOB/process-*.log"
  fi
  if [ "$(flag --wait)" = yes ]; then
    step sbatch --wait "$script"
  else
    step sbatch "$script"
  fi
}
