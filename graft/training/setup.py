"""Sets up a training run: data, adapter, optimizer, memory plan and log, from options."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from graft.adapters.adapter import apply_adapter
from graft.adapters.attach import attach, base_parameters, count_parameters, lora_layers
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
from graft.pretrained.load import fingerprint, former_fingerprint, read_model
from graft.pretrained.mlx_names import parameters_of
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
from graft.training.optimizers import make_optimizer, make_schedule, parse_betas
from graft.training.options import (
    DEFAULT_ADAPTER,
    DEFAULT_ALPHA,
    DEFAULT_ITERS,
    DEFAULT_METHOD,
    DEFAULT_RANK,
    NO_ADAPTER,
    Options,
    flag,
    from_mapping,
    options_for_resume,
    record,
)
from graft.training.packing import find_capacity
from graft.training.plan_cache import plan_key
from graft.training.probe import check_trainable
from graft.training.progress import Progress
from graft.training.reporters import REPORTERS
from graft.training.run import Run
from graft.training.run_folder import RunFolder, check_same_run
from graft.training.saved_adapter import attach_saved, layers_record

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

TRAINING_SPLITS = ("train", "valid")
# The options of how a layer is adapted, with the field of `LayerConfig` that they set.
_LAYER_OPTIONS = {
    "method": "method",
    "rank": "rank",
    "alpha": "alpha",
    "rank_pattern": "rank",
    "alpha_pattern": "alpha",
}


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


def start_adapter(
    model: nn.Module, options: Options, checkpoint: Checkpoint | None = None
) -> tuple[Options, dict[str, Any]]:
    """Attach the adapter to be trained: a checkpoint's, `--resume-adapter-file`'s or a new one.

    A model that has an adapter already keeps it, unless a run is resumed.

    Returns:
        The options with the method and rank of a new adapter, and what the adapter's file records,
        as keyword arguments of `save_adapter`.

    Raises:
        InputError: the adapter does not fit the model, or options contradict the adapter.
    """
    # Checkpoints of earlier versions do not hold how layers are adapted.
    saved = checkpoint.state.get("adapter") if checkpoint is not None else None
    if saved is not None:
        attach_saved(model, saved, dropout=options.dropout, seed=options.seed)
    elif options.resume_adapter_file is not None:
        _attach_from_file(model, options, options.resume_adapter_file, check=checkpoint is None)
    elif not lora_layers(model):
        method, rank = options.method or DEFAULT_METHOD, options.rank or DEFAULT_RANK
        options = replace(options, method=method, rank=rank)
        attach_new_adapter(model, options)
    if not options.full_logits:
        use_chunked_loss(model)
    trained, total = count_parameters(model)
    say(
        f"adapter: {len(lora_layers(model))} layers, {trained:,} of {total:,} parameters "
        f"trained ({trained / total:.2%}) on {options.model or 'the included model'}"
    )
    content = {"base_model": options.model, "dropout": options.dropout, "options": record(options)}
    return options, content


def _attach_from_file(model: nn.Module, options: Options, name: str, *, check: bool) -> None:
    adapter = load_adapter(Path(name), alpha=options.alpha)
    if check and (problems := contradictions(model, adapter.layers, options)):
        raise InputError(
            f"{'; '.join(problems)}: the adapter {name} decides this; leave these options out"
        )
    apply_adapter(model, replace(adapter, dropout=options.dropout), name=name)
    say(f"starting from {name}, with its layers, ranks and alphas")


def contradictions(
    model: nn.Module, layers: Mapping[str, LayerConfig], options: Options
) -> list[str]:
    """The options of a new adapter that an existing one does not have.

    Args:
        model: without an adapter.
        layers: of the existing adapter.
        options: those that are not given are `None`.
    """
    where = [name for name in ("targets", "lora_layers") if getattr(options, name) is not None]
    how = [name for name in _LAYER_OPTIONS if getattr(options, name) is not None]
    if not layers or not (where or how):
        return []
    used = {config.method for config in layers.values()}
    wanted = replace(
        options,
        method=options.method or next(name for name in METHODS if name in used),
        rank=options.rank or min(config.rank for config in layers.values()),
        targets=options.targets if where else ",".join(layers),
        lora_layers=options.lora_layers if where else -1,
    )
    asked = plan_run(model, wanted)
    problems = []
    if where and asked.keys() != layers.keys():
        named = " and ".join(f"{flag(name)} {getattr(options, name)}" for name in where)
        problems.append(f"{named} would adapt {len(asked)} layers, other than its {len(layers)}")
    for name in how:
        field = _LAYER_OPTIONS[name]
        pairs = [
            (getattr(layers[p], field), getattr(asked[p], field)) for p in asked if p in layers
        ]
        if has := sorted({str(found) for found, expected in pairs if found != expected}):
            problems.append(f"{flag(name)} {getattr(options, name)}, but it has {', '.join(has)}")
    return problems


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
        rank=options.rank or DEFAULT_RANK,
        alpha=DEFAULT_ALPHA if options.alpha is None else options.alpha,
        method=options.method or DEFAULT_METHOD,
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


def use_adapter(model: nn.Module, options: Options) -> Sequence[str]:
    """Load the adapter to be evaluated or prompted, or report that the base model is used.

    Returns:
        The names of the shapes of the rows that it was trained on, if known.
    """
    row_shapes: Sequence[str] = ()
    name = options.adapter_file or DEFAULT_ADAPTER
    if options.adapter_file == NO_ADAPTER:
        note("no adapter: this is the base model")
    elif options.adapter_file is None and not Path(name).is_file():
        note(f"no adapter at {name}: this is the base model")
    else:
        adapter = load_adapter(Path(name), alpha=options.alpha)
        apply_adapter(model, adapter, name=name)
        row_shapes = adapter.row_shapes
        if adapter.base_model != options.model:
            note(f"{name} was trained on {adapter.base_model or 'the included base model'}")
    if options.test and not options.full_logits:
        use_chunked_loss(model, training=False)
    model.eval()
    return row_shapes


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
    folder.lock.acquire()
    if checkpoint is not None and folder.store.load()[0].step != checkpoint.step:
        raise InputError(f"another process has continued the run in {folder.path}; resume it again")
    fingerprints: dict[str, Any] = {
        "model": fingerprint(base_parameters(model)),
        "data": {name: splits[name].fingerprint for name in TRAINING_SPLITS},
    }
    if checkpoint is None:
        folder.check_no_unfinished_run(force=options.force)
    else:
        former = former_fingerprint(parameters_of(model))
        check_same_run(checkpoint.state["fixed"], fingerprints, former_model=former)
    options, adapter_record = start_adapter(model, options, checkpoint)
    adapter_record["row_shapes"] = sorted(splits["train"].shape_counts)
    optimizer = _make_optimizer(options)
    trial, steps = _prepare(model, splits, options, optimizer, folder, fingerprints["model"])
    key = plan_key(options, fingerprints, layers_record(model))
    plan = trial.choose(checkpoint.state if checkpoint is not None else None, key)
    batches, update = trial.build(plan)
    run = Run(
        model=model,
        objective=trial.objective,
        valid=splits["valid"],
        batches=batches,
        update=update,
        optimizer=optimizer,
        schedule=_make_schedule(options, steps),
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


def _make_optimizer(options: Options) -> optim.MultiOptimizer:
    return make_optimizer(
        options.optimizer,
        weight_decay=options.weight_decay,
        betas=parse_betas(options.betas),
        eps=options.eps,
    )


def _make_schedule(options: Options, steps: int) -> Callable[[int], float]:
    return make_schedule(
        options.lr_schedule,
        options.learning_rate,
        steps=steps,
        warmup_steps=options.warmup_steps,
        least=options.min_learning_rate,
        cycles=options.lr_cycles,
    )


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
    check_trainable(model, objective)
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
    name, run_id = options.report_to, None
    # Another service would not know the name.
    if state is not None and state["options"].get("report_to") == name:
        run_id = state.get("report_id")
    return RunLog(
        folder.metrics,
        steps,
        resume_at=state["metrics_bytes"] if state else 0,
        seconds=state["progress"]["seconds"] if state else 0.0,
        reporter=REPORTERS[name](folder.path, record(options), run_id) if name else None,
    )


def count_steps(options: Options, batches: TrainingBatches) -> int:
    """The steps that `--iters` or `--epochs` ask for."""
    if options.epochs is not None:
        return batches.steps_in(options.epochs)
    return options.iters or DEFAULT_ITERS
