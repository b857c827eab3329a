import dataclasses
import json
from pathlib import Path
from typing import Any

import graft  # noqa: F401
from graft.cli.run_options import options_parser, parse_options
from graft.errors import InputError
from graft.training.options import Options, from_mapping, record

import pytest

# From DESIGN's list; the first group is that of the MLX LoRA example, with its defaults.
DEFAULTS: dict[str, Any] = {
    "model": None,
    "prompt": None,
    "num_tokens": 100,
    "write_every": 10,
    "temp": 0.8,
    "train": False,
    "data": "datasets/mlx-docs",
    "lora_layers": None,
    "batch_size": 4,
    "val_batches": 25,
    "steps_per_report": 10,
    "steps_per_eval": 200,
    "save_every": 100,
    "resume_adapter_file": None,
    "adapter_file": None,
    "test": False,
    "test_batches": -1,
    "seed": 0,
    "rank": None,  # 8, likewise
    "alpha": None,  # 16, but for an adapter that is read and tells its own
    "dropout": 0.0,
    "max_seq_length": 2048,
}
OTHERS = ["iters", "learning_rate", "targets"]


def options(*argv: str) -> Options:
    return from_mapping(parse_options(options_parser("Train."), argv))


def refusal(*argv: str) -> str:
    with pytest.raises(InputError) as error:
        options(*argv)
    assert "\n" not in str(error.value)
    return str(error.value)


def yaml_file(folder: Path, text: str) -> str:
    (folder / "run.yaml").write_text(text)
    return str(folder / "run.yaml")


@pytest.mark.parametrize("name", [*DEFAULTS, *OTHERS])
def test_every_option_of_the_design_is_there(name: str) -> None:
    assert hasattr(Options(), name)
    assert f"--{name.replace('_', '-')}" in options_parser("Train.").format_help()


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_defaults_are_those_of_the_design(name: str) -> None:
    assert getattr(options(), name) == DEFAULTS[name]


def test_without_arguments_every_option_has_its_default() -> None:
    assert options() == Options()


@pytest.mark.parametrize("flag", ["--num-tokens", "--max-tokens", "-n", "-m"])
def test_the_number_of_tokens_has_its_other_names(flag: str) -> None:
    assert options(flag, "7").num_tokens == 7


@pytest.mark.parametrize("flag", ["--prompt", "-p"])
def test_the_prompt_has_its_short_name(flag: str) -> None:
    assert options(flag, "hi").prompt == "hi"


def test_a_command_with_some_options_has_those_alone() -> None:
    parser = options_parser("Measure.", names=["model", "seed"])
    assert parse_options(parser, ["--model", "m", "--seed", "3"]) == {"model": "m", "seed": 3}
    with pytest.raises(InputError, match="--rank"):
        parse_options(parser, ["--rank", "3"])


def test_what_is_not_given_is_not_there() -> None:
    assert parse_options(options_parser("Train."), ["--rank", "8"]) == {"rank": 8}


def test_a_choice_that_there_is_not_is_told_with_those_there_are(tmp_path: Path) -> None:
    assert "adam" in refusal("--optimizer", "adma")
    text = refusal("--config", yaml_file(tmp_path, "optimizer: adma\n"))
    assert "--optimizer adma: give one of" in text and "adam" in text


def test_every_option_can_be_given_on_the_command_line() -> None:
    for field in dataclasses.fields(Options):
        flag = "--" + field.name.replace("_", "-")
        value: Any = {"str": "x", "int": 3, "float": 0.5, "bool": True}[
            str(getattr(field.type, "__name__", field.type)).split(" |")[0]
        ]
        value = (field.metadata["choices"] or [value])[-1]
        found = getattr(options(flag) if value is True else options(flag, str(value)), field.name)
        assert (found, type(found)) == (value, type(value)), flag


def test_every_option_has_help_and_its_default_in_it() -> None:
    text = " ".join(options_parser("Train.").format_help().split())
    for field in dataclasses.fields(Options):
        assert field.metadata["help"].split(",")[0].split("(")[0].strip() in text, field.name
    assert "(default: 0.8)" in text and "(default: 16, or" in text
    assert "adapters/adapters.npz" in text


def test_a_yaml_file_stands_over_the_defaults_and_under_the_command_line(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "rank: 4\niters: 7\ntrain: true\nmodel: here\n")
    found = options("--config", path, "--iters", "9")
    assert (found.rank, found.iters, found.train, found.model) == (4, 9, True, "here")
    assert found == dataclasses.replace(Options(), rank=4, iters=9, train=True, model="here")


def test_a_command_line_that_repeats_a_default_wins_too(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "rank: 4\n")
    assert options("--config", path, "--rank", "8").rank == 8


def test_names_in_a_file_may_have_hyphens_and_the_command_line_wins_over_them(
    tmp_path: Path,
) -> None:
    path = yaml_file(tmp_path, "batch-size: 2\nval-batches: 3\n")
    found = options("--config", path, "--batch-size", "5")
    assert (found.batch_size, found.val_batches) == (5, 3)


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "0.00001", "1E-5"])
def test_a_learning_rate_in_a_file_may_be_written_as_everybody_writes_it(
    tmp_path: Path, text: str
) -> None:
    # YAML 1.1 takes 1e-5, which has no point, for a string.
    path = yaml_file(tmp_path, f"learning_rate: {text}\n")
    assert options("--config", path).learning_rate == 1e-5


