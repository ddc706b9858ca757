"""What the scripts share: statistics over ranks, data, tokens, models, batches, flags, folders."""

import contextlib
import copy
import datetime
import json
import math
import os
import re
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    PreTrainedTokenizerFast,
    Qwen3NextConfig,
)
from transformers.cache_utils import StaticLayer
from transformers.modeling_layers import GradientCheckpointingLayer

import utils
from conftest import FAMILIES, GROUPED, SMALL, WIDE, build_tokenizer, read_jsonl, write_jsonl

pytestmark = pytest.mark.fast

CPU = torch.device("cpu")
ONE = utils.Ranks(0, 1, CPU)
EOS = 1
NAN = float("nan")


@dataclass
class Args:
    """What utils asks of any script's arguments."""

    model: str = "some/model"
    dataset: str = "data/some/rows.jsonl"
    seed: int = 1
    batch_size: int = 8
    micro_batch_size: int = 4
    lr: float = 1e-3
    max_grad_norm: float = 1.0
    betas: tuple[float, ...] = (0.0, 1.0)
    price: float | None = None
    precision: str = "fp32"
    output_dir: str | None = None
    resume: str | None = None
    track: str = "none"
    save_every: int = 0
    timeout_minutes: float = 60


def refused(match, function, *args, **options):
    """The function ends in a UserError whose first line, which `launch` prints, matches."""
    with pytest.raises(utils.UserError) as caught:
        function(*args, **options)
    assert re.search(match, str(caught.value).splitlines()[0])


# --------------------------------------------------------------------------------------------------
# Processes and seeds


def test_ranks_cannot_be_changed():
    assert ONE.is_main
    assert not utils.Ranks(1, 2, CPU).is_main
    with pytest.raises(FrozenInstanceError):
        ONE.rank = 1


def test_launch_turns_a_user_error_into_one_line(capsys):
    def main(args):
        raise utils.UserError(f"{args}: wrong\nand more that nobody needs")

    with pytest.raises(SystemExit) as caught:
        utils.launch(main, "this")
    assert caught.value.code == 1
    assert capsys.readouterr().err == "error: this: wrong\n"
    with pytest.raises(ZeroDivisionError):  # A mistake of ours keeps its traceback.
        utils.launch(lambda args: 1 / 0, None)


@pytest.mark.parametrize(("connected", "lines"), [(False, 0), (True, 1)])
def test_ranks_that_are_not_connected_yet_leave_the_message_to_the_first(
    connected, lines, monkeypatch, capsys
):
    def main(args):
        raise utils.UserError("wrong")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(dist, "is_initialized", lambda: connected)
    with pytest.raises(SystemExit):
        utils.launch(main, None)
    assert capsys.readouterr().err.count("\n") == lines


@pytest.mark.parametrize("error", [None, utils.UserError("wrong"), ZeroDivisionError()])
def test_launch_leaves_the_process_group_after_success_only(error, monkeypatch):
    """To leave it a rank waits for the others, which may be waiting for one that failed."""
    left = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append("the group"))

    def main(args):
        if error:
            raise error

    expected = pytest.raises((SystemExit, ZeroDivisionError)) if error else contextlib.nullcontext()
    with expected:
        utils.launch(main, None)
    assert left == ([] if error else ["the group"])


def test_launch_alone_has_no_process_group_to_leave():
    utils.launch(lambda args: None, None)


@pytest.mark.parametrize("name", ["there", "file/run"])
def test_a_run_folder_that_cannot_be_made_ends_in_one_line(tmp_path, capsys, name):
    """Another run of one seed made it in the same second, or a file is in its way."""
    (tmp_path / "there" / "checkpoints").mkdir(parents=True)
    (tmp_path / "file").touch()

    def main(args):
        utils.Run(args, ONE, "ppo_rlhf")

    with pytest.raises(SystemExit) as caught:
        utils.launch(main, Args(output_dir=str(tmp_path / name)))
    error = capsys.readouterr().err
    assert caught.value.code == 1
    assert error.startswith("error: ")
    assert str(tmp_path / name) in error
    assert error.count("\n") == 1


def test_a_process_without_torchrun_is_alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert utils.init_ranks() == ONE


def test_init_ranks_waits_as_long_as_it_is_told(monkeypatch):
    joined = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kw: joined.append((args, kw)))
    utils.init_ranks(timeout_minutes=1.5)
    timeout = datetime.timedelta(seconds=90)
    assert joined == [(("gloo",), {"timeout": timeout, "device_id": None})]


def test_attention_is_not_cudnns(monkeypatch):
    """With a mask its gradients are NaN at some lengths on H100 and H200 (pytorch issue 196678)."""
    precision = torch.get_float32_matmul_precision()
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        ranks = utils.init_ranks()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.get_float32_matmul_precision() == "high"
        assert ranks.device == torch.device("cuda", 1)
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cuda.enable_cudnn_sdp(True)


def test_seeded_depends_on_the_key_alone():
    torch.manual_seed(0)
    first = torch.rand(4, generator=utils.seeded(1, "order", 2))
    torch.manual_seed(99)
    torch.rand(3)
    assert torch.equal(first, torch.rand(4, generator=utils.seeded(1, "order", 2)))
    for key in [(2, "order", 2), (1, "other", 2), (1, "order", 3), (1, "order"), ("1", "order", 2)]:
        assert not torch.equal(first, torch.rand(4, generator=utils.seeded(*key)))


def test_a_stopwatch_gives_a_lap_the_seconds_since_the_one_before(monkeypatch):
    times = iter([10.0, 13.0, 20.0])
    monkeypatch.setattr(utils.Stopwatch, "now", lambda self: next(times))
    watch = utils.Stopwatch(CPU)
    watch.lap("rollout")
    watch.lap("update")
    assert watch.laps == {"rollout": 3.0, "update": 7.0}


def test_check_divides():
    flags = "--batch_size by the number of ranks"
    utils.check_divides(4, 8, flags)
    for divisor, number in [(3, 8), (0, 8), (2, 0)]:
        refused(re.escape(flags), utils.check_divides, divisor, number, flags)


# --------------------------------------------------------------------------------------------------
# Statistics over processes


