"""Writes docs/architectures.md: what works for each architecture of mlx-lm, found by trying.

    python scripts/probe_architectures.py                 # all of them, a quarter of an hour
    python scripts/probe_architectures.py llama mixtral   # these rows only

Each architecture is built with a tiny configuration and random weights. Where Graft has a probe of
its own for a fast path, that probe decides; the other columns compare with the plain computation.
"""

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import graft  # noqa: F401  (loads a fast BLAS before MLX)
from graft.adapters.attach import attach
from graft.adapters.files import save_adapter
from graft.adapters.layer_config import LayerConfig, largest_rank
from graft.adapters.targets import block_paths, plan
from graft.data.examples import Example, Split
from graft.engine.adapter_bank import AdapterBank
from graft.engine.engine import Engine
from graft.engine.errors import AdapterDoesNotFit
from graft.engine.row_adapters import MultiAdapterModel, can_batch
from graft.pretrained.folder import find_folder
from graft.pretrained.load import build_model
from graft.pretrained.tokenizer import load_tokenizer
from graft.runtime.cpu import suit_backend
from graft.training.activation_cache import cache_activations
from graft.training.chunked_loss import find_head
from graft.training.frozen_prefix import prefix_removed
from graft.training.grad_checkpoint import can_checkpoint
from graft.training.objectives import get_objective
from graft.training.packing import find_capacity

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architectures.md"
CONFIGS = ROOT / "tests" / "support" / "data" / "architectures.json"

RANK, LENGTH, VOCABULARY = 2, 40, 64
TOLERANCE = 1e-3
SECONDS = 300

YES = "yes"
# What ends the process or needs a machine that is not there.
UNTRIED = {
    "bitnet": "not tried: needs Metal",
    "muse_spark": "not tried: needs Metal",
    "olmo": "not tried: mlx-lm needs the package ai2-olmo",
    "phi3small": "not tried: mlx-lm ends the process on a CPU",
}


def make_model(config: dict[str, Any], *, suited: bool = True) -> nn.Module:
    """The architecture with random weights, the same each time."""
    mx.random.seed(0)
    model = build_model(config)
    if suited:
        suit_backend(model)
    mx.eval(model.parameters())
    return model


def make_adapted(config: dict[str, Any], *, upper_half: bool = False, suited: bool = True) -> Any:
    """The same with an adapter on the default targets, whose update is not zero."""
    model = make_model(config, suited=suited)
    adapt(model, wide_enough(model), upper_half=upper_half)
    return model


