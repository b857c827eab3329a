"""The commands by name: ``graft VERB ...``, or ``python -m graft VERB ...``."""

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence

from graft import __version__
from graft.cli.command import command
from graft.errors import InputError

VERBS = {
    "bench": ("graft.cli.bench:main", "measure speed and memory, compared with other tools"),
    "chat": ("graft.cli.chat:main", "talk to a model, and choose adapters between answers"),
    "convert": ("graft.convert:main", "turn PyTorch or Hugging Face weights into an MLX model"),
    "dataset": ("graft.cli.dataset:main", "build a dataset from the documentation of packages"),
    "export": ("graft.cli.export:main", "write an adapter for mlx-lm, PEFT or llama.cpp"),
    "extract": (
        "graft.cli.extract:main",
        "extract the difference between two models as an adapter",
    ),
    "fuse": ("graft.cli.fuse:main", "write a model with its adapter inside"),
    "inspect": ("graft.cli.inspect:main", "show what an adapter is"),
    "lora": ("graft.lora:main", "train, evaluate and generate with an adapter"),
    "merge": ("graft.cli.merge:main", "make one adapter of several"),
    "serve": ("graft.cli.serve:main", "serve a model with many adapters over HTTP"),
    "targets": ("graft.cli.targets:main", "show what can be adapted, and what options would train"),
}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb that is given first, with the arguments after it.

    Raises:
        InputError: there is no verb, or not this one.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments.pop(0) if arguments else ""
    if verb in ("-h", "--help"):
        print(_help())
    elif verb == "--version":
        print(f"graft {__version__}")
    elif verb in VERBS:
        sys.argv[0] = f"graft {verb}"  # the name that the verb's own --help shows
        return _entry(VERBS[verb][0])(arguments)
    else:
        raise InputError(_no_such(verb))
    return 0


def _entry(target: str) -> Callable[[Sequence[str]], int]:
    """The function that "module:function" names."""
    module, function = target.split(":")
    entry: Callable[[Sequence[str]], int] = getattr(importlib.import_module(module), function)
    return entry


def _help() -> str:
    verbs = "\n".join(f"  {verb:<9} {text}" for verb, (_, text) in VERBS.items())
    return (
        f"usage: graft VERB ... | --version\n\n{verbs}\n\ngraft VERB --help lists a verb's options."
    )


def _no_such(verb: str) -> str:
    """What is wrong with the verb, and the nearest right one by spelling or by what it does."""
    if not verb:
        return f"no verb given; name one of {', '.join(VERBS)} (graft --help says what each does)"
    near = difflib.get_close_matches(verb, VERBS, n=1)
    near += [name for name, (_, text) in VERBS.items() if verb in text.replace(",", "").split()]
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(VERBS)}"
    return f"unknown verb {verb!r}: {hint} (graft --help says what each does)"


if __name__ == "__main__":
    sys.exit(main())
