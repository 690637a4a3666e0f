# shellcheck shell=bash disable=SC2034,SC2154
# Sourced by run.sh: flags of a target, and steps that --dry-run prints instead of running.
#
# A target names its flags in $switches and $values (words with dashes), gives target_usage and
# run_target, and reads flags with `flag --name`.

dry_run=no
flag_names=()
flag_values=()

# flag_kind NAME: prints switch, value or nothing.
flag_kind() {
  case " $switches " in *" $1 "*) printf 'switch\n' ;; esac
  case " --restarts $values " in *" $1 "*) printf 'value\n' ;; esac
}

# set_flag NAME VALUE: keeps it.
set_flag() {
  case "$1" in
    --dry-run) dry_run=yes ;;
    --restarts) restarts="$2" ;;
  esac
  flag_names+=("$1")
  flag_values+=("$2")
}

# flag NAME [DEFAULT]: prints the last value that was given.
flag() {
  local found="${2:-}" i
  for ((i = 0; i < ${#flag_names[@]}; i++)); do
    [ "${flag_names[i]}" != "$1" ] || found="${flag_values[i]}"
  done
  printf '%s' "$found"
}

# need_flags NAME…: refuses to go on without them, naming all that are missing.
need_flags() {
  local name missing=()
  for name in "$@"; do
    [ -n "$(flag "$name")" ] || missing+=("$name")
  done
  [ "${#missing[@]}" -eq 0 ] ||
    fail "--target $target needs ${missing[*]} (\`launch/run.sh --target $target --help\`)"
}

# quoted WORD…: prints words as a bash command line that gives exactly these words, on one line.
quoted() {
  local word rest out line="" LC_ALL=C
  for word in "$@"; do
    case "$word" in
      *[[:cntrl:]]*) printf -v out '%q' "$word" ;; # $'…', where a line break would do harm
      '' | *[!A-Za-z0-9_@%+=:,./-]*)
        out="" rest="$word"
        while [[ "$rest" == *\'* ]]; do
          out+="${rest%%\'*}'\\''"
          rest="${rest#*\'}"
        done
        out="'$out$rest'"
        ;;
      *) out="$word" ;;
    esac
    line+="${line:+ }$out"
  done
  printf '%s\n' "$line"
}

# step COMMAND…: runs a command, or prints it with --dry-run.
step() {
  if [ "$dry_run" = yes ]; then
    quoted "$@"
  else
    "$@" 3>&- # see ask
  fi
}

# ask ANSWER COMMAND…: prints what a command prints, nothing where it fails. With --dry-run the
# command goes to file descriptor 3 (standard output is being caught) and ANSWER is printed.
ask() {
  local answer="$1"
  shift
  if [ "$dry_run" = yes ]; then
    quoted "$@" >&3
    printf '%s\n' "$answer"
  else
    "$@" 2>/dev/null 3>&- || true
  fi
}

# need_program NAME HINT: refuses to go on without a program; a dry run needs none.
need_program() {
  [ "$dry_run" = yes ] || command -v "$1" >/dev/null 2>&1 ||
    fail "$1: not found; $2"
}

# check_command WORD…: refuses, before anything is built, sent or paid for, a command that cannot
# succeed. With --shares-files as first word also files that are missing here. It needs the
# environment of this machine: nothing is installed for it.
check_command() {
  [ "$dry_run" = no ] || return 0
  if [ ! -x "$venv/bin/python" ] || [ ! -e "$venv/installed/requirements.txt" ]; then
    say "the command is not checked before it is sent: there is no environment here" \
      "(bash launch/install.sh makes one)"
    return 0
  fi
  JAX_PLATFORMS=cpu PYTHONPATH="$root" "$venv/bin/python" -P -m mlpmem_jax.launching --check "$@" ||
    exit $?
}

# need_checkout: refuses to go on where git does not know which files belong to the project.
need_checkout() {
  git -C "$root" rev-parse --is-inside-work-tree >/dev/null 2>&1 ||
    fail "$root is no git checkout, so it is not known which files to copy"
}

# project_arguments WORD…: sets `arguments` to the words, paths inside the project relative to
# it, because they will be used where only the project is.
project_arguments() {
  local i
  with_config project_file "$@"
  for ((i = 0; i < ${#arguments[@]}; i++)); do
    arguments[i]="${arguments[i]#"$root"/}"
  done
}

# project_file PATH: prints a tracked file's path in the project; refuses any other file.
project_file() {
  local directory path
  ! is_read_once "$1" || fail "--config $1: a pipe cannot be copied; write it to a file" \
    "that git tracks"
  directory="$(cd -- "$(dirname -- "$1")" 2>/dev/null && pwd -P)" || fail "--config $1: no such file"
  path="$directory/$(basename -- "$1")"
  path="${path#"$(cd -- "$root" && pwd -P)"/}"
  git -C "$root" ls-files --error-unmatch -- "$path" >/dev/null 2>&1 ||
    fail "--config $1: only files that git tracks are copied; \`git add\` it first"
  printf '%s\n' "$path"
}

# is_read_once PATH: succeeds for what cannot be read again, or not by another process: <(…), a
# pipe, standard input.
is_read_once() {
  case "$1" in
    /dev/stdin | /dev/fd/* | /proc/*/fd/*) return 0 ;;
  esac
  [ -e "$1" ] && [ ! -f "$1" ] && [ ! -d "$1" ]
}

# with_config COMMAND WORD…: sets `arguments` to the words, each path of --config replaced by what
# COMMAND PATH prints.
with_config() {
  local replace="$1" word wants_file=no
  shift
  arguments=()
  for word in "$@"; do
    if [ "$wants_file" = yes ]; then
      word="$("$replace" "$word")" || exit $?
      wants_file=no
    else
      case "$word" in
        --config) wants_file=yes ;;
        --config=*)
          word="$("$replace" "${word#--config=}")" || exit $?
          word="--config=$word"
          ;;
        *=/dev/stdin | *=/dev/fd/* | *=/proc/*/fd/*)
          fail "$word: cannot be read again after a restart; write it to a file" ;;
      esac
    fi
    arguments+=("$word")
  done
}

# keep_config WORD…: sets `arguments` to the words; a configuration that can be read only once is
# copied, for restarts and for all processes.
keep_config() {
  kept="${TMPDIR:-/tmp}/mlpmem-config-$$-$RANDOM"
  trap 'rm -f "$kept/config.yaml"; rmdir "$kept" 2>/dev/null || true' EXIT
  with_config kept_config "$@"
}

# kept_config PATH: prints the path itself, or of its copy.
kept_config() {
  if ! is_read_once "$1"; then
    printf '%s\n' "$1"
  elif mkdir -m 700 "$kept" && cat -- "$1" >"$kept/config.yaml"; then
    printf '%s\n' "$kept/config.yaml"
  else
    fail "--config $1: cannot be copied to $kept"
  fi
}