def test_a_whole_number_is_a_float_where_one_is_wanted(tmp_path: Path) -> None:
    found = options("--config", yaml_file(tmp_path, "alpha: 32\n")).alpha
    assert (found, type(found)) == (32.0, float)


def test_null_in_a_file_is_the_default_of_what_may_be_left_out(tmp_path: Path) -> None:
    assert options("--config", yaml_file(tmp_path, "model: null\nlora_layers:\n")) == Options()


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("learning_rte", "learning_rate"),
        ("lora_layer", "lora_layers"),
        ("batchsize", "batch_size"),
        ("max-seq-len", "max_seq_length"),
    ],
)
def test_an_unknown_key_is_told_with_the_nearest_right_one(
    tmp_path: Path, key: str, nearest: str
) -> None:
    text = refusal("--config", yaml_file(tmp_path, f"{key}: 1\n"))
    assert f"unknown option '{key}' (did you mean '{nearest}'?)" in text


def test_a_key_like_no_other_is_told_without_a_guess(tmp_path: Path) -> None:
    text = refusal("--config", yaml_file(tmp_path, "zzzzzz: 1\n"))
    assert text.endswith("unknown option 'zzzzzz'")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("iters: many", "iters: 'many' is a str, expected int"),
        ("iters: 1.5", "iters: 1.5 is a float, expected int"),
        ("iters: true", "iters: True is a bool, expected int"),
        ("train: 1", "train: 1 is a int, expected bool"),
        ("alpha: true", "alpha: True is a bool, expected float"),
        ("alpha: big", "alpha: 'big' is a str, expected float"),
        ("model: 5", "model: 5 is a int, expected str"),
        ("prompt: [a]", "prompt: ['a'] is a list, expected str"),
        ("batch_size: null", "batch_size: None is a NoneType, expected int"),
    ],
)
def test_a_value_of_the_wrong_type_is_told_with_the_right_one(
    tmp_path: Path, line: str, problem: str
) -> None:
    assert problem in refusal("--config", yaml_file(tmp_path, line + "\n"))


def test_all_problems_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    text = refusal("--config", yaml_file(tmp_path, "iters: many\nrnk: 3\nrank: 0\nseed: -1\n"))
    assert all(part in text for part in ("iters:", "did you mean 'rank'?", "--rank 0", "--seed -1"))


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--rank", "0"),
        ("--alpha", "-1"),
        ("--alpha", "nan"),
        ("--seed", "-1"),
        ("--iters", "0"),
        ("--batch-size", "0"),
        ("--num-tokens", "0"),
        ("--temp", "-0.1"),
        ("--temp", "nan"),
        ("--alpha", "inf"),
        ("--epochs", "inf"),
        ("--early-stop", "-1"),
        ("--learning-rate", "-1"),
        ("--max-seq-length", "1"),
        ("--val-batches", "-2"),
        ("--val-batches", "0"),
        ("--test-batches", "0"),
        ("--save-every", "0"),
    ],
)
def test_a_value_out_of_range_is_told_with_what_is_allowed(flag: str, value: str) -> None:
    text = refusal(flag, value)
    assert text.removeprefix("argument ").startswith(flag) and "give a" in text


@pytest.mark.parametrize("flag", ["--val-batches", "--test-batches"])
def test_minus_one_batches_are_all(flag: str) -> None:
    assert getattr(options(flag, "-1"), flag[2:].replace("-", "_")) == -1


@pytest.mark.parametrize(
    "argv", [["--iters", "many"], ["--nope"], ["--rank"], ["stray"], ["--train", "yes"]]
)
def test_a_mistyped_command_line_is_one_line(argv: list[str]) -> None:
    assert "--help" in refusal(*argv)


def test_a_config_that_is_missing_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "no.yaml") in refusal("--config", str(tmp_path / "no.yaml"))


def test_a_config_that_is_a_folder_is_named(tmp_path: Path) -> None:
    assert str(tmp_path) in refusal("--config", str(tmp_path))


@pytest.mark.parametrize("text", ["a: [", "\ta: 1", "a: b: c", "!!python/object:os.system x"])
def test_a_config_that_is_no_yaml_is_one_line(tmp_path: Path, text: str) -> None:
    path = yaml_file(tmp_path, text)
    assert f"{path} is not valid YAML" in refusal("--config", path)


@pytest.mark.parametrize("text", ["", "# nothing\n", "- rank\n", "rank\n", "5\n"])
def test_a_config_without_options_is_refused(tmp_path: Path, text: str) -> None:
    assert "holds no options" in refusal("--config", yaml_file(tmp_path, text))


def test_a_record_makes_the_same_options_again() -> None:
    given = options("--train", "--rank", "3", "--prompt", "a\nb", "--lora-layers", "-1")
    assert from_mapping(json.loads(json.dumps(record(given)))) == given
    assert from_mapping(json.loads(json.dumps(record(Options())))) == Options()


def test_a_record_as_a_yaml_file_makes_the_same_options_again(tmp_path: Path) -> None:
    import yaml

    given = options("--test", "--learning-rate", "3e-5", "--targets", "q_proj,*.mlp.*")
    path = yaml_file(tmp_path, yaml.safe_dump(record(given)))
    assert options("--config", path) == given


def test_a_record_of_another_version_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="unknown option 'colour'"):
        from_mapping({**record(Options()), "colour": "red"})


def test_help_is_printed_and_ends_well(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        options("--help")
    assert end.value.code == 0
    assert "Train." in capsys.readouterr().out
