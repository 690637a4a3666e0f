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
  --sbatch "FLAGS"      further flags for sbatch, for example "--qos=long --exclusive"
  --wait                wait for the job and exit as it does
  --dry-run             print the script and the commands, write and run nothing
USAGE
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
    [ -z "$(flag "--$extra")" ] || printf '#SBATCH --%s=%s\n' "$extra" "$(flag "--$extra")"
  done
  # shellcheck disable=SC2046  # words are meant
  for extra in $(flag --sbatch); do printf '#SBATCH %s\n' "$extra"; done
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
  local name folder script
  need_flags --nodes
  check_restarts
  need_number --nodes "$(flag --nodes)"
  need_number --gpus-per-node "$(flag --gpus-per-node 8)"
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
  # Here and not in the job: nodes often have no network.
  step bash "$root/launch/install.sh" requirements.txt requirements-gpu.txt \
    requirements-remote.txt
  if [ "$dry_run" = yes ]; then
    printf 'mkdir -p %s\ncat >%s <<'\''END'\''\n' "$(quoted "$folder")" "$(quoted "$script")"
    job_script "$@"
    printf 'END\n'
  else
    mkdir -p "$folder"
    job_script "$@" >"$script"
    say "wrote $script; logs: $folder/$name-JOB.log and $folder/$name-JOB/process-*.log"
  fi
  if [ "$(flag --wait)" = yes ]; then
    step sbatch --wait "$script"
  else
    step sbatch "$script"
  fi
}
