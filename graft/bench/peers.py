"""Runs another tool once for `graft bench` and prints its figures as one line of JSON.

This script runs under any Python that has the tool, so it imports nothing of Graft at the top.
Graft's own generation is here, too, so that both are timed by the same code. Speed is measured
after ten warm-up steps; a validation loss to reach is checked every ten steps.
"""

import argparse
import ctypes
import json
import time
from pathlib import Path
from typing import Any

RANK, ALPHA, BATCH, MAX_TOKENS, WARM_UP = 8, 16, 4, 512, 10
STEPS, LEARNING_RATE = 40, 1e-3
PROMPT = "Q: What is read?\nA:"


def main() -> None:
    """Run the tool named by the first argument."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tool", choices=list(TOOLS))
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--layers", type=int, default=-1)
    parser.add_argument(
        "--loss", type=float, default=0.0, help="validation loss to reach; 0 for none"
    )
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--blas", help="BLAS library to load before MLX")
    parser.add_argument("--scratch", type=Path, help="folder to write to")
    arguments = parser.parse_args()
    if arguments.blas:
        ctypes.CDLL(arguments.blas, mode=ctypes.RTLD_GLOBAL)
    print(json.dumps(TOOLS[arguments.tool](arguments)))


def train_with_mlx_lm(arguments: Any) -> dict[str, float]:
    """Train with mlx-lm's trainer; the figures come from its reports."""
    import mlx.core as mx
    import mlx.optimizers as optim
    import numpy as np
    from mlx_lm.tuner.datasets import CacheDataset, TextDataset
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load

    np.random.seed(0)
    mx.random.seed(0)
    loaded: Any = load(str(arguments.model))
    model, tokenizer = loaded
    model.freeze()
    settings = {"rank": RANK, "scale": ALPHA / RANK, "dropout": 0.0}
    linear_to_lora_layers(model, arguments.layers, settings)
    every = 10 if arguments.steps >= 10 else 1
    clock: Any = _Clock(start_at=every, loss=arguments.loss)

    def rows(split: str) -> Any:
        return CacheDataset(TextDataset(_rows(arguments.data, split), tokenizer, "text"))

    train(
        model=model,
        optimizer=optim.Adam(learning_rate=LEARNING_RATE, bias_correction=True),
        train_dataset=rows("train"),
        val_dataset=rows("valid") if arguments.loss else None,
        args=TrainingArgs(
            batch_size=BATCH,
            iters=arguments.steps + every,
            steps_per_report=every,
            steps_per_eval=every,
            val_batches=-1,
            steps_per_save=10**9,
            max_seq_length=MAX_TOKENS,
            adapter_file=str(arguments.scratch / "adapters.safetensors"),
        ),
        training_callback=clock,
    )
    figures = {"tokens_per_second": clock.rate, "peak_memory_bytes": mx.get_peak_memory()}
    return figures | clock.reached


class _Clock:
    """Receives mlx-lm's reports and computes the speed after the warm-up."""

    def __init__(self, start_at: int, loss: float) -> None:
        self._start_at, self._loss = start_at, loss
        self._start = (0.0, 0.0)
        self.rate = 0.0
        self.reached: dict[str, float] = {}

    def on_train_loss_report(self, report: dict[str, Any]) -> None:
        now = time.perf_counter(), float(report["trained_tokens"])
        if report["iteration"] == self._start_at:
            self._start = now
        else:
            self.rate = (now[1] - self._start[1]) / (now[0] - self._start[0])

    def on_val_loss_report(self, report: dict[str, Any]) -> None:
        if not self.reached and report["val_loss"] <= self._loss:
            self.reached = {"reached_at": time.time()}


