#!/usr/bin/env bash
# Makes .venv beside this file once, then runs the command that follows in it.
#
#   ./setup.sh                          install what the lesson needs (requirements.txt)
#   ./setup.sh --all                    and what real_world/ needs
#   ./setup.sh python lesson_code.py    install what the lesson needs, then run a command in .venv
#
# PYTHON=/path/to/python3.12 ./setup.sh chooses the Python for a new .venv.
# shellcheck disable=SC2128 # dash and zsh read this line, too
[ "${BASH_SOURCE-}" = "$0" ] || { echo "setup.sh: run it as ./setup.sh" >&2 && return 1 2>/dev/null || exit 1; }
set -euo pipefail
unset CDPATH PYTHONHOME PYTHONPATH

here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
venv=$here/.venv
bin=$venv/bin:
PATH=${PATH//"$bin"/} # where .venv is activated: it is not made with its own Python
installed=$venv/.installed # a copy of each requirements file, and of $(identity), once all is installed
cpu_index=https://download.pytorch.org/whl/cpu

say() { printf 'setup.sh: %s\n' "$1" >&2; }
fail() { say "$1" && exit "${2:-1}"; }

# The scripts of .venv contain its path, and its packages belong to one version of Python.
identity() { printf '%s %s' "$here" "$("$venv/bin/python" -ISc 'import sys; print(sys.version_info[:2])' 2>&1 || true)"; }
up_to_date() {
  [ "$(cat "$installed/identity" 2>/dev/null)" = "$(identity)" ] || return 1
  local file
  for file in "${files[@]}"; do
    cmp -s "$here/$file" "$installed/${file//\//-}" || return 1
  done
}

find_python() {
  local python range="3.10 to 3.15" versions="(3, 10) <= sys.version_info < (3, 16)"
  [ "${#files[@]}" -eq 1 ] || range="3.11 to 3.14 for --all" versions="(3, 11) <= sys.version_info < (3, 15)"
  local candidates=(python3 python3.{15,14,13,12,11,10} python)
  [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
  for python in "${candidates[@]}"; do
    if [ "$("$python" -c "import sys; print($versions and sys.prefix != sys.argv[1])" "$venv" 2>/dev/null)" = True ]; then
      printf '%s' "$python"
      return
    fi
  done
  python=${candidates[0]}
  fail "needs Python $range, but finds $("$python" --version 2>&1 || true); install one outside of .venv, or name it: PYTHON=python3.12 ./setup.sh"
}

make_venv() {
  "$1" -c 'import ctypes, ensurepip, venv' 2>/dev/null ||
    fail "$1 has no ctypes or no venv module; on Debian and Ubuntu: sudo apt install $(basename "$1")-venv"
  say "making $venv with $("$1" --version)"
  rm -rf -- "$venv"
  mkdir -p -- "$installed" # first, to tell from now on that this .venv is ours
  "$1" -m venv "$venv" || fail "could not make $venv: see the message above"
}

# Settings of pip that would install somewhere else are ignored; mirrors and certificates are kept.
pip_install() {
  local compile=--no-compile # Python compiles what it imports; all of it would take a minute
  [ -z "${PYTHONDONTWRITEBYTECODE:-}" ] || compile=--compile
  env -u PIP_TARGET -u PIP_PREFIX -u PIP_ROOT -u PIP_DRY_RUN -u PIP_PYTHON -u PIP_NO_DEPS PIP_USER=0 \
    "$venv/bin/python" -m pip install --disable-pip-version-check "$compile" "$@" >&2 ||
    fail "pip failed: see its message above, check the network and the disk, and run this again"
}

install() {
  local file arguments=() python="$venv/bin/python"
  if [ "${#files[@]}" -gt 1 ] && ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))'; then
    fail "real_world/ needs Python 3.11 to 3.14: delete .venv, then PYTHON=python3.12 ./setup.sh --all"
  fi
  # Without a GPU, PyPI's build for Linux would bring gigabytes of CUDA.
  if grep -q '^torch==' "$here/requirements.txt" && [ "$(uname -s)" = Linux ] &&
    [[ "$(nvidia-smi -L 2>/dev/null || true)" != *"GPU 0"* ]]; then
    if timeout 10 "$python" -c "from urllib.request import urlopen; urlopen('$cpu_index/torch/', timeout=5)" 2>/dev/null; then
      say "downloading PyTorch for the CPU, about 200 MB"
      pip_install --index-url "$cpu_index" -r <(grep '^torch==' "$here/requirements.txt")
    else
      say "$cpu_index cannot be reached: taking PyTorch from PyPI, which may download 3 GB"
    fi
  fi
  for file in "${files[@]}"; do [[ $file == *constraints.txt ]] || arguments+=(-r "$here/$file"); done
  pip_install "${arguments[@]}"
  # shellcheck disable=SC2046 # one word per package
  "$python" -Ic 'import sys; [__import__(name) for name in sys.argv[1:]]' \
    $(sed -n 's/==.*//p' "$here/requirements.txt") ||
    fail "the installed packages cannot be imported: if 'pip config list' shows a target or prefix, remove it"
  for file in "${files[@]}"; do cp -- "$here/$file" "$installed/${file//\//-}"; done
  identity >"$installed/identity"
}

set_up() {
  local python lock='import fcntl, sys; fcntl.flock(9, fcntl.LOCK_EX | int(sys.argv[1]))'
  python=$(find_python)
  exec 9<"${BASH_SOURCE[0]}" # the lock is the system's: it ends with this process, however that ends
  if ! "$python" -c "$lock" 4 2>/dev/null; then # 4 is LOCK_NB: do not wait
    say "waiting for another setup.sh in this folder"
    "$python" -c "$lock" 0 || true
  fi
  if [ -e "$venv" ] && { [ ! -d "$installed" ] || [ ! -w "$venv" ]; }; then
    fail "$venv was not made by setup.sh, or belongs to another user: move or delete it, then run this again"
  fi
  if [ "$(cat "$installed/identity" 2>/dev/null)" != "$(identity)" ]; then
    [ ! -e "$venv" ] || say "an earlier set-up was interrupted, or the folder or its Python changed: starting again"
    make_venv "$python"
  fi
  up_to_date || install
  exec 9<&-
}

files=(requirements.txt)
[ "${1-}" != --all ] || { files+=(real_world/requirements.txt real_world/constraints.txt) && shift; }
case ${1-} in
  --help | -h) sed -n '2,/^# PYTHON/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
  -*) fail "unknown option $1: use --all, --help or a command to run" 2 ;;
esac
case $(uname -s) in
  MINGW* | MSYS* | CYGWIN*) fail "cannot run in Git Bash: use WSL, or the PowerShell commands in README.md" ;;
esac

up_to_date || (unset PYTHONHASHSEED PYTHONINSPECT && set_up)
[ $# -gt 0 ] || { say "ready; './setup.sh python lesson_code.py' runs the lesson" && exit; }
export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
exec "$@"