def sample(seed, shape, fraction=0.6):
    """fp64 numbers that are not centred, a mask, and NaN wherever the mask is False."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 + 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(shape, generator=generator) < fraction
    return torch.where(mask, x, NAN), mask


def test_masked_mean_is_the_mean_of_the_true_entries():
    x, mask = sample(0, (5, 7))
    mean = utils.masked_mean(x, mask)
    assert mean.shape == ()
    assert mean.dtype == x.dtype
    assert abs(mean.item() - x.numpy()[mask.numpy()].mean()) < 1e-12
    with_zeros = torch.nan_to_num(x).mean()
    assert abs(mean.item() - with_zeros.item()) > 0.1


def test_masked_mean_of_nothing_is_zero_and_carries_no_gradient():
    x = torch.full((2, 3), NAN, requires_grad=True)
    assert utils.masked_mean(x, torch.zeros(2, 3, dtype=torch.bool)).item() == 0
    assert not utils.masked_mean(x, torch.ones(2, 3, dtype=torch.bool)).requires_grad


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_against_numpy(shift_mean):
    x, mask = sample(1, (4, 9))
    whitened = utils.whiten(x, mask, shift_mean=shift_mean)
    valid = x.numpy()[mask.numpy()]
    offset = 0 if shift_mean else valid.mean()
    expected = (valid - valid.mean()) / valid.std() + offset
    unbiased = (valid - valid.mean()) / valid.std(ddof=1) + offset
    assert np.abs(whitened.numpy()[mask.numpy()] - expected).max() < 1e-7
    assert np.abs(unbiased - expected).max() > 1e-3
    assert (whitened[~mask] == 0).all()


def test_whiten_has_zero_mean_unit_variance_and_keeps_the_mean_when_asked():
    x, mask = sample(2, (8, 8))
    shifted = utils.whiten(x, mask)[mask]
    unshifted = utils.whiten(x, mask, shift_mean=False)[mask]
    assert abs(shifted.mean()) < 1e-12
    assert abs(shifted.var(correction=0) - 1) < 1e-6
    assert abs(unshifted.mean() - x[mask].mean()) < 1e-12
    assert abs(unshifted.var(correction=0) - 1) < 1e-6


@pytest.mark.parametrize("num_valid", [0, 1])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_is_finite_for_no_and_one_valid_entry(num_valid, shift_mean):
    x = torch.full((2, 3), NAN)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    if num_valid:
        x[1, 1] = 5.0
        mask[1, 1] = True
    whitened = utils.whiten(x, mask, shift_mean=shift_mean)
    assert whitened.isfinite().all()
    assert (whitened[~mask] == 0).all()
    assert whitened.dtype == torch.float32
    if num_valid:
        assert whitened[1, 1].item() == pytest.approx(0.0 if shift_mean else 5.0)


def test_means_over_micro_batches_are_means_over_entries():
    means = utils.Means()
    means.add({"a": torch.tensor([1.0, NAN])}, torch.tensor([True, False]))
    means.add({"a": torch.tensor([4.0, 4.0, 4.0]), "b": torch.tensor([1.0, 2.0, 1.5, 1.5])})
    means.add({"nothing": torch.tensor([NAN])}, torch.tensor([False]))
    expected = {"a": 13 / 4, "b": 1.5, "nothing": 0.0}  # A mean of means would give 2.5 for a.
    assert means.over_ranks() == expected
    assert means.over_ranks() == expected  # Asking changes nothing.


def test_add_sum_is_add_of_the_entries_it_sums():
    means = utils.Means()
    means.add_sum("a", torch.tensor(6.0), torch.tensor(3))
    means.add_sum("a", torch.tensor(2.0), torch.tensor(1))
    means.add_sum("nothing", torch.tensor(0.0), torch.tensor(0))
    assert means.over_ranks() == {"a": 2.0, "nothing": 0.0}
    means.add({"a": torch.tensor([7.0])})
    assert means.over_ranks()["a"] == 3.0


def test_merge_adds_what_another_has_collected_and_leaves_it_alone():
    means = utils.Means()
    means.add({"a": torch.tensor([1.0])})
    other = utils.Means()
    other.add({"a": torch.tensor([4.0, 4.0, 4.0]), "b": torch.tensor([5.0])})
    means.merge(other)
    assert means.over_ranks() == {"a": 13 / 4, "b": 5.0}
    means.add({"a": torch.tensor([1.0]), "b": torch.tensor([1.0])})
    assert other.over_ranks() == {"a": 4.0, "b": 5.0}


def test_means_of_nothing_at_all():
    assert utils.Means().over_ranks() == {}


def test_means_keep_no_graph():
    means = utils.Means()
    x = torch.ones(3, requires_grad=True)
    means.add({"a": x * 2})
    means.add_sum("b", (x * 2).sum(), torch.tensor(3))
    assert not any(pair.requires_grad for pair in means.sums.values())
    assert means.over_ranks() == {"a": 2.0, "b": 2.0}


def test_means_do_not_lose_small_numbers_beside_large_ones():
    means = utils.Means()
    for x in (2.0**24, 1.0, 1.0):  # In fp32 the sum would stay at 2^24.
        means.add({"a": torch.tensor([x])})
        means.add_sum("b", torch.tensor(x), torch.tensor(1))
    expected = (2.0**24 + 2) / 3
    assert means.over_ranks() == {"a": expected, "b": expected}


# Two ranks hold unequal parts of one table: four rows each, of which rank 1 masks most.


def table():
    x, mask = sample(3, (8, 6))
    mask[4:, 1:] = False
    x[4:] += 10  # The ranks differ, so that statistics of one rank alone are far off.
    return x, mask


def statistics_of_one_rank(rank):
    x, mask = (part[4 * rank : 4 * rank + 4] for part in table())
    means = utils.Means()
    for row, row_mask in zip(x, mask, strict=True):
        means.add({"x": row}, row_mask)
    means.add_sum("sums", torch.tensor(rank + 1.0), torch.tensor(3 * rank + 1))
    ranks = utils.init_ranks()
    return {
        "gathered": utils.all_gather(torch.arange(3) + 10 * rank).tolist(),
        "objects": utils.gather_objects(["text"] * rank),
        "summed": utils.sum_over_ranks(torch.tensor([[1.0, rank]])).tolist(),
        "mean": utils.masked_mean(x, mask).item(),
        "none": utils.masked_mean(x, torch.zeros_like(mask)).item(),
        "whitened": utils.whiten(x, mask).numpy(),
        "scaled": utils.whiten(x, mask, shift_mean=False).numpy(),
        "means": means.over_ranks(),
        "ranks": (ranks.rank, ranks.world_size),
    }


def test_statistics_of_two_ranks_are_those_of_the_pooled_table(on_two_ranks):
    x, mask = table()
    answers = on_two_ranks(statistics_of_one_rank)
    assert [answer["ranks"] for answer in answers] == [(0, 2), (1, 2)]
    for answer in answers:
        assert answer["gathered"] == [0, 1, 2, 10, 11, 12]
        assert answer["objects"] == [[], ["text"]]
        assert answer["summed"] == [[2.0, 1.0]]
        assert answer["none"] == 0
        assert abs(answer["mean"] - utils.masked_mean(x, mask).item()) < 1e-12
        assert abs(answer["means"]["x"] - answer["mean"]) < 1e-12
        assert answer["means"]["sums"] == 3 / 5
    for key, shift_mean in [("whitened", True), ("scaled", False)]:
        pooled = utils.whiten(x, mask, shift_mean=shift_mean).numpy()
        both = np.concatenate([answer[key] for answer in answers])
        assert np.abs(both - pooled).max() < 1e-12
    alone = utils.whiten(x[:4], mask[:4]).numpy()
    assert np.abs(answers[0]["whitened"] - alone).max() > 0.1


def means_of_unequal_names(rank, full_rank):
    """One rank has had rows and names, the other none at first and then a name in another order."""
    means = utils.Means()
    if rank == full_rank:
        means.add({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([5.0])})
    first = means.over_ranks()
    if rank != full_rank:
        means.add({"c": torch.tensor([7.0]), "b": torch.tensor([1.0, 3.0])})
    return first, means.over_ranks()


@pytest.mark.parametrize("full_rank", [0, 1])
def test_ranks_need_not_have_added_the_same_names(on_two_ranks, full_rank):
    for first, second in on_two_ranks(means_of_unequal_names, full_rank):
        assert first == {"a": 1.5, "b": 5.0}
        assert second == {"a": 1.5, "b": 3.0, "c": 7.0}


def test_alone_gathered_objects_are_the_one_there_is():
    assert utils.gather_objects({"a": 1}) == [{"a": 1}]


# --------------------------------------------------------------------------------------------------
# Data files

ROWS = [{"prompt": "ab", "completion": "cd"}, {"prompt": "ba", "completion": "d"}]
COLUMNS = [("prompt", "completion"), ("text",)]


def write_rows(path, rows=ROWS):
    """A file of the kind that its suffix names."""
    if path.suffix == ".jsonl":
        return write_jsonl(path, rows)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_load_rows_reads_each_kind_of_file(tmp_path, suffix):
    rows = utils.load_rows(write_rows(tmp_path / f"rows.{suffix}"), COLUMNS)
    assert [dict(row) for row in rows] == ROWS


def test_load_rows_reads_a_folder_in_the_order_of_its_names(tmp_path):
    write_rows(tmp_path / "b.jsonl", ROWS[1:])
    write_rows(tmp_path / "a.jsonl", ROWS[:1])
    (tmp_path / "README.md").write_text("not data")
    assert [dict(row) for row in utils.load_rows(str(tmp_path), COLUMNS)] == ROWS


def test_load_rows_keeps_the_first_rows_and_looks_at_no_others(tmp_path):
    rows = [*ROWS, {"prompt": "ab", "completion": None}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    refused("row 3: completion is None", utils.load_rows, path, COLUMNS)
    refused("row 3: completion is None", utils.load_rows, path, COLUMNS, max_rows=9)
    assert [dict(row) for row in utils.load_rows(path, COLUMNS, max_rows=2)] == ROWS
    assert [dict(row) for row in utils.load_rows(path, COLUMNS, max_rows=1)] == ROWS[:1]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("empty.jsonl", "", "empty.jsonl: empty"),
        ("empty.jsonl", "\n \n", "empty.jsonl: empty"),
        ("empty.json", "[]", "empty.json: "),
        ("broken.jsonl", '{"prompt": "a", \n', "broken.jsonl: cannot be read"),
        ("huge.jsonl", '{"text": "a", "reward": 1e400}\n', "huge.jsonl: cannot be read.*too big"),
        ("notes.txt", "text", "notes.txt: "),
        (
            "other.jsonl",
            '{"question": "a", "answer": "b"}\n',
            r"other.jsonl: .*prompt\+completion or text; it has question, answer",
        ),
    ],
)
def test_load_rows_says_what_is_wrong(tmp_path, name, content, match):
    (tmp_path / name).write_text(content)
    refused(match, utils.load_rows, str(tmp_path / name), COLUMNS)


def test_load_rows_refuses_a_table_without_rows(tmp_path):
    datasets.Dataset.from_dict({"text": []}).to_parquet(tmp_path / "empty.parquet")
    refused("empty.parquet: .*no data", utils.load_rows, str(tmp_path / "empty.parquet"), COLUMNS)


def test_a_path_that_is_no_name_on_the_hub_is_not_looked_for_there(tmp_path):
    for path in (str(tmp_path / "rows.jsonl"), str(tmp_path / "folder"), "rows.jsonl", "a/b/c"):
        refused(f"{path}: no such file or folder", utils.load_rows, path, COLUMNS)
    for path in ("name", "owner/name", str(tmp_path)):
        utils.check_path(path)


def test_messages_may_hold_tool_calls_parts_and_nothing_said(tmp_path):
    """Content may be empty, in parts, or lacking beside a tool call."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    for messages in (
        [{"role": "user", "content": "1 + 1?"}, call, {"role": "tool", "content": ""}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
    ):
        path = write_rows(tmp_path / "rows.jsonl", [{"messages": messages}])
        assert len(utils.load_rows(path, [("messages",)])) == 1


