#!/usr/bin/env bash
# Check and measure everything on a GPU, in one call under nine minutes, from the checkout and with no
# network: python3 needs torch, triton, numpy, pytest, hypothesis, pytest-benchmark, pytest-xdist.
#
#   bash benchmarks/gpu_check.sh [OUT [PART ...]]      parts: tests sanitizer benchmarks
#
# OUT (gpu-check by default) gets a log of each part, the benchmarks' JSON and summary.txt, all written
# as they come: a stop half-way loses nothing. SIZE=tiny rehearses it, on a CPU in the interpreter too.
# What is worth keeping goes to benchmarks/results/.
set -uo pipefail
cd "$(dirname "$0")/.."

out=$(realpath -m "${1:-gpu-check}")
parts=("${@:2}")
[ ${#parts[@]} -gt 0 ] || parts=(tests sanitizer benchmarks)
mkdir -p "$out"
export PYTHONPATH=. PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
failures=0

say() { echo "$*" | tee -a "$out/summary.txt"; }

# Run a command for at most so many seconds; its log is kept and its last line joins the summary.
part() {
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    local status=$?
    [ $status -eq 0 ] || failures=$((failures + 1))
    say "$name: exit $status, $((SECONDS - start)) s: $(grep -v '^$' "$out/$name.log" | tail -1)"
}

say "$($python -c 'import torch, triton
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"{gpu}, torch {torch.__version__}, triton {triton.__version__}")') $(git describe --always --dirty 2>/dev/null)"

# Kernels are compiled by several processes at a time; the benchmarks have the GPU to themselves.
tests=(--numprocesses 8 -m gpu tests)
sizes=()
if [ "${SIZE:-}" = tiny ]; then
    tests=(tests/test_nt_xent.py -k test_two_samples_by_hand)
    sizes=(-k "test_nt_xent and fastssl and 0")
fi

for chosen in "${parts[@]}"; do
    case $chosen in
    tests)
        part tests 240 "$python" -m pytest -q -rf -p no:cacheprovider "${tests[@]}"
        ;;
    sanitizer)
        if command -v compute-sanitizer >/dev/null; then
            for tool in memcheck racecheck; do
                part "sanitizer-$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 1 \
                    "$python" benchmarks/every_kernel.py
            done
        else
            part sanitizer-none 60 "$python" benchmarks/every_kernel.py
        fi
        ;;
    benchmarks)
        for dtype in bfloat16 float32; do
            [ "${SIZE:-}" = tiny ] && [ $dtype = bfloat16 ] && continue
            part "benchmarks-$dtype" 85 "$python" -m pytest -q -p no:cacheprovider benchmarks \
                --dtype "$dtype" --record "$out/gpu-$dtype" "${sizes[@]}"
        done
        ;;
    *)
        say "no part is called $chosen"
        failures=$((failures + 1))
        ;;
    esac
done
say "$failures parts failed"
exit $((failures > 0))
