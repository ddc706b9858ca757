"""The running sum: its sums and rewards against their definitions, and the files."""

import json

import pytest

from tasks import running_sum as task
from utils import load_tokenizer

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder, {table: rows}) of a small call."""
    folder = tmp_path_factory.mktemp("data") / "sums"
    flags = {"num_demonstrations": 2000, "num_prompts": 300, "num_test_prompts": 50}
    task.main(task.Args(output_dir=str(folder), **flags))
    tables = {}
    for path in folder.glob("*.jsonl"):
        tables[path.stem] = [json.loads(line) for line in path.read_text().splitlines()]
    return folder, tables


def test_running_sums_are_the_sums_of_all_beginnings():
    for prompt, base in (("31230123", 4), ("0", 2), ("9999", 10), ("11111", 3)):
        expected = [sum(map(int, prompt[:end])) % base for end in range(1, len(prompt) + 1)]
        assert task.running_sums(prompt, base) == "".join(map(str, expected))
    assert task.completion("31230123", 4, thinks=True) == ":30211203=3"
    assert task.completion("31230123", 4, thinks=False) == "3"


@pytest.mark.parametrize(
    ("response", "is_right"),
    [
        ("3", 1.0),
        ("2", 0.0),
        (":30211203=3", 1.0),
        (":00000000=3", 1.0),  # Only the answer counts.
        (":30211203=0", 0.0),
        (":30211203", 0.0),
        (":30211203=", 0.0),
        ("33", 0.0),
        ("", 0.0),
        ("3|", 1.0),
        (" 3 ", 1.0),
    ],
)
def test_the_reward_is_that_of_the_answer(response, is_right):
    assert task.reward(["31230123"], [response], base=[4]) == [is_right]
    assert task.thinks(["31230123"], [response]) == [float(response.startswith(":"))]


def test_the_rows_are_right_and_the_held_out_ones_new(written):
    _, tables = written
    held_out = {row["prompt"] for row in tables["prompts_test"]}
    assert len(held_out) == 50 and len({row["prompt"] for row in tables["prompts"]}) == 300
    others = {row["prompt"] for name in ("demonstrations", "prompts") for row in tables[name]}
    assert not held_out & others
    demonstrations = tables["demonstrations"]
    prompts = [row["prompt"] for row in demonstrations]
    completions = [row["completion"] for row in demonstrations]
    assert set(task.reward(prompts, completions, base=[4] * 2000)) == {1.0}
    assert sum(task.thinks(prompts, completions)) / 2000 == pytest.approx(0.2, abs=0.03)
    assert {len(prompt) for prompt in prompts} == {8}


def test_the_tokenizer_has_a_token_for_each_character(written):
    folder, _ = written
    tokenizer = load_tokenizer(str(folder / "model"))
    ids = tokenizer("3123:0=|").input_ids
    assert len(ids) == 8 and tokenizer.decode(ids) == "3123:0=|"
    assert tokenizer.eos_token == "|" and tokenizer.pad_token == "<pad>"


def test_a_second_call_writes_the_same_bytes(written, tmp_path):
    folder, _ = written
    flags = {"num_demonstrations": 2000, "num_prompts": 300, "num_test_prompts": 50}
    task.main(task.Args(output_dir=str(tmp_path / "again"), **flags))
    for path in folder.rglob("*"):
        if path.is_file():
            other = tmp_path / "again" / path.relative_to(folder)
            assert other.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"base": 1}, "--base"),
        ({"base": 11}, "--base"),
        ({"share": 1.5}, "--share"),
        ({"num_digits": 0}, "--num_digits"),
        ({"num_digits": 4}, "more than half of the 256 prompts"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_flags_out_of_bounds_end_in_one_line(flags, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        task.main(task.Args(output_dir=str(tmp_path / "sums"), **flags))
    assert not (tmp_path / "sums").exists()
