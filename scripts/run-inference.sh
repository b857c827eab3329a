#!/usr/bin/env bash
# Answers questions with the base model and with the adapter of run-training.sh, side by side.
#
#   run-inference.sh [QUESTION ...] [OPTION ...]
#
# Options are passed to lora.py, for instance: run-inference.sh "What is Adam in mlx?" --temp 0.5
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up

model=build/sapling-4bit
adapter=adapters/adapters.npz
width=100

questions=()
while [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; do
    questions+=("$1")
    shift
done
if [ ${#questions[@]} = 0 ]; then
    questions=("What is relu in mlx?" "What is Linear in mlx?" "What is Adam in mlx?")
fi

case " $* " in
*" --adapter-file"* | *" --model"*) ;;
*) [ -e "$adapter" ] || fail "no adapter at $adapter: run scripts/run-training.sh first" ;;
esac

log=$(mktemp)
trap 'rm -f "$log"' EXIT

# The answer only: lora.py prints the prompt before it.
answer() {
    local prompt printed
    prompt=$(printf 'Q: %s\nA:' "$1")
    shift
    if ! printed=$("$PYTHON" lora.py --model "$model" --temp 0 --num-tokens 60 --prompt "$prompt" "$@" 2>"$log"); then
        cat "$log" >&2
        exit 2
    fi
    printed=${printed#"$prompt"}
    printf '%s\n' "${printed# }" | expand | fold -s -w $((width / 2 - 3))
}

columns() { pr -m -t -w "$width" <(printf '%s\n' "$1") <(printf '%s\n' "$2") | expand; }

for question in "${questions[@]}"; do
    before=$(answer "$question" "$@" --adapter-file none)
    after=$(answer "$question" --adapter-file "$adapter" "$@")
    printf '\n%s\n' "$question"
    columns "-- base model" "-- with the adapter"
    columns "$before" "$after"
done
