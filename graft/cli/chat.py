"""`graft chat`: chats with a model, and chooses or compares adapters between answers.

python -m graft chat --adapters adapters

Lines that start with a slash are commands; `/help` lists them. If standard input is not a terminal,
only the answers are printed.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.cli.command import Parser, command
from graft.data.chat_template import ChatFormat
from graft.data.conversations import ChatError
from graft.errors import InputError

if TYPE_CHECKING:
    from graft.engine.engine import Engine
    from graft.engine.streams import Stream

HELP = """\
/adapter NAME[=SCALE] ...  answer with these adapters; SCALE is a factor on the adapter's scale
/base                      answer without adapters
/compare [MESSAGE]         answer MESSAGE, or the last one, with the base model and each adapter
/adapters                  list the loaded adapters and mark the chosen ones
/load NAME PATH            load an adapter
/unload NAME               unload an adapter
/new                       start a new conversation
/help                      show this help
/quit                      quit, as Ctrl-D does; Ctrl-C stops an answer"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = Parser(description="Chat with a model, and choose adapters between answers.")
    add = parser.add_argument
    add("--model", metavar="BASE", help="folder or Hub name (default: the included base model)")
    add("--adapters", metavar="DIR", help="load the adapters in this folder, or this one adapter")
    add(
        "--adapter",
        metavar="NAME[=SCALE]",
        nargs="+",
        default=[],
        help="answer with these adapters at the start",
    )
    add("--system", metavar="TEXT", help="system message at the start of a conversation")
    add(
        "--format",
        metavar="TEXT",
        help=r"prompt with {} for the message, such as 'Q: {}\nA:', instead of a conversation",
    )
    add("--max-tokens", "-n", type=int, default=256, metavar="N", help="most tokens in an answer")
    add(
        "--temperature",
        "--temp",
        type=float,
        default=0.0,
        metavar="T",
        help="sampling temperature; 0 takes the most likely token",
    )
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the most likely tokens with this total probability",
    )
    add("--seed", type=int, metavar="N", help="seed of sampling (default: a new one each time)")
    add("--stop", nargs="+", default=[], metavar="TEXT", help="end an answer before these strings")
    add("--max-adapters", type=int, default=8, metavar="N", help="adapters loaded at a time")
    add("--max-rank", type=int, default=64, metavar="N", help="highest adapter rank accepted")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Chat until the input ends."""
    from graft.engine.adapter_folder import load_all
    from graft.engine.engine import Engine
    from graft.pretrained.load import load_model

    args = build_parser().parse_args(argv)
    if args.format is not None and "{}" not in args.format:
        raise InputError(f"--format {args.format!r} has no {{}} for the message")
    model, tokenizer, _ = load_model(args.model)
    limits = {"max_adapters": args.max_adapters, "max_rank": args.max_rank}
    with Engine(model, tokenizer, **limits) as engine:
        lines = load_all(engine, args.adapters, limit=args.max_adapters)
        session = ChatSession(
            engine, settings_of(args), system=args.system, prompt_format=args.format
        )
        session.choose(args.adapter)
        for line in [*lines, *_forms_of_rows(engine, prompt_format=args.format)]:
            print(line, file=sys.stderr)
        if sys.stdin.isatty():
            print("/help lists the commands")
            converse(session, _typed_lines())
        else:
            session.handle_all(line.rstrip("\n") for line in sys.stdin)
    return 0


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of answers, as arguments of `Engine.submit`."""
    return {
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "seed": args.seed,
        "stop": args.stop,
    }


def _forms_of_rows(engine: "Engine", *, prompt_format: str | None) -> Iterable[str]:
    """A line for each adapter that was not trained on what it is asked with."""
    from graft.adapters.files import find_adapter, read_adapter

    for info in engine.adapters():
        shapes = read_adapter(find_adapter(Path(info.path))).row_shapes or ("chat",)
        if prompt_format is None and "chat" not in shapes:
            yield (
                f"{info.name} was trained on rows of the form {' and '.join(shapes)}, not on "
                "conversations: --format '{}' sends messages as they are"
            )
        elif prompt_format is not None and shapes == ("chat",):
            yield f"{info.name} was trained on conversations: without --format it is asked so"


def converse(session: "ChatSession", lines: Iterable[str]) -> None:
    """Handle lines until the end; errors are printed and do not end the session."""
    for line in lines:
        try:
            session.handle(line)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
        if session.ended:
            return


