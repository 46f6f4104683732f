#!/usr/bin/env bash
# All that wants a GPU, in one command and under ten minutes: tests, times, a profile, pictures, report.
#
#   bench/gpu.sh             on a machine with a CUDA device and torch, triton, pytest (matplotlib for the pictures)
#   bench/gpu.sh --dry-run   every step on the CPU with a tiny shape, to see that the script works
#
# STEPS="targets report" runs those steps alone (of tests targets shapes blocks launches profile plot report).
# Nothing is installed. Files go to ${OUT:-bench/results}; PYTHON names the interpreter. Each step has a time
# limit and the steps after one that fails still run; the exit code is then 1. Where the tree has no
# history, LPT_COMMIT names the commit that results are of.
set -uo pipefail
cd "$(dirname "$0")/.."
source bench/gpu_steps.sh
begin
results=$out/kernels.jsonl

# Only files with tests for a GPU: others import what such a machine may lack.
mapfile -t with_mark < <(grep -l 'pytest\.mark\.gpu' tests/test_*.py 2>/dev/null)
tests=(tests/interpreter "${with_mark[@]}")
headline=roberta-large-32k-m20-sst2
others=roberta-large-4k-m20-sst2,llama-3-8b-32k-m20-subj
others+=,roberta-base-32k-m20-mr,minilm-32k-m20-trec,minilm-4k-m20-mpqa
if [ "$dry" = 1 ]; then
    step tests 120 "$python" -m pytest -q -m gpu --co "${tests[@]}"
    bench=("$python" -m bench.kernels --device cpu --quick --provider eager --out "$results")
    step targets 120 "${bench[@]}" --op 'copy,insert_*.*'
    step blocks 120 "${bench[@]}" --op 'gather_*,*norm*,gelu*,silu*'
    step shapes 60 "${bench[@]}" --op 'insert_*.fwd'
    step launches 60 "${bench[@]}" --op 'insert_npg.*' --no-graph
    step profile 60 "$python" -m bench.profiling --device cpu --steps 2 --out "$out/profile.txt"
else
    step tests 150 "$python" -m pytest -q -m gpu "${tests[@]}"
    bench=("$python" -m bench.kernels --device cuda --out "$results")
    # What has targets first, beside torch.compile; then as much as time allows.
    step targets 185 "${bench[@]}" --limit 150 --shape "$headline,roberta-large-32k-m5-trec" \
        --op 'copy,insert_npg.*,insert_appg.*,insert_mppg.*,insert_static.*'
    step shapes 60 "${bench[@]}" --limit 40 --seconds 0.25 --shape "$others" --provider eager,triton \
        --op 'insert_npg.fwd,insert_appg.fwd,insert_mppg.fwd,insert_mppg.bwd_weights'
    step blocks 60 "${bench[@]}" --limit 40 --seconds 0.25 --shape "$headline" --provider eager,triton \
        --op 'insert_into_*,insert_padded_*,gather_*,*norm*,gelu*,silu*'
    # As a program without CUDA graphs sees it, launches and Python included.
    step launches 25 "${bench[@]}" --limit 12 --no-graph --shape "$headline" --provider eager,triton \
        --op 'insert_npg.*,insert_appg.fwd'
    step profile 35 "$python" -m bench.profiling --device cuda --out "$out/profile.txt"
fi
if "$python" -c 'import matplotlib' 2>/dev/null; then
    step plot 40 "$python" -m bench.plot --file "$results" --out "$out"
else
    echo "== plot: left out, matplotlib is not installed; python -m bench plot draws from the file anywhere"
fi
step report 15 bash -c 'set -o pipefail; "$0" -m bench.report --file "$1" | tee "$2"' "$python" "$results" "$out/report.md"
end
