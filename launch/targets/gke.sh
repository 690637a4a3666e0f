# shellcheck shell=bash disable=SC2034,SC2154
# Sourced by run.sh: a workload on a GKE cluster, through xpk.
#
# Builds and pushes the image, submits the workload and waits for its end. Restarts after a
# preemption are the cluster's (a JobSet's), so they need nobody who watches.

switches="--dry-run --no-build --no-wait --spot"
values="--name --cluster --zone --project --image --priority"
values+=" --tpu-type --device-type --num-slices --num-nodes"

target_usage() {
  cat <<'USAGE'
flags of gke:
  --name NAME           of the workload
  --cluster NAME        made before, for example with `xpk cluster create`
  --image IMAGE         name in a registry that the cluster reads, with a tag
  --tpu-type TYPE       for example v5p-128, v5litepod-256; or
  --device-type TYPE    for GPUs, for example h200-141gb-8
  --num-slices N        TPU slices (mesh.dcn_data); 1
  --num-nodes N         GPU machines; 1
  --zone Z, --project P otherwise xpk's own
  --priority P          very-low, low, medium, high, very-high; medium
  --spot                spot capacity, where the cluster provisions by itself
  --no-build            the image is in the registry already
  --no-wait             return once the workload is submitted
  --dry-run             print the commands, run nothing
USAGE
}

# container_command WORD…: the command as Kubernetes must be given it. It is put on one line of
# YAML, and Kubernetes reads $(NAME) and $$ in it, so every $ is doubled.
container_command() {
  local line
  line="$(quoted exec env MLPMEM_RUN_ID="$run_id" python -P -m mlpmem_jax "$@")"
  printf '%s\n' "${line//\$/\$\$}"
}

# xpk_at VERB ARGUMENT…: the words of an xpk command on the cluster, in `words`.
xpk_at() {
  words=(xpk workload "$@" --cluster "$(flag --cluster)")
  [ -z "$(flag --zone)" ] || words+=(--zone "$(flag --zone)")
  [ -z "$(flag --project)" ] || words+=(--project "$(flag --project)")
}

run_target() {
  local name image file device=() code=0
  need_flags --name --cluster --image
  check_restarts
  name="$(flag --name)" image="$(flag --image)"
  if [ -n "$(flag --tpu-type)" ] && [ -z "$(flag --device-type)" ]; then
    file=Dockerfile.tpu
    need_number --num-slices "$(flag --num-slices 1)" 1
    device=(--tpu-type "$(flag --tpu-type)" --num-slices "$(flag --num-slices 1)")
  elif [ -z "$(flag --tpu-type)" ] && [ -n "$(flag --device-type)" ]; then
    file=Dockerfile.gpu
    need_number --num-nodes "$(flag --num-nodes 1)" 1
    device=(--device-type "$(flag --device-type)" --num-nodes "$(flag --num-nodes 1)")
  else
    fail "--target gke needs one of --tpu-type and --device-type"
  fi
  [ "$(flag --spot)" != yes ] || device+=(--spot)
  need_program xpk "pip install xpk"
  need_checkout
  project_arguments "$@"
  (cd -- "$root" && check_command "${arguments[@]}") || exit $?
  if [ "$(flag --no-build)" != yes ]; then
    need_program docker "build the image elsewhere and use --no-build"
    step docker build --file "$root/launch/$file" --tag "$image" "$root"
    step docker push "$image"
  fi
  xpk_at create --workload "$name" "${device[@]}" --docker-image "$image" \
    --priority "$(flag --priority medium)" \
    --max-restarts "$restarts" --restart-on-exit-codes "$PREEMPTED" \
    --termination-grace-period-seconds 300 \
    --command "$(container_command "${arguments[@]}")"
  step "${words[@]}"
  [ "$(flag --no-wait)" != yes ] || return 0
  say "waiting for workload $name; Ctrl-C leaves it running"
  xpk_at list --wait-for-job-completion "$name"
  step "${words[@]}" || code=$?
  return "$code"
}
