#!/usr/bin/env bash
# Correctness, then speed, on a GPU, in under 9 minutes. Installs nothing; see README.md for what it needs.
# Each part is a process of its own with a time limit: what one loses, the others keep. The report is written at the
# end, however that comes: gpu.json and gpu.md in $OUT. Exit code: 0 if all parts ran and the checks held.
#   usage: [OUT=DIR] [PYTHON=python3] experiments/bench/gpu.sh [lanes|sizes] [--smoke]
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python=${PYTHON:-python3}
out=${OUT:-experiments/bench/results}
mkdir -p "$out"
parts=$(mktemp -d) # and the initial weights, half a gigabyte, on their way from jaxlm to the peer
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92} # one process at a time has the card
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
failed=0

part() { # NAME SECONDS
    local name=$1 limit=$2
    shift 2
    echo "== $name (at most $limit s; ${SECONDS} s so far)"
    timeout -k 5 "$limit" "$python" -m experiments.bench.gpu "$name" --parts "$parts" "$@"
    local code=$?
    if [ $code -ne 0 ]; then
        echo "== $name failed: exit code $code"
        echo "$code" >"$parts/$name.failed"
        failed=1
    fi
}

finish() {
    trap - EXIT
    timeout -k 5 30 "$python" -m experiments.bench.gpu report --parts "$parts" --out "$out" || failed=1
    rm -rf "$parts"
    echo "== done in ${SECONDS} s: $out/gpu.md"
    exit $failed
}
trap finish EXIT
trap 'failed=1; exit' INT TERM

nvidia-smi || true
case "${1:-}" in
lanes) # two processes share the card
    shift
    XLA_PYTHON_CLIENT_PREALLOCATE=false part lanes 520 "$@"
    exit
    ;;
sizes)
    shift
    part sizes 520 "$@"
    exit
    ;;
esac
part facts 40 "$@"
part correct 120 "$@"
part ours 200 "$@"
part peer 130 "$@"