class ChatSession:
    """A conversation, and the adapters chosen for the next answer.

    Args:
        engine: generates the answers.
        settings: arguments of `Engine.submit`.
        system: the system message.
        prompt_format: a text with {} for the message, which makes every message independent; `None`
            for a conversation.

    Attributes:
        chosen: scales of the chosen adapters by name.
        ended: whether the user has quit.
    """

    def __init__(
        self,
        engine: "Engine",
        settings: Mapping[str, Any],
        *,
        system: str | None = None,
        prompt_format: str | None = None,
    ) -> None:
        self.chosen: dict[str, float] = {}
        self.ended = False
        self._engine = engine
        self._settings = dict(settings)
        self._prompt_format = prompt_format and prompt_format.replace("\\n", "\n")
        self._chat = ChatFormat(engine.tokenizer)
        if prompt_format is None and not self._chat.has_template:
            self._settings["stop"] = [*self._settings.get("stop", ()), "\nUser:"]
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._messages: list[dict[str, str]] = list(self._system)
        # The last message, and the conversation before it.
        self._last: tuple[str, list[dict[str, str]]] | None = None

    def handle_all(self, lines: Iterable[str]) -> None:
        """Handle lines until the session ends.

        Raises:
            InputError: as for `handle`.
        """
        for line in lines:
            self.handle(line)
            if self.ended:
                return

    def handle(self, line: str) -> None:
        """Answer a message or run a command.

        Raises:
            InputError: the command is unknown or its arguments are invalid, or the engine or the
                chat template refuses the message.
        """
        if not line.strip():
            return
        if not line.startswith("/"):
            self._answer(line)
            return
        name, _, rest = line.partition(" ")
        if name not in _COMMANDS:
            raise InputError(f"unknown command {name}; the commands are {', '.join(_COMMANDS)}")
        _COMMANDS[name](self, rest.strip())

    def choose(self, texts: Sequence[str]) -> None:
        """Use these adapters for the next answers.

        Args:
            texts: each NAME or NAME=SCALE.

        Raises:
            InputError: an adapter is not loaded, or a scale is not a number.
        """
        chosen = dict(map(_parse_scale, texts))
        loaded = [info.name for info in self._engine.adapters()]
        missing = [name for name in chosen if name not in loaded]
        if missing:
            known = ", ".join(loaded) or "none"
            raise InputError(f"there is no adapter {', '.join(missing)}; loaded: {known}")
        self.chosen = chosen

    def _answer(self, message: str) -> None:
        """Print the answer to a message as it is generated, and add both to the conversation."""
        self._last = message, list(self._messages)
        text = _print_as_it_comes(self._submit(message, self.chosen, self._messages))
        if self._prompt_format is None:
            turns = (("user", message), ("assistant", text.strip()))
            self._messages += [{"role": role, "content": content} for role, content in turns]

    def _compare(self, message: str) -> None:
        if not message and self._last is None:
            raise InputError("there is no message to answer yet; give one: /compare MESSAGE")
        conversation = self._messages
        if not message:
            assert self._last is not None
            message, conversation = self._last
        choices: dict[str, dict[str, float]] = {"base": {}}
        choices |= {info.name: {info.name: 1.0} for info in self._engine.adapters()}
        if self.chosen and self.chosen not in choices.values():
            choices["chosen"] = self.chosen
        streams = {
            name: self._submit(message, adapters, conversation)
            for name, adapters in choices.items()
        }
        for name, stream in streams.items():
            print(f"[{name}]")
            _print_as_it_comes(stream)

    def _submit(
        self,
        message: str,
        adapters: Mapping[str, float],
        conversation: Sequence[Mapping[str, str]],
    ) -> "Stream":
        """Submit a message that continues a conversation."""
        prompt: str | list[int]
        if self._prompt_format is not None:
            prompt = self._prompt_format.replace("{}", message)
        else:
            try:
                with self._engine.tokenizer_lock:
                    prompt = self._chat.prompt_ids(
                        [*conversation, {"role": "user", "content": message}], None
                    )
            except ChatError as error:
                raise InputError(str(error)) from error
        return self._engine.submit(prompt, adapters=adapters, **self._settings)

    def _list_adapters(self, _: str) -> None:
        for info in self._engine.adapters():
            scale = self.chosen.get(info.name)
            mark = "" if scale is None else f", chosen at {scale:g}"
            print(f"{info.name}: rank {info.rank}, {len(info.targets)} layers{mark}")
        if not self.chosen:
            print("no adapter is chosen: the base model answers")

    def _load(self, rest: str) -> None:
        name, _, path = rest.partition(" ")
        if not path:
            raise InputError("/load needs a name and a path: /load NAME PATH")
        self._engine.load_adapter(name, path.strip())

    def _unload(self, name: str) -> None:
        self._engine.unload_adapter(name)
        self.chosen.pop(name, None)

    def _start_anew(self, _: str) -> None:
        self._messages = list(self._system)
        self._last = None

    def _quit(self, _: str) -> None:
        self.ended = True


_COMMANDS: dict[str, Callable[[ChatSession, str], None]] = {
    "/adapter": lambda session, rest: session.choose(rest.split()),
    "/base": lambda session, _: session.choose([]),
    "/compare": ChatSession._compare,
    "/adapters": ChatSession._list_adapters,
    "/load": ChatSession._load,
    "/unload": ChatSession._unload,
    "/new": ChatSession._start_anew,
    "/help": lambda _, __: print(HELP),
    "/quit": ChatSession._quit,
}


def _print_as_it_comes(stream: "Stream") -> str:
    """Print an answer and a newline, and return it. Ctrl-C stops the answer, not the program."""
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
        raise InputError(f"{text}: the scale {scale!r} is not a number") from None


def _typed_lines() -> Iterable[str]:
    """The lines that a user types, with line editing if `readline` is available."""
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
