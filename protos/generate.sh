#!/usr/bin/env bash
# Generate the Python stubs (yuan_grpc/v1) and the API reference (docs/reference/api.md) from yuan/v1/yuan.proto.
#
#     generate.sh [ROOT]
#
# Write them under ROOT (default: this repository). `make proto` calls it with the pinned grpcio-tools of .venv-proto.
set -euo pipefail
cd "$(dirname "$0")/.."
root=${1:-.}
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

.venv-proto/bin/python -m grpc_tools.protoc --proto_path=protos \
  --python_out="$build" --pyi_out="$build" --grpc_python_out="$build" \
  --descriptor_set_out="$build/yuan.binpb" --include_source_info yuan/v1/yuan.proto

# The file keeps the name yuan/v1/yuan.proto, which reflection and other languages see. protoc derives the Python package
# `yuan.v1` from it and has no option for another one.
sed -i 's/^from yuan\.v1 import /from yuan_grpc.v1 import /' "$build/yuan/v1/yuan_pb2_grpc.py"
.venv-proto/bin/python protos/reference.py "$build/yuan.binpb" clients/examples >"$build/api.md"
mkdir -p "$root/yuan_grpc/v1" "$root/docs/reference"
cp "$build"/yuan/v1/* "$root/yuan_grpc/v1"
cp "$build/api.md" "$root/docs/reference"
