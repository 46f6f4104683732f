# What bench/gpu.sh and bench/gpu_train.sh share; they source it from the root of the tree, with their arguments.
python=${PYTHON:-$(command -v python3 || command -v python)}
export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
out=${OUT:-bench/results}
script=bench/$(basename "$0")
dry=0
case "${1:-}" in
"") ;;
--dry-run) dry=1 ;;
*)
    echo "Usage: $script [--dry-run]"
    exit 2
    ;;
esac

if [ "$dry" = 0 ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "No CUDA device was found (or torch does not import in $python): $script needs a GPU; --dry-run tries its steps on the CPU."
    exit 2
fi
began=$SECONDS
failed=()

# step NAME SECONDS COMMAND...: runs it with a limit, says how it ended and how long it took.
step() {
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    case " ${STEPS:-$name} " in *" $name "*) ;; *) return ;; esac
    echo "== $name (at most $limit s): $*"
    timeout --signal=INT --kill-after=10 "$limit" "$@"
    code=$?
    echo "== $name: exit $code after $((SECONDS - start)) s"
    [ "$code" = 0 ] || failed+=("$name ($code)")
}

# begin: makes the folder of the results and names the machine.
begin() {
    mkdir -p "$out"
    echo "== machine"
    nvidia-smi -L 2>/dev/null || echo "no nvidia-smi"
    "$python" -c 'from bench.machine import describe; print(describe())' || exit 1
}

# end: says how long all took and what failed.
end() {
    echo "== $((SECONDS - began)) s in all; files in $out"
    if [ ${#failed[@]} -gt 0 ]; then
        echo "Steps that failed: ${failed[*]}"
        exit 1
    fi
}
