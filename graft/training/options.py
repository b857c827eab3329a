"""Every option of `lora.py`, declared once.

The command line, the YAML file of `--config` and the record that is saved beside an adapter all
come from the fields of `Options`. Knows nothing of what the options do.
"""

import argparse
import contextlib
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.adapters.method_names import method_names
from graft.cli.command import Parser
from graft.errors import InputError

OPTIMIZERS = ("adam", "adamw", "sgd", "lion", "adafactor", "muon")
SCHEDULES = ("constant", "linear", "cosine")
TRUNK_CACHES = ("auto", "memory", "disk", "off")
REPORTERS = ("wandb", "tensorboard")

NO_ADAPTER = "none"
DEFAULT_ADAPTER = "adapters/adapters.npz"
DEFAULT_ITERS = 1000
DEFAULT_ALPHA = 16.0


def option(
    default: Any,
    text: str,
    *,
    short: Sequence[str] = (),
    at_least: float | None = None,
    choices: Sequence[str] | None = None,
    harmless: bool = False,
) -> Any:
    """A field of `Options`.

    Args:
        default: its value where it is not given.
        text: its help.
        short: further flags.
        at_least: the least value that makes sense; where that is -1, it stands for "all" and 0
            makes no sense.
        choices: all values there are.
        harmless: whether a run can be resumed with another value; what `model` and `data` hold is
            compared by itself.
    """
    metadata = {
        "help": text,
        "short": tuple(short),
        "at_least": at_least,
        "choices": choices,
        "harmless": harmless,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a run of `lora.py` is told. Field `steps_per_eval` is `--steps-per-eval`, and so on."""

    model: str | None = option(
        None, "model folder or Hub name (default: the embedded base model)", harmless=True
    )
    adapter_file: str | None = option(
        None,
        f"adapter to write or read; '{NO_ADAPTER}' for the base model (default: {DEFAULT_ADAPTER})",
    )
    seed: int = option(0, "seed of everything random", at_least=0)

    train: bool = option(False, "train an adapter")
    data: str = option(
        "datasets/mlx-docs",
        "folder with train, valid and test (.jsonl, .parquet, .txt), one such file, folder of .txt "
        "and .md files, or Hugging Face dataset as OWNER/NAME[:CONFIG]",
        harmless=True,
    )
    valid_fraction: float = option(
        0.1,
        "share set aside for validation where the data is not divided; --test then takes it too",
        at_least=0,
    )
    mask_prompt: bool = option(
        False, "learn completions and the assistant's turns only, not what they answer"
    )
    overlap: int = option(
        0, "tokens of plain text that a window repeats from the one before, untrained", at_least=0
    )
    lora_layers: int | None = option(
        None,
        "the last so many transformer layers are adapted, -1 for all (default: 16, or all)",
    )
    method: str = option("lora", f"training method: {', '.join(method_names())}")
    targets: str | None = option(
        None,
        "what to adapt, by comma: names (q_proj, lm_head), paths, globs ('*.mlp.*'), all-linear, "
        "all-norms, all-biases (default: all-linear, or what suits the method)",
    )
    rank: int = option(8, "rank of the adapter", at_least=1)
    alpha: float | None = option(
        None,
        f"the update is scaled by alpha / rank (default: {DEFAULT_ALPHA:g}, or what an adapter "
        "that is read tells)",
        at_least=0,
    )
    rank_pattern: str | None = option(
        None, "ranks of some layers, by names as for --targets: 'q_proj=16,*norm*=1'"
    )
    alpha_pattern: str | None = option(None, "alphas of some layers, likewise")
    original_model: str | None = option(
        None, "the model before quantization, for --method loftq: folder or Hub name"
    )
    dropout: float = option(0.0, "dropout on the adapter's input, 0 to 1", at_least=0)
    batch_size: int = option(4, "rows at a time", at_least=1)
    pack: bool = option(
        False,
        "put several rows into one of up to --max-seq-length tokens, where none sees the others; "
        "--batch-size then counts these",
    )
    lanes: int | None = option(
        None,
        "parts of a batch that are computed side by side, each by a process (default: one a core "
        "on Linux's CPU; elsewhere there is 1)",
        at_least=1,
    )
    grad_accumulation_steps: int = option(
        1, "add up the gradients of so many batches for one step", at_least=1
    )
    iters: int | None = option(
        None, f"steps to train (default: {DEFAULT_ITERS})", at_least=1, harmless=True
    )
    epochs: float | None = option(
        None, "how often to go over the data, instead of --iters", at_least=0, harmless=True
    )
    learning_rate: float = option(1e-4, "learning rate of the optimizer", at_least=0)
    optimizer: str = option("adam", "what updates the adapter", choices=OPTIMIZERS)
    lr_schedule: str = option(
        "constant", "course of the learning rate after the warm-up", choices=SCHEDULES
    )
    warmup_steps: int = option(0, "steps in which the learning rate rises", at_least=0)
    weight_decay: float = option(0.0, "decay of the adapter's weights a step", at_least=0)
    grad_clip: float = option(0.0, "largest norm of the gradient, 0 for any", at_least=0)
    lora_plus_ratio: float = option(
        1.0, "learning rate of lora_b over that of lora_a (LoRA+)", at_least=0
    )
    grad_checkpoint: bool = option(
        False, "compute again in the backward pass instead of keeping: less memory, more time"
    )
    memory_budget: str | None = option(
        None,
        "most memory that the training may take, such as 12GB: divides batches, recomputes and "
        "places the trunk cache so that it fits",
        harmless=True,
    )
    trunk_cache: str = option(
        "auto",
        "keep what enters the first adapted layer instead of computing it for every step; auto "
        "does where rows are seen more than once and it fits",
        choices=TRUNK_CACHES,
    )
    whole_logits: bool = option(
        False, "compute the loss from whole logits: more memory and time, the same loss"
    )
    max_bad_steps: int = option(
        5, "steps in a row that may fail to be finite", at_least=1, harmless=True
    )
    max_seq_length: int = option(
        2048,
        "longest row in tokens; longer ones are cut (at most the model's own context)",
        at_least=2,
    )
    add_eos_token: int = option(1, "end each row with the token that ends texts; 0 for no")
    val_batches: int = option(25, "batches in a validation, -1 for all", at_least=-1, harmless=True)
    steps_per_report: int = option(
        10, "steps between reports of the training loss", at_least=1, harmless=True
    )
    steps_per_eval: int = option(200, "steps between validations", at_least=1, harmless=True)
    early_stop: int = option(
        0,
        "stop after so many validations without a better one, 0 for never",
        at_least=0,
        harmless=True,
    )
    save_every: int = option(
        100, "steps between saves of adapter and checkpoint", at_least=1, harmless=True
    )
    keep_checkpoints: int = option(2, "how many checkpoints to keep", at_least=1, harmless=True)
    resume: bool = option(False, "continue the run in the folder of --adapter-file", harmless=True)
    force: bool = option(
        False, "start anew where an unfinished run could be resumed", harmless=True
    )
    restarts: int = option(
        0,
        "train in a process of its own and resume it when it is killed",
        at_least=0,
        harmless=True,
    )
    report_to: str | None = option(
        None, "report the metrics there too", choices=REPORTERS, harmless=True
    )
    resume_adapter_file: str | None = option(
        None, "start from this adapter's weights, with a fresh optimizer"
    )

    test: bool = option(False, "measure the loss on test.jsonl", harmless=True)
    test_batches: int = option(-1, "batches in the test, -1 for all", at_least=-1, harmless=True)

    prompt: str | None = option(None, "generate an answer to this", short=("-p",), harmless=True)
    num_tokens: int = option(
        100,
        "most tokens to generate",
        short=("-n", "-m", "--max-tokens"),
        at_least=1,
        harmless=True,
    )
    write_every: int = option(10, "tokens between writes of the answer", at_least=1, harmless=True)
    temp: float = option(
        0.8, "sampling temperature; 0 takes the likeliest token", at_least=0, harmless=True
    )


def build_parser(description: str, names: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """A parser with every option, which leaves out of its result whatever was not given.

    Args:
        description: of the command.
        names: the fields that the command has; all by default.
    """
    parser = Parser(description=description, argument_default=argparse.SUPPRESS)
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file of options; the command line wins"
    )
    for field in dataclasses.fields(Options):
        if names is not None and field.name not in names:
            continue
        text = field.metadata["help"]
        if field.default not in (None, False) and "(default" not in text:
            text += f" (default: {field.default})"
        flags = (*field.metadata["short"], flag(field.name))
        kind = _value_type(field)
        if kind is bool:
            parser.add_argument(*flags, dest=field.name, action="store_true", help=text)
        else:
            choices = field.metadata["choices"]
            metavar = None if choices else _METAVARS[kind]
            parser.add_argument(
                *flags, dest=field.name, type=kind, metavar=metavar, choices=choices, help=text
            )
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> dict[str, Any]:
    """What a command line gives, over what its `--config` file does; no defaults.

    Raises:
        InputError: the file cannot be read.
    """
    given = vars(parser.parse_args(argv))
    file = given.pop("config", None)
    return {**(_read_yaml(Path(file)) if file else {}), **given}


def from_mapping(values: Mapping[str, Any]) -> Options:
    """Options from names and values, such as a saved record, with defaults for the others.

    Raises:
        InputError: keys that are no options, values of the wrong type or out of range; all of them
            named.
    """
    fields = {field.name: field for field in dataclasses.fields(Options)}
    names = {name: name.replace("-", "_") for name in values}
    problems = [_unknown(name, fields) for name, plain in names.items() if plain not in fields]
    checked = {}
    for name, plain in names.items():
        if plain in fields:
            checked[plain], problem = _checked(fields[plain], values[name])
            problems += [problem] if problem else []
    if problems:
        raise InputError("; ".join(problems))
    return Options(**checked)


def record(options: Options) -> dict[str, Any]:
    """Names and values of all options, as a YAML or JSON file holds them."""
    return dataclasses.asdict(options)


def resumed(saved: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[Options, list[str]]:
    """The options of a run that is continued: its own, with harmless changes.

    Args:
        saved: the record of the run.
        given: what the command that continues it says.

    Returns:
        The options, and what has changed, a line each.

    Raises:
        InputError: changes that would make it another run; all of them named.
    """
    before = from_mapping(saved)
    length = dict.fromkeys(_LENGTH) if any(given.get(name) for name in _LENGTH) else {}
    now = dataclasses.replace(from_mapping({**saved, **length, **given}), resume=False)
    changes = _changes(before, now)
    rows = before.batch_size * before.grad_accumulation_steps
    if now.batch_size * now.grad_accumulation_steps == rows:
        changes = {
            name: (line, harmless or name in _ROWS) for name, (line, harmless) in changes.items()
        }
    refused = [line for line, harmless in changes.values() if not harmless]
    if refused:
        raise InputError(
            f"this run cannot be resumed with {'; '.join(refused)}; "
            "leave these options out, or start another run elsewhere"
        )
    return now, [line for line, _ in changes.values()]


def flag(name: str) -> str:
    """The command-line flag of an option."""
    return "--" + name.replace("_", "-")


_ROWS = ("batch_size", "grad_accumulation_steps")
# Either tells how long a run is.
_LENGTH = ("iters", "epochs")
_NO_CHANGE = ("resume", "train", "force", "restarts", "adapter_file")
_METAVARS = {int: "N", float: "X", str: "TEXT"}


def _value_type(field: "dataclasses.Field[Any]") -> type:
    """The type of a field's value, `None` aside."""
    if isinstance(field.type, types.UnionType):
        return next(kind for kind in typing.get_args(field.type) if kind is not type(None))
    assert isinstance(field.type, type)
    return field.type


def _checked(field: "dataclasses.Field[Any]", value: Any) -> tuple[Any, str | None]:
    """The value as its field wants it, and what is wrong with it."""
    kind = _value_type(field)
    if value is None and field.default is None:
        return value, None
    if kind is float and type(value) in (int, str):
        # YAML 1.1 takes 1e-5 for a string: it wants 1.0e-5.
        with contextlib.suppress(ValueError):
            value = float(value)
    if type(value) is not kind:
        return (
            value,
            f"{field.name}: {value!r} is a {type(value).__name__}, expected {kind.__name__}",
        )
    choices, least = field.metadata["choices"], field.metadata["at_least"]
    if choices is not None and value not in choices:
        return value, f"{flag(field.name)} {value}: give one of {', '.join(choices)}"
    if least == -1 and value == 0:
        return value, f"{flag(field.name)} {value}: give at least 1, or -1 for all"
    if isinstance(value, float) and not math.isfinite(value):
        return value, f"{flag(field.name)} {value}: give a number"
    if least is not None and not value >= least:
        return value, f"{flag(field.name)} {value}: give at least {least}"
    return value, None


def _changes(before: Options, now: Options) -> dict[str, tuple[str, bool]]:
    """From option to how it changed and whether that is harmless."""
    changes = {}
    for field in dataclasses.fields(Options):
        old, new = getattr(before, field.name), getattr(now, field.name)
        if old != new and field.name not in _NO_CHANGE:
            line = f"{flag(field.name)} {new} (the run has {old})"
            changes[field.name] = line, _is_harmless(field, now)
    return changes


def _is_harmless(field: "dataclasses.Field[Any]", options: Options) -> bool:
    if field.name in _LENGTH:
        # Other schedules end with the run, so more steps would change the ones before.
        return options.lr_schedule == "constant"
    return bool(field.metadata["harmless"])


def _unknown(name: str, fields: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name.replace("-", "_"), fields, n=1)
    return f"unknown option {name!r}" + (f" (did you mean {near[0]}?)" if near else "")


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read --config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no options: write one `name: value` a line")
    return {str(key): value for key, value in content.items()}
