#!/usr/bin/env bash
# Generates the Python stubs of yuan/v1/yuan.proto into a folder, yuan_grpc/v1 unless named: generate.sh [FOLDER]
# `make proto` calls it with the pinned grpcio-tools of .venv-proto.
set -euo pipefail
cd "$(dirname "$0")/.."
to=${1:-yuan_grpc/v1}
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT

.venv-proto/bin/python -m grpc_tools.protoc --proto_path=protos \
  --python_out="$made" --pyi_out="$made" --grpc_python_out="$made" yuan/v1/yuan.proto

# The proto keeps its own name (yuan/v1/yuan.proto) in the descriptor pool, which is what other languages and reflection
# see; protoc then takes the Python package to be `yuan.v1` too, and has no option to say that it is another.
sed -i 's/^from yuan\.v1 import /from yuan_grpc.v1 import /' "$made/yuan/v1/yuan_pb2_grpc.py"
mkdir -p "$to"
cp "$made"/yuan/v1/* "$to"
