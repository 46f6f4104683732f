#!/usr/bin/env bash
# The whole suite with the newest releases that pip finds: no constraints.txt, and none of setup.py's upper bounds, so that
# a release that breaks something is met here before users meet it.
#
#   bench/newest.sh                                    in a temporary environment, which goes afterwards
#   bench/newest.sh FOLDER                             in that one, which is made where it is not there, and stays
#   bench/newest.sh FOLDER torch==2.13.0 'peft<0.22'   these releases are installed in it first
#   bench/newest.sh FOLDER -- tests/method -m 'not slow'   what pytest gets in place of nothing
#
# PYTHON names the interpreter that makes the environment. The last lines say which releases differ from constraints.txt and which
# tests failed; the exit code is pytest's. A range of setup.py may grow by a minor when this passes with it.
set -euo pipefail
cd "$(dirname "$0")/.."
folder="" wanted=()
[ $# = 0 ] || [ "$1" = -- ] || { folder=$1; shift; }
while [ $# != 0 ] && [ "$1" != -- ]; do
    wanted+=("$1")
    shift
done
[ $# = 0 ] || shift
if [ -z "$folder" ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
elif [ -e "$folder" ] && ! [ -x "$folder/bin/python" ] && [ -n "$(ls -A "$folder" 2>/dev/null || echo file)" ]; then
    echo "bench/newest.sh got $folder, which is there and no virtual environment; expected one, an empty folder or a new name."
    exit 2
fi
unset PIP_CONSTRAINT
export PIP_DISABLE_PIP_VERSION_CHECK=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=.:kernels
python=$folder/bin/python
[ -x "$python" ] || "${PYTHON:-python3}" -m venv "$folder"
# (Asked of the packages: an installation may have been broken off.)
if ! "$python" -c 'import matplotlib, peft, pytest, torch, transformers, typer' 2>/dev/null; then
    mapfile -t needed < <("$python" - <<'END'
import ast, re

call = next(
    n for n in ast.walk(ast.parse(open("setup.py").read()))
    if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "setup"
)
value = {k.arg: k.value for k in call.keywords}
for one in ast.literal_eval(value["install_requires"]) + ast.literal_eval(value["extras_require"])["test"]:
    print(re.sub(r",?\s*<[^,;]*", "", one))
END
    )
    "$python" -m pip install -q "${needed[@]}" "${wanted[@]}"
elif [ ${#wanted[@]} != 0 ]; then
    "$python" -m pip install -q "${wanted[@]}"
fi
log=$(mktemp)
code=0
"$python" -m pytest -q -rf "$@" 2>&1 | tee "$log" || code=$?
echo
echo "== releases that are not those of constraints.txt"
"$python" -m pip freeze --exclude-editable | tr 'A-Z_' 'a-z-' | grep -vxFf <(tr 'A-Z_' 'a-z-' <constraints.txt) |
    grep -E "^($(grep -o '^[A-Za-z0-9_.-]*' constraints.txt | tr 'A-Z_' 'a-z-' | paste -sd'|'))==" || echo "none"
echo "== what broke"
grep -E '^(FAILED|ERROR) ' "$log" | cut -c1-250 || { [ "$code" = 0 ] && echo "nothing" || tail -n 20 "$log"; }
rm -f "$log"
exit "$code"
