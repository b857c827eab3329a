"""Inputs of commands with one thing wrong: seeded changes to small valid files and options."""

import copy
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

NUMBERS = (0, -1, 1, 2, 2**31 - 1, 2**31, 2**63, 10**30, -(10**30), 0.5, 1e308, 1e-320)
NUMBERS += (float("nan"), float("inf"), 10**299)
VALUES: tuple[Any, ...] = (*NUMBERS, None, True, False, "", "x", "../..", "\0", "é", "🙂" * 50)
VALUES += (
    "x" * 5000,
    [],
    {},
    [[]],
    [None],
    {"a": None},
    [1, "a"],
    "NaN",
    "\ud83d",
    "{{",
    "{x!r:>9}",
)
# What an option may be given.
TEXTS = ("", " ", "-", "--", "0", "-1", "1", "2.5", "nan", "inf", "-inf", "1e400", "1e-400", "0x10")
TEXTS += ("9" * 40, "9" * 400, "9" * 5000, "-" + "9" * 400, "0." + "0" * 5000 + "1", "1e999999999")
TEXTS += (
    "٣",
    "1_000",
    "x",
    "a,b",
    ",",
    "=",
    "a=1",
    "q_proj=" + "9" * 400,
    "*",
    "[",
    "\\",
    "(" * 200,
)
TEXTS += (
    "..",
    "/",
    "~",
    "a" * 300,
    "a/" * 3000,
    "owner/" + "n" * 300,
    "\udcff",
    "\ud800",
    "🙂",
    "a\nb",
)
TEXTS += ("/dev/null", "/dev/zero", "/proc/self/mem", "pipe", "socket", "folder", "loop", "missing")
TEXTS += ("9" * 400 + "GB", "1e400GB", "5", "none", "auto", "off", "None", "\x1b[31m", "{}", "{0}")
TAGS = ("!!python/object/apply:os.system [true]", "!!int x", "!!bool x", "2024-99-99", "!a b", "*a")
TAGS += ("&a [*a]", "!!binary é", "!!timestamp x", "0x" + "f" * 5000, "9" * 5000, "[" * 2000, "? x")
TAGS += (
    '"\\ud800"',
    '"a\\0b"',
    '"a\\nb"',
    "1:2:3",
    "~",
    "[1, 2]",
    "{a: 1}",
    "'",
    "|",
    "on",
    "1e5",
    ".nan",
    "-.inf",
    "<<: 1",
    "\t",
)


