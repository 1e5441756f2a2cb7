#!/usr/bin/env bash
# Check and measure everything on a GPU, in one call under nine minutes, from the checkout and with no
# network: python3 needs torch, triton, numpy, pytest, hypothesis, pytest-benchmark, pytest-xdist.
#
#   bash benchmarks/gpu_check.sh [OUT [PART ...]]      parts: tests sanitizer compile launches benchmarks
#
# OUT (gpu-check by default) gets a log of each part, the benchmarks' JSON and summary.txt, all written
# as they come: a stop half-way loses nothing. SIZE=tiny rehearses it, on a CPU in the interpreter too;
# TOTAL is the number of seconds after which it ends. What is worth keeping goes to benchmarks/results/.
set -uo pipefail
cd "$(dirname "$0")/.."

out=$(realpath -m "${1:-gpu-check}")
parts=("${@:2}")
[ ${#parts[@]} -gt 0 ] || parts=(tests sanitizer compile launches benchmarks)
mkdir -p "$out"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# Triton's own default, said so that torch.compile does not choose another for kernels compiled after its own.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$HOME/.triton/cache}
python=${PYTHON:-python3}
total=${TOTAL:-520}
failures=0

say() { echo "$*" | tee -a "$out/summary.txt"; }

# Run a command for at most so many seconds, and not past the end; its log is kept and its last line joins
# the summary. The clock stops it as a keyboard would: pytest then says what has failed so far. (timeout
# interrupts its own command twice, and what that runs once.) Where the clock may stop it, that is no failure.
part() {
    local name=$1 limit=$2 may_stop=$3 start=$SECONDS status
    shift 3
    [ "${SIZE:-}" != tiny ] && [ $limit -lt $((total - SECONDS)) ] || limit=$((total - SECONDS))
    if [ $limit -lt 10 ]; then
        say "$name: no time left"
        [ $may_stop = yes ] || failures=$((failures + 1))
        return
    fi
    timeout --signal INT --kill-after 10 "$limit" env --default-signal=INT \
        bash -c '"$@"; exit' - "$@" >"$out/$name.log" 2>&1
    status=$?
    case $may_stop$status in
    yes0 | no0 | yes124 | yes137) ;;
    *) failures=$((failures + 1)) ;;
    esac
    say "$name: exit $status, $((SECONDS - start)) s: $(grep -v '^$' "$out/$name.log" | tail -1)"
}

pytest=("$python" -m pytest -q -rf -p no:cacheprovider)
# Most of a kernel's first call is compiling it, on one core: processes share that work, and through the
# disk its results with the parts that follow.
workers=$(nproc)
[ "${SIZE:-}" != tiny ] || workers=0
together=("${pytest[@]}" --numprocesses "$workers")

bench() { # NAME LIMIT DTYPE SIZES [OPTION ...]
    part "benchmarks-$1" "$2" yes "${pytest[@]}" benchmarks \
        --dtype "$3" --sizes "$4" --record "$out/gpu-$1" "${@:5}"
}

say "$($python -c 'import torch, triton
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"{gpu}, torch {torch.__version__}, triton {triton.__version__}")') $(git describe --always --dirty 2>/dev/null)"

tests=(-m gpu tests)
types=(bfloat16 float32)
sizes=key
compiled=fastssl,compiled
if [ "${SIZE:-}" = tiny ]; then
    tests=(tests/losses/test_nt_xent.py -k test_two_samples_by_hand)
    types=(float32)
    sizes=tiny
    compiled=fastssl
fi

for chosen in "${parts[@]}"; do
    case $chosen in
    tests)
        part tests 150 no "${together[@]}" "${tests[@]}"
        ;;
    sanitizer)
        part sanitizer 100 no "$python" benchmarks/sanitize.py
        ;;
    compile) # the benchmarks once, unmeasured, but for sizes that fill a GPU by themselves
        for dtype in "${types[@]}"; do
            TORCHINDUCTOR_COMPILE_THREADS=1 part "compile-$dtype" 45 yes "${together[@]}" benchmarks \
                --dtype "$dtype" --sizes "$sizes" --providers "$compiled" \
                -k "test_loss and not 65536x768 and not 32768x128"
        done
        ;;
    launches)
        part launches 30 no "$python" benchmarks/launches.py
        ;;
    benchmarks) # they have the GPU to themselves
        if [ "${SIZE:-}" = tiny ]; then
            bench tiny "$total" float32 tiny --providers fastssl
        else # 70 seconds are kept for float32
            bench bfloat16 $((total - SECONDS - 70)) bfloat16 key
            bench float32 "$total" float32 key
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
