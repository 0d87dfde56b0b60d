#!/usr/bin/env bash
# Everything for a machine with an NVIDIA GPU and no network, in one command, under 10 minutes:
#   tools/gpu.sh [folder for the results, default bench/results]
# Installs into the running interpreter (PYTHON, default python3), which needs torch, cmake, ninja, pybind11, setuptools and pytest; then
# tests, compute-sanitizer on a small set, `genkern verify`, and the bench of both GPU backends as JSON. Fails if any step failed.
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-bench/results}
python=${PYTHON:-python3}
"$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "tools/gpu.sh: torch sees no NVIDIA GPU here")' || exit 2
mkdir -p "$results"
name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')
failed=0 summary=""

step() { # step <name> <seconds> <command...>
  local label=$1 limit=$2 start=$SECONDS status
  shift 2
  printf '\n== %s\n' "$label"
  timeout "$limit" "$@" 2>&1 | tail -n 60
  status=${PIPESTATUS[0]}
  [ "$status" -eq 0 ] || failed=1
  summary+=$(printf '%-22s %-10s %4d s' "$label" "$([ "$status" -eq 0 ] && echo ok || echo "failed: $status")" $((SECONDS - start)))$'\n'
}

export GENKERN_REQUIRE=cpu,cuda PYTHONUNBUFFERED=1
step install 200 "$python" -m pip install --no-build-isolation --no-deps --no-index -e .
step tests 200 "$python" -m pytest tests/gpu tests/test_every_op.py -k "cuda or triton or gpu" -x
if command -v compute-sanitizer > /dev/null; then
  step memcheck 90 compute-sanitizer --error-exitcode 9 "$python" -m pytest tests/test_every_op.py -k "test_values_and_gradients and float32 and cuda-" -x
else
  summary+="memcheck               skipped: no compute-sanitizer on PATH"$'\n'
fi
step verify 90 "$python" -m genkern verify --device cuda
for backend in cuda triton; do
  step "bench $backend" 90 "$python" -m genkern bench --device cuda --backend $backend --rounds 11 --no-compile --json "$results/${name}_$backend.json"
done
printf '\n%s' "$summary"
exit $failed
