# Sourced by the other scripts; not run by itself.
#
# gaze_environment EXTRA: makes the virtual environment and installs this checkout into it, each only when needed.
#   EXTRA    "" for what running needs, "data,dev,docs,parity,video" for what the tests need as well.
# Reads:
#   GAZE_VENV     the environment's folder; default .venv in the checkout
#   GAZE_PYTHON   the interpreter to build it with; default the first python3 on PATH that is 3.11 or newer
# Sets:
#   root     the checkout, absolute
#   python   the environment's interpreter, absolute
#
# gaze_python VERSION: chooses the interpreter for the next gaze_environment, such as 3.13.
# gaze_python_of ARGUMENT ...: the same for the last --python=VERSION among the arguments, if there is one.
# Sets:
#   GAZE_PYTHON   pythonVERSION on PATH, or else the newest of that version that pyenv has
#   GAZE_VENV     .venv-VERSION in the checkout, unless it is set already
#   arguments     gaze_python_of: the other arguments
#
# gaze_constraints PYTHON: prints which file of tested versions is for that interpreter.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# The first candidate that runs and is new enough; fails with one line that says what was found.
find_python() {
  local candidate found="none"
  for candidate in ${GAZE_PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
    # A name on PATH need not run (pyenv leaves such names), so ask it rather than look for it.
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
    if [[ $found == none ]]; then
      found="$("$candidate" --version 2>/dev/null)" || found="none"
    fi
  done
  echo "gaze_jax needs Python 3.11 or newer; found: $found. Install one, or name it in GAZE_PYTHON." >&2
  return 1
}

gaze_python() {
  local version="$1" candidate
  if [[ ! $version =~ ^3\.[0-9]+$ ]]; then
    echo "--python=$version is no version of Python such as 3.11 or 3.13." >&2
    return 1
  fi
  while read -r candidate; do
    # A name on PATH need not run, see find_python.
    if "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null; then
      GAZE_PYTHON="$candidate"
      GAZE_VENV="${GAZE_VENV:-$root/.venv-$version}"
      if [[ -e $GAZE_VENV/pyvenv.cfg && ! -e $GAZE_VENV/bin/python$version ]]; then
        echo "GAZE_VENV=$GAZE_VENV has another Python than $version: remove it, or name an empty folder." >&2
        return 1
      fi
      return
    fi
  done < <(
    echo "python$version"
    printf '%s\n' "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version"*/bin/python | sort --version-sort --reverse
  )
  echo "--python=$version: no python$version on PATH or among pyenv's versions; install one, or set GAZE_PYTHON instead." >&2
  return 1
}

gaze_python_of() {
  local argument version=""
  arguments=()
  for argument in "$@"; do
    if [[ $argument == --python=* ]]; then
      version="${argument#*=}"
    else
      arguments+=("$argument")
    fi
  done
  [[ -z $version ]] || gaze_python "$version"
}

# For 3.11 and 3.12 the versions that were tested with Python 3.11 and jax 0.10, for 3.13 and newer those with
# Python 3.13 and jax 0.12.
gaze_constraints() {
  if "$1" -c 'import sys; sys.exit(sys.version_info < (3, 13))'; then
    echo constraints-py313.txt
  else
    echo constraints.txt
  fi
}

gaze_environment() {
  local extra="$1" venv="${GAZE_VENV:-$root/.venv}" base digest stamp
  [[ $venv == /* ]] || venv="$PWD/$venv"
  python="$venv/bin/python"

  # pip is asked for too: Debian's python3 without python3-venv leaves a folder behind that has none.
  if ! "$python" -m pip --version >/dev/null 2>&1; then
    if [[ -n "$(ls -A "$venv" 2>/dev/null)" && ! -e "$venv/pyvenv.cfg" ]]; then
      echo "GAZE_VENV=$venv is a folder with other things in it; name an empty or a new one." >&2
      return 1
    fi
    base="$(find_python)" || return 1
    echo "Creating $venv with $("$base" --version)" >&2
    "$base" -m venv --clear "$venv" || return 1
  elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "$venv has $("$python" --version), gaze_jax needs 3.11 or newer: remove it or set GAZE_VENV." >&2
    return 1
  fi

  # The checkout's place counts too: an editable install points to it. So do the sources of what it compiles.
  digest="$(cd "$root" && { pwd && cat requirements.txt pyproject.toml constraints*.txt setup.py \
    pallas_kernels/gaze_decode/native/{build.py,*.cc,*.h}; } | sha256sum | cut -d' ' -f1)"
  stamp="$venv/.gaze-installed${extra:+-$extra}"
  if [[ "$(cat "$stamp" 2>/dev/null)" != "$digest" ]]; then
    echo "Installing gaze_jax${extra:+[$extra]} into $venv (a few minutes the first time)" >&2
    "$python" -m pip install --quiet --disable-pip-version-check \
      -c "$root/$(gaze_constraints "$python")" -e "$root${extra:+[$extra]}" || return 1
    # Whatever extra was asked for, the core is there now.
    echo "$digest" | tee "$stamp" >"$venv/.gaze-installed"
  fi
}
