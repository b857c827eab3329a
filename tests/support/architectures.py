"""Every architecture of mlx-lm, tiny and with random weights, and what must hold for each.

The checks share one model, and return what is wrong instead of raising, so that one failure does
not hide another. The rows are long enough for the fast attention.
"""

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import graft  # noqa: F401
from graft.adapters.adapter import adapter_of, apply_adapter
from graft.adapters.attach import attach, detach, merge_all, unmerge_all
from graft.adapters.files import load_adapter, save_adapter
from graft.adapters.layer_config import LayerConfig, largest_rank
from graft.adapters.targets import block_paths, plan
from graft.data.collate import collate, collate_packed
from graft.data.examples import Example
from graft.engine.engine import Engine
from graft.engine.errors import AdapterDoesNotFit
from graft.errors import InputError
from graft.exporting.adapter import export
from graft.pretrained.folder import find_folder
from graft.pretrained.load import build_model
from graft.pretrained.tokenizer import Tokenizer, load_tokenizer
from graft.runtime.cpu import suit_backend
from graft.training.frozen_prefix import (
    example_states,
    prefix_length,
    probe_prefix,
    remove_prefix,
    to_numpy,
)
from graft.training.grad_checkpoint import can_checkpoint, checkpoint_blocks
from graft.training.objectives import get_objective
from graft.training.packing import find_capacity
from graft.training.probe import check_trainable, loss_and_gradients
from graft.training.step import mean_loss

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

DATA = Path(__file__).parent / "data"
RANK, VOCABULARY = 2, 64
# The second row is padded.
LENGTHS = (65, 41)
# The largest difference, as a fraction of the largest value; gradients smaller than a share of the
# largest one are rounding.
TOLERANCE, SMALL_SHARE = 1e-3, 1e-3


@cache
def read_configs() -> dict[str, dict[str, Any]]:
    """The tiny configuration of each architecture, in alphabetical order."""
    configs: dict[str, dict[str, Any]] = json.loads((DATA / "architectures.json").read_text())
    return dict(sorted(configs.items(), key=lambda item: item[0].lower()))


@cache
def read_notes() -> dict[str, Any]:
    """What is known not to work, with the reason.

    `untried` has architectures that mlx-lm itself cannot run here; `refused` and `failing` have
    the names of checks, by architecture.
    """
    notes: dict[str, Any] = json.loads((DATA / "architecture_notes.json").read_text())
    return notes


def make_model(config: dict[str, Any], *, suited: bool = True) -> nn.Module:
    """The architecture with random weights, the same each time.

    What starts at zero does not stay there: rwkv7 divides by the length of a vector of zeros.
    """
    mx.random.seed(0)
    model = build_model(config)
    model.update(tree_map_with_path(_not_zero, model.parameters()))
    if suited:
        suit_backend(model)
    mx.eval(model.parameters())
    return model


def _not_zero(path: str, array: mx.array) -> mx.array:
    if not mx.issubdtype(array.dtype, mx.floating):
        return array
    noise = _moved(path, mx.zeros_like(array))
    return mx.where((array == 0).all(), noise, array)


def wide_enough(model: nn.Module) -> dict[str, LayerConfig]:
    """The default targets, all but those that are narrower than the rank."""
    modules = dict(model.named_modules())
    return {
        path: LayerConfig(RANK, 16.0, parts=each.parts)
        for path, each in plan(model, rank=1, num_layers=-1).items()
        if largest_rank(modules[path], each) >= RANK
    }


def adapt(model: nn.Module, settings: dict[str, LayerConfig]) -> None:
    """Attach an adapter whose update is not zero."""
    attach(model, settings)
    model.update(tree_map_with_path(_moved, model.trainable_parameters()))
    mx.eval(model.parameters())


def _moved(path: str, array: mx.array) -> mx.array:
    key = mx.random.key(sum(map(ord, path)))
    return array + 0.05 * mx.random.normal(array.shape, key=key).astype(array.dtype)


def examples() -> list[Example]:
    """Rows of random tokens."""
    generator = np.random.default_rng(0)
    tokens = [generator.integers(1, VOCABULARY, length).astype(np.int32) for length in LENGTHS]
    return [Example(row, np.ones(len(row), dtype=np.bool_)) for row in tokens]


def verdict(found: dict[str, mx.array], expected: dict[str, mx.array]) -> str:
    """Which array differs most from what is expected; empty if none does."""
    largest = max(mx.abs(array).max().item() for array in expected.values())
    worst = ""
    for path, array in expected.items():
        allowed = TOLERANCE * max(mx.abs(array).max().item(), SMALL_SHARE * largest)
        # Not greater, because NaN must not pass.
        if not mx.abs(found[path] - array).max().item() <= allowed:
            worst = path
    return f"{worst or 'loss'} differs" if worst else ""


