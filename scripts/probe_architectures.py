"""Writes docs/architectures.md: what works for each architecture of mlx-lm, found by trying.

    python scripts/probe_architectures.py                 # all of them, a few minutes
    python scripts/probe_architectures.py llama mixtral   # these rows only

Each architecture is built with a tiny configuration and random weights. The checks are those of the
test of every architecture, in tests/support/architectures.py.
"""

import argparse
import contextlib
import io
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import graft  # noqa: E402, F401  (loads a fast BLAS before MLX)
from graft.adapters.targets import plan  # noqa: E402
from graft.engine.adapter_bank import AdapterBank  # noqa: E402
from graft.engine.row_adapters import MultiAdapterModel, can_batch  # noqa: E402
from graft.errors import InputError  # noqa: E402
from graft.quantization.choose import (  # noqa: E402
    choose_quantized_layers,
    quantization_settings,
)
from graft.runtime.cpu import suit_backend  # noqa: E402
from graft.training.chunked_loss import find_head  # noqa: E402

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402

from support.architectures import (  # noqa: E402
    RANK,
    Checks,
    adapt,
    make_model,
    read_configs,
    read_notes,
    wide_enough,
)

PAGE = ROOT / "docs" / "architectures.md"
YES, NO = "yes", "no"


def cell(checks: Checks, name: str) -> str:
    """The cell of a check: right, refused by Graft, or what is wrong."""
    problem = getattr(checks, name)()
    return f"no: {problem}" if problem else NO if name in checks.refused else YES


def default_targets(config: dict[str, Any]) -> str:
    """Whether the default targets can be adapted at any rank."""
    model = make_model(config)
    narrow = plan(model, rank=1, num_layers=-1).keys() - wide_enough(model).keys()
    names = sorted({path.rpartition(".")[2] for path in narrow})
    return f"all but {', '.join(f'`{name}`' for name in names)}" if names else YES


def chunked_loss(checks: Checks) -> str:
    """Whether the loss can be computed a chunk of the logits at a time."""
    return NO if find_head(checks.model)[0] is None else YES


def quantized_base(config: dict[str, Any]) -> str:
    """Whether an adapter trains on the model in 4 bits."""
    checks = Checks(config)
    model = checks.model = make_model(config, suited=False)
    chosen = choose_quantized_layers(model, quantization_settings(4, 32)).layers
    nn.quantize(model, class_predicate=lambda path, _: chosen.get(path, False))
    suit_backend(model)
    adapt(model, wide_enough(model))
    found = checks.gradients(checks.batch)
    return YES if all(mx.isfinite(g).all().item() for g in found.values()) else "no: not finite"


def serving(checks: Checks) -> str:
    """Whether the engine answers for base and adapter, and whether it does so in one batch."""
    answer = cell(checks, "serving")
    if answer != YES:
        return "refused" if answer == NO else answer
    model = make_model(checks.config)
    bank = AdapterBank(model, max_adapters=1, max_rank=RANK)
    return YES if can_batch(MultiAdapterModel(model, bank)) else "one at a time"


COLUMNS = {
    "fast gradients": lambda checks: cell(checks, "fast_gradients"),
    "default targets": lambda checks: default_targets(checks.config),
    "chunked loss": chunked_loss,
    "packing": lambda checks: cell(checks, "packing"),
    "activation cache": lambda checks: cell(checks, "activation_cache"),
    "gradient checkpointing": lambda checks: cell(checks, "checkpointing"),
    "4-bit base": lambda checks: quantized_base(checks.config),
    "fusing": lambda checks: cell(checks, "fusing"),
    "mlx-lm export": lambda checks: cell(checks, "mlx_lm"),
    "serving": serving,
}


def probe(name: str, config: dict[str, Any]) -> list[str]:
    """The cells of an architecture's row."""
    untried = read_notes()["untried"]
    if name in untried:
        return [f"not tried: {untried[name]}", *[""] * (len(COLUMNS) - 1)]
    cells, checks = [], Checks(config)
    mx.disable_compile()
    try:
        checks.trainable()
        for column in COLUMNS.values():
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    cells.append(column(checks))
            except Exception as error:  # every architecture fails in its own way
                cells.append(f"fails: {type(error).__name__}")
    except InputError:
        return ["refused: mlx-lm computes no gradient", *[""] * (len(COLUMNS) - 1)]
    finally:
        mx.enable_compile()
    return cells


def label(name: str, config: dict[str, Any]) -> str:
    """The architecture's `model_type`, and the variant where there are several."""
    kind = str(config["model_type"])
    return f"`{kind}`" if kind == name else f"`{kind}` ({name})"


def page(text: str, rows: Iterable[str]) -> str:
    """A page with these rows in place of its table."""
    start = text.index("| architecture |")
    lines = [f"| {' | '.join(['architecture', *COLUMNS])} |", "|---" * (len(COLUMNS) + 1) + "|"]
    return text[:start] + "\n".join([*lines, *rows]) + "\n"


def row(name: str, config: dict[str, Any], cells: list[str]) -> str:
    """A line of the table."""
    return f"| {' | '.join([label(name, config), *cells])} |"


def rows_of(text: str) -> dict[str, str]:
    """The rows of a page, by their label."""
    return {match[1]: match[0] for match in re.finditer(r"^\| (`.*?) \|.*$", text, re.MULTILINE)}


def main() -> int:
    """Probe the architectures that are named, or all, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="architectures (default: all)")
    options = parser.parse_args()
    configs = read_configs()
    for name in options.names or configs:
        line = row(name, configs[name], probe(name, configs[name]))
        print(line, flush=True)
        text = PAGE.read_text(encoding="utf-8")
        known = rows_of(text) | {label(name, configs[name]): line}
        labels = [label(name, config) for name, config in configs.items()]
        PAGE.write_text(page(text, [known[each] for each in labels if each in known]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
