"""Options: everything that `lora.py` accepts, declared once.

The command line, the YAML file of `--config` and the record saved beside an adapter all come from
the fields of `Options`. What the options do is decided elsewhere.
"""

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graft.adapters.method_names import method_names
from graft.console import did_you_mean
from graft.data.readers import FILE_READERS
from graft.data.sources import DEFAULT_DATA
from graft.errors import InputError
from graft.training.objectives import OBJECTIVES
from graft.training.optimizers import OPTIMIZERS, SCHEDULES
from graft.training.reporters import REPORTERS

CACHE_PLACES = ("auto", "memory", "disk", "off")

NO_ADAPTER = "none"
DEFAULT_ADAPTER = "adapters/adapters.npz"
DEFAULT_ITERS = 1000
DEFAULT_METHOD = "lora"
DEFAULT_RANK = 8
DEFAULT_ALPHA = 16.0
LARGEST_NUMBER = 2**32 - 1  # the largest seed


def option(
    default: Any,
    text: str,
    *,
    group: str,
    flags: Sequence[str] = (),
    formerly: str | None = None,
    metavar: str | None = None,
    at_least: float | None = None,
    choices: Sequence[str] | None = None,
    resumable: bool = False,
) -> Any:
    """A field of `Options`.

    Args:
        default: the value if it is not given.
        text: its help.
        group: the heading in `--help` that it is listed under.
        flags: further flags.
        formerly: the name it had in earlier versions, still read from files and command lines.
        metavar: what represents its value in the help.
        at_least: the smallest value allowed; if that is -1, then -1 means "all" and 0 is refused.
        choices: all values allowed.
        resumable: whether a run can be resumed with another value; the contents of `model` and
            `data` are compared separately.
    """
    metadata = {
        "help": text,
        "group": group,
        "flags": tuple(flags),
        "formerly": formerly,
        "metavar": metavar,
        "at_least": at_least,
        "choices": None if choices is None else tuple(choices),
        "resumable": resumable,
    }
    return dataclasses.field(default=default, metadata=metadata)


