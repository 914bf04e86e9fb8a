#!/usr/bin/env bash
# Copy a data set to this node's own disk, once: stage_data.sh SOURCE COPY. launch/job.sh calls it
# on every node of a job. SOURCE is a folder or a tar file. A copy appears under its name when it is
# whole; several jobs on one node wait for the one that makes it.
set -euo pipefail
if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
  exec sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
fi
source="$1" copy="$2"

fail() {
  echo "error: $(hostname): $*" >&2
  exit 2
}

[[ -e "$source" ]] || fail "TPP_STAGE_DATA: there is no $source on this node"
mkdir -p "$(dirname "$copy")" 2>/dev/null ||
  fail "TPP_LOCAL_DISK: $(dirname "$copy") cannot be made; name a disk that can be written to"
exec 9>"$copy.lock"
flock 9

# A source that has changed is copied anew.
stamp="$source $(stat -L -c '%Y %s' "$source")"
if [[ -d "$copy" && "$(cat "$copy.from" 2>/dev/null)" == "$stamp" ]]; then
  echo "$(hostname): $copy is there already"
  exit
fi
rm -rf "$copy" "$copy.partial" "$copy.from"
mkdir "$copy.partial"
started=$SECONDS
if [[ -d "$source" ]]; then
  cp -a "$source/." "$copy.partial/" || fail "$source: not copied to $copy; is the disk full?"
else
  tar -xf "$source" -C "$copy.partial" || fail "$source: not unpacked into $copy; is the disk full?"
  # An archive of one folder: what is in it is the data set.
  inside=("$copy.partial"/*)
  if ((${#inside[@]} == 1)) && [[ -d "${inside[0]}" && ! -d "$copy.partial/train" ]]; then
    rm -rf "$copy.whole"
    mv "${inside[0]}" "$copy.whole"
    rm -rf "$copy.partial" # and what is hidden beside that folder
    mv "$copy.whole" "$copy.partial"
  fi
fi
mv "$copy.partial" "$copy"
echo "$stamp" >"$copy.from"
echo "$(hostname): copied $source to $copy in $((SECONDS - started)) s"
