# Sourced by quickstart and test: makes or reuses .venv and installs tlc with the extras named in $1.
# Nothing is installed outside .venv, and nothing is downloaded when .venv already holds this pyproject.toml.

say() { printf '%s\n' "$*" >&2; }
die() { say "$0: $*"; exit 6; }

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      printf '%s' "$candidate"
      return
    fi
  done
  die "Python 3.11 or newer with venv was not found; install it, or name it: PYTHON=/path/to/python $0"
}

# Kilobytes free where .venv lives.
free_kb() { df -Pk . | awk 'NR == 2 { print $4 }'; }

require_space() { # gigabytes, what for
  [ "$(free_kb)" -ge $(($1 * 1024 * 1024)) ] ||
    die "$2 needs about $1 GB of free disk here, $(($(free_kb) / 1024 / 1024)) GB are free; free some space and run this again"
}

sees_nvidia_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; }

cpu_index=https://download.pytorch.org/whl/cpu

# A name lookup can hang beyond urllib's own timeout, so the probe is a process with a limit.
cpu_index_answers() {
  "$1" - "$cpu_index/torch/" <<'PYTHON'
import subprocess, sys
probe = "import sys, urllib.request as r; r.urlopen(r.Request(sys.argv[1], method='HEAD'), timeout=3)"
try:
    done = subprocess.run([sys.executable, "-c", probe, sys.argv[1]], timeout=3, capture_output=True)
except subprocess.TimeoutExpired:
    sys.exit(1)
sys.exit(done.returncode)
PYTHON
}

install_torch() {
  if [ "$(uname -s)" != Linux ]; then
    say "PyTorch: the package registry's wheels (about 0.5 GB on disk)"
    require_space 2 "installing"
  elif sees_nvidia_gpu; then
    say "PyTorch: an NVIDIA GPU is here, so the CUDA wheels (about 3 GB to download, 6 GB on disk)"
    require_space 9 "installing"
  elif cpu_index_answers .venv/bin/python; then
    say "PyTorch: no NVIDIA GPU, so the CPU wheels of PyTorch's own index (about 0.3 GB to download, 1.5 GB on disk)"
    require_space 3 "installing"
    # Both from one index: a CPU torch with the registry's torchvision does not import.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --index-url "$cpu_index" torch torchvision
    return
  else
    say "PyTorch: no NVIDIA GPU, but PyTorch's own index of CPU wheels did not answer within 3 seconds,"
    say "         so the package registry's wheels, which bring CUDA (about 3 GB to download, 6 GB on disk)"
    require_space 9 "installing"
  fi
}

ensure_environment() { # extras
  local stamp extras=$1 python
  if [ ! -x .venv/bin/python ] || ! .venv/bin/python -c 'import pip' 2>/dev/null; then
    python=$(find_python)
    say "making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
  fi
  stamp="$(cat pyproject.toml scripts/environment.sh | .venv/bin/python -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())') $PWD"
  if grep -qxF "$stamp $extras" .venv/.tlc-installed 2>/dev/null; then
    return
  fi
  .venv/bin/python -c 'import torch, torchvision' 2>/dev/null || install_torch
  say "installing tlc[$extras] into .venv"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$extras]"
  printf '%s\n' "$stamp $extras" >>.venv/.tlc-installed
}
