#!/usr/bin/env bash
# Generates what is made of yuan/v1/yuan.proto, the Python stubs yuan_grpc/v1 and the reference docs/api.md, into a tree
# like this one, this one unless named: generate.sh [ROOT]
# `make proto` calls it with the pinned grpcio-tools of .venv-proto.
set -euo pipefail
cd "$(dirname "$0")/.."
to=${1:-.}
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT

.venv-proto/bin/python -m grpc_tools.protoc --proto_path=protos \
  --python_out="$made" --pyi_out="$made" --grpc_python_out="$made" \
  --descriptor_set_out="$made/yuan.binpb" --include_source_info yuan/v1/yuan.proto

# The proto keeps its own name (yuan/v1/yuan.proto) in the descriptor pool, which is what other languages and reflection
# see; protoc then takes the Python package to be `yuan.v1` too, and has no option to say that it is another.
sed -i 's/^from yuan\.v1 import /from yuan_grpc.v1 import /' "$made/yuan/v1/yuan_pb2_grpc.py"
.venv-proto/bin/python protos/reference.py "$made/yuan.binpb" clients/examples >"$made/api.md"
mkdir -p "$to/yuan_grpc/v1" "$to/docs"
cp "$made"/yuan/v1/* "$to/yuan_grpc/v1"
cp "$made/api.md" "$to/docs"
