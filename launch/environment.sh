# shellcheck shell=bash
# Sourced by run.sh, test.sh and .ci/run: keeps a virtual environment with what is required.
#
#   MLPMEM_VENV     its directory; .venv in the project by default
#   MLPMEM_PYTHON   the interpreter to make it with; otherwise the first of python3.12,
#                   python3.11, python3 that is 3.11 or newer
#
# A copy of each requirements file is kept in the environment, in `installed`, once it is
# installed, so a second start compares files and starts no Python. That folder also says that the
# launcher made the environment: no other is cleared or installed into.

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${MLPMEM_VENV:-$root/.venv}"
case "$venv" in
  /*) ;;
  *) venv="$PWD/$venv" ;;
esac

say() { printf 'launch: %s\n' "$*" >&2; }

complain() { printf 'error: %s\n' "$*" >&2; }

fail() {
  complain "$@"
  exit 2
}

# check_python COMMAND: succeeds where it runs, is new enough and can make environments.
check_python() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# find_python: prints the interpreter to use.
find_python() {
  local candidate without_ensurepip=""
  for candidate in ${MLPMEM_PYTHON:+"$MLPMEM_PYTHON"} python3.12 python3.11 python3; do
    if check_python "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      without_ensurepip="${without_ensurepip:-$candidate}"
    elif [ "$candidate" = "${MLPMEM_PYTHON:-}" ]; then
      fail "MLPMEM_PYTHON=$MLPMEM_PYTHON does not run, or is older than Python 3.11"
    fi
    [ "$candidate" != "${MLPMEM_PYTHON:-}" ] || break
  done
  if [ -n "$without_ensurepip" ]; then
    fail "$without_ensurepip cannot make virtual environments (no ensurepip): install it" \
      "(on Debian and Ubuntu: apt install python3-venv) or name another with MLPMEM_PYTHON"
  fi
  fail "no Python of 3.11 or newer found (looked for python3.12, python3.11, python3):" \
    "install one, or name it with MLPMEM_PYTHON"
}

# venv_fits: succeeds where the environment exists and is of the version asked for.
venv_fits() {
  [ -x "$venv/bin/python" ] || return 1
  [ -n "${MLPMEM_PYTHON:-}" ] || return 0
  local wanted
  wanted="$("$MLPMEM_PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" ||
    fail "MLPMEM_PYTHON=$MLPMEM_PYTHON does not run"
  grep -Eq "^version(_info)? = ${wanted//./\\.}(\.|$)" "$venv/pyvenv.cfg" 2>/dev/null
}

# check_own_venv: refuses a directory that is there and was not made by make_venv.
check_own_venv() {
  if [ -d "$venv/installed" ] || [ ! -e "$venv" ]; then return; fi
  if [ ! -d "$venv" ]; then fail "$venv exists and is no directory: set MLPMEM_VENV"; fi
  if [ -z "$(ls -A "$venv")" ]; then return; fi
  if [ ! -e "$venv/pyvenv.cfg" ]; then
    fail "$venv exists and is no virtual environment: move it away, or set MLPMEM_VENV"
  fi
  fail "$venv was not made by the launcher, which would change it: set MLPMEM_VENV to a new" \
    "directory, or start $venv/bin/python -m mlpmem_jax yourself"
}

# make_venv: makes the environment, in place of one that was made here before.
make_venv() {
  local python
  python="$(find_python)" || exit $?
  say "making $venv with $python"
  # By hand and not with --clear: after an interrupt it must still be known to be ours.
  mkdir -p "$venv/installed"
  find -H "$venv" -mindepth 1 -maxdepth 1 ! -name installed -exec rm -rf {} +
  rm -f "$venv"/installed/*
  "$python" -m venv "$venv" >&2 || fail "$python could not make $venv"
}

# ensure_environment FILE...: installs the requirements files (of the project's root) that
# are not installed yet or have changed.
ensure_environment() {
  local file stale=()
  check_own_venv
  venv_fits || make_venv
  for file in "$@"; do
    cmp -s "$root/$file" "$venv/installed/$file" || stale+=("$file")
  done
  [ "${#stale[@]}" -gt 0 ] || return 0
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 ||
    "$venv/bin/python" -m ensurepip --upgrade >/dev/null 2>&1 || make_venv
  # All files at once, so that what was installed before keeps its say in the versions.
  local arguments=()
  for file in "$@"; do
    arguments+=(-r "$root/$file")
  done
  say "installing ${stale[*]} into $venv (once; a few minutes)"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${arguments[@]}" >&2 ||
    fail "pip could not install ${stale[*]}; the next start tries again"
  mkdir -p "$venv/installed"
  for file in "$@"; do
    cp "$root/$file" "$venv/installed/$file.new"
    mv "$venv/installed/$file.new" "$venv/installed/$file"
  done
}
