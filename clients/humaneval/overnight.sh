#!/bin/sh
# Measure served models on HumanEval: generate, score, report. Run it again to resume after an interruption.
#
#   clients/humaneval/overnight.sh RUN PROMPTS HOST:PORT [HOST:PORT ...]
#
# GENERATE has more options for `generate`, for example GENERATE="--samples 20 --temperature 0.8 --top-p 0.95".
set -eu
if [ "$#" -lt 3 ]; then
    sed -n '4p' "$0" >&2
    exit 2
fi
run=$1 prompts=$2
shift 2
targets=
for address; do
    targets="$targets --target $address"
done
# Both variables are lists of words, so they are not quoted.
# shellcheck disable=SC2086
yuan-grpc humaneval generate "$run" --prompts "$prompts" $targets ${GENERATE:-}
yuan-grpc humaneval score "$run"
yuan-grpc humaneval report "$run"