def test_messages_do_not_hold_numbers(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": 5}]}])
    match = "row 1: messages is .*5.*not a text or messages"
    refused(match, utils.load_rows, path, [("messages",)])


def test_load_rows_refuses_a_folder_of_nothing(tmp_path):
    refused(".json, .jsonl or .parquet", utils.load_rows, str(tmp_path), COLUMNS)


def test_load_rows_leaves_no_file_of_a_folder_unread(tmp_path):
    """The library does not read one table from files of two kinds."""
    write_rows(tmp_path / "a.jsonl", ROWS[:1])
    write_rows(tmp_path / "b.parquet", ROWS[1:])
    refused(str(tmp_path), utils.load_rows, str(tmp_path), COLUMNS)


def test_load_rows_wants_one_whole_group_of_columns(tmp_path):
    half = write_rows(tmp_path / "half.jsonl", [{"prompt": "a"}])
    refused("it has prompt", utils.load_rows, half, COLUMNS)
    more = write_rows(tmp_path / "more.jsonl", [{"text": "a", "source": 3}])
    assert utils.load_rows(more, COLUMNS)[0] == {"text": "a", "source": 3}


def test_one_row_in_twenty_is_held_out():
    rows = [{"input_ids": [i]} for i in range(60)]
    kept, held_out = utils.hold_out(rows, seed=1)
    assert len(held_out) == 3
    assert kept == [row for row in rows if row not in held_out]  # In their old order.
    assert utils.hold_out(rows, seed=1) == (kept, held_out)
    assert utils.hold_out(rows, seed=2)[1] != held_out
    assert utils.hold_out(rows[:19], seed=1) == (rows[:19], [])


def test_no_copy_of_a_held_out_row_is_trained_on():
    rows = [{"input_ids": [i // 2]} for i in range(60)]
    kept, held_out = utils.hold_out(rows, seed=1)
    assert len(held_out) == 3
    assert not [row for row in kept if row in held_out]
    assert len(kept) < 57
    refused("--dataset: .*--eval_dataset", utils.hold_out, [{"input_ids": [5]}] * 20, seed=1)


SCORES = """
from dataclasses import dataclass

CONSTANT = 1

@dataclass
class Score:
    value: 'int' = 3

def score(prompts, responses):
    return [Score().value] * len(responses)
"""


def test_load_function_finds_a_function_and_names_what_is_missing(tmp_path):
    path = tmp_path / "scores.py"
    path.write_text(SCORES)
    assert utils.load_function(f"{path}:score", "--reward_fn")(["a"], ["b"]) == [3]
    for name in ("other", "CONSTANT"):
        match = f"--reward_fn .*no function {name}"
        refused(match, utils.load_function, f"{path}:{name}", "--reward_fn")
    nowhere = f"{tmp_path}/nowhere.py:score"
    refused("--reward_fn .*no such file", utils.load_function, nowhere, "--reward_fn")
    refused("file.py:function", utils.load_function, str(path), "--reward_fn")
    path.write_text("import functools\nnameless = functools.partial(max)\n")
    match = "--reward_fn .*no function nameless"
    refused(match, utils.load_function, f"{path}:nameless", "--reward_fn")


def test_a_reward_function_gets_rows_and_columns_in_their_order():
    seen = {}

    def reward(prompts, responses, **columns):
        seen.update(columns, prompts=prompts, responses=responses)
        return [len(response) for response in responses]

    rows = [{"prompt": "x", "label": 3, "note": "u"}, {"prompt": "y", "label": 4, "note": "v"}]
    scores = utils.call_reward_fn(reward, rows, ["", "ab"], CPU)
    assert scores.dtype == torch.float32
    assert scores.tolist() == [0.0, 2.0]
    assert seen == {
        "prompts": ["x", "y"],
        "responses": ["", "ab"],
        "label": [3, 4],
        "note": ["u", "v"],
    }


NONSENSE = [[1.0], [1.0, 2.0, 3.0], [1.0, NAN], [math.inf, 1.0], [1.0, None], None, [1.0, "good"]]


@pytest.mark.parametrize("answer", NONSENSE)
def test_a_reward_function_that_answers_nonsense_is_named(answer):
    def quality(prompts, responses):
        return answer

    rows = [{"prompt": "x"}, {"prompt": "y"}]
    refused("quality", utils.call_reward_fn, quality, rows, ["a", "b"], CPU)


FAILING = {
    "it fails": lambda prompts, responses: [len(response.split()[0]) for response in responses],
    "its signature": lambda prompts: [0.0, 0.0],
    "a matrix": lambda prompts, responses: torch.zeros(2, 2),
    "no sequence": lambda prompts, responses: torch.tensor(1.0),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_reward_function_that_fails_ends_in_one_line(name):
    rows = [{"prompt": "x"}, {"prompt": "y"}]
    match = "gives no number for each response: .*Error"
    refused(match, utils.call_reward_fn, FAILING[name], rows, ["a", ""], CPU)


# --------------------------------------------------------------------------------------------------
# Tokenizers


@pytest.mark.parametrize("pad_token", ["|", None])
@pytest.mark.parametrize("spare", [True, False])
def test_pad_is_never_eos(tmp_path, pad_token, spare):
    tokenizer = build_tokenizer(pad_token)
    if spare:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved_0|>"]})
    tokenizer.save_pretrained(tmp_path)
    loaded = utils.load_tokenizer(str(tmp_path))
    assert loaded.eos_token_id == EOS
    assert loaded.pad_token_id not in (None, EOS)
    assert loaded.pad_token == ("<|reserved_0|>" if spare else "[PAD]")


def test_an_eos_that_is_called_pad_is_no_padding(tmp_path):
    tokenizer = build_tokenizer("|")
    tokenizer.add_special_tokens({"eos_token": "<|endofpad|>", "pad_token": "<|endofpad|>"})
    tokenizer.save_pretrained(tmp_path)
    loaded = utils.load_tokenizer(str(tmp_path))
    assert loaded.eos_token == "<|endofpad|>"
    assert loaded.pad_token not in (None, "<|endofpad|>")


def test_a_folder_without_a_tokenizer_or_an_eos_is_refused(tmp_path):
    (tmp_path / "nothing").mkdir()
    refused("nothing: no tokenizer", utils.load_tokenizer, str(tmp_path / "nothing"))
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "mute")
    refused("mute: .*no EOS token", utils.load_tokenizer, str(tmp_path / "mute"))


def test_a_reward_model_of_other_token_ids_is_refused(tmp_path, gpt2_folder, llama_rm_folder):
    tokenizer = utils.load_tokenizer(gpt2_folder)
    utils.check_same_tokenizer(llama_rm_folder, tokenizer, gpt2_folder)
    other = build_tokenizer()
    other.add_tokens(["more"])
    other.save_pretrained(tmp_path)
    match = "--reward_model .*differs from that of"
    refused(match, utils.check_same_tokenizer, str(tmp_path), tokenizer, gpt2_folder)


def special_tokenizer(folder, pattern):
    """A tokenizer that adds BOS 'U' and EOS '|' where the pattern says so, as many do."""
    characters = build_tokenizer().backend_tokenizer
    special_tokens = [("U", 29), ("|", EOS)]
    characters.post_processor = TemplateProcessing(single=pattern, special_tokens=special_tokens)
    options = {"bos_token": "U", "eos_token": "|", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=characters, **options).save_pretrained(folder)
    return utils.load_tokenizer(str(folder))


@pytest.mark.parametrize("pattern", ["$A", "U $A", "$A |", "U $A |"])
def test_one_bos_and_one_eos_whatever_the_tokenizer_adds(tmp_path, pattern):
    tokenizer = special_tokenizer(tmp_path, pattern)
    adds_bos = pattern.startswith("U")
    for prompt in ("abc", "Uabc", "UUabc"):  # The others bring a BOS, or two, of their own.
        bos = [29] if adds_bos or prompt[0] == "U" else []
        assert utils.encode_prompt(tokenizer, prompt) == [*bos, 2, 3, 4]
        assert utils.encode_pair(tokenizer, prompt, "de") == ([*bos, 2, 3, 4], [5, 6, EOS])
    assert utils.encode_prompt(tokenizer, "ab|")[-3:] == [2, 3, EOS]  # One that the user wrote.
    assert utils.encode_prompt(tokenizer, "") == [29] * adds_bos
    assert utils.encode_response(tokenizer, "", "abc") == [2, 3, 4, EOS]


def test_a_bos_that_is_also_the_eos_stays_in_front_of_no_prompt(tmp_path):
    tokenizer = special_tokenizer(tmp_path, "| $A")
    tokenizer.bos_token = "|"
    assert utils.encode_prompt(tokenizer, "ab") == [EOS, 2, 3]
    assert utils.encode_prompt(tokenizer, "") == [EOS]


def test_a_response_ends_at_its_first_eos(tokenizer):
    assert utils.encode_response(tokenizer, "a", "bc") == [3, 4, EOS]
    assert utils.encode_response(tokenizer, "a", "bc|") == [3, 4, EOS]
    assert utils.encode_response(tokenizer, "a", "b|c") == [3, EOS]
    assert utils.encode_response(tokenizer, "a", "") == [EOS]


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role[0] | upper }}{{ m.content }} {% endfor %}"
)
TEMPLATE += "{% if add_generation_prompt %}A{% endif %}"


@pytest.fixture
def chat_tokenizer():
    """Its template writes a BOS, U for the user, A for the assistant, and a space after a turn."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_a_chat_template_writes_prompt_and_response(chat_tokenizer):
    prompt = [{"role": "user", "content": "ab"}]
    response = [{"role": "assistant", "content": "cd"}]
    assert utils.encode_prompt(chat_tokenizer, prompt) == [EOS, 29, 2, 3, 28, 30]
    assert utils.encode_response(chat_tokenizer, prompt, response) == [4, 5, 28, EOS]
    adds_both = TemplateProcessing(single="| $A |", special_tokens=[("|", EOS)])
    chat_tokenizer.backend_tokenizer.post_processor = adds_both
    assert utils.encode_prompt(chat_tokenizer, prompt) == [EOS, 29, 2, 3, 28, 30]
    assert utils.encode_response(chat_tokenizer, prompt, response) == [4, 5, 28, EOS]


def test_a_conversation_may_hold_its_prompt(chat_tokenizer):
    prompt = [{"role": "user", "content": "ab"}]
    response = [{"role": "assistant", "content": "cd"}]
    apart = utils.encode_pair(chat_tokenizer, prompt, response)
    assert apart == ([EOS, 29, 2, 3, 28, 30], [4, 5, 28, EOS])
    assert utils.encode_pair(chat_tokenizer, "", prompt + response) == apart
    assert utils.encode_pair(chat_tokenizer, "a text beside it", prompt + response) == apart


def test_messages_that_cannot_be_rendered_are_refused(tokenizer, chat_tokenizer):
    prompt = [{"role": "user", "content": "a"}]
    response = [{"role": "assistant", "content": "b"}]
    refused("no chat template", utils.encode_prompt, tokenizer, prompt)
    chat_tokenizer.chat_template = "{{ messages | length }}{{ messages[0].content }}"
    match = "chat template does not render a prompt as the beginning"
    refused(match, utils.encode_response, chat_tokenizer, prompt, response)


def test_long_prompts_are_left_out_and_counted(tmp_path, tokenizer, capsys):
    rows = [{"prompt": "abc", "label": 1}, {"prompt": "abcd", "label": 2}]
    path = write_rows(tmp_path / "prompts.jsonl", rows)
    prompts = utils.load_prompts(path, tokenizer, 3, "--query_length")
    assert [(ids, dict(row)) for ids, row in prompts] == [([2, 3, 4], rows[0])]
    assert "left out 1 of 2 rows longer than 3 tokens (--query" in capsys.readouterr().out
    match = r"no row is left: all 2 have over 2 tokens \(--query_length\)"
    refused(match, utils.load_prompts, path, tokenizer, 2, "--query_length")


def test_what_cannot_be_encoded_is_named_by_its_row():
    rows = [{"x": 1}, {"x": 0}]
    assert utils.encode_rows("a.jsonl", rows, lambda row: [row["x"]] * 2) == [1, 1, 0, 0]
    refused("a.jsonl: row 2: division", utils.encode_rows, "a.jsonl", rows, lambda r: [1 / r["x"]])


def test_long_rows_are_left_out_and_counted(capsys):
    rows = ["a", "abc", "ab"]
    assert utils.leave_out_long("a.jsonl", rows, len, 3) == rows
    assert capsys.readouterr().out == ""
    assert utils.leave_out_long("a.jsonl", rows, len, 2) == ["a", "ab"]
    left_out = "a.jsonl: left out 1 of 3 rows longer than 2 tokens (--max_length)\n"
    assert capsys.readouterr().out == left_out
    message = r"a.jsonl: no row is left: all 3 have over 0 tokens \(--x\)"
    refused(message, utils.leave_out_long, "a.jsonl", rows, len, 0, "--x")


def test_an_empty_or_broken_prompt_is_named(tmp_path, tokenizer):
    path = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "a"}, {"prompt": ""}])
    refused(
        "prompts.jsonl: row 2: its prompt is empty",
        utils.load_prompts,
        path,
        tokenizer,
        9,
        "--length",
    )
    messages = [{"role": "user", "content": "a"}]
    path = write_rows(tmp_path / "messages.jsonl", [{"prompt": messages}])
    refused("row 1: .*no chat template", utils.load_prompts, path, tokenizer, 9, "--length")


class Melting:
    """A tokenizer that has one token for a letter and the full stop after it, and 0 for unknown."""

    eos_token_id = 1
    pad_token_id = 0
    unk_token_id = None

    def __call__(self, text, add_special_tokens):
        pieces = {"x": [5], "x.": [6], "x!?": [5, 7, 8], "x;": [9, 7], "x,": [5, 0]}
        return SimpleNamespace(input_ids=pieces[text])


def test_a_stop_token_is_the_one_that_follows_a_letter():
    assert utils.stop_token_ids(Melting(), "!?", 1) == [1, 7, 8]
    assert utils.stop_token_ids(Melting(), None, None) == [1]
    assert utils.stop_token_ids(Melting(), None, [3, 1]) == [1, 3]
    for text in (".", ";", "", ","):
        refused("--stop_token", utils.stop_token_ids, Melting(), text, 1)


def test_ids_without_a_token_and_the_pad_may_not_be_said():
    vocabulary = {"<pad>": 0, "a": 2, "|": 5, "beyond the embedding": 9}
    tokenizer = SimpleNamespace(pad_token_id=0, get_vocab=lambda: vocabulary)
    allowed = utils.allowed_ids(tokenizer, 7, CPU)
    assert allowed.dtype == torch.bool
    assert allowed.nonzero().flatten().tolist() == [2, 5]


# --------------------------------------------------------------------------------------------------
# Models


def logits(model):
    """Of one fixed row, in train mode: dropout would show."""
    model.train()
    with torch.no_grad():
        return model(torch.tensor([[2, 3, 4, 5, 1]])).logits


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_load_pretrained_has_no_dropout_left(kind, request):
    folder = request.getfixturevalue(f"{kind}_folder")
    model, missing = utils.load_pretrained(AutoModelForCausalLM, folder)
    assert missing == []
    assert not model.training
    dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert all(module.p == 0 for module in dropouts)
    rates = [value for name, value in vars(model.config).items() if "drop" in name]
    rates = [value for value in rates if isinstance(value, float)]
    assert rates
    assert not any(rates)
    assert torch.equal(logits(model), logits(model))
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert not torch.equal(logits(plain), logits(plain))  # The folder itself asks for dropout.


def test_load_pretrained_is_fp32_whatever_the_folder_holds(tmp_path, gpt2_folder):
    half = AutoModelForCausalLM.from_pretrained(gpt2_folder, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert half.dtype == torch.bfloat16
    model, _ = utils.load_pretrained(AutoModelForCausalLM, str(tmp_path / "half"))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path / "full")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "full").dtype == torch.float32


def test_load_pretrained_starts_from_the_seed_where_there_are_no_weights(
    tmp_path, llama_folder, capsys
):
    AutoConfig.from_pretrained(llama_folder).save_pretrained(tmp_path)
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model, _ = utils.load_pretrained(AutoModelForCausalLM, str(tmp_path))
        weights.append(model.lm_head.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert "starting from random weights" in capsys.readouterr().out


def test_load_pretrained_refuses_what_is_no_model_folder(tmp_path):
    load = utils.load_pretrained
    refused("cannot be loaded as a model", load, AutoModelForCausalLM, str(tmp_path))
    refused("nowhere: no such", load, AutoModelForCausalLM, str(tmp_path / "nowhere"))
    for content in ('{"model_type": "no_such_type"}', "{"):
        (tmp_path / "config.json").write_text(content)
        refused("cannot be loaded as a model", load, AutoModelForCausalLM, str(tmp_path))


def test_load_pretrained_refuses_a_damaged_file_of_weights(tmp_path, gpt2_folder):
    AutoConfig.from_pretrained(gpt2_folder).save_pretrained(tmp_path)
    weights = (Path(gpt2_folder) / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    load = utils.load_pretrained
    refused("cannot be loaded as a model", load, AutoModelForCausalLM, str(tmp_path))


def test_load_pretrained_refuses_weights_of_other_shapes(tmp_path, gpt2_rm_folder):
    auto_class = AutoModelForSequenceClassification
    options = {"num_labels": 2, "ignore_mismatched_sizes": True}
    auto_class.from_pretrained(gpt2_rm_folder, **options).save_pretrained(tmp_path)
    refused(str(tmp_path), utils.load_pretrained, auto_class, str(tmp_path), num_labels=1)


def test_load_pretrained_refuses_missing_weights_unless_they_may_miss(gpt2_folder, llama_rm_folder):
    load = utils.load_pretrained
    auto_class = AutoModelForSequenceClassification
    refused("lacks the weights score.weight", load, auto_class, gpt2_folder, num_labels=1)
    _, missing = load(auto_class, gpt2_folder, ["score.weight"], num_labels=1)
    assert missing == ["score.weight"]
    refused("lacks the weights lm_head.weight", load, AutoModelForCausalLM, llama_rm_folder)


def wide_model(config):
    """A language model whose weights are not small, so that every part of it shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager")
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


def name_of(config):
    return config.model_type


@pytest.mark.parametrize("config", FAMILIES, ids=name_of)
@torch.no_grad()
def test_head_logits_are_the_models_own(config):
    model = wide_model(config)
    ids = torch.randint(2, 32, (2, 6))
    hidden = model.base_model(ids, use_cache=False).last_hidden_state
    ours = utils.head_logits(model, hidden)
    torch.testing.assert_close(ours, model(ids, use_cache=False).logits)
    if config.model_type == "gemma2":
        assert ours.abs().max() < 2.0
        assert model.get_output_embeddings()(hidden).abs().max() > 2.5  # The cap is at 2.


WINDOWS = [config for config in FAMILIES if getattr(config, "sliding_window", None) == 4]


@pytest.mark.parametrize("config", WINDOWS, ids=name_of)
@torch.no_grad()
def test_steps_through_a_static_cache_are_one_forward(config):
    """A left-padded prompt, then token by token, far beyond a window of 4 tokens."""
    model = wide_model(config)
    ids = torch.randint(2, 32, (2, 12))
    expected = model(ids, use_cache=False).logits
    cache = utils.static_cache(config, 16)
    assert {type(layer) for layer in cache.layers} == {StaticLayer}
    assert [layer.max_cache_len for layer in cache.layers] == [16] * len(cache.layers)
    mask = torch.zeros(2, 16, dtype=torch.long)
    mask[:, 2:7] = 1
    positions = torch.tensor([[0, 0, 0, 1, 2, 3, 4]] * 2)
    padded = torch.nn.functional.pad(ids[:, :5], (2, 0))
    options = {"attention_mask": mask, "past_key_values": cache, "use_cache": True}
    output = model(padded, position_ids=positions, **options)
    steps = [output.logits[:, -1]]
    for t in range(5, 12):
        mask[:, t + 2] = 1
        output = model(ids[:, t, None], position_ids=torch.full((2, 1), t), **options)
        steps.append(output.logits[:, -1])
    torch.testing.assert_close(torch.stack(steps, 1), expected[:, 4:], rtol=1e-4, atol=1e-4)


LINEAR = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "layer_types": ["full_attention", "linear_attention"],
}


