# Sourced by the other scripts; not run by itself.
#
# gaze_environment EXTRA: makes the virtual environment and installs this checkout into it, each only when needed.
#   EXTRA    "" for what running needs, "dev,docs,parity,video" for what the tests need as well.
# Reads:
#   GAZE_VENV     the environment's folder; default .venv in the checkout
#   GAZE_PYTHON   the interpreter to build it with; default the first python3 on PATH that is 3.11 or newer
# Sets:
#   root     the checkout, absolute
#   python   the environment's interpreter, absolute

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

  # The checkout's place counts too: an editable install points to it.
  digest="$(cd "$root" && { pwd && cat requirements.txt pyproject.toml constraints.txt; } | sha256sum | cut -d' ' -f1)"
  stamp="$venv/.gaze-installed${extra:+-$extra}"
  if [[ "$(cat "$stamp" 2>/dev/null)" != "$digest" ]]; then
    echo "Installing gaze_jax${extra:+[$extra]} into $venv (a few minutes the first time)" >&2
    "$python" -m pip install --quiet --disable-pip-version-check \
      -c "$root/constraints.txt" -e "$root${extra:+[$extra]}" || return 1
    # Whatever extra was asked for, the core is there now.
    echo "$digest" | tee "$stamp" >"$venv/.gaze-installed"
  fi
}
