"""Reads untrusted YAML files of settings: names and plain values."""

from pathlib import Path
from typing import Any

from graft.console import one_line
from graft.errors import InputError
from graft.storage.plain_file import read_plain_text

# PyYAML takes seconds for a megabyte.
LARGEST_YAML_BYTES = 1 << 20
MOST_BITS = 1000


def read_yaml_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Aliases are refused, since a kilobyte of them can take forever to read.

    Raises:
        InputError: the file is missing or too large, is not valid YAML, uses aliases or holds
            something else than a mapping.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("it uses aliases (*NAME), which are not read; write values out")
            return super().compose_node(parent, index)

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and value.bit_length() > MOST_BITS:
                raise ValueError(f"a number of more than {MOST_BITS} bits")
            if isinstance(value, str):
                value.encode()  # fails for half of a surrogate pair
            return value

    text = read_plain_text(path, most_bytes=LARGEST_YAML_BYTES)
    try:
        content = yaml.load(text, Loader)
        if isinstance(content, dict):
            return {str(key): value for key, value in content.items()}
    except RecursionError:
        raise InputError(f"{path} is not valid YAML: it is nested too deeply") from None
    except Exception as error:  # dates, numbers and tags fail in their own ways
        raise InputError(f"{path} is not valid YAML: {one_line(error)}") from error
    raise InputError(f"{path} holds no options: write one `name: value` per line")