@pytest.mark.parametrize(
    "config",
    [Qwen3NextConfig(**GROUPED, **LINEAR, **SMALL), MambaConfig(hidden_size=16, vocab_size=32)],
    ids=name_of,
)
def test_linear_attention_has_no_static_cache(config):
    """Such a layer sums over the slots of a cache that are still empty."""
    match = "--model: it cannot be sampled from with a static cache"
    refused(match, utils.static_cache, config, 8)


def test_a_model_of_images_and_text_is_refused():
    model = SimpleNamespace(config=SimpleNamespace(text_config=None))
    refused("--model path: .*text alone", utils.check_decoding, model, 8, "path")


def longrope(limit):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope |= {"rope_theta": 1e4, "original_max_position_embeddings": limit}
    return LlamaConfig(**WIDE, max_position_embeddings=64, rope_parameters=rope)


def test_rows_are_not_longer_than_the_positions():
    """LongRoPE turns all positions by other angles as soon as one row passes its limit."""
    gpt2 = GPT2Config(n_positions=64)
    for config, limit in ((gpt2, 64), (longrope(20), 20), (longrope(99), 64)):
        assert utils.max_positions(config) == limit
        utils.check_positions(config, limit, "--max_length", "path")
        match = f"--max_length: {limit + 1} tokens are more than the {limit} positions of path"
        refused(match, utils.check_positions, config, limit + 1, "--max_length", "path")
    assert utils.max_positions(MambaConfig()) == math.inf


