# shellcheck shell=bash disable=SC2034,SC2154
# Sourced by run.sh: this machine, one process or several joined by jax.distributed.

switches=""
values="--processes --devices-per-process --logs --with"

target_usage() {
  cat <<'USAGE'
flags of local:
  --processes N             N processes on this machine over Gloo, on CPU; the first has the
                            terminal, the others write WORKDIR/logs/process-*.log
  --devices-per-process D   D simulated CPU devices in each process
  --logs DIR                another directory for these logs
  --with gpu|tpu            also installs requirements-gpu.txt or requirements-tpu.txt
USAGE
}

run_target() {
  local processes devices logs with requirements=(requirements.txt) module=mlpmem_jax
  processes="$(flag --processes 1)"
  devices="$(flag --devices-per-process)"
  logs="$(flag --logs)"
  with="$(flag --with)"
  need_number --processes "$processes"
  [ "$processes" -gt 0 ] || fail "--processes=0: must be at least 1"
  if [ -n "$devices" ]; then
    need_number --devices-per-process "$devices"
    [ "$devices" -gt 0 ] || fail "--devices-per-process=0: must be at least 1"
  fi
  check_restarts
  if [ -n "$with" ]; then
    [ -e "$root/requirements-$with.txt" ] ||
      fail "--with=$with: there is no requirements-$with.txt"
    requirements+=("requirements-$with.txt")
  fi
  if [ "$processes" -gt 1 ]; then
    set -- ${logs:+--logs "$logs"} "$@"
    set -- --processes "$processes" ${devices:+--devices-per-process "$devices"} "$@"
    module=mlpmem_jax.launching
  elif [ -n "$devices" ]; then
    export MLPMEM_DEVICES_PER_PROCESS="$devices"
  fi
  ensure_environment "${requirements[@]}"
  # Huge pages for what XLA on CPU allocates anew each step (see mlpmem_jax/parallel/host.py).
  export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
  export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
  # -P: a folder of the caller that happens to be named like the package is not imported.
  with_restarts "$venv/bin/python" -P -m "$module" "$@"
}