def change_bytes(rng: random.Random, content: bytes) -> bytes:
    """A file that was damaged: cut, flipped, spliced, or with a wrong number in it."""
    raw = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = (
            rng.randrange(len(raw) + 1)
            if rng.random() < 0.5
            else rng.randrange(min(len(raw), 300) + 1)
        )
        kind = rng.randrange(6)
        if kind == 0:
            del raw[at:]
        elif kind == 1 and at < len(raw):
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            raw[at : at + rng.randrange(9)] = rng.randbytes(rng.randrange(9))
        elif kind == 3:
            size = rng.choice((2, 4, 8))
            number = rng.choice((0, 1, 255, 2**15, 2**31 - 1, 2**31, 2**63 - 1, 2**64 - 1))
            raw[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")
        elif kind == 4:
            first = rng.randrange(len(raw) + 1)
            raw[at:at] = raw[first : first + rng.randrange(200)]
        else:
            del raw[at : at + rng.randrange(50)]
    return bytes(raw)


def change_json(rng: random.Random, content: bytes) -> bytes:
    """JSON with one value of another type, size or depth, or text that is no JSON."""
    value = json.loads(content)
    for _ in range(rng.choice((1, 1, 1, 3))):
        places = list(_places(value))
        holder, key = rng.choice(places)
        kind = rng.randrange(5)
        if kind < 3:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 3 and isinstance(holder, dict):
            if rng.random() < 0.5:
                del holder[key]
            else:
                holder[rng.choice(("", "x", "\0", "9" * 400, "base_layer"))] = holder.pop(key)
        else:
            holder[key] = [holder[key]] if rng.random() < 0.5 else {"a": holder[key]}
        if not isinstance(value, dict) or not value:
            break
    text = json.dumps(value)
    kind = rng.randrange(20)
    if kind == 0:
        number = rng.choice(("9" * 5000, "-" + "9" * 301, "1e99999", "0.1" + "0" * 9999))
        text = text.replace(": ", f': {number}, "x": ', 1)
    elif kind == 1:
        depth = rng.choice((90, 200, 900, 5000, 100_000))
        text = text.replace(": ", f': {"[" * depth + "]" * depth}, "x": ', 1)
    elif kind == 2:
        text = text.replace("{", '{"x": 1, "x": 2, ', 1)
    elif kind == 3:
        return change_bytes(rng, text.encode())
    return text.encode()


def _places(value: Any) -> Any:
    """Every holder and key in a JSON value, those of the top often."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def change_lines(rng: random.Random, content: bytes) -> bytes:
    """JSONL with one bad row."""
    lines = content.splitlines()
    number = rng.randrange(len(lines))
    lines[number] = change_json(rng, lines[number])
    return b"\n".join(lines)


def change_yaml(rng: random.Random, content: bytes) -> bytes:
    """YAML with one bad value or line."""
    lines = content.decode().splitlines()
    number = rng.randrange(len(lines))
    name = lines[number].partition(":")[0]
    value = rng.choice((*TAGS, *(t for t in TEXTS if t.isprintable())))
    lines[number] = rng.choice((f"{name}: {value}", value, f"{value}: 1", f'{name}: "{value}"'))
    return "\n".join(lines).encode()


def change_zip(rng: random.Random, content: bytes) -> bytes:
    """A zip of which one member was changed, with the right checksums."""
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(written, "w") as new:
        members = old.infolist()
        chosen = rng.choice([m for m in members if m.filename.endswith(("pkl", "npy"))])
        for member in members:
            raw = old.read(member)
            if member is chosen:
                head = change_bytes(rng, raw[:2000])
                raw = head + raw[2000:]
            new.writestr(
                member.filename, raw, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
            )
    return written.getvalue()


def change_npy(rng: random.Random, content: bytes) -> bytes:
    """An npz with one header that lies, of the same length."""
    lies = ("(9999999999999,)", "(-1, -8)", "(0, 9999999999999)", "(((((1,),),),),)", "'<V99999'")
    lies += ("'<f8'", "'|O'", "'>f4'", "[('a', '<f4')]", "True", "(" * 50, "'|S0'", "(1.5, 2)")
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(written, "w") as new:
        chosen = rng.choice(old.infolist())
        for member in old.infolist():
            raw = old.read(member)
            if member is chosen:
                end = raw.index(b"\n")
                fields = {"descr": "'<f4'", "fortran_order": "False", "shape": "(2, 2)"}
                fields[rng.choice(tuple(fields))] = rng.choice(lies)
                text = "{" + ", ".join(f"'{name}': {value}" for name, value in fields.items()) + "}"
                raw = raw[:10] + text.encode().ljust(end - 10)[: end - 10] + raw[end:]
            new.writestr(member.filename, raw)
    return written.getvalue()


def change_safetensors(rng: random.Random, content: bytes) -> bytes:
    """Safetensors whose header lies; its length is right."""
    (length,) = struct.unpack("<Q", content[:8])
    header = change_json(rng, content[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def change_template(rng: random.Random, content: bytes) -> bytes:
    """The settings of a tokenizer with a chat template that fails."""
    settings = json.loads(content)
    settings["chat_template"] = rng.choice(
        (
            "{{ 1 / 0 }}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{{ 10 ** 10 ** 10 }}",
            "{{ 'a' * 999999999999 }}",
            "{{ messages.__class__.__mro__ }}",
            "{% for",
            "{{ messages[99].content }}",
            "{{ messages | tojson | fromjson }}",
            "{{ raise_exception('no') }}",
            "{{ raise_exception(1) }}",
            "{{ range(10000000) | list }}",
            "{{ '\\ud83d' }}",
            "",
            "{{ strftime_now(5) }}",
            "{{ strftime_now('%') }}",
            "{{ ''.format(1, 2) ~ '{9999}'.format(1) }}",
            "{{ '%d' % 'x' }}",
            "{{ messages | sort }}",
            "{{ none.x.y }}",
            "{% generation %}",
            "{% include 'x' %}",
            "{% import '/etc/passwd' as x %}",
            ["x"],
            {"default": "{{ 1 }}"},
            [{"name": "default", "template": 5}],
            5,
        )
    )
    return json.dumps(settings).encode()


Change = Callable[[random.Random, bytes], bytes]


def nested_tuple(depth: int) -> bytes:
    """The pickle of a dictionary whose key holds itself twice at every depth."""
    return b"\x80\x02}(K\x01q\x00" + b"h\x00h\x00\x86q\x00" * depth + b"K\x02u."


def torch_file(pickled: bytes) -> bytes:
    """A file in PyTorch's format with this pickle."""
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    return written.getvalue()


def safetensors(header: str | bytes, length: int | None = None) -> bytes:
    """A safetensors file with this header, and its length or another."""
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw) if length is None else length) + raw