def test_a_model_gets_the_tokens_and_the_ids_of_the_tokenizer(gpt2_folder):
    model, _ = utils.load_pretrained(AutoModelForCausalLM, gpt2_folder)
    tokenizer = build_tokenizer("|")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    before = model.get_input_embeddings().weight.detach().clone()
    utils.fit_to_tokenizer(model, tokenizer)
    after = model.get_input_embeddings().weight
    assert len(after) == len(tokenizer) == len(before) + 1
    assert torch.equal(after[:-1], before)
    for config in (model.config, model.generation_config):
        assert (config.pad_token_id, config.eos_token_id) == (31, EOS)
    utils.fit_to_tokenizer(model, tokenizer, [EOS, 30])
    assert model.config.eos_token_id == model.generation_config.eos_token_id == [EOS, 30]
    assert utils.all_eos_ids(model, tokenizer) == [EOS, 30]


def test_a_model_with_more_embeddings_than_tokens_keeps_them(tokenizer):
    model = wide_model(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40))
    utils.fit_to_tokenizer(model, tokenizer)
    assert model.get_input_embeddings().num_embeddings == 40
    assert utils.all_eos_ids(model, tokenizer) == EOS


def test_to_bf16_rounds_parameters_and_keeps_buffers(llama_folder):
    """In bf16 the angles of rotary positions would be those of other positions."""
    model, _ = utils.load_pretrained(AutoModelForCausalLM, llama_folder)
    before = copy.deepcopy(model)
    assert utils.to_bf16(model) is model
    for ours, theirs in zip(model.parameters(), before.parameters(), strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, theirs.bfloat16())
    buffers = dict(model.named_buffers())
    assert buffers
    for name, theirs in before.named_buffers():
        assert buffers[name].dtype == torch.float32
        assert torch.equal(buffers[name], theirs)