@contextlib.contextmanager
def without_shortcuts() -> Iterator[None]:
    """Compute as plain MLX does until the context ends."""
    os.environ["GRAFT_SHORTCUTS"] = "off"
    try:
        yield
    finally:
        del os.environ["GRAFT_SHORTCUTS"]


@cache
def tokenizer() -> Tokenizer:
    """The included model's, which no answer here depends on."""
    return load_tokenizer(find_folder(None))


def ids(answers: list[Any]) -> list[list[int]]:
    """The token ids of each answer."""
    return [[token.id for token in answer.tokens] for answer in answers]


def _compare_answers(engine: Engine) -> str:
    prompts = (([1, 2, 3, 4, 5], {"a": 1.0}), ([6, 7, 8], {}))
    limits = {"max_tokens": 2, "temperature": 0}
    alone = [engine.generate(p, adapters=a, **limits) for p, a in prompts]
    streams = [engine.submit(p, adapters=a, **limits) for p, a in prompts]
    together = [stream.result() for stream in streams]
    return "" if ids(alone) == ids(together) else "answers differ"


@dataclass
class Checks:
    """The checks of one architecture; each method returns what is wrong, or nothing."""

    config: dict[str, Any]
    refused: set[str] = field(default_factory=set)
    objective: Any = field(default_factory=lambda: get_objective("sft"))

    @cached_property
    def model(self) -> Any:
        """With an adapter, not yet suited to the CPU."""
        model = make_model(self.config, suited=False)
        adapt(model, wide_enough(model))
        return model

    @cached_property
    def plain(self) -> dict[str, mx.array]:
        """Loss and gradients in plain MLX."""
        with without_shortcuts():
            found = self.gradients(self.batch)
        suit_backend(self.model)
        return found

    @cached_property
    def batch(self) -> dict[str, mx.array]:
        """Both rows."""
        return collate(examples(), range(len(LENGTHS))).to_mlx()

    @cached_property
    def logits(self) -> mx.array:
        """What the adapted model computes."""
        self.model.eval()
        return self.model(self.batch["inputs"])

    def gradients(self, batch: dict[str, mx.array]) -> dict[str, mx.array]:
        """The loss and all gradients by name."""
        (loss, *_), tree = loss_and_gradients(self.model, self.objective, batch)
        return {"loss": loss, **dict(tree_flatten(tree))}

    def trainable(self) -> str:
        """Training computes a gradient."""
        check_trainable(self.model, self.objective)
        return ""

    def fast_gradients(self) -> str:
        """The fast paths of the CPU change neither loss nor gradients."""
        expected = self.plain
        return verdict(self.gradients(self.batch), expected)

    def training(self) -> str:
        """A small step against the gradient lowers the loss."""
        before, gradients = self.plain["loss"], self.plain
        norm = mx.sqrt(sum(mx.square(g).sum() for n, g in gradients.items() if n != "loss"))
        if not mx.isfinite(norm).item():
            return "the gradient is not finite"
        weights = dict(tree_flatten(self.model.trainable_parameters()))
        for step in (1e-2, 1e-3):
            moved = [(n, w - step / norm * gradients[n]) for n, w in weights.items()]
            self.model.load_weights(moved, strict=False)
            after = mean_loss(self.objective)(self.model, self.batch)[0].item()
            self.model.load_weights(list(weights.items()), strict=False)
            if after < before.item():
                return ""
        return f"the loss goes from {before.item()} to {after}"

    def checkpointing(self) -> str:
        """Gradient checkpointing leaves the gradients as they are, or is refused."""
        if not can_checkpoint(self.model, self.objective):
            return self.refuse("checkpointing")
        undo = checkpoint_blocks(self.model)
        try:
            return verdict(self.gradients(self.batch), self.plain)
        finally:
            undo()

    def packing(self) -> str:
        """Rows that share one have the gradients that they have alone, or packing is refused."""
        _ = self.plain
        if find_capacity(self.model, sum(LENGTHS)) is None:
            return self.refuse("packing")
        packed = collate_packed(examples(), [range(len(LENGTHS))]).to_mlx()
        return verdict(self.gradients(packed), self.plain)

    def activation_cache(self) -> str:
        """Training from the output of the lower blocks gives the same, or it is refused."""
        expected = self.plain
        blocks = block_paths(self.model)
        if not blocks:
            return self.refuse("activation_cache")
        lower = tuple(f"{block}." for block in blocks[: len(blocks) // 2])
        frozen = [m for p, m in self.model.named_modules() if f"{p}.".startswith(lower)]
        outside = [p for p in expected if p != "loss" and not p.startswith(tuple(blocks))]
        before = [(m, set(m._no_grad)) for m in frozen]
        for module in frozen:
            module.freeze(recurse=False)
        try:
            return self._from_states(expected, outside)
        finally:
            for module, names in before:
                module._no_grad = names

    def _from_states(self, expected: dict[str, mx.array], outside: list[str]) -> str:
        length = prefix_length(self.model)
        if length == 0 or probe_prefix(self.model, length, self.objective) is None:
            return self.refuse("activation_cache")
        states = map(to_numpy, example_states(self.model, length, examples()))
        rows = [replace(row, states=s) for row, s in zip(examples(), states, strict=True)]
        undo = remove_prefix(self.model, length)
        try:
            found = self.gradients(collate(rows, range(len(rows))).to_mlx())
        finally:
            undo()
        return verdict(found, {path: expected[path] for path in found})

    def fusing(self) -> str:
        """Fused layers return what base and update return."""
        expected = self.logits
        merge_all(self.model)
        try:
            return verdict({"logits": self.model(self.batch["inputs"])}, {"logits": expected})
        finally:
            unmerge_all(self.model)

    def saving(self) -> str:
        """A saved adapter, loaded into the base, gives the same bits."""
        expected = self.logits
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "adapters.safetensors")
            save_adapter(path, self.model)
            detach(self.model)
            apply_adapter(self.model, load_adapter(path), name="the saved one")
        same = mx.array_equal(self.model(self.batch["inputs"]), expected).item()
        return "" if same else "logits differ"

    def mlx_lm(self) -> str:
        """mlx-lm's own loader reads the export, and so does Graft."""
        from mlx_lm.tuner.utils import load_adapters

        expected, adapter = self.logits, adapter_of(self.model)
        fresh = make_model(self.config, suited=False)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "out")
            try:
                export(adapter, out, to="mlx-lm")
            except InputError:
                return self.refuse("mlx_lm")
            detach(self.model)
            apply_adapter(self.model, load_adapter(out), name="the exported one")
            again = self.model(self.batch["inputs"])
            load_adapters(fresh, str(out))
        fresh.eval()
        found = {"mlx-lm": fresh(self.batch["inputs"]), "Graft": again}
        return verdict(found, dict.fromkeys(found, expected))

    def serving(self) -> str:
        """Rows answered together have the answers that they get alone, or it is refused."""
        trained = make_model(self.config)
        adapt(trained, wide_enough(trained))
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            path = Path(folder, "adapters.npz")
            save_adapter(path, trained)
            try:
                with Engine(make_model(self.config), tokenizer(), prompt_cache_bytes=0) as engine:
                    engine.load_adapter("a", path)
                    return _compare_answers(engine)
            except (AdapterDoesNotFit, InputError):
                return self.refuse("serving")

    def refuse(self, name: str) -> str:
        """Note that Graft itself has refused what a check is about."""
        self.refused.add(name)
        return ""


