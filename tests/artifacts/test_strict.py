"""Small files that are big trouble: each is one paragraph, at once, naming the file."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from mc_cli.artifacts.calibration import TOKENS, read_token_ids
from mc_cli.artifacts.files import check_json_file, read_json, read_tensors, read_text
from mc_cli.artifacts.plan import Plan
from mc_cli.artifacts.strict_json import JsonError, parse_json
from mc_cli.artifacts.strict_yaml import read_yaml
from mc_cli.encodings.affine import choose_group_size
from mc_cli.errors import ArtifactError, InputError, PlanError, shown
from mc_cli.recipe import read_recipe

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[" * 100_000, "more than 100 lists"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "more than 100 lists"),
        (b"9" * 5000, "a whole number of 5,000 digits"),
        (b"[-1e999]", "too large"),
        (b"[NaN]", "NaN is not a number of JSON"),
        (b"[-Infinity]", "-Infinity is not a number"),
        (b'{"a": 1, "a": 2}', "given twice in one object: 'a'"),
        (b'["\\ud800"]', "half of a character"),
        ('{"a": 1}'.encode("utf-16"), "cannot be read as UTF-8"),
        (b"", "Expecting value"),
    ],
)
def test_json_beyond_its_bounds(data: bytes, message: str) -> None:
    with pytest.raises(JsonError, match=message):
        parse_json(data)


def test_json_within_its_bounds() -> None:
    assert parse_json(b"[" * 100 + b"]" * 100)
    assert parse_json(b'["' + b"[" * 100_000 + b'\\"["]') == ["[" * 100_000 + '"[']
    assert parse_json(b'["\\ud83d\\ude00", 18446744073709551615, 1e300]') == ["😀", 2**64 - 1, 1e300]
    assert parse_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}
    assert parse_json(b'{"a": 1, "a": Infinity}', finite=False, unique=False) == {"a": float("inf")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "more than 400,000 entries"),
        (BOMB + "calibrate: {sequences: *a9}", "more than 400,000 entries"),
        ("[" * 5000, "levels|nesting"),
        ("".join(" " * depth + "a:\n" for depth in range(200)), "more than 50 levels"),
        ("a: &x [*x]", "recursive|holds itself"),
        ("a: &a {b: 1}\nc: {<<: *a}", "merge key"),
        ("? [1]\n: 2", "a list cannot be a key"),
        ("".join(f"k{n % 30_000}: 1\n" for n in range(60_000)), "given twice: k0, k1"),
        ("a: " + "9" * 5000, "5,000 digits"),
        ("a: 0b" + "1" * 5000, "5,002 digits"),
        ("a: 2001-99-99", "not of its type"),
        ("a: !!int ''", "not of its type"),
        ('export: {out: "runs\\0x"}', "NUL character"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_yaml_beyond_its_bounds(text: str, message: str) -> None:
    began = time.process_time()
    with pytest.raises(yaml.YAMLError, match=message):
        read_yaml(text)
    assert time.process_time() - began < 5


def test_yaml_within_its_bounds() -> None:
    assert read_yaml("a: &a [1, 2]\nb: *a") == {"a": [1, 2], "b": [1, 2]}
    assert len(read_yaml("".join(f"k{n}: 1\n" for n in range(60_000)))) == 60_000


def test_bombs_in_plans_and_recipes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "bomb.yaml"
    path.write_text(BOMB + "schema: 1\nmethod: *a9\ncalibrate: {sequences: *a9}\n", encoding="utf-8")
    with pytest.raises(PlanError, match=r"bomb\.yaml is not valid YAML: more than"):
        Plan.read(path)
    with pytest.raises(InputError, match=r"bomb\.yaml is not valid YAML: more than"):
        read_recipe(path)
    path.write_text("".join(f"k{n}: 1\n" for n in range(4_000)), encoding="utf-8")
    began = time.process_time()
    with pytest.raises(InputError, match="has 4000 entries that cannot be used") as raised:
        read_recipe(path)
    assert len(str(raised.value)) < 5000 and time.process_time() - began < 5


def test_group_size_without_end_is_refused_and_none_is_counted_down_from(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    text = "schema: 1\nmodel_type: m\nmethod: pmq\nexpert_bits: {0: [2]}\nrole_bits: {}\ngroup_size_limit: "
    path.write_text(text + "128000000000", encoding="utf-8")
    with pytest.raises(PlanError, match="group_size_limit is 128000000000"):
        Plan.read(path)
    assert choose_group_size(96, 10**11) == 96 and choose_group_size(2880, 128) == 96


@pytest.mark.parametrize("read", [read_text, read_json, read_tensors, check_json_file, Plan.read, read_recipe])
def test_what_is_no_file_is_not_waited_for(read, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("pipe", "folder", "loop"):
        with pytest.raises((InputError, ArtifactError, PlanError), match=str(tmp_path / name)):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"ids": torch.zeros(2, 4, dtype=torch.int64)}, "holds no tensor 'token_ids', but ids"),
        ({"token_ids": torch.zeros(2, 4)}, "is float32 of shape"),
        ({"token_ids": torch.zeros(8, dtype=torch.int64)}, "should be int64 with 2 dimensions"),
        ({"token_ids": torch.zeros(0, 4, dtype=torch.int64)}, r"of shape \(0, 4\)"),
        ({"token_ids": torch.tensor([[1, 2, 300]])}, "token ids from 1 to 300, the model's vocabulary has 300"),
        ({"token_ids": torch.tensor([[1, -2, 3]])}, "token ids from -2 to 3"),
    ],
)
def test_damaged_tokens_are_named(tensors: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / TOKENS)
    with pytest.raises(ArtifactError, match=message) as raised:
        read_token_ids(tmp_path, vocabulary=300)
    assert str(tmp_path / TOKENS) in str(raised.value)


def test_values_are_shown_without_being_built() -> None:
    assert shown([1, "a", None]) == "[1, 'a', None]"
    assert shown(10**5000) == "a whole number of 5,001 digits"
    assert shown("x" * 10**7) == "'" + "x" * 36 + "..."
    bomb: object = "x"
    for _ in range(12):
        bomb = [bomb] * 9
    assert len(shown(bomb)) == 40
