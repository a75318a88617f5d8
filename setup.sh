#!/usr/bin/env bash
# Makes .venv beside this file once, then runs in it whatever command follows.
#
#   ./setup.sh                          install what the lesson needs (requirements.txt)
#   ./setup.sh --all                    and what real_world/ needs
#   ./setup.sh python lesson_code.py    the same, then run that command and return its exit status
#
# PYTHON=/path/to/python3.12 ./setup.sh chooses the Python that .venv is made from.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
venv=$here/.venv
lock=$here/.venv.lock # the process at work; one that died left .venv in an unknown state
cpu_index=https://download.pytorch.org/whl/cpu

say() { printf 'setup.sh: %s\n' "$1" >&2; }

owned= # the lock, once it is ours
fail() {
  say "$1"
  [ -z "$owned" ] || rm -f -- "$owned"
  exit "${2:-1}"
}

# Where .venv/ keeps a copy of a requirements file once all of it is installed.
stamp() { printf '%s/.installed/%s' "$venv" "${1//\//-}"; }

up_to_date() {
  [ ! -e "$lock" ] && [ -x "$venv/bin/python" ] &&
    [ "$(cat "$venv/.installed/path" 2>/dev/null)" = "$here" ] || return 1 # its scripts hold the path
  local file
  for file in "${files[@]}"; do
    cmp -s "$here/$file" "$(stamp "$file")" || return 1
  done
}

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.{14,13,12,11,10} python; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' 2>/dev/null; then
      printf '%s' "$candidate"
      return
    fi
  done
  fail "needs Python 3.10 to 3.14, but finds $(python3 --version 2>&1 || true); install one or name it: PYTHON=python3.12 ./setup.sh"
}

make_venv() {
  local python
  python=$(find_python)
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python has no venv module; on Debian and Ubuntu: sudo apt install $(basename "$python")-venv"
  say "making $venv with $("$python" --version)"
  rm -rf -- "$venv"
  "$python" -m venv "$venv" || fail "could not make $venv; see above"
}

# pip, its output on standard error, and one sentence where it fails.
pip_install() {
  local log=$venv/pip.log
  rm -f -- "$log"
  "$venv/bin/python" -m pip install --disable-pip-version-check --log "$log" "$@" >&2 && return
  if grep -q 'No space left' "$log"; then
    owned= # whatever pip was writing is not whole: the lock stays, and the next run starts again
    fail "the disk is full: free some space and run this again"
  fi
  if grep -qE 'Failed to establish|Name or service|NameResolution|timed out|ProxyError' "$log"; then
    fail "the package index cannot be reached: check the network and run this again"
  fi
  fail "pip could not install the requirements: see its message above"
}

install() {
  local free torch file
  if [ "${#files[@]}" -gt 1 ] && ! "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    fail "the pages of real_world/ need Python 3.11 or newer: delete .venv, then PYTHON=python3.12 ./setup.sh --all"
  fi
  free=$(df -Pk -- "$here" | awk 'NR == 2 { print int($4 / 1024) }')
  if [ ! -e "$venv/.installed/requirements.txt" ] && [ "$free" -lt 2000 ]; then
    fail "needs 2 GB of free disk in $here, which has $free MB"
  fi
  # Without a GPU, the ordinary index's build for Linux would bring gigabytes of CUDA.
  torch=$(grep -E '^torch==' "$here/requirements.txt" || true)
  if [ -n "$torch" ] && [ "$(uname -s)" = Linux ] && ! nvidia-smi -L 2>/dev/null | grep -q GPU; then
    if timeout 10 "$venv/bin/python" -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=5)' \
      "$cpu_index/torch/" 2>/dev/null; then
      pip_install --index-url "$cpu_index" "$torch"
    else
      say "$cpu_index cannot be reached: taking PyTorch from the ordinary index, which may be large"
    fi
  fi
  local arguments=()
  for file in "${files[@]}"; do arguments+=(-r "$here/$file"); done
  pip_install "${arguments[@]}"
  mkdir -p -- "$venv/.installed"
  for file in "${files[@]}"; do cp -- "$here/$file" "$(stamp "$file")"; done
  printf '%s\n' "$here" >"$venv/.installed/path"
}

set_up() {
  local owner
  until (set -o noclobber && echo $$ >"$lock") 2>/dev/null; do
    [ -e "$lock" ] || fail "cannot write in $here"
    owner=$(cat "$lock" 2>/dev/null || true)
    if [ -n "$owner" ] && kill -0 "$owner" 2>/dev/null; then
      say "waiting for process $owner, which is setting this folder up"
      while kill -0 "$owner" 2>/dev/null && [ -e "$lock" ]; do sleep 0.2; done
    else
      say "an earlier set-up was interrupted: starting again"
      rm -rf -- "$venv"
      rm -f -- "$lock"
    fi
  done
  owned=$lock
  if ! [ -x "$venv/bin/python" ] ||
    [ "$(cat "$venv/.installed/path" 2>/dev/null || printf '%s' "$here")" != "$here" ]; then
    make_venv
  fi
  install
  rm -f -- "$lock"
}

files=(requirements.txt)
case ${1-} in
  --all)
    if [ -e "$here/real_world/requirements.txt" ]; then files+=(real_world/requirements.txt); fi
    shift
    ;;
  --help | -h)
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
    exit
    ;;
  -*) fail "there is no option $1: it takes --all, --help or a command to run" 2 ;;
esac

up_to_date || set_up
if [ $# -eq 0 ]; then
  say "ready; './setup.sh python lesson_code.py' runs the lesson"
  exit
fi
export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
unset PYTHONHOME
exec "$@"
