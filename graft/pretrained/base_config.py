"""What a format must know of the base model: its configuration, never its weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graft.adapters.factors import HALVES, INTERLEAVED
from graft.errors import InputError
from graft.pretrained.folder import find_folder, read_config


@dataclass(frozen=True)
class BaseModel:
    """The base model of an adapter, by its configuration.

    Attributes:
        name: a folder or Hub name; `None` is the embedded model.
        config: as `config.json` has it.
    """

    name: str | None
    config: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        """mlx-lm's name, such as `llama`."""
        return str(self.config.get("model_type"))

    @property
    def tied(self) -> bool:
        """Whether the embedding is the output projection too."""
        tied_by_default = self.architecture.startswith("gemma")
        return bool(self.config.get("tie_word_embeddings", tied_by_default))

    @property
    def rotary(self) -> str:
        """How the rows of q and k are ordered."""
        return INTERLEAVED if self.config.get("rope_traditional") else HALVES

    def heads(self, path: str) -> int | None:
        """Heads of the layer at a path, if it is a q or k projection.

        Raises:
            InputError: the configuration does not tell.
        """
        name = path.rpartition(".")[2]
        if name not in ("q_proj", "k_proj"):
            return None
        heads = self.config.get("num_attention_heads")
        if name == "k_proj":
            heads = self.config.get("num_key_value_heads") or heads
        if type(heads) is not int or heads < 1:
            raise InputError(f"the configuration of {self.name} tells no number of heads")
        return heads


def read_base_model(name: str | None) -> BaseModel:
    """The base model that a person or a record names; no weights are read.

    Raises:
        InputError: there is no such model.
    """
    return BaseModel(name, read_config(find_folder(name)))