def test_copy_weights_keeps_the_precision_of_the_target(llama_folder):
    source, _ = utils.load_pretrained(AutoModelForCausalLM, llama_folder)
    target = utils.to_bf16(copy.deepcopy(source))
    with torch.no_grad():
        for weight in source.parameters():
            weight += 0.1
    utils.copy_weights(source, target)
    for ours, theirs in zip(target.parameters(), source.parameters(), strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, theirs.bfloat16())
    with pytest.raises(ValueError, match="zip"):
        utils.copy_weights(source, target.model)  # It lacks the head.


def test_compile_layers_compiles_each_layer_for_rows_of_any_length(llama_folder, monkeypatch):
    model, _ = utils.load_pretrained(AutoModelForCausalLM, llama_folder)
    compiled = []

    def record(self, **options):
        compiled.append((self, options))

    monkeypatch.setattr(torch.nn.Module, "compile", record)
    utils.compile_layers(model, None)
    assert [module for module, _ in compiled] == list(model.model.layers)
    assert all(isinstance(module, GradientCheckpointingLayer) for module, _ in compiled)
    assert [options for _, options in compiled] == [{"dynamic": True}] * 2


def test_compile_layers_refuses_a_model_without_layers():
    match = "--compile: finds no layers in Linear; use --no-compile"
    refused(match, utils.compile_layers, None, torch.nn.Linear(2, 2))


def test_probing_ids_are_spread_over_the_vocabulary():
    """The first ids of a vocabulary are often untrained: there rounding alone grows large."""
    assert utils.spread_ids(3, 400).tolist() == [[100, 200, 300]]
    assert utils.spread_ids(5, 3).max() < 3


def test_autocast_is_what_precision_asks_for():
    x = torch.randn(2, 2)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with utils.autocast(Args(precision=precision), CPU):
            assert (x @ x).dtype == dtype


def added_gradients(rank):
    """Gradients after `sum_gradients`, weights after `broadcast_weights`, of two ranks that differ.

    The second rank has had no row, and so no gradient.
    """
    torch.manual_seed(rank)
    module = torch.nn.Linear(3, 1)
    module.register_buffer("scale", torch.tensor([5.0 + rank]))
    module.bias.requires_grad_(False)
    utils.broadcast_weights(module)
    if rank == 0:
        for x in (1.0, 2.0):
            module(torch.full((1, 3), x)).sum().backward()
    utils.sum_gradients(module)
    idle = module.weight.grad.tolist()
    module.zero_grad()
    module(torch.full((1, 3), 1.0 + rank)).sum().backward()
    utils.sum_gradients(module)
    both = module.weight.grad.tolist()
    start = [x.tolist() for x in (module.weight, module.bias, module.scale)]
    return idle, both, module.bias.grad, start


def test_gradients_are_added_up_over_the_ranks(on_two_ranks):
    """1 + 2 of one rank and nothing of the other; then 1 of the one and 2 of the other."""
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 1)
    for idle, both, frozen, start in on_two_ranks(added_gradients):
        assert idle == [[3.0] * 3]
        assert both == [[3.0] * 3]
        assert frozen is None
        assert start == [module.weight.tolist(), module.bias.tolist(), [5.0]]


def test_alone_gradients_stay_as_they_are():
    module = torch.nn.Linear(3, 1)
    utils.broadcast_weights(module)
    utils.sum_gradients(module)
    assert module.weight.grad is None


# --------------------------------------------------------------------------------------------------
# Micro-batches


def test_every_row_is_in_one_batch_of_an_epoch():
    batches = list(utils.global_batches(10, 4, 7, seed=1))
    assert [epoch for epoch, _ in batches] == [1, 1, 1, 2, 2, 2, 3]
    assert [len(numbers) for _, numbers in batches] == [4, 4, 2, 4, 4, 2, 4]
    first = [i for epoch, numbers in batches if epoch == 1 for i in numbers]
    second = [i for epoch, numbers in batches if epoch == 2 for i in numbers]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert list(utils.global_batches(10, 4, 7, seed=1)) == batches
    assert list(utils.global_batches(10, 4, 7, seed=2)) != batches


@pytest.mark.parametrize("done", [1, 3, 4, 7])
def test_batches_go_on_after_those_that_are_done(done):
    batches = list(utils.global_batches(10, 4, 7, seed=1))
    assert list(utils.global_batches(10, 4, 7, seed=1, done=done)) == batches[done:]


@pytest.mark.parametrize(("done", "epochs"), [(0, 3), (4, 2)])
def test_the_order_of_an_epoch_is_drawn_once(done, epochs, monkeypatch):
    """For millions of rows, drawing it takes longer than a step."""
    randperm = torch.randperm
    drawn = []

    def record(*args, **options):
        drawn.append(args)
        return randperm(*args, **options)

    monkeypatch.setattr(torch, "randperm", record)
    list(utils.global_batches(10, 4, 7, seed=1, done=done))
    assert drawn == [(10,)] * epochs


def groups_of(lengths, size, ranks=None):
    return utils.micro_batch_rows(range(len(lengths)), lengths, size, ranks)


