"""The command that talks: one base model, and adapters to choose and compare between answers.

python -m graft chat --adapters adapters

At a terminal, lines that begin with a slash are commands; `/help` tells them. Where standard input
is no terminal each line is a message, and nothing but the answers is printed.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graft.cli.command import Parser, command
from graft.data.chat_template import ChatError, ChatFormat
from graft.errors import InputError

if TYPE_CHECKING:
    from graft.engine.engine import Engine
    from graft.engine.streams import Stream

HELP = """\
/adapter NAME[=SCALE] ...  answer with these adapters; a scale multiplies an adapter's own
/base                      answer without adapters
/compare [MESSAGE]         the message, or the last one, answered by the base and by each adapter
/adapters                  what is loaded, and what is chosen
/load NAME PATH            load an adapter
/unload NAME               unload an adapter
/new                       forget the conversation
/quit                      end; so does Ctrl-D. Ctrl-C ends an answer"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = Parser(description="Talk to a model, and choose adapters between answers.")
    add = parser.add_argument
    add("--model", metavar="BASE", help="folder or Hub name (default: the embedded base model)")
    add("--adapters", metavar="DIR", help="folder of adapters, each a folder or file; or one such")
    add("--adapter", metavar="NAME[=SCALE]", nargs="+", default=[], help="chosen at the start")
    add("--system", metavar="TEXT", help="what the model is told before the conversation")
    add(
        "--format",
        metavar="TEXT",
        help=r"put each message alone, where {} stands in a text such as 'Q: {}\nA:', instead of a "
        "conversation",
    )
    add("--max-tokens", "-n", type=int, default=256, metavar="N", help="of an answer (256)")
    add("--temp", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (0)")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest only (1)")
    add("--seed", type=int, metavar="N", help="of the draws (default: another each time)")
    add("--stop", nargs="+", default=[], metavar="TEXT", help="end an answer before these")
    add("--max-adapters", type=int, default=8, metavar="N", help="loaded at a time (8)")
    add("--max-rank", type=int, default=64, metavar="N", help="of an adapter (64)")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Talk until the input ends."""
    from graft.engine.adapter_folder import load_all
    from graft.engine.engine import Engine
    from graft.pretrained.load import load_model

    args = build_parser().parse_args(argv)
    if args.format is not None and "{}" not in args.format:
        raise InputError(f"--format {args.format!r} has no {{}} for the message to stand in")
    model, tokenizer, _ = load_model(args.model)
    limits = {"max_adapters": args.max_adapters, "max_rank": args.max_rank}
    with Engine(model, tokenizer, **limits) as engine:
        notes = load_all(engine, args.adapters, limit=args.max_adapters)
        talk = Talk(engine, settings_of(args), system=args.system, form=args.format)
        talk.choose(args.adapter)
        for note in notes:
            print(note, file=sys.stderr)
        if sys.stdin.isatty():
            print("/help tells the commands")
            converse(talk, _lines())
        else:
            talk.take_all(line.rstrip("\n") for line in sys.stdin)
    return 0


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """How answers are generated, for `Engine.submit`."""
    return {
        "max_tokens": args.max_tokens,
        "temperature": args.temp,
        "top_p": args.top_p,
        "seed": args.seed,
        "stop": args.stop,
    }


def converse(talk: "Talk", lines: Iterable[str]) -> None:
    """Take lines of a person, who is told of what goes wrong and may go on."""
    for line in lines:
        try:
            talk.take(line)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
        if talk.ended:
            return


class Talk:
    """A conversation, and the adapters that are chosen for its next answer.

    Args:
        engine: that answers.
        settings: of the answers.
        system: what the model is told first.
        form: a text with {} for the message, where each stands alone; `None` for a conversation.

    Attributes:
        chosen: names of adapters with their scales.
        ended: whether the person wants to end.
    """

    def __init__(
        self,
        engine: "Engine",
        settings: Mapping[str, Any],
        *,
        system: str | None = None,
        form: str | None = None,
    ) -> None:
        self.chosen: dict[str, float] = {}
        self.ended = False
        self._engine = engine
        self._settings = dict(settings)
        self._form = None if form is None else form.replace("\\n", "\n")
        self._chat = ChatFormat(engine.tokenizer)
        if form is None and not self._chat.has_template:
            self._settings["stop"] = [*self._settings.get("stop", ()), "\nUser:"]
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._messages: list[dict[str, str]] = list(self._system)
        # The last message, and what came before it.
        self._last: tuple[str, list[dict[str, str]]] | None = None

    def take_all(self, lines: Iterable[str]) -> None:
        """Take lines up to the one that ends the conversation.

        Raises:
            InputError: as for `take`.
        """
        for line in lines:
            self.take(line)
            if self.ended:
                return

    def take(self, line: str) -> None:
        """Answer a message, or do what a command says.

        Raises:
            InputError: an unknown command, or one with bad arguments; a message that the engine or
                the model's template refuses.
        """
        if not line.strip():
            return
        if not line.startswith("/"):
            self._answer(line)
            return
        name, _, rest = line.partition(" ")
        if name not in _COMMANDS:
            raise InputError(f"no command {name}; there are {', '.join(_COMMANDS)}")
        _COMMANDS[name](self, rest.strip())

    def choose(self, texts: Sequence[str]) -> None:
        """Answer with these adapters from now on.

        Args:
            texts: NAME or NAME=SCALE each.

        Raises:
            InputError: one is not loaded, or its scale is no number.
        """
        chosen = dict(map(_parse_scale, texts))
        loaded = [info.name for info in self._engine.adapters()]
        missing = [name for name in chosen if name not in loaded]
        if missing:
            there = ", ".join(loaded) or "none loaded"
            raise InputError(f"there is no adapter {', '.join(missing)}; there are {there}")
        self.chosen = chosen

    def _answer(self, message: str) -> None:
        """Print the answer to a message as it comes, and remember both."""
        self._last = message, list(self._messages)
        text = _print_as_it_comes(self._submit(message, self.chosen, self._messages))
        if self._form is None:
            turns = (("user", message), ("assistant", text.strip()))
            self._messages += [{"role": role, "content": content} for role, content in turns]

    def _compare(self, message: str) -> None:
        if not message and self._last is None:
            raise InputError("there is no message to compare answers to; give one: /compare TEXT")
        before = self._messages
        if not message:
            assert self._last is not None
            message, before = self._last
        choices: dict[str, dict[str, float]] = {"base": {}}
        choices |= {info.name: {info.name: 1.0} for info in self._engine.adapters()}
        if self.chosen and self.chosen not in choices.values():
            choices["chosen"] = self.chosen
        streams = {
            name: self._submit(message, adapters, before) for name, adapters in choices.items()
        }
        for name, stream in streams.items():
            print(f"[{name}]")
            _print_as_it_comes(stream)

    def _submit(
        self, message: str, adapters: Mapping[str, float], before: Sequence[Mapping[str, str]]
    ) -> "Stream":
        """Ask for an answer to a message after others."""
        prompt: str | list[int]
        if self._form is not None:
            prompt = self._form.replace("{}", message)
        else:
            try:
                with self._engine.tokenizer_lock:
                    prompt = self._chat.prompt_ids(
                        [*before, {"role": "user", "content": message}], None
                    )
            except ChatError as error:
                raise InputError(str(error)) from error
        return self._engine.submit(prompt, adapters=adapters, **self._settings)

    def _tell_adapters(self, _: str) -> None:
        for info in self._engine.adapters():
            scale = self.chosen.get(info.name)
            mark = "" if scale is None else f", chosen at {scale:g}"
            print(f"{info.name}: rank {info.rank}, {len(info.targets)} layers{mark}")
        if not self.chosen:
            print("the base answers")

    def _load(self, rest: str) -> None:
        name, _, path = rest.partition(" ")
        if not path:
            raise InputError("/load takes a name and a path: /load NAME PATH")
        self._engine.load_adapter(name, path.strip())

    def _unload(self, name: str) -> None:
        self._engine.unload_adapter(name)
        self.chosen.pop(name, None)

    def _forget(self, _: str) -> None:
        self._messages = list(self._system)
        self._last = None

    def _end(self, _: str) -> None:
        self.ended = True


_COMMANDS: dict[str, Callable[[Talk, str], None]] = {
    "/adapter": lambda talk, rest: talk.choose(rest.split()),
    "/base": lambda talk, _: talk.choose([]),
    "/compare": Talk._compare,
    "/adapters": Talk._tell_adapters,
    "/load": Talk._load,
    "/unload": Talk._unload,
    "/new": Talk._forget,
    "/help": lambda _, __: print(HELP),
    "/quit": Talk._end,
}


def _print_as_it_comes(stream: "Stream") -> str:
    """Print an answer and a line's end; returns it. Ctrl-C ends the answer, not the program."""
    text = ""
    try:
        for piece in stream:
            print(piece.text, end="", flush=True)
            text += piece.text
    except KeyboardInterrupt:
        stream.cancel()
        if not sys.stdin.isatty():
            raise
    print()
    return text


def _parse_scale(text: str) -> tuple[str, float]:
    name, equals, scale = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        return name, float(scale)
    except ValueError:
        raise InputError(f"{text}: the scale {scale!r} is no number") from None


def _lines() -> Iterable[str]:
    """What a person types, with line editing where there is a library for it."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


if __name__ == "__main__":
    sys.exit(main())
