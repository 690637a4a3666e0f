# shellcheck shell=bash disable=SC2034,SC2154
# Sourced by run.sh: this machine, one process or several joined by jax.distributed.

switches="--dry-run"
values="--processes --devices-per-process --logs --with"

target_usage() {
  cat <<'USAGE'
flags of local:
  --processes N             N processes on this machine over Gloo, on CPU; the first has the
                            terminal, the others write WORKDIR/logs/process-*.log
  --devices-per-process D   D simulated CPU devices in each process
  --logs DIR                another directory for these logs
  --with NAME               also installs requirements-NAME.txt (gpu, tpu, serve, …)
  --dry-run                 print the commands, run nothing (after COMMAND it is the command's
                            own, and prints its plan)
USAGE
}

# print_processes LOGS DEVICES COMMAND…: prints, as comments, what mlpmem_jax.launching starts:
# the port is one that is free then, and it also stops all of them when one fails.
print_processes() {
  local logs="$1" devices="$2" index log
  local variables=(JAX_PLATFORMS="${JAX_PLATFORMS-cpu}" MLPMEM_COORDINATOR=localhost:PORT
    MLPMEM_NUM_PROCESSES="$processes")
  shift 2
  [ -z "$devices" ] || variables+=(MLPMEM_DEVICES_PER_PROCESS="$devices")
  printf '# which starts\n'
  for ((index = 0; index < processes; index++)); do
    log=""
    [ "$index" -eq 0 ] || log=" </dev/null >>$(quoted "$logs/process-$index.log") 2>&1"
    printf '# %s%s &\n' \
      "$(quoted env "${variables[@]}" MLPMEM_PROCESS_INDEX="$index" "$@")" "$log"
  done
}

run_target() {
  local processes devices logs with requirements=(requirements.txt) variables
  processes="$(flag --processes 1)"
  devices="$(flag --devices-per-process)"
  logs="$(flag --logs)"
  with="$(flag --with)"
  need_number --processes "$processes" 1
  [ -z "$devices" ] || need_number --devices-per-process "$devices" 1
  check_restarts
  if [ -n "$with" ]; then
    [ -e "$root/requirements-$with.txt" ] ||
      fail "--with=$with: there is no requirements-$with.txt"
    requirements+=("requirements-$with.txt")
  fi
  # Huge pages for what XLA on CPU allocates anew each step (see mlpmem_jax/parallel/host.py).
  variables=(GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}" MLPMEM_RUN_ID="$run_id"
    PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}")
  # -P: a folder of the caller that happens to be named like the package is not imported.
  local python=("$venv/bin/python" -P -m) launching=()
  if [ "$processes" -gt 1 ]; then
    launching=("${python[@]}" mlpmem_jax.launching --processes "$processes")
    [ -z "$devices" ] || launching+=(--devices-per-process "$devices")
    [ -z "$logs" ] || launching+=(--logs "$logs")
  else
    launching=("${python[@]}" mlpmem_jax)
    [ -z "$devices" ] || variables+=(MLPMEM_DEVICES_PER_PROCESS="$devices")
  fi
  if [ "$dry_run" = yes ]; then
    quoted bash "$root/launch/install.sh" "${requirements[@]}"
    quoted env "${variables[@]}" "${launching[@]}" "$@"
    [ "$processes" -eq 1 ] ||
      print_processes "${logs:-WORKDIR/logs}" "$devices" "${python[@]}" mlpmem_jax "$@"
    return
  fi
  keep_config "$@"
  ensure_environment "${requirements[@]}"
  export "${variables[@]}"
  with_restarts "${launching[@]}" "${arguments[@]}"
}