def test_rows_of_similar_length_go_together():
    assert groups_of([5, 1, 3, 2, 4], 2) == [[1, 3], [2, 4], [0]]
    assert groups_of([5, 1, 3, 2, 4], 9) == [[1, 3, 2, 4, 0]]
    assert groups_of([2, 2, 2, 1], 2) == [[3, 0], [1, 2]]  # Equal ones keep their order.
    assert groups_of([], 2) == []


def test_some_rows_are_split_by_their_lengths():
    lengths = [5, 1, 3, 2, 4]
    assert utils.micro_batch_rows([4, 0, 3], lengths, 2) == [[3, 4], [0]]
    assert utils.micro_batch_rows(torch.tensor([4, 0, 3]), lengths, 2) == [[3, 4], [0]]


def test_ranks_share_the_rows_of_every_length():
    lengths = torch.randint(1, 50, (23,), generator=torch.Generator().manual_seed(0)).tolist()
    shares = []
    for rank in range(3):
        groups = groups_of(lengths, 4, utils.Ranks(rank, 3, CPU))
        assert all(len(group) <= 4 for group in groups)
        shares.append([i for group in groups for i in group])
    order = sorted(range(23), key=lambda i: lengths[i])
    assert shares == [order[rank::3] for rank in range(3)]
    assert sorted(i for share in shares for i in share) == list(range(23))


def test_a_rank_without_rows_has_no_group():
    assert groups_of([3], 2, utils.Ranks(0, 2, CPU)) == [[0]]
    assert groups_of([3], 2, utils.Ranks(1, 2, CPU)) == []


def test_prompt_order_is_pass_after_pass():
    order = utils.prompt_order(5, 0, 20, seed=3)
    passes = [order[start : start + 5] for start in range(0, 20, 5)]
    assert [sorted(numbers) for numbers in passes] == [list(range(5))] * 4
    assert len({tuple(numbers) for numbers in passes}) > 1
    assert utils.prompt_order(5, 3, 9, seed=3) == order[3:12]  # However it is cut into updates.
    assert utils.prompt_order(5, 0, 20, seed=4) != order


def test_left_pad():
    queries, query_mask = utils.left_pad([[5], [6, 7]], 3, 9, CPU)
    assert queries.tolist() == [[9, 9, 5], [9, 6, 7]]
    assert query_mask.tolist() == [[False, False, True], [False, True, True]]


def test_pad_right():
    assert utils.pad_right([[5], [6, 7, 8], []], 9).tolist() == [[5, 9, 9], [6, 7, 8], [9, 9, 9]]
    assert utils.pad_right([[True], [True, True]], False).dtype == torch.bool


def test_a_batch_goes_to_the_device_as_it_is():
    batch = {"input_ids": torch.arange(3), "mask": torch.tensor([True])}
    moved = utils.to_device(batch, CPU)
    assert moved.keys() == batch.keys()
    assert all(torch.equal(moved[name], batch[name]) for name in batch)