CHECKS: tuple[Callable[[Checks], str], ...] = (
    Checks.trainable,
    Checks.fast_gradients,
    Checks.training,
    Checks.checkpointing,
    Checks.packing,
    Checks.activation_cache,
    Checks.fusing,
    Checks.saving,
    Checks.mlx_lm,
    Checks.serving,
)


def run_checks(config: dict[str, Any]) -> tuple[dict[str, str], set[str]]:
    """What is wrong by check, and the checks whose fast path Graft has refused."""
    checks, wrong = Checks(config), dict[str, str]()
    for check in CHECKS:
        try:
            problem = check(checks)
        except Exception as error:  # every architecture fails in its own way
            problem = f"{type(error).__name__}: {error}"
        if problem:
            wrong[check.__name__] = problem.splitlines()[0][:200]
        if "trainable" in wrong:
            break  # Runs are refused at their start, so there is no adapter for the other checks.
    return wrong, checks.refused


def check_architecture(name: str) -> None:
    """Assert that an architecture does all that it is noted to do, and nothing more."""
    notes = read_notes()
    with contextlib.redirect_stdout(io.StringIO()):
        wrong, refused = run_checks(read_configs()[name])
    known = notes["failing"].get(name, {})
    assert set(wrong) == set(known), (wrong, "what works now leaves architecture_notes.json")
    assert sorted(refused) == notes["refused"].get(name, [])
