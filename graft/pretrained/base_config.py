"""A base model's architecture, for code that needs facts about it but never its weights."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from typing import Any

from graft.errors import InputError
from graft.models import weight_shape
from graft.pretrained.architectures import (
    HALVES,
    INTERLEAVED,
    ROTARY_PROJECTIONS,
)
from graft.pretrained.folder import find_folder, open_folder
from graft.pretrained.load import build_model
from graft.pretrained.mlx_names import parameters_of, sanitized
from graft.storage.lazy_tensors import LazyTensor

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class BaseConfig:
    """The base model of an adapter, without its weights.

    Attributes:
        name: a folder or Hub name; `None` is the included model.
        config: the content of `config.json`.
        tensors: the checkpoint's, on disk; `None` if only the configuration is known.
    """

    name: str | None
    config: Mapping[str, Any]
    tensors: Mapping[str, LazyTensor] | None = None

    @property
    def architecture(self) -> str:
        """mlx-lm's name, such as `llama`."""
        return str(self.config.get("model_type"))

    @cached_property
    def model(self) -> nn.Module:
        """The architecture as loading builds it; its weights are never computed.

        Raises:
            InputError: mlx-lm has no such architecture.
        """
        model = build_model(dict(self.config))
        if self.tensors is not None:
            arrays = {n: mx.zeros(t.shape, t.dtype) for n, t in self.tensors.items()}
        else:
            arrays = parameters_of(model)
            if self.config.get("tie_word_embeddings") is not False:
                arrays = {
                    n: a for n, a in arrays.items() if n.rpartition(".")[0] not in _heads(model)
                }
        # Some architectures have a head until `sanitize` sees a checkpoint without one.
        try:
            sanitized(model, arrays, str(self.name))
        except InputError:
            return build_model(dict(self.config))
        return model

    @property
    def tied(self) -> bool:
        """Whether the output shares the embedding's weight."""
        return is_tied(self.model)

    @property
    def rotary(self) -> str:
        """The order of the rows of q and k."""
        return rotary_order(self.model)

    def heads(self, path: str) -> int | None:
        """The number of heads of the layer at a path, if it is a q or k projection.

        Raises:
            InputError: the configuration has no number of heads.
        """
        return head_count(self.config, path, str(self.name))


def rotary_order(model: nn.Module) -> str:
    """The order of the rows of q and k in a model: transformers' ("halves") or Meta's.

    mlx-lm runs transformers' checkpoints of every architecture as they are, also where transformers
    itself rotates neighbors (GLM-4, Cohere). So the rows are in another order only if
    `rope_traditional` differs from the architecture's default.
    """
    args = getattr(getattr(model, "language_model", model), "args", None)
    if not is_dataclass(args):
        return HALVES
    default = {field.name: field.default for field in fields(args)}.get("rope_traditional", False)
    return HALVES if getattr(args, "rope_traditional", default) == default else INTERLEAVED


def head_count(config: Mapping[str, Any], path: str, name: str) -> int | None:
    """The number of heads of the layer at a path, if it is a q or k projection.

    Args:
        config: of the model.
        path: of the layer.
        name: of the model, for the message.

    Raises:
        InputError: the configuration has no number of heads.
    """
    names = ROTARY_PROJECTIONS.get(path.rpartition(".")[2])
    if names is None:
        return None
    heads = next((config[name] for name in names if config.get(name)), None)
    if type(heads) is not int or heads < 1:
        raise InputError(f"the configuration of {name} has no number of heads")
    return heads


def read_base_config(name: str | None) -> BaseConfig:
    """The model that a folder or Hub name means; no weights are read.

    Raises:
        InputError: there is no such model, or its files are damaged.
    """
    return BaseConfig(name, *open_folder(find_folder(name)))


def is_tied(model: nn.Module) -> bool:
    """Whether the output of a model shares the embedding's weight."""
    return not _heads(model)


def _heads(model: nn.Module) -> list[str]:
    """The paths of the layers that make logits: one score for each row of the embedding."""
    modules = dict(model.named_modules())
    embeddings = {
        p for p, m in modules.items() if isinstance(m, nn.Embedding | nn.QuantizedEmbedding)
    }
    vocabularies = {weight_shape(modules[path])[0] for path in embeddings}
    return [
        path
        for path, module in modules.items()
        if "weight" in module and path not in embeddings
        if len(shape := weight_shape(module)) == 2 and shape[0] in vocabularies
        if not any(part.isdecimal() for part in path.split("."))
    ]