def test_pack_rows_against_a_loop():
    """Padding of any id on either side and in between, as after a left-padded prompt."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(6, 9, generator=generator) < 0.5
    mask[0] = True
    mask[1] = False
    ids = torch.randint(1, 30, (6, 9), generator=generator)
    ids = torch.where(mask, ids, -100)
    for given in (mask, mask.long()):
        packed, lengths = utils.pack_rows(ids, given)
        assert lengths.tolist() == mask.sum(1).tolist()
        for row, row_mask, result in zip(ids, mask, packed, strict=True):
            real = row[row_mask].tolist()
            assert result.tolist() == real + [0] * (9 - len(real))


# --------------------------------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize("value", [0, -1, 0.5, NAN, math.inf, -math.inf])
def test_flags_below_their_least_or_not_finite_are_refused(value):
    match = f"--batch_size {value}: must be at least 1 and finite"
    refused(match, utils.check_at_least, Args(batch_size=value), 1, "seed", "batch_size")
    utils.check_at_least(Args(batch_size=1, price=None), 1, "batch_size", "price")


@pytest.mark.parametrize("value", [0, 0.0, -0.1, NAN, math.inf, -math.inf])
def test_flags_that_are_not_above_zero_are_refused(value):
    match = f"--price {value}: must be above 0 and finite"
    refused(match, utils.check_above_zero, Args(price=value), "lr", "price")
    utils.check_above_zero(Args(price=1e-9), "price")
    utils.check_above_zero(Args(price=None), "price")


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_flags_that_are_not_finite_are_refused(value):
    refused(
        f"--price {value}: must be finite", utils.check_finite, Args(price=value), "lr", "price"
    )
    utils.check_finite(Args(price=-5.0), "price")


OUT_OF_BOUNDS = [
    ("batch_size", 0),
    ("micro_batch_size", 0),
    ("lr", -0.1),
    ("lr", NAN),
    ("lr", math.inf),
    ("max_grad_norm", -1.0),
    ("save_every", -1),
    ("timeout_minutes", 0),
    ("timeout_minutes", math.inf),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_BOUNDS)
def test_shared_flags_out_of_bounds_are_refused(name, value):
    refused(f"--{name} {value}: must be", utils.check_shared_flags, Args(**{name: value}))
    utils.check_shared_flags(Args(lr=0.0, max_grad_norm=0.0, seed=-3))


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(utils.importlib.util, "find_spec", lambda name: None)
    refused("--track tensorboard: .*pip", utils.check_shared_flags, Args(track="tensorboard"))


def test_an_existing_run_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("precious")
    args = Args(output_dir=str(tmp_path / "run"))
    refused("--output_dir .*run: exists already", utils.check_shared_flags, args)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious.txt"]
    utils.check_shared_flags(Args(output_dir=args.output_dir, resume=args.output_dir))


def test_resuming_takes_the_runs_own_arguments_and_refuses_others(tmp_path):
    folder = str(tmp_path / "run")
    started = Args(output_dir=folder, lr=0.5, seed=7, betas=(0.0, 4.0))
    utils.Run(started, ONE, "sft")
    assert utils.resolve_args(Args(lr=3.0)) == Args(lr=3.0)  # Nothing to resume.
    args = utils.resolve_args(Args(resume=folder))
    assert (args.lr, args.seed, args.output_dir, args.resume) == (0.5, 7, folder, folder)
    assert args.betas == (0.0, 4.0)
    assert utils.resolve_args(Args(resume=folder, lr=0.5)).lr == 0.5  # It may be repeated.
    other = str(tmp_path / "other")
    refused("--lr differs", utils.resolve_args, Args(resume=folder, lr=0.25))
    refused("--output_dir differs", utils.resolve_args, Args(resume=folder, output_dir=other))


def test_what_cannot_be_resumed_is_refused(tmp_path):
    folder = tmp_path / "run"
    args = Args(resume=str(folder))
    refused("--resume .*run: no args.json", utils.resolve_args, args)
    utils.Run(Args(output_dir=str(folder)), ONE, "sft")
    record = json.loads((folder / "args.json").read_text())
    record["args"]["flag_of_another_script"] = 1
    (folder / "args.json").write_text(json.dumps(record))
    refused("--flag_of_another_script is no flag of this", utils.resolve_args, args)
    (folder / "model").mkdir()
    refused("--resume .*run: the run is finished", utils.resolve_args, args)


def test_a_run_from_before_a_flag_existed_takes_its_default(tmp_path):
    utils.Run(Args(output_dir=str(tmp_path / "run"), lr=0.5), ONE, "sft")
    path = tmp_path / "run" / "args.json"
    record = json.loads(path.read_text())
    del record["args"]["price"]
    path.write_text(json.dumps(record))
    assert utils.resolve_args(Args(resume=str(tmp_path / "run"))).price is None


def test_a_moved_run_can_be_resumed(tmp_path):
    utils.Run(Args(output_dir=str(tmp_path / "run"), lr=0.5), ONE, "sft")
    (tmp_path / "run").rename(tmp_path / "moved")
    args = utils.resolve_args(Args(resume=str(tmp_path / "moved")))
    assert args.lr == 0.5
    assert args.output_dir == str(tmp_path / "moved")


def finished_run(name, dataset, time):
    """A run folder of which newest_run is to think that its model was saved at that time."""
    model = Path("runs") / name / "model"
    model.mkdir(parents=True)
    (model.parent / "args.json").write_text(json.dumps({"args": {"dataset": dataset}}))
    (model / "config.json").write_text("{}")
    os.utime(model / "config.json", (time, time))


def test_newest_run_is_the_newest_finished_one_on_data_of_the_same_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = "data/walks/demonstrations.jsonl"
    refused("run `python sft.py` first", utils.newest_run, "sft", rows)
    finished_run("sft__1__300", rows, 1000)
    finished_run("sft__2__200", "./data/walks/others.jsonl", 1001)
    finished_run("reward_model__1__400", rows, 1002)
    finished_run("sft__1__500", "data/reviews/demonstrations.jsonl", 1003)
    Path("runs/sft__3__600/checkpoints").mkdir(parents=True)  # It is not finished.
    for dataset in (rows, "data/walks/preferences.jsonl"):
        assert utils.newest_run("sft", dataset) == "runs/sft__2__200/model"
    assert utils.newest_run("sft", "data/reviews/x.jsonl") == "runs/sft__1__500/model"
    match = r"no finished run of sft.py on data from data/elsewhere in runs/sft__\*: .*sft.py"
    refused(match, utils.newest_run, "sft", "data/elsewhere/x.jsonl")
    refused("`python ppo_rlhf.py`", utils.newest_run, "ppo_rlhf", rows)


# --------------------------------------------------------------------------------------------------
# Run folders


class Number:
    """Something with a state_dict, as the adaptive coefficient is."""

    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def test_a_run_folder_holds_arguments_metrics_and_complete_checkpoints(tmp_path, capsys):
    args = Args(output_dir=str(tmp_path / "run"), lr=0.5)
    run = utils.Run(args, ONE, "sft")
    run.log(1, {"train/sft/loss": 2.0})
    metrics = {"train/sft/loss": 1.0, "eval/sft/loss": 3.0}
    run.log(2, metrics, show=["train/sft/loss", "eval/sft/loss", "absent"])
    run.save_checkpoint(2, {"number": Number(7)})

    record = json.loads((run.folder / "args.json").read_text())
    assert record["script"] == "sft.py"
    assert record["args"]["lr"] == 0.5
    assert record["world_size"] == 1
    assert {"argv", "commit", "dirty", "versions", "device"} <= record.keys()
    assert {"torch", "transformers", "datasets"} <= record["versions"].keys()
    assert read_jsonl(run.folder / "metrics.jsonl")[1] == {"step": 2, **metrics}
    assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["step_000002.pt"]
    assert re.search(r"sft +2 \| loss 1 +eval loss 3\n", capsys.readouterr().out)


def test_a_run_is_named_by_script_seed_and_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(utils.time, "time", lambda: 1234.5)
    run = utils.Run(Args(seed=3), ONE, "sft")
    assert run.folder == Path("runs/sft__3__1234")
    assert run.folder.is_dir()


def test_a_machine_without_git_can_train(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    utils.Run(Args(output_dir=str(tmp_path / "run")), ONE, "sft")
    record = json.loads((tmp_path / "run" / "args.json").read_text())
    assert not record["commit"]


def test_only_rank_zero_writes(tmp_path):
    args = Args(output_dir=str(tmp_path / "run"))
    run = utils.Run(args, utils.Ranks(1, 2, CPU), "sft")
    run.log(1, {"a": 1.0})
    run.show_samples(1, {"query": ["a"]})
    run.save_checkpoint(1, {})
    assert not (tmp_path / "run").exists()


def test_samples_are_all_written_and_the_first_are_printed(tmp_path, capsys):
    run = utils.Run(Args(output_dir=str(tmp_path / "run")), ONE, "ppo_rlhf")
    capsys.readouterr()
    responses = ["a\n b", "é" * 90, "c", "d", "e"]
    columns = {"response": responses, "score": [0.5, 1.0, 2.0, 3.0, 4.0]}
    run.show_samples(3, columns, num_shown=2)
    rows = read_jsonl(run.folder / "samples.jsonl")
    assert rows[0] == {"step": 3, "response": "a\n b", "score": 0.5}
    assert [row["response"] for row in rows] == responses
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["response | score", "a b |   0.50", "é" * 70 + " |   1.00"]


def test_resuming_cuts_later_lines_and_takes_the_newest_complete_checkpoint(tmp_path):
    args = Args(output_dir=str(tmp_path / "run"))
    run = utils.Run(args, ONE, "sft")
    layer = torch.nn.Linear(1, 1)
    for step in range(1, 16):
        run.log(step, {"a": step / 2})
        torch.nn.init.constant_(layer.weight, step)
        if step % 5 == 0:
            run.save_checkpoint(step, {"layer": layer, "number": Number(step)})
    samples = '{"step": 9, "query": "a"}\n{"step": 11, "query": "b"}\n'
    (run.folder / "samples.jsonl").write_text(samples)
    (run.folder / "my_prompts.jsonl").write_text('{"prompt": "a file of the user\'s"}\n')
    last = run.folder / "checkpoints" / "step_000015.pt"
    last.rename(f"{last}.tmp")
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 16, "a"')  # The process died while it wrote.
    arguments = (run.folder / "args.json").read_text()

    run = utils.Run(utils.resolve_args(Args(resume=str(run.folder))), ONE, "sft")
    number = Number(0)
    assert run.load_checkpoint({"layer": layer, "number": number}) == 10
    assert layer.weight.item() == number.value == 10
    assert [line["step"] for line in read_jsonl(run.folder / "metrics.jsonl")] == [*range(1, 11)]
    assert (run.folder / "samples.jsonl").read_text() == '{"step": 9, "query": "a"}\n'
    assert (run.folder / "my_prompts.jsonl").read_text().startswith('{"prompt"')
    assert (run.folder / "args.json").read_text() == arguments
    run.log(11, {"a": 0.0})
    assert [line["step"] for line in read_jsonl(run.folder / "metrics.jsonl")] == [*range(1, 12)]


def test_training_on_does_not_write_into_the_checkpoint(tmp_path):
    """The file is mapped into memory, and the weights of a loaded optimizer may lie in it."""
    run = utils.Run(Args(output_dir=str(tmp_path / "run")), ONE, "sft")
    layer = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    state = {"layer": layer, "optimizer": optimizer}
    run.save_checkpoint(1, state)
    path = run.folder / "checkpoints" / "step_000001.pt"
    before = path.read_bytes()
    run.load_checkpoint(state)
    optimizer.step()
    assert path.read_bytes() == before


def test_resuming_without_a_checkpoint_is_refused(tmp_path):
    utils.Run(Args(output_dir=str(tmp_path / "run")), ONE, "sft")
    run = utils.Run(utils.resolve_args(Args(resume=str(tmp_path / "run"))), ONE, "sft")
    refused("--resume .*no checkpoint.*--save_every", run.load_checkpoint, {})


def test_progress_counts_the_steps_that_are_left():
    assert list(utils.progress(3, 6, ONE, "sft")) == [4, 5, 6]
    assert list(utils.progress(0, 2, utils.Ranks(1, 2, CPU), "sft")) == [1, 2]


def test_save_pretrained_shows_a_folder_when_it_is_complete(tmp_path, tokenizer):
    class Broken:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        utils.save_pretrained(tmp_path / "model", tokenizer, Broken())
    assert not (tmp_path / "model").exists()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old.txt").touch()  # Left by a run that was stopped.
    utils.save_pretrained(tmp_path / "model", tokenizer)
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    assert not (tmp_path / "model" / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
