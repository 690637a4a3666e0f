#!/usr/bin/env bash
# Writes the files that git tracks, as they are now, into a compressed archive.
#
#   bash launch/pack.sh build/mlpmem.tar.gz
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
archive="${1:?usage: pack.sh FILE}"
mkdir -p "$(dirname -- "$archive")"

# tracked_files: prints those that exist, NUL-separated (a removed file may still be tracked).
tracked_files() {
  local file
  git -C "$root" ls-files -z | while IFS= read -r -d '' file; do
    if [ -e "$root/$file" ] || [ -L "$root/$file" ]; then printf '%s\0' "$file"; fi
  done
}

tracked_files | COPYFILE_DISABLE=1 tar -C "$root" --null -T - -czf "$archive"
