#!/usr/bin/env bash
# All that wants a GPU, in one command and under nine minutes, the most valuable facts first.
#
#   bench/first_light.sh              all parts
#   bench/first_light.sh PART...      these alone, in three minutes (env check kernels train compile profile
#                                     tests report, and tune, which is none of the others)
#   DRY=1 bench/first_light.sh        every part on the CPU with tiny shapes, to see that the script works
#
# Nothing is installed. Figures go to ${OUT:-bench/results/gpu}, lines flushed as they are made; each part has its own limit, and
# the parts after one that fails still run. PYTHON names the interpreter, BUDGET the seconds of all. Where the tree has no history,
# LPT_COMMIT names the commit. A Triton cache compiled elsewhere for this GPU may lie in .tricache.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$(command -v python3 || command -v python)}
out=${OUT:-bench/results/gpu} dry=${DRY:-0}
parts=" ${*:-env check kernels train compile profile tests report} "
budget=${BUDGET:-$([ $# = 0 ] && echo 530 || echo 180)}
export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
[ -d .tricache ] && export TRITON_CACHE_DIR=$PWD/.tricache
for part in $parts; do
    case " env check tune kernels train compile profile tests report " in *" $part "*) ;; *)
        echo "bench/first_light.sh got the part '$part', expected one of env check tune kernels train compile profile tests report."
        exit 2 ;;
    esac
done
device=cuda headline=roberta-large-32k-m20-sst2 small=minilm-1k-m5-trec providers=eager,varlen,triton quick=()
if [ "$dry" = 1 ]; then
    device=cpu headline=tiny-256-m5-trec small=tiny-256-m5-trec providers=eager quick=(--quick)
elif ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "No CUDA device was found (or torch does not import in $python): bench/first_light.sh needs a GPU; DRY=1 tries it on the CPU."
    exit 2
fi
mkdir -p "$out/logs"
began=$SECONDS failed=()

# step NAME SECONDS COMMAND...: runs it with a limit; its output goes to a log, whose end is shown.
step() {
    local name=$1 limit=$2 left=$((budget - (SECONDS - began))) start=$SECONDS code
    shift 2
    case "$parts" in *" $name "*) ;; *) return ;; esac
    if [ "$left" -lt 10 ]; then
        echo "== $name: left out, $left s are left"
        failed+=("$name (left out)")
        return
    fi
    [ "$limit" -gt "$left" ] && limit=$left
    timeout --signal=INT --kill-after=5 "$limit" "$@" >"$out/logs/$name.log" 2>&1
    code=$?
    echo "== $name: exit $code after $((SECONDS - start)) s (at most $limit)"
    tail -n "${TAIL:-12}" "$out/logs/$name.log" | cut -c1-220
    [ "$code" = 0 ] || failed+=("$name ($code)")
}

step env 40 bash -c 'nvidia-smi -L; nvidia-smi --query-gpu=driver_version,memory.free,clocks.sm,clocks.mem --format=csv
    "$0" -c "from bench.machine import describe; print(describe())"' "$python"

# Every operator in every dtype against float64, on a small shape, and those of the headline: in many processes, for most of the
# time goes to Triton's compilations. Nothing is timed here; what is timed below finds its kernels compiled.
check() {
    local bench=("$python" -m bench.kernels.main --device $device --provider $providers --check-only "${quick[@]}")
    local groups=('insert_npg*,insert_static*' 'insert_appg*' 'insert_mppg*' 'insert_into_*,insert_padded_*' 'gather_*' '*norm*,gelu*,silu*,attention.*')
    for dtype in bf16 fp32 fp16; do
        for i in "${!groups[@]}"; do
            "${bench[@]}" --dtype $dtype --shape $small --op "${groups[$i]}" >"$out/logs/check_${dtype}_$i.txt" 2>&1 &
        done
    done
    for kind in npg appg mppg static; do
        "${bench[@]}" --dtype bf16 --shape $headline --op "insert_$kind.*" >"$out/logs/check_headline_$kind.txt" 2>&1 &
    done
    wait
    echo "right: $(cat "$out"/logs/check_*.txt | grep -c ' right ')"
    # Triton's and Python's own last words, where a process broke, among them.
    cat "$out"/logs/check_*.txt | grep -Ev ' right |^[0-9]+ s; 0 contestant|^$|are left out|left out\.$'
    ! cat "$out"/logs/check_*.txt | grep -Eq ' (wrong|failed): |Error'
}
export -f check
export python device providers small headline out
TAIL=30 step check 110 bash -c "quick=(${quick[*]:-}); check"

# Launch configurations of each kernel, one process for each compiling and then one timing.
tune() {
    local tuner=("$python" -m bench.kernels.tune_insert)
    for part in $("${tuner[@]}" --list); do
        "${tuner[@]}" --part $part --compile >"$out/logs/tune_$part.txt" 2>&1 &
    done
    wait
    "${tuner[@]}" --best 4
}
export -f tune
[ "$dry" = 1 ] || TAIL=90 step tune 170 bash -c tune

# Operators beside a copy and eager PyTorch.
bench=("$python" -m bench.kernels.main --device $device "${quick[@]}" --out "$out/kernels.jsonl")
TAIL=20 step kernels 90 "${bench[@]}" --provider $providers --limit 75 --seconds 0.2 --repeats 15 --shape $headline \
    --op 'copy,insert_npg.*,insert_appg.*,insert_mppg.*,insert_static.*,gather_plain.fwd,gelu.*,layer_norm.*,attention.*'

# Training steps.
TAIL=50 step train 200 "$python" -m bench.train.steps --device $device --out "$out/train.jsonl" --profiles "$out/logs" --host "$out/logs" \
    ${SIZES:+--sizes $SIZES}

# torch.compile last, for its compilations are slow.
if [ "$dry" = 0 ]; then
    TAIL=16 step compile 150 "${bench[@]}" --provider compile,triton --limit 130 --seconds 0.2 --repeats 10 --shape $headline \
        --op 'insert_npg.fwd,insert_mppg.fwd,insert_appg.fwd,insert_npg.bwd_weights,insert_mppg.bwd_weights,insert_appg.bwd_weights'
    step profile 40 "$python" -m bench.kernels.profiling --device cuda --out "$out/logs/profile_kernels.txt"
    more=()
    "$python" -c 'import xdist' 2>/dev/null && more=(-n 16 --dist worksteal)
else
    step profile 40 "$python" -m bench.kernels.profiling --device cpu --steps 2 --out "$out/logs/profile_kernels.txt"
    more=(--collect-only)
fi
# (Only files with tests for a GPU: others import what such a machine may lack.)
mapfile -t tests < <(grep -rlE 'mark\.gpu|\bDEVICES\b' tests --include='test_*.py')
TAIL=40 step tests 300 "$python" -m pytest -q -m gpu -o addopts=--strict-markers "${more[@]}" --tb=short -p no:cacheprovider -p no:benchmark -p bench.instafail tests/interpreter "${tests[@]}"
TAIL=60 step report 20 "$python" -m bench.kernels.report --file "$out/kernels.jsonl"
tar czf "$out/logs.tar.gz" -C "$out" logs
echo "== $((SECONDS - began)) s in all; files in $out"
[ ${#failed[@]} = 0 ] || { echo "Parts that failed: ${failed[*]}"; exit 1; }
