#!/usr/bin/env bash
# Fine-tunes the included base model on the documentation of the installed mlx, and evaluates it before and after.
# Arguments are passed to lora.py, for instance: run-training.sh --iters 600 --lora-layers 4
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up

model=build/sapling-4bit
data=build/mlx-docs
question=$'Q: What is relu in mlx?\nA:'
# Three epochs with two rows per step: many small steps suit a small model and little data.
training=(--iters 760 --batch-size 2 --rank 16 --alpha 32 --learning-rate 4e-3 --lr-schedule cosine
    --warmup-steps 20 --grad-clip 1 --steps-per-report 50 --steps-per-eval 380 --val-batches 10)

lora() { "$PYTHON" lora.py --model "$model" --data "$data" "$@"; }

step() { printf '\n== %s\n' "$*"; }

step "The base model in 4 bits: $model"
if [ -e "$model" ]; then
    echo "$model exists; delete it to convert again"
else
    "$PYTHON" convert.py --torch-path graft/assets/sapling --mlx-path "$model" -q
fi

step "The dataset, from the installed mlx: $data"
if [ -e "$data" ]; then
    echo "$data exists; delete it to build it again"
else
    "$PYTHON" -m graft dataset mlx --out "$data"
fi

step "Before"
lora "$@" --test --adapter-file none
lora --temp 0 --num-tokens 60 "$@" --prompt "$question" --adapter-file none

step "Training"
lora --train "${training[@]}" "$@"

step "After"
lora "$@" --test
lora --temp 0 --num-tokens 60 "$@" --prompt "$question"