def adapt(model: nn.Module, settings: dict[str, LayerConfig], *, upper_half: bool = False) -> None:
    """Attach an adapter whose update is not zero."""
    if upper_half:
        blocks = block_paths(model)
        upper = tuple(f"{block}." for block in blocks[len(blocks) // 2 :])
        settings = {path: each for path, each in settings.items() if path.startswith(upper)}
    attach(model, settings)
    model.update(tree_map_with_path(_moved, model.trainable_parameters()))
    mx.eval(model.parameters())


def _moved(path: str, array: mx.array) -> mx.array:
    key = mx.random.key(sum(map(ord, path)))
    return array + 0.05 * mx.random.normal(array.shape, key=key).astype(array.dtype)


def wide_enough(model: nn.Module) -> dict[str, LayerConfig]:
    """The default targets, all but those that are narrower than the rank."""
    settings = plan(model, rank=1, num_layers=-1)
    narrow = narrow_layers(model, settings)
    return {
        path: LayerConfig(RANK, 16.0, parts=each.parts)
        for path, each in settings.items()
        if path not in narrow
    }


def narrow_layers(model: nn.Module, settings: dict[str, LayerConfig]) -> set[str]:
    """Paths of the layers that cannot have an adapter of this rank."""
    modules = dict(model.named_modules())
    return {path for path, each in settings.items() if largest_rank(modules[path], each) < RANK}


def loss(model: nn.Module, batch: dict[str, mx.array]) -> mx.array:
    """Mean cross-entropy over the tokens of the loss mask."""
    total, count, _ = get_objective("sft")(model, batch)
    return total / count


def sample() -> dict[str, mx.array]:
    """A batch of two rows; in the second one, half of the tokens count."""
    tokens = mx.array(np.random.default_rng(0).integers(1, VOCABULARY, (2, LENGTH + 1)))
    loss_mask = mx.arange(LENGTH)[None] >= mx.array([[0], [LENGTH // 2]])
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "loss_mask": loss_mask}


def gradients(model: nn.Module) -> dict[str, mx.array]:
    """The gradient of each trained tensor, in training mode."""
    model.train()
    _, found = nn.value_and_grad(model, loss)(model, sample())
    mx.eval(found)
    return dict(tree_flatten(found))


def verdict(found: dict[str, mx.array], expected: dict[str, mx.array]) -> str:
    """Whether gradients agree, each to a share of its largest value."""
    for path, gradient in expected.items():
        largest = mx.abs(gradient).max().item()
        if not mx.abs(found[path] - gradient).max().item() <= TOLERANCE * largest:
            return "no: gradients differ"
    return YES


# One function a column; each returns a cell.


def default_targets(config: dict[str, Any]) -> str:
    """Whether the default targets can be adapted at any rank."""
    model = make_model(config)
    settings = plan(model, rank=1, num_layers=-1)
    names = sorted({path.rpartition(".")[2] for path in narrow_layers(model, settings)})
    return f"all but {', '.join(f'`{name}`' for name in names)}" if names else YES


def fast_gradients(config: dict[str, Any]) -> str:
    """Whether gradients with the CPU's fast paths are those without."""
    plain = gradients(make_adapted(config, suited=False))
    return verdict(gradients(make_adapted(config)), plain)


def chunked_loss(config: dict[str, Any]) -> str:
    """Whether the loss can be computed a chunk of the logits at a time."""
    return "no" if find_head(make_adapted(config))[0] is None else YES


def packing(config: dict[str, Any]) -> str:
    """Whether several rows can share one without seeing each other."""
    return "no" if find_capacity(make_adapted(config), 64) is None else YES


def activation_cache(config: dict[str, Any]) -> str:
    """Whether training can start from the stored output of the frozen blocks."""
    model = make_adapted(config, upper_half=True)
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, LENGTH).astype(np.int32)
    rows = [Example(tokens, np.ones(LENGTH, dtype=np.bool_))] * 2
    with tempfile.TemporaryDirectory() as folder:
        cache_activations(
            model,
            {"train": Split(rows)},
            get_objective("sft"),
            mode="memory",
            repeated=True,
            folder=Path(folder),
            model_key="",
        )
    return YES if prefix_removed(model) else "no"


def checkpointing(config: dict[str, Any]) -> str:
    """Whether recomputing blocks in the backward pass leaves the gradients as they are."""
    return YES if can_checkpoint(make_adapted(config), get_objective("sft")) else "no"


def quantized_base(config: dict[str, Any]) -> str:
    """Whether an adapter trains on the model in 4 bits."""
    model = make_model(config, suited=False)
    nn.quantize(
        model,
        group_size=32,
        bits=4,
        class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % 32 == 0,
    )
    suit_backend(model)
    adapt(model, wide_enough(model))
    found = gradients(model)
    return YES if all(mx.isfinite(g).all().item() for g in found.values()) else "no: not finite"


def serving(config: dict[str, Any]) -> str:
    """Whether the engine answers for base and adapter, and whether it does so in one batch."""
    trained = make_model(config)
    adapt(trained, wide_enough(trained))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "adapters.npz")
        save_adapter(path, trained)
        with (
            contextlib.redirect_stderr(io.StringIO()),
            Engine(make_model(config), load_tokenizer(find_folder(None))) as engine,
        ):
            try:
                engine.load_adapter("a", path)
            except AdapterDoesNotFit:
                return "refused"
            prompts = ([1, 2, 3, 4, 5], {"a": 1.0}), ([6, 7, 8], {})
            streams = [
                engine.submit(prompt, adapters=adapters, max_tokens=3, temperature=0)
                for prompt, adapters in prompts
            ]
            for stream in streams:
                stream.result()
    model = make_model(config)
    bank = AdapterBank(model, max_adapters=1, max_rank=RANK)
    return YES if can_batch(MultiAdapterModel(model, bank)) else "one at a time"


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "fast gradients": fast_gradients,
    "default targets": default_targets,
    "chunked loss": chunked_loss,
    "packing": packing,
    "activation cache": activation_cache,
    "gradient checkpointing": checkpointing,
    "4-bit base": quantized_base,
    "serving": serving,
}


def probe(name: str, config: dict[str, Any]) -> list[str]:
    """The cells of an architecture's row."""
    if name in UNTRIED:
        return [UNTRIED[name], *[""] * (len(COLUMNS) - 1)]
    cells = []
    for column in COLUMNS.values():
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                cells.append(column(config))
        except Exception as error:  # every architecture fails in its own way
            cells.append(f"fails: {type(error).__name__}")
    return cells


def read_configs() -> dict[str, dict[str, Any]]:
    """The tiny configuration of each architecture."""
    configs: dict[str, dict[str, Any]] = json.loads(CONFIGS.read_text(encoding="utf-8"))
    return dict(sorted(configs.items(), key=lambda item: item[0].lower()))


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


def probe_apart(name: str) -> list[str]:
    """The cells of a row, found in another process, because some architectures end it."""
    command = [sys.executable, __file__, "--cells", name]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, env=environment
        )
        cells: list[str] = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, ValueError):
        cells = ["ends the process or hangs", *[""] * (len(COLUMNS) - 1)]
    return cells


def main() -> int:
    """Probe the architectures that are named, or all, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="architectures (default: all)")
    parser.add_argument("--cells", metavar="NAME", help="print the cells of one row as JSON")
    options = parser.parse_args()
    configs = read_configs()
    if options.cells:
        print(json.dumps(probe(options.cells, configs[options.cells])))
        return 0
    for name in options.names or configs:
        line = row(name, configs[name], probe_apart(name))
        print(line, flush=True)
        text = PAGE.read_text(encoding="utf-8")
        known = rows_of(text) | {label(name, configs[name]): line}
        labels = [label(name, config) for name, config in configs.items()]
        PAGE.write_text(page(text, [known[each] for each in labels if each in known]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
