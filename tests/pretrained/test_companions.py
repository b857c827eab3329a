from pathlib import Path

from graft.errors import InputError
from graft.pretrained.companions import copy_companions, find_companions, find_tokenizer

import pytest

TOGETHER = {
    *("tokenizer.json", "tokenizer.model", "qwen.tiktoken", "vocab.json", "merges.txt"),
    *("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    "generation_config.json",
}
APART = {
    *("my-notes.txt", "train.jsonl", "metrics.jsonl", "config.json", "params.json", "README.md"),
    *("model.safetensors.index.json", "adapter_config.json", "chat_template.py", "modeling.py"),
}


def test_the_tokenizer_goes_along_and_nothing_private_and_no_code(tmp_path: Path) -> None:
    for name in TOGETHER | APART:
        (tmp_path / name).write_text(name)
    (tmp_path / "chat_template_folder").mkdir()
    assert {file.name for file in find_companions(tmp_path)} == TOGETHER
    (tmp_path / "copy").mkdir()
    copy_companions(tmp_path, tmp_path / "copy")
    assert {file.name: file.read_text() for file in (tmp_path / "copy").iterdir()} == {
        name: name for name in TOGETHER
    }


def test_a_tokenizer_is_in_the_folder_or_else_in_the_fallback(tmp_path: Path) -> None:
    folder, fallback = tmp_path / "m", tmp_path / "tokenizer.model"
    folder.mkdir()
    with pytest.raises(InputError, match="has no tokenizer"):
        find_tokenizer(folder, fallback=fallback)
    fallback.touch()
    (folder / "merges.txt").touch()
    assert find_tokenizer(folder, fallback=fallback) == [fallback, folder / "merges.txt"]
    (folder / "vocab.json").touch()
    found = find_tokenizer(folder, fallback=fallback)
    assert found == [folder / "vocab.json", folder / "merges.txt"]
