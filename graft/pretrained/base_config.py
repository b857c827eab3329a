"""A base model's configuration, for code that needs facts about it but never its weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graft.errors import InputError
from graft.pretrained.architectures import ROTARY_PROJECTIONS, find_architecture, rotary_order
from graft.pretrained.folder import find_folder, read_config


@dataclass(frozen=True)
class BaseConfig:
    """The base model of an adapter, by its configuration.

    Attributes:
        name: a folder or Hub name; `None` is the included model.
        config: the content of `config.json`.
    """

    name: str | None
    config: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        """mlx-lm's name, such as `llama`."""
        return str(self.config.get("model_type"))

    @property
    def tied(self) -> bool:
        """Whether the output shares the embedding's weight."""
        default = find_architecture(self.architecture).tied_by_default
        return bool(self.config.get("tie_word_embeddings", default))

    @property
    def rotary(self) -> str:
        """The order of the rows of q and k."""
        return rotary_order(self.config)

    def heads(self, path: str) -> int | None:
        """The number of heads of the layer at a path, if it is a q or k projection.

        Raises:
            InputError: the configuration has no number of heads.
        """
        names = ROTARY_PROJECTIONS.get(path.rpartition(".")[2])
        if names is None:
            return None
        heads = next((self.config[name] for name in names if self.config.get(name)), None)
        if type(heads) is not int or heads < 1:
            raise InputError(f"the configuration of {self.name} has no number of heads")
        return heads


def read_base_config(name: str | None) -> BaseConfig:
    """The configuration of the model that a folder or Hub name means; no weights are read.

    Raises:
        InputError: there is no such model.
    """
    return BaseConfig(name, read_config(find_folder(name)))
