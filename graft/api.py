"""The public functions train, evaluate and generate, for notebooks and scripts.

`import graft` offers them with the others listed in `graft.__init__`; docs/python.md shows how.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.adapters.attach import lora_layers
from graft.data.examples import load_splits
from graft.errors import InputError
from graft.pretrained.context_length import context_length
from graft.pretrained.tokenizer import Tokenizer
from graft.training.check_options import check_options
from graft.training.chunked_loss import use_chunked_loss
from graft.training.evaluate import Evaluation, evaluate_split
from graft.training.frozen_prefix import prefix_removed
from graft.training.objectives import get_objective
from graft.training.options import flag, from_mapping
from graft.training.run import Run
from graft.training.setup import load_data, resolve_options

import mlx.nn as nn

# Options of `lora.py` that a call from Python has other means for.
COMMAND_ONLY = ("train", "prompt", "restarts", "num_tokens", "write_every", "temp")
# Options of a new adapter.
ADAPTER_OPTIONS = (
    *("method", "targets", "rank", "alpha", "lora_layers"),
    *("rank_pattern", "alpha_pattern", "original_model", "resume_adapter_file"),
)


@dataclass(frozen=True)
class TrainingResult:
    """A training run that has ended.

    Attributes:
        steps: optimizer steps taken.
        losses: (step, training loss) of every report, in nats per token.
        valid_losses: (step, validation loss) of every validation.
        best_step: the step with the lowest validation loss, if any after step 0.
        best_loss: that loss.
        finished: whether the run reached its end; otherwise a signal stopped it, and
            `train(..., resume=True)` continues it.
        adapter: the adapter file as last saved.
        best_adapter: the adapter file with the lowest validation loss.
        metrics: metrics.jsonl.
        folder: the folder of the run.
    """

    steps: int
    losses: tuple[tuple[int, float | None], ...]
    valid_losses: tuple[tuple[int, float | None], ...]
    best_step: int | None
    best_loss: float | None
    finished: bool
    adapter: Path
    best_adapter: Path
    metrics: Path
    folder: Path


def train(
    model: nn.Module,
    tokenizer: Tokenizer,
    data: str | Path,
    *,
    adapter_file: str | Path = "adapters/adapters.npz",
    base_model: str | None = None,
    **options: Any,
) -> TrainingResult:
    """Train an adapter on a model and save it; the model keeps the trained adapter.

    A model that already has an adapter (`graft.attach`) trains that one.

    Args:
        model: from `graft.load_model`.
        tokenizer: the model's.
        data: folder, file or Hub dataset, as for `lora.py --data`.
        adapter_file: where to write the adapter; the other files of the run go beside it.
        base_model: folder or Hub name of the model, to be recorded in the adapter file; by default
            the one that it was loaded from.
        options: other options of `lora.py`, with underscores: `iters`, `rank`, `method`, ...
            The activation cache is off unless asked for: it takes the lower blocks out of `model`.

    Returns:
        Losses, best step and paths of the run.

    Raises:
        InputError: an option, the data or the adapter file is wrong; the message names it.
        RunError: too many steps in a row were not finite.
    """
    from graft.lora import run_training

    if unusable := [flag(name) for name in COMMAND_ONLY if name in options]:
        raise InputError(f"{', '.join(unusable)} can only be used on the command line")
    given = {"activation_cache": "off", **options, "train": True, "data": str(data)}
    name = base_model or getattr(model, "loaded_from", None)
    given |= {"adapter_file": str(adapter_file), "model": name}
    _check_adapter_options(model, options)
    settings, checkpoint = resolve_options(given)
    check_options(settings, resumes=checkpoint is not None)
    _check_whole(model)
    splits = load_data(settings, tokenizer, context=context_length(model))
    run, status = run_training(model, splits, settings, checkpoint)
    model.eval()
    return _result(run, finished=status == 0)


def evaluate(
    model: nn.Module,
    tokenizer: Tokenizer,
    data: str | Path,
    *,
    split: str = "test",
    batch_size: int = 4,
    num_batches: int = -1,
    max_seq_length: int = 2048,
    mask_prompt: bool = False,
    objective: str = "sft",
) -> Evaluation:
    """The loss of a model, with its adapter if it has one, on a split of some data.

    Args:
        model: from `graft.load_model`.
        tokenizer: the model's.
        data: folder, file or Hub dataset, as for `lora.py --data`.
        split: "train", "valid" or "test".
        batch_size: rows computed at a time; it does not change the loss.
        num_batches: evaluate on a sample of this many batches; -1 uses all rows.
        max_seq_length: longest row in tokens; longer rows are truncated.
        mask_prompt: count completions and assistant turns only.
        objective: what to compute.

    Returns:
        Loss in nats per token, perplexity, tokens and seconds.

    Raises:
        InputError: the data is missing or broken, or an argument is out of range.
    """
    _check_whole(model)
    checked = {"batch_size": batch_size, "test_batches": num_batches, "objective": objective}
    from_mapping({**checked, "max_seq_length": max_seq_length})
    limit = min(max_seq_length, context_length(model) or max_seq_length)
    splits = load_splits(str(data), tokenizer, [split], max_length=limit, mask_prompt=mask_prompt)
    if getattr(model, "loss_head", None) is None:
        use_chunked_loss(model, training=False)
    return evaluate_split(
        model,
        splits[split],
        batch_size,
        objective=get_objective(objective),
        num_batches=num_batches,
    )


def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int = 100,
    temperature: float = 0.0,
    seed: int | None = None,
) -> str:
    """The model's answer to a prompt, with its adapter if it has one.

    Args:
        model: from `graft.load_model`.
        tokenizer: the model's.
        prompt: the text to continue, as it is.
        max_tokens: most tokens to generate.
        temperature: of sampling; 0 takes the most likely token.
        seed: makes sampling repeatable.

    Raises:
        InputError: the prompt is too long, or an argument is out of range.
    """
    from graft.engine.engine import Engine

    _check_whole(model)
    with Engine(model, tokenizer, max_rows=1, prompt_cache_bytes=0) as engine:
        pieces = engine.submit(prompt, max_tokens=max_tokens, temperature=temperature, seed=seed)
        return "".join(piece.text for piece in pieces)


def _result(run: Run, *, finished: bool) -> TrainingResult:
    lines = [json.loads(line) for line in run.folder.metrics.read_text("utf-8").splitlines()]
    valid = [line for line in lines if line.get("split") == "valid"]
    return TrainingResult(
        steps=run.progress.step,
        losses=tuple((line["step"], line["loss"]) for line in lines if line["kind"] == "train"),
        valid_losses=tuple((line["step"], line["loss"]) for line in valid),
        best_step=run.progress.best_step,
        best_loss=run.progress.best_loss,
        finished=finished,
        adapter=run.folder.adapter,
        best_adapter=run.folder.best,
        metrics=run.folder.metrics,
        folder=run.folder.path,
    )


def _check_adapter_options(model: nn.Module, options: Mapping[str, Any]) -> None:
    given = [name for name in ADAPTER_OPTIONS if options.get(name) is not None]
    if given and lora_layers(model) and not options.get("resume"):
        raise InputError(
            f"the model has an adapter already, which would be trained without regard to "
            f"{', '.join(given)}; leave these out, or call graft.detach first"
        )


def _check_whole(model: nn.Module) -> None:
    if prefix_removed(model):
        raise InputError(
            "the activation cache has taken the lower blocks out of this model; load it again"
        )