WHAT, DATA, ADAPTER, STEPS, MEMORY, REPORTS, KEEPING, TEST, GENERATION = GROUPS = (
    "model and adapter",
    "data",
    "what is adapted",
    "training",
    "speed and memory",
    "reports",
    "saving and resuming",
    "evaluation",
    "generation",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `lora.py`; the field `steps_per_eval` is `--steps-per-eval`, and so on."""

    model: str | None = option(
        None,
        "model folder or Hub name (default: the included model)",
        group=WHAT,
        metavar="MODEL",
        resumable=True,
    )
    adapter_file: str | None = option(
        None,
        f"adapter to write or read; '{NO_ADAPTER}' for the base model (default: {DEFAULT_ADAPTER})",
        group=WHAT,
        metavar="FILE",
    )
    seed: int = option(0, "random seed", group=WHAT, at_least=0)

    train: bool = option(False, "train an adapter", group=STEPS)
    objective: str = option("sft", "what to minimize", group=STEPS, choices=OBJECTIVES)
    data: str = option(
        DEFAULT_DATA,
        f"file ({', '.join(FILE_READERS)}), folder of files, or OWNER/NAME[:CONFIG] on the Hub",
        group=DATA,
        metavar="DATA",
        resumable=True,
    )
    valid_fraction: float = option(
        0.1,
        "fraction of rows held out for validation if the data has no valid split; if it has no "
        "splits at all, --test uses the same rows",
        group=DATA,
        at_least=0,
    )
    mask_prompt: bool = option(
        False, "compute the loss on completions and assistant turns only", group=DATA
    )
    overlap: int = option(
        0,
        "tokens that a window of plain text repeats from the previous one, untrained",
        group=DATA,
        at_least=0,
    )
    max_seq_length: int = option(
        2048,
        "longest row in tokens; longer rows are truncated (at most the model's context)",
        group=DATA,
        at_least=2,
    )
    add_eos_token: int = option(
        1, "end each row with the end-of-text token; 0 leaves it out", group=DATA
    )

    lora_layers: int | None = option(
        None,
        "adapt the last N transformer blocks; -1 adapts all (default: 16, or all if fewer)",
        group=ADAPTER,
    )
    method: str | None = option(
        None,
        f"training method: {', '.join(method_names())} (default: {DEFAULT_METHOD}, or that of the "
        "adapter that is read)",
        group=ADAPTER,
        metavar="METHOD",
    )
    targets: str | None = option(
        None,
        "comma-separated names (q_proj), paths, globs ('mlp.*'), re:EXPRESSION, all-linear, "
        "all-norms, all-biases; !NAME leaves out (default: all-linear, or what suits the method)",
        group=ADAPTER,
        metavar="NAMES",
    )
    rank: int | None = option(
        None,
        f"rank of the adapter (default: {DEFAULT_RANK}, or that of the adapter that is read)",
        group=ADAPTER,
        at_least=1,
    )
    alpha: float | None = option(
        None,
        f"the update is scaled by alpha / rank (default: {DEFAULT_ALPHA:g}, or that of the adapter "
        "that is read)",
        group=ADAPTER,
        at_least=0,
    )
    rank_pattern: str | None = option(
        None,
        "ranks of some layers, named as in --targets: 'q_proj=16,*norm*=1' (default: --rank)",
        group=ADAPTER,
        metavar="NAME=N,...",
    )
    alpha_pattern: str | None = option(
        None,
        "alphas of some layers, as in --rank-pattern (default: --alpha)",
        group=ADAPTER,
        metavar="NAME=X,...",
    )
    original_model: str | None = option(
        None,
        "the model before quantization, for --method loftq (default: not needed)",
        group=ADAPTER,
        metavar="MODEL",
    )
    dropout: float = option(
        0.0, "dropout on the adapter's input, 0 to below 1", group=ADAPTER, at_least=0
    )
    resume_adapter_file: str | None = option(
        None,
        "start from the weights of this adapter, with a new optimizer (default: a new adapter)",
        group=ADAPTER,
        metavar="FILE",
    )

    batch_size: int = option(4, "rows per batch", group=STEPS, at_least=1)
    grad_accumulation_steps: int = option(
        1, "accumulate gradients over N batches per optimizer step", group=STEPS, at_least=1
    )
    iters: int | None = option(
        None,
        f"optimizer steps (default: {DEFAULT_ITERS})",
        group=STEPS,
        at_least=1,
        resumable=True,
    )
    epochs: float | None = option(
        None,
        "passes over the data, instead of --iters (default: --iters decides)",
        group=STEPS,
        at_least=0,
        resumable=True,
    )
    learning_rate: float = option(
        1e-4, "peak learning rate", group=STEPS, flags=("--lr",), at_least=0
    )
    optimizer: str = option("adam", "optimizer", group=STEPS, choices=tuple(OPTIMIZERS))
    lr_schedule: str = option(
        "constant", "learning rate after the warm-up", group=STEPS, choices=tuple(SCHEDULES)
    )
    warmup_steps: int = option(
        0, "steps over which the learning rate rises from 0", group=STEPS, at_least=0
    )
    min_learning_rate: float = option(
        0.0, "learning rate that a linear or cosine schedule falls to", group=STEPS, at_least=0
    )
    lr_cycles: int = option(
        1,
        "times that the schedule runs after the warm-up, each time from the peak",
        group=STEPS,
        at_least=1,
    )
    betas: str | None = option(
        None,
        "decay rates of the optimizer's moments (default: 0.9,0.999, or 0.9,0.99 with lion)",
        group=STEPS,
        metavar="X,X",
    )
    eps: float | None = option(
        None,
        "added to the root of the second moment of adam and adamw (default: 1e-08)",
        group=STEPS,
        at_least=0,
    )
    weight_decay: float = option(
        0.0, "weight decay on the adapter's parameters", group=STEPS, at_least=0
    )
    grad_clip: float = option(
        0.0, "clip the gradient to this norm; 0 does not clip", group=STEPS, at_least=0
    )
    lora_plus_ratio: float = option(
        1.0, "learning rate of lora_b over that of lora_a (LoRA+)", group=STEPS, at_least=0
    )
    early_stop: int = option(
        0,
        "stop after N validations without improvement; 0 never stops",
        group=STEPS,
        at_least=0,
        resumable=True,
    )
    max_nonfinite_steps: int = option(
        5,
        "roll back to the last checkpoint after N consecutive non-finite losses or gradients",
        group=STEPS,
        formerly="max_bad_steps",
        at_least=1,
        resumable=True,
    )

    pack: bool = option(
        False,
        "pack several rows into one of up to --max-seq-length tokens, kept apart by the attention "
        "mask; --batch-size counts packed rows",
        group=MEMORY,
    )
    workers: int | None = option(
        None,
        "processes that share each batch (default: on a Linux CPU one per core, at most one per "
        "row of a micro-batch; 1 elsewhere)",
        group=MEMORY,
        formerly="lanes",
        at_least=1,
    )
    grad_checkpoint: bool = option(
        False,
        "recompute activations in the backward pass: less memory, about a third more time",
        group=MEMORY,
    )
    memory_budget: str | None = option(
        None,
        "limit on memory, such as 12GB: chooses micro-batches, gradient checkpointing and the "
        "place of the activation cache (default: no limit)",
        group=MEMORY,
        metavar="SIZE",
        resumable=True,
    )
    activation_cache: str = option(
        "auto",
        "where to cache the output of the frozen blocks below the adapter; auto caches only for "
        "several epochs, and if the cache fits",
        group=MEMORY,
        formerly="trunk_cache",
        choices=CACHE_PLACES,
    )
    full_logits: bool = option(
        False,
        "compute the loss from all logits at once: the same loss, more memory and time",
        group=MEMORY,
        formerly="whole_logits",
    )

    val_batches: int = option(
        25,
        "batches per validation; -1 uses all rows",
        group=REPORTS,
        at_least=-1,
        resumable=True,
    )
    steps_per_report: int = option(
        10, "steps between reports of the training loss", group=REPORTS, at_least=1, resumable=True
    )
    steps_per_eval: int = option(
        200, "steps between validations", group=REPORTS, at_least=1, resumable=True
    )
    report_to: str | None = option(
        None,
        "also send the metrics to this service (default: metrics.jsonl only)",
        group=REPORTS,
        choices=tuple(REPORTERS),
        resumable=True,
    )

    save_every: int = option(
        100,
        "steps between saves of the adapter and a checkpoint",
        group=KEEPING,
        at_least=1,
        resumable=True,
    )
    keep_checkpoints: int = option(
        2, "checkpoints to keep", group=KEEPING, at_least=1, resumable=True
    )
    resume: bool = option(
        False, "continue the run in the folder of --adapter-file", group=KEEPING, resumable=True
    )
    force: bool = option(
        False,
        "start a new run where an unfinished one could be resumed",
        group=KEEPING,
        resumable=True,
    )
    restarts: int = option(
        0,
        "if the training process is killed, restart it from the last checkpoint, up to N times",
        group=KEEPING,
        at_least=0,
        resumable=True,
    )

    test: bool = option(False, "compute the loss on the test split", group=TEST, resumable=True)
    test_batches: int = option(
        -1, "batches of the test; -1 uses all rows", group=TEST, at_least=-1, resumable=True
    )

    prompt: str | None = option(
        None,
        "generate a completion of this text; - reads it from standard input "
        "(default: generate nothing)",
        group=GENERATION,
        flags=("-p",),
        metavar="TEXT",
        resumable=True,
    )
    num_tokens: int = option(
        100,
        "most tokens to generate",
        group=GENERATION,
        flags=("-n", "-m", "--max-tokens"),
        at_least=1,
        resumable=True,
    )
    write_every: int = option(
        10, "print the answer every N tokens", group=GENERATION, at_least=1, resumable=True
    )
    temp: float = option(
        0.8,
        "sampling temperature; 0 takes the most likely token",
        group=GENERATION,
        flags=("--temperature",),
        at_least=0,
        resumable=True,
    )


_FIELDS = {field.name: field for field in dataclasses.fields(Options)}
_CURRENT_NAMES = {
    field.metadata["formerly"]: name
    for name, field in _FIELDS.items()
    if field.metadata["formerly"]
}
# The options of a batch; others of the same product make the same steps.
_BATCH = ("batch_size", "grad_accumulation_steps")
# Either one sets the length of a run.
_LENGTH = ("iters", "epochs")
_NOT_COMPARED = ("resume", "train", "force", "restarts", "adapter_file")


@dataclass(frozen=True)
class OptionChange:
    """An option that a resumed run has with another value.

    Attributes:
        name: of the option.
        text: its new and its old value, for a person.
        allowed: whether the run can go on with it.
    """

    name: str
    text: str
    allowed: bool


def from_mapping(values: Mapping[str, Any]) -> Options:
    """Options from names and values, such as a saved record, with defaults for the rest.

    Raises:
        InputError: keys that are not options, values of the wrong type or out of range; the
            message names all of them.
    """
    names = {name: _current_name(name) for name in values}
    problems = [_unknown_option(name) for name, current in names.items() if current not in _FIELDS]
    checked = {}
    for name, current in names.items():
        if current in _FIELDS:
            checked[current], problem = _checked(_FIELDS[current], values[name])
            problems += [problem] if problem else []
    if problems:
        raise InputError("; ".join(problems))
    return Options(**checked)


def record(options: Options) -> dict[str, Any]:
    """Names and values of all options, as a YAML or JSON file holds them."""
    return dataclasses.asdict(options)


def options_for_resume(
    saved: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[Options, list[str]]:
    """The options of a run that is resumed: its own, with the changes that are allowed.

    Args:
        saved: the options recorded by the run.
        given: the options of the command that resumes it.

    Returns:
        The options, and the changes as text.

    Raises:
        InputError: changes that would make it another run; the message names all of them.
    """
    before = from_mapping(saved)
    given = {_current_name(name): value for name, value in given.items()}
    length = dict.fromkeys(_LENGTH) if any(given.get(name) for name in _LENGTH) else {}
    now = dataclasses.replace(from_mapping({**record(before), **length, **given}), resume=False)
    changes = _changes(before, now)
    if refused := [change.text for change in changes if not change.allowed]:
        raise InputError(
            f"this run cannot be resumed with {'; '.join(refused)}; "
            "leave these options out, or start another run elsewhere"
        )
    return now, [change.text for change in changes]


def flag(name: str) -> str:
    """The command-line flag of an option."""
    return "--" + name.replace("_", "-")


def value_type(field: "dataclasses.Field[Any]") -> type:
    """The type of an option's value, `None` aside."""
    if isinstance(field.type, types.UnionType):
        return next(kind for kind in typing.get_args(field.type) if kind is not type(None))
    assert isinstance(field.type, type)
    return field.type


def _current_name(name: str) -> str:
    plain = name.replace("-", "_")
    return _CURRENT_NAMES.get(plain, plain)


def _unknown_option(name: str) -> str:
    hint = did_you_mean(name.replace("-", "_"), _FIELDS)
    return f"unknown option {name!r}" + (f" ({hint})" if hint else "")


def _checked(field: "dataclasses.Field[Any]", value: Any) -> tuple[Any, str | None]:
    """The value in its field's type, and what is wrong with it."""
    kind = value_type(field)
    if value is None and field.default is None:
        return value, None
    if kind is float and type(value) in (int, str):
        # YAML 1.1 reads 1e-5 as a string; it wants 1.0e-5.
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)
    if value is False and "off" in (field.metadata["choices"] or ()):
        value = "off"  # YAML 1.1 reads off as false.
    if type(value) is not kind:
        found, wanted = type(value).__name__, kind.__name__
        return value, f"{field.name}: {value!r} is a {found}, expected {wanted}"
    choices, least = field.metadata["choices"], field.metadata["at_least"]
    given = f"{flag(field.name)} {value}"
    if value == "" and field.name != "prompt":
        return value, f"{flag(field.name)}: its value is empty"
    if choices is not None and value not in choices:
        return value, f"{given}: give one of {', '.join(choices)}"
    if least == -1 and value == 0:
        return value, f"{given}: give at least 1, or -1 for all"
    if isinstance(value, float) and not math.isfinite(value):
        return value, f"{given}: give a number"
    if isinstance(value, int) and value > LARGEST_NUMBER:
        return value, f"{given}: give at most {LARGEST_NUMBER}"
    if least is not None and not value >= least:
        return value, f"{given}: give at least {least}"
    return value, None


def _changes(before: Options, now: Options) -> list[OptionChange]:
    rows = [options.batch_size * options.grad_accumulation_steps for options in (before, now)]
    allowed = set(_BATCH) if rows[0] == rows[1] else set()
    # Other schedules depend on the number of steps, so another number would change earlier steps.
    allowed |= set(_LENGTH) if now.lr_schedule == "constant" else set()
    changes = []
    for name, field in _FIELDS.items():
        old, new = getattr(before, name), getattr(now, name)
        if old != new and name not in _NOT_COMPARED:
            resumable = field.metadata["resumable"] and name not in _LENGTH
            text = f"{flag(name)} {new} (the run has {old})"
            changes.append(OptionChange(name, text, resumable or name in allowed))
    return changes
