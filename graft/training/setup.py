"""Sets up a training run: data, adapter, optimizer, memory plan and log, from options."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from graft.adapters.adapter import apply_adapter
from graft.adapters.attach import attach, count_parameters, lora_layers
from graft.adapters.files import load_adapter
from graft.adapters.layer_config import LayerConfig
from graft.adapters.methods import METHODS
from graft.adapters.targets import parse_pattern, plan
from graft.console import note, say
from graft.data.batches import TrainingBatches
from graft.data.examples import Split, describe_split, load_splits
from graft.errors import InputError
from graft.models import is_quantized
from graft.pretrained.folder import find_folder
from graft.pretrained.load import fingerprint, read_model
from graft.pretrained.tokenizer import Tokenizer
from graft.pretrained.vocabulary import check_token_ids
from graft.runtime.workers import choose_workers
from graft.training.activation_cache import cache_activations
from graft.training.checkpoints import Checkpoint
from graft.training.chunked_loss import use_chunked_loss
from graft.training.dry_run import MemoryTrial
from graft.training.memory_plan import parse_budget
from graft.training.metrics import RunLog
from graft.training.objectives import get_objective
from graft.training.optimizers import make_optimizer, make_schedule
from graft.training.options import (
    DEFAULT_ADAPTER,
    DEFAULT_ALPHA,
    DEFAULT_ITERS,
    NO_ADAPTER,
    Options,
    from_mapping,
    options_for_resume,
    record,
)
from graft.training.packing import find_capacity
from graft.training.progress import Progress
from graft.training.reporters import REPORTERS
from graft.training.run import Run
from graft.training.run_folder import RunFolder, check_same_run

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

TRAINING_SPLITS = ("train", "valid")


def resolve_options(given: Mapping[str, Any]) -> tuple[Options, Checkpoint | None]:
    """The options of a command, and the checkpoint that it resumes from.

    Raises:
        InputError: the options are wrong, there is nothing to resume, or it was another run.
    """
    options = from_mapping(given)
    if not options.resume:
        return options, None
    checkpoint = RunFolder(options).load_checkpoint()
    options, changes = options_for_resume(checkpoint.state["options"], given)
    for change in changes:
        say(f"changed: {change}")
    return options, checkpoint


def load_data(options: Options, tokenizer: Tokenizer, *, context: int | None) -> dict[str, Split]:
    """Read and tokenize the splits that a run needs, and report their sizes.

    Args:
        options: name the data, and whether to train or test.
        tokenizer: of the model.
        context: the longest row that the model was made for, in tokens, if known.

    Raises:
        InputError: data is missing, empty or broken, or has nothing to train on.
    """
    names = [*TRAINING_SPLITS] if options.train else []
    names += ["test"] if options.test else []
    limit = min(options.max_seq_length, context or options.max_seq_length)
    splits = load_splits(
        options.data,
        tokenizer,
        names,
        max_length=limit,
        overlap=options.overlap,
        mask_prompt=options.mask_prompt,
        add_eos=bool(options.add_eos_token),
        valid_fraction=options.valid_fraction,
    )
    for name, split in splits.items():
        say(f"{name}: {describe_split(split, limit)}")
    return splits


def start_adapter(model: nn.Module, options: Options) -> dict[str, Any]:
    """Attach the adapter to be trained: a new one, or that of `--resume-adapter-file`.

    A model that has an adapter already keeps it.

    Returns:
        What its file records, as keyword arguments of `save_adapter`.
    """
    if options.resume_adapter_file is not None:
        name = options.resume_adapter_file
        adapter = load_adapter(Path(name), alpha=options.alpha)
        apply_adapter(model, replace(adapter, dropout=options.dropout), name=name)
        say(f"starting from {name}, with its layers, ranks and alphas")
    elif not lora_layers(model):
        attach_new_adapter(model, options)
    if not options.full_logits:
        use_chunked_loss(model)
    trained, total = count_parameters(model)
    say(
        f"adapter: {len(lora_layers(model))} layers, {trained:,} of {total:,} parameters "
        f"trained ({trained / total:.2%})"
    )
    saved = record(options)
    return {"base_model": options.model, "dropout": options.dropout, "options": saved}


def attach_new_adapter(model: nn.Module, options: Options) -> None:
    """Attach the untrained adapter that a run starts from.

    Raises:
        InputError: as for `plan_run` and `read_unquantized_weights`.
    """
    layers = plan_run(model, options)
    weights = read_unquantized_weights(options.original_model, layers)
    attach(
        model,
        layers,
        dropout=options.dropout,
        seed=options.seed,
        unquantized_weights=weights,
    )


def plan_run(model: nn.Module, options: Options) -> dict[str, LayerConfig]:
    """The configuration of each layer that a run adapts, by module path.

    Raises:
        InputError: as for `graft.adapters.targets.plan`, or patterns that cannot be parsed.
    """
    return plan(
        model,
        options.targets,
        rank=options.rank,
        alpha=DEFAULT_ALPHA if options.alpha is None else options.alpha,
        method=options.method,
        num_layers=options.lora_layers,
        rank_pattern=parse_pattern(options.rank_pattern or "", int, option="--rank-pattern"),
        alpha_pattern=parse_pattern(options.alpha_pattern or "", float, option="--alpha-pattern"),
    )


def read_unquantized_weights(
    name: str | None, layers: Mapping[str, LayerConfig]
) -> dict[str, mx.array]:
    """The weights before quantization of the layers whose method needs them, by module path.

    Args:
        name: folder or Hub name of the model before quantization.
        layers: from module path to how the layer is adapted.

    Raises:
        InputError: a method needs the weights but there is no name, or the named model is quantized
            too or lacks the layers.
    """
    needed = {
        path: config.method
        for path, config in layers.items()
        if METHODS[config.method].start_from_original
    }
    if not needed:
        return {}
    if name is None:
        methods = ", ".join(sorted(set(needed.values())))
        raise InputError(
            f"--method {methods} needs --original-model, the model before quantization"
        )
    modules = dict(read_model(find_folder(name))[0].named_modules())
    bad = [path for path in needed if path not in modules or is_quantized(modules[path])]
    if bad:
        raise InputError(f"--original-model {name} has no unquantized weight of {', '.join(bad)}")
    return {path: modules[path].weight for path in needed}


def use_adapter(model: nn.Module, options: Options) -> None:
    """Load the adapter to be evaluated or prompted, or report that the base model is used."""
    name = options.adapter_file or DEFAULT_ADAPTER
    if options.adapter_file == NO_ADAPTER:
        note("no adapter: this is the base model")
    elif options.adapter_file is None and not Path(name).is_file():
        note(f"no adapter at {name}: this is the base model")
    else:
        adapter = load_adapter(Path(name), alpha=options.alpha)
        apply_adapter(model, adapter, name=name)
        if adapter.base_model != options.model:
            note(f"{name} was trained on {adapter.base_model or 'the included base model'}")
    if options.test and not options.full_logits:
        use_chunked_loss(model, training=False)
    model.eval()


def make_run(
    model: nn.Module,
    splits: dict[str, Split],
    options: Options,
    checkpoint: Checkpoint | None = None,
) -> Run:
    """Attach the adapter and build the run, or continue the run of a checkpoint.

    Raises:
        InputError: the checkpoint is of another model or other data, an unfinished run is in the
            way, or rows or options do not fit the model.
    """
    for name in TRAINING_SPLITS:
        check_token_ids(model, (example.tokens for example in splits[name].examples))
    folder = RunFolder(options)
    fingerprints: dict[str, Any] = {"model": fingerprint(model)}
    fingerprints["data"] = {name: splits[name].fingerprint for name in TRAINING_SPLITS}
    if checkpoint is None:
        folder.check_no_unfinished_run(force=options.force)
    else:
        check_same_run(checkpoint.state["fixed"], fingerprints)
    adapter_record = start_adapter(model, options)
    optimizer = make_optimizer(options.optimizer, weight_decay=options.weight_decay)
    trial, steps = _prepare(model, splits, options, optimizer, folder, fingerprints["model"])
    plan = trial.choose(checkpoint.state if checkpoint is not None else None)
    batches, update = trial.build(plan)
    schedule = make_schedule(
        options.lr_schedule,
        options.learning_rate,
        steps=steps,
        warmup_steps=options.warmup_steps,
    )
    run = Run(
        model=model,
        objective=trial.objective,
        valid=splits["valid"],
        batches=batches,
        update=update,
        optimizer=optimizer,
        schedule=schedule,
        steps=steps,
        options=options,
        plan=plan,
        progress=Progress(),
        folder=folder,
        adapter_record=adapter_record,
        fingerprints=fingerprints,
        log=make_log(options, folder, steps, checkpoint),
    )
    if checkpoint is not None:
        run.restore(checkpoint)
    return run


def _prepare(
    model: nn.Module,
    splits: dict[str, Split],
    options: Options,
    optimizer: optim.MultiOptimizer,
    folder: RunFolder,
    model_key: str,
) -> tuple[MemoryTrial, int]:
    """What builds the step, with packing and the activation cache in place; how many steps."""
    objective = get_objective(options.objective)
    capacity = find_capacity(model, options.max_seq_length) if options.pack else None
    trial = MemoryTrial(model, splits, options, optimizer, objective, capacity)
    batches = trial.batches(options.batch_size)
    steps = count_steps(options, batches)
    splits |= cache_activations(
        model,
        splits,
        objective,
        mode=options.activation_cache,
        repeated=steps > batches.steps_per_epoch,
        folder=folder.path,
        model_key=model_key,
        workers=choose_workers(options.workers, options.batch_size),
        budget=parse_budget(options.memory_budget) if options.memory_budget else None,
    )
    return trial, steps


def make_log(
    options: Options, folder: RunFolder, steps: int, checkpoint: Checkpoint | None
) -> RunLog:
    """The log of a run, cut back to what `checkpoint` knew of it."""
    state = checkpoint.state if checkpoint is not None else None
    name = options.report_to
    return RunLog(
        folder.metrics,
        steps,
        resume_at=state["metrics_bytes"] if state else 0,
        seconds=state["progress"]["seconds"] if state else 0.0,
        reporter=REPORTERS[name](folder.path, record(options)) if name else None,
    )


def count_steps(options: Options, batches: TrainingBatches) -> int:
    """The steps that `--iters` or `--epochs` ask for."""
    if options.epochs is not None:
        return batches.steps_in(options.epochs)
    return options.iters or DEFAULT_ITERS