ADAPTER, CONFIG, ROWS = "npz/adapter_config.json", "model/config.json", "rows.jsonl"
TEST = "lora --test --model model --data"
# Commands, and content of a file for them, that ended in a traceback, a hang or a full memory.
KNOWN: dict[str, tuple[str, str, bytes]] = {
    "a tuple as key": (
        "convert --torch-path meta --mlx-path out",
        "meta/consolidated.00.pth",
        torch_file(nested_tuple(60)),
    ),
    "a memo of 2**31": (
        "convert --torch-path meta --mlx-path out",
        "meta/consolidated.00.pth",
        torch_file(b"\x80\x02K\x01r\xff\xff\xff\x7f."),
    ),
    "digits in a record": ("inspect npz", ADAPTER, b'{"rank": ' + b"9" * 5000 + b"}"),
    "depth in a record": ("inspect npz", ADAPTER, b'{"a":' * 100_000),
    "half a surrogate": ("inspect npz", ADAPTER, b'{"format": "\\ud83d"}'),
    "digits in a row": (f"{TEST} {ROWS}", ROWS, b'{"text": "a", "n": ' + b"9" * 5000 + b"}"),
    "depth in a row": (f"{TEST} {ROWS}", ROWS, b'{"text": ' + b"[" * 100_000),
    "a surrogate in arguments": (
        f"{TEST} chats.jsonl",
        "chats.jsonl",
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [{"function": {"name": "f", "arguments": '"\\ud83d"'}}],
                    },
                ]
            }
        ).encode(),
    ),
    "a billion layers": ("targets --model model", CONFIG, b'"num_hidden_layers": 1000000000'),
    "a module that exits": ("targets --model model", CONFIG, b'"model_type": "olmo"'),
    "a setting of text": ("targets --model model", CONFIG, b'"rope_theta": "x"'),
    "a scale of 1e308": (
        "inspect mlx",
        "mlx/adapter_config.json",
        b'{"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 1e308}}',
    ),
    "a size of text": ("targets --model model", CONFIG, b'"hidden_size": "x"'),
    "a list of sizes": ("targets --model model", CONFIG, b'"num_attention_heads": [4]'),
    "no heads": ("targets --model model", CONFIG, b'"num_attention_heads": 0'),
    "an end of text": (f"{TEST} {ROWS}", "model/generation_config.json", b'{"eos_token_id": [[]]}'),
    "merges in YAML": (
        "targets --config run.yaml",
        "run.yaml",
        b"a: &a {x: 1}\n"
        + b"".join(
            b"%c: &%c {<<: [%s]}\n" % (n + 1, n + 1, b", ".join([b"*%c" % n] * 9))
            for n in range(97, 110)
        ),
    ),
    "a header of 2**63": ("inspect safe", "safe/adapters.safetensors", safetensors("{}", 2**63)),
    "depth in a header": ("inspect safe", "safe/adapters.safetensors", safetensors(b"[" * 10**6)),
    "sizes that are no numbers": (
        "inspect safe",
        "safe/adapters.safetensors",
        safetensors('{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}xxxx'),
    ),
    "a GGUF list of 2**60": (
        "inspect gguf",
        "gguf/adapter.gguf",
        b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 1) + b"a" + struct.pack("<IIQ", 9, 5, 2**60),
    ),
}
