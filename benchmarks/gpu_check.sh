#!/usr/bin/env bash
# Check and measure everything on a GPU, in one call under nine minutes, from the checkout and with no
# network: python3 needs torch, triton, numpy, pytest, hypothesis, pytest-benchmark, pytest-xdist.
#
#   bash benchmarks/gpu_check.sh [OUT [PART ...]]      parts: tests sanitizer launches benchmarks
#
# OUT (gpu-check by default) gets a log of each part, the benchmarks' JSON and summary.txt, all written
# as they come: a stop half-way loses nothing. SIZE=tiny rehearses it, on a CPU in the interpreter too;
# TOTAL is the number of seconds after which it ends. What is worth keeping goes to benchmarks/results/.
set -uo pipefail
cd "$(dirname "$0")/.."

out=$(realpath -m "${1:-gpu-check}")
parts=("${@:2}")
[ ${#parts[@]} -gt 0 ] || parts=(tests sanitizer launches benchmarks)
mkdir -p "$out"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
total=${TOTAL:-520}
failures=0

say() { echo "$*" | tee -a "$out/summary.txt"; }

# Run a command for at most so many seconds, and not past the end; its log is kept and its last line joins
# the summary. Where the clock may stop it, that is no failure.
part() {
    local name=$1 limit=$2 may_stop=$3 start=$SECONDS status
    shift 3
    [ "${SIZE:-}" != tiny ] && [ $limit -lt $((total - SECONDS)) ] || limit=$((total - SECONDS))
    if [ $limit -lt 10 ]; then
        say "$name: no time left"
        [ $may_stop = yes ] || failures=$((failures + 1))
        return
    fi
    timeout --kill-after 5 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    [ $status -eq 0 ] || [ $may_stop$status = yes124 ] || failures=$((failures + 1))
    say "$name: exit $status, $((SECONDS - start)) s: $(grep -v '^$' "$out/$name.log" | tail -1)"
}

bench() { # NAME LIMIT DTYPE SIZES [OPTION ...]
    part "benchmarks-$1" "$2" yes "$python" -m pytest -q -rf -p no:cacheprovider benchmarks \
        --dtype "$3" --sizes "$4" --record "$out/gpu-$1" "${@:5}"
}

say "$($python -c 'import torch, triton
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"{gpu}, torch {torch.__version__}, triton {triton.__version__}")') $(git describe --always --dirty 2>/dev/null)"

# Kernels are compiled by several processes at a time; the benchmarks have the GPU to themselves.
tests=(--numprocesses 8 -m gpu tests)
[ "${SIZE:-}" = tiny ] && tests=(tests/test_nt_xent.py -k test_two_samples_by_hand)

for chosen in "${parts[@]}"; do
    case $chosen in
    tests)
        part tests 200 no "$python" -m pytest -q -rf -p no:cacheprovider "${tests[@]}"
        ;;
    sanitizer)
        if command -v compute-sanitizer >/dev/null; then
            for tool in memcheck racecheck; do
                part "sanitizer-$tool" 60 no compute-sanitizer --tool "$tool" --error-exitcode 1 \
                    "$python" benchmarks/every_kernel.py
            done
        else
            part sanitizer-none 60 no "$python" benchmarks/every_kernel.py
        fi
        ;;
    launches)
        part launches 60 no "$python" benchmarks/launches.py
        ;;
    benchmarks)
        if [ "${SIZE:-}" = tiny ]; then
            bench tiny "$total" float32 tiny --providers fastssl
        else
            bench bfloat16 200 bfloat16 key
            bench float32 100 float32 key
            bench bfloat16-full "$total" bfloat16 full
        fi
        ;;
    *)
        say "no part is called $chosen"
        failures=$((failures + 1))
        ;;
    esac
done
say "$failures parts failed"
exit $((failures > 0))