def train_with_peft(arguments: Any) -> dict[str, float]:
    """Train with PyTorch and PEFT in float32, on batches made the way mlx-lm makes them."""
    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    base: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    count = base.config.num_hidden_layers
    layers = list(range(count - arguments.layers, count)) if arguments.layers > 0 else None
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=names, layers_to_transform=layers
    )
    model = get_peft_model(base.to(device), settings)
    optimizer = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE
    )

    def is_reached() -> bool:
        with torch.no_grad():
            sums = [(_torch_loss(model, b).item() * _tokens_of(b), _tokens_of(b)) for b in valid]
        total, tokens = map(sum, zip(*sums, strict=True))
        return bool(total / tokens <= arguments.loss)

    batches, valid = (_batches(arguments.data, name, tokenizer) for name in ("train", "valid"))
    order = np.random.default_rng(0).permutation(len(batches))
    tokens, start = 0, 0.0
    reached: dict[str, float] = {}
    for step in range(arguments.steps + WARM_UP):
        if step % WARM_UP == 0 and arguments.loss and not reached and is_reached():
            reached = {"reached_at": time.time()}
        if step == WARM_UP:
            tokens, start = 0, time.perf_counter()
        batch = batches[order[step % len(batches)]]
        loss = _torch_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tokens += _tokens_of(batch)
    loss.item()
    if arguments.loss and not reached and is_reached():
        reached = {"reached_at": time.time()}
    return {"tokens_per_second": tokens / (time.perf_counter() - start), **reached}


def _batches(data: Path, split: str, tokenizer: Any) -> list[list[list[int]]]:
    """Token ids in batches of rows with similar lengths."""
    encoded = (tokenizer(row["text"])["input_ids"] for row in _rows(data, split))
    rows = sorted(([*ids[: MAX_TOKENS - 1], tokenizer.eos_token_id] for ids in encoded), key=len)
    return [rows[start : start + BATCH] for start in range(0, len(rows) - BATCH + 1, BATCH)]


def _tokens_of(batch: list[list[int]]) -> int:
    return sum(len(values) - 1 for values in batch)


def _torch_loss(model: Any, batch: list[list[int]]) -> Any:
    import torch

    width = -(-max(map(len, batch)) // 32) * 32
    ids, labels, mask = (torch.full((BATCH, width), value) for value in (0, -100, 0))
    for row, values in enumerate(batch):
        ids[row, : len(values)] = labels[row, : len(values)] = torch.tensor(values)
        mask[row, : len(values)] = 1
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    return model(**{name: array.to(model.device) for name, array in inputs.items()}).loss


def generate_with_mlx_lm(arguments: Any) -> dict[str, float]:
    """Generate greedily with mlx-lm; timed from the first new token."""
    from mlx_lm import stream_generate
    from mlx_lm.utils import load

    loaded: Any = load(str(arguments.model))
    model, tokenizer = loaded
    tokenizer._eos_token_ids = set()
    return _timed(stream_generate(model, tokenizer, PROMPT, max_tokens=arguments.tokens))


def generate_with_graft(arguments: Any) -> dict[str, float]:
    """Generate greedily with Graft's engine; timed from the first new token."""
    import graft  # noqa: F401
    from graft.engine.engine import Engine
    from graft.pretrained.load import load_model

    model, tokenizer, _ = load_model(arguments.model)
    tokenizer.eos_token_ids = set()
    with Engine(model, tokenizer, max_rows=1) as engine:
        return _timed(iter(engine.submit(PROMPT, max_tokens=arguments.tokens)))


def _timed(pieces: Any) -> dict[str, float]:
    import mlx.core as mx

    next(pieces)
    start = time.perf_counter()
    count = sum(1 for _ in pieces)
    rate = count / (time.perf_counter() - start)
    return {"tokens_per_second": rate, "peak_memory_bytes": mx.get_peak_memory()}


def _rows(data: Path, split: str) -> list[dict[str, str]]:
    lines = (data / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


TOOLS = {
    "mlx-lm": train_with_mlx_lm,
    "peft": train_with_peft,
    "mlx-lm-generation": generate_with_mlx_lm,
    "graft-generation": generate_with_graft,
}

if __name__ == "__main__":
    main()
