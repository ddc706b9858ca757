"""Masked statistics against numpy and against two ranks; data files, model folders and run folders, good and bad."""

import functools
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor.utils import fresh_cache, run_and_get_code
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache
from transformers import Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, StaticCache
from transformers.integrations import sdpa_attention

import ilql_rlhf
import ppo_rlhf
import reward_model
import sft
import utils

ONE = utils.Ranks(0, 1, torch.device("cpu"))
NAN = float("nan")


@dataclass
class Args:
    """What utils asks of any script's arguments."""

    model: str = "some/model"
    seed: int = 1
    lr: float = 1e-3
    output_dir: str | None = None
    resume: str | None = None
    track: str = "none"
    save_every: int = 0


def sample(seed, shape, fraction=0.6):
    """fp64 numbers that are not centred, a mask, and NaN wherever the mask is False."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 + 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(shape, generator=generator) < fraction
    return torch.where(mask, x, NAN), mask


# ----------------------------------------------------------------------------------------------------------------------
# Masked statistics


def test_masked_mean_is_the_mean_of_the_true_entries():
    x, mask = sample(0, (5, 7))
    mean = utils.masked_mean(x, mask)
    assert mean.shape == () and mean.dtype == x.dtype
    assert abs(mean.item() - x.numpy()[mask.numpy()].mean()) < 1e-12
    assert abs(mean.item() - torch.nan_to_num(x).mean().item()) > 0.1  # padding as zeros would be another number


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
    expected, sample_std = (valid - valid.mean()) / valid.std() + offset, valid.std(ddof=1)
    assert np.abs(whitened.numpy()[mask.numpy()] - expected).max() < 1e-7
    assert np.abs((valid - valid.mean()) / sample_std + offset - expected).max() > 1e-3  # the unbiased one is another
    assert (whitened[~mask] == 0).all()


def test_whiten_has_zero_mean_unit_variance_and_keeps_the_mean_when_asked():
    x, mask = sample(2, (8, 8))
    shifted, unshifted = utils.whiten(x, mask), utils.whiten(x, mask, shift_mean=False)
    assert abs(shifted[mask].mean()) < 1e-12 and abs(shifted[mask].var(correction=0) - 1) < 1e-6
    assert abs(unshifted[mask].mean() - x[mask].mean()) < 1e-12
    assert abs(unshifted[mask].var(correction=0) - 1) < 1e-6


@pytest.mark.parametrize("num_valid", [0, 1])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_is_finite_for_no_and_one_valid_entry(num_valid, shift_mean):
    x, mask = torch.full((2, 3), NAN), torch.zeros(2, 3, dtype=torch.bool)
    if num_valid:
        x[1, 1], mask[1, 1] = 5.0, True
    whitened = utils.whiten(x, mask, shift_mean=shift_mean)
    assert whitened.isfinite().all() and (whitened[~mask] == 0).all()
    assert whitened.dtype == torch.float32
    if num_valid:
        assert whitened[1, 1].item() == pytest.approx(0.0 if shift_mean else 5.0)


def test_means_over_micro_batches_are_means_over_entries():
    means = utils.Means()
    means.add({"a": torch.tensor([1.0, NAN])}, torch.tensor([True, False]))
    means.add({"a": torch.tensor([4.0, 4.0, 4.0]), "b": torch.tensor([1.0, 2.0, 1.5, 1.5])})
    means.add({"nothing": torch.tensor([NAN])}, torch.tensor([False]))
    assert means.reduce() == {"a": 13 / 4, "b": 1.5, "nothing": 0.0}  # a mean of means would give 2.5 for a
    means.add({"a": torch.tensor([7.0])})
    assert means.reduce() == {"a": 7.0}  # reduce starts again


def test_means_keep_no_graph():
    means = utils.Means()
    x = torch.ones(3, requires_grad=True)
    means.add({"a": x * 2})
    assert not any(pair.requires_grad for pair in means.values())
    assert means.reduce() == {"a": 2.0}


def test_seeded_depends_on_the_key_alone():
    torch.manual_seed(0)
    first = torch.rand(4, generator=utils.seeded(1, "order", 2))
    torch.manual_seed(99)
    torch.rand(3)
    assert torch.equal(first, torch.rand(4, generator=utils.seeded(1, "order", 2)))
    for key in [(2, "order", 2), (1, "other", 2), (1, "order", 3), (1, "order"), ("1", "order", 2)]:
        assert not torch.equal(first, torch.rand(4, generator=utils.seeded(*key)))


# Two ranks hold unequal parts of one table: 4 + 4 rows of which rank 1 masks most.


def table():
    x, mask = sample(3, (8, 6))
    mask[4:, 1:] = False
    x[4:] += 10  # the ranks differ, so that statistics of one rank alone are far off
    return x, mask


def statistics_of_one_rank(rank):
    x, mask = (part[4 * rank : 4 * rank + 4] for part in table())
    means = utils.Means()
    for row, row_mask in zip(x, mask, strict=True):
        means.add({"x": row}, row_mask)
    return {
        "gathered": utils.all_gather(torch.arange(3) + 10 * rank).tolist(),
        "mean": utils.masked_mean(x, mask).item(),
        "none": utils.masked_mean(x, torch.zeros_like(mask)).item(),
        "whitened": utils.whiten(x, mask).numpy(),
        "scaled": utils.whiten(x, mask, shift_mean=False).numpy(),
        "means": means.reduce()["x"],
    }


def test_statistics_of_two_ranks_are_those_of_the_pooled_table(on_two_ranks):
    x, mask = table()
    ranks = on_two_ranks(statistics_of_one_rank)
    for rank in ranks:
        assert rank["gathered"] == [0, 1, 2, 10, 11, 12] and rank["none"] == 0
        assert abs(rank["mean"] - utils.masked_mean(x, mask).item()) < 1e-12
        assert abs(rank["means"] - rank["mean"]) < 1e-12
    for key, shift_mean in [("whitened", True), ("scaled", False)]:
        pooled = utils.whiten(x, mask, shift_mean=shift_mean).numpy()
        assert np.abs(np.concatenate([rank[key] for rank in ranks]) - pooled).max() < 1e-12
    alone = utils.whiten(x[:4], mask[:4]).numpy()
    assert np.abs(ranks[0]["whitened"] - alone).max() > 0.1  # whitening a rank by itself is something else


# ----------------------------------------------------------------------------------------------------------------------
# Data files

ROWS = [{"prompt": "ab", "completion": "cd"}, {"prompt": "ba", "completion": "d"}]
COLUMNS = [("prompt", "completion"), ("text",)]


def write_rows(path, rows=ROWS):
    """A file of the kind its suffix names."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
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


def refused(match, function, *args, **options):
    """The function ends in a UserError whose first line, the one that `launch` prints, matches."""
    with pytest.raises(utils.UserError) as caught:
        function(*args, **options)
    assert re.search(match, str(caught.value).splitlines()[0])


def test_load_rows_says_what_is_wrong(tmp_path):
    refused("nowhere.jsonl: no such file", utils.load_rows, str(tmp_path / "nowhere.jsonl"), COLUMNS)
    refused("nowhere: no such file", utils.load_rows, str(tmp_path / "nowhere"), COLUMNS)
    refused(r"rows.jsonl: no such file", utils.load_rows, "rows.jsonl", COLUMNS)
    other = write_rows(tmp_path / "other.jsonl", [{"question": "a", "answer": "b"}])
    refused(r"other.jsonl: .*prompt\+completion or text; it has question, answer", utils.load_rows, other, COLUMNS)
    for content in ("", "\n \n"):
        (tmp_path / "empty.jsonl").write_text(content)
        refused("empty.jsonl: .*empty", utils.load_rows, str(tmp_path / "empty.jsonl"), COLUMNS)
    refused("empty.json: ", utils.load_rows, write_rows(tmp_path / "empty.json", []), COLUMNS)
    datasets.Dataset.from_dict({"text": []}).to_parquet(tmp_path / "empty.parquet")  # columns, and no row
    refused("empty.parquet: .*no data", utils.load_rows, str(tmp_path / "empty.parquet"), COLUMNS)
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", \n')
    refused("broken.jsonl: cannot be read", utils.load_rows, str(tmp_path / "broken.jsonl"), COLUMNS)
    (tmp_path / "huge.jsonl").write_text('{"prompt": "a", "completion": "b", "reward": 1e400}\n')
    refused("huge.jsonl: cannot be read.*too big", utils.load_rows, str(tmp_path / "huge.jsonl"), COLUMNS)
    (tmp_path / "notes.txt").write_text("text")
    refused("notes.txt: ", utils.load_rows, str(tmp_path / "notes.txt"), COLUMNS)


def test_messages_may_hold_tool_calls_parts_and_nothing_said(tmp_path):
    """Content may be empty, in parts, or lacking beside a tool call; the data set library fills what a row lacks."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    for messages in (
        [{"role": "user", "content": "1 + 1?"}, call, {"role": "tool", "content": ""}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
    ):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps({"messages": messages}) + "\n")
        assert len(utils.load_rows(str(path), [("messages",)])) == 1


def test_messages_do_not_hold_numbers(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": 5}]}])
    refused("row 1: messages is .*5.*not a text or messages", utils.load_rows, path, [("messages",)])


def test_load_rows_refuses_a_folder_of_nothing(tmp_path):
    refused(".json, .jsonl or .parquet", utils.load_rows, str(tmp_path), COLUMNS)


def test_load_rows_leaves_no_file_of_a_folder_unread(tmp_path):
    write_rows(tmp_path / "a.jsonl", ROWS[:1])
    write_rows(tmp_path / "b.parquet", ROWS[1:])
    refused(
        str(tmp_path), utils.load_rows, str(tmp_path), COLUMNS
    )  # one table of two kinds is not what the library reads


def test_load_rows_wants_one_whole_group_of_columns(tmp_path):
    half = write_rows(tmp_path / "half.jsonl", [{"prompt": "a"}])
    refused("it has prompt", utils.load_rows, half, COLUMNS)
    more = write_rows(tmp_path / "more.jsonl", [{"text": "a", "source": 3}])
    assert utils.load_rows(more, COLUMNS)[0] == {"text": "a", "source": 3}


def test_load_function_finds_a_function_and_names_what_is_missing(tmp_path):
    path = tmp_path / "scores.py"
    path.write_text("from dataclasses import dataclass\n\n@dataclass\nclass Score:\n    value: 'int' = 3\n\n")
    with path.open("a") as file:
        file.write("CONSTANT = 1\n\ndef score(prompts, responses):\n    return [Score().value] * len(responses)\n")
    assert utils.load_function(f"{path}:score", "--reward_fn")(["a"], ["b"]) == [3]
    refused("--reward_fn .*no function other", utils.load_function, f"{path}:other", "--reward_fn")
    refused("--reward_fn .*no function CONSTANT", utils.load_function, f"{path}:CONSTANT", "--reward_fn")
    refused("--reward_fn .*no such file", utils.load_function, f"{tmp_path}/nowhere.py:score", "--reward_fn")
    refused("file.py:function", utils.load_function, str(path), "--reward_fn")
    path.write_text("import functools\nnameless = functools.partial(max)\n")
    refused("--reward_fn .*no function nameless", utils.load_function, f"{path}:nameless", "--reward_fn")


# ----------------------------------------------------------------------------------------------------------------------
# Model folders


def logits(model):
    """Of one fixed row, in train mode: dropout would show."""
    model.train()
    with torch.no_grad():
        return model(torch.tensor([[2, 3, 4, 5, 1]])).logits


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_load_pretrained_has_no_dropout_left(kind, request):
    folder = request.getfixturevalue(f"{kind}_folder")
    model, missing = utils.load_pretrained(AutoModelForCausalLM, folder)
    assert missing == [] and not model.training
    assert all(module.p == 0 for module in model.modules() if isinstance(module, torch.nn.Dropout))
    rates = {name: value for name, value in vars(model.config).items() if "drop" in name and value is not None}
    assert rates and all(value == 0 for value in rates.values() if isinstance(value, float))
    assert torch.equal(logits(model), logits(model))
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert not torch.equal(logits(plain), logits(plain))  # the folder itself asks for dropout


def test_load_pretrained_is_fp32_whatever_the_folder_holds(tmp_path, gpt2_folder):
    AutoModelForCausalLM.from_pretrained(gpt2_folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    assert next(AutoModelForCausalLM.from_pretrained(tmp_path / "half").parameters()).dtype == torch.bfloat16
    model, _ = utils.load_pretrained(AutoModelForCausalLM, str(tmp_path / "half"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path / "full")
    assert next(AutoModelForCausalLM.from_pretrained(tmp_path / "full").parameters()).dtype == torch.float32


def test_load_pretrained_starts_from_the_seed_where_there_are_no_weights(tmp_path, llama_folder, capsys):
    AutoConfig.from_pretrained(llama_folder).save_pretrained(tmp_path)
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        weights.append(utils.load_pretrained(AutoModelForCausalLM, str(tmp_path))[0].lm_head.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert "starting from random weights" in capsys.readouterr().out


def test_load_pretrained_refuses_what_is_no_model_folder(tmp_path):
    refused("cannot be loaded as a model", utils.load_pretrained, AutoModelForCausalLM, str(tmp_path))
    refused("nowhere: no such", utils.load_pretrained, AutoModelForCausalLM, str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
    refused("cannot be loaded as a model", utils.load_pretrained, AutoModelForCausalLM, str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    refused("cannot be loaded as a model", utils.load_pretrained, AutoModelForCausalLM, str(tmp_path))


def test_load_pretrained_refuses_a_damaged_file_of_weights(tmp_path, gpt2_folder):
    AutoConfig.from_pretrained(gpt2_folder).save_pretrained(tmp_path)
    weights = (Path(gpt2_folder) / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused("cannot be loaded as a model", utils.load_pretrained, AutoModelForCausalLM, str(tmp_path))


def test_load_pretrained_refuses_weights_of_other_shapes(tmp_path, gpt2_rm_folder):
    model = AutoModelForSequenceClassification.from_pretrained(
        gpt2_rm_folder, num_labels=2, ignore_mismatched_sizes=True
    )
    model.save_pretrained(tmp_path)
    options = {"num_labels": 1}
    refused(str(tmp_path), utils.load_pretrained, AutoModelForSequenceClassification, str(tmp_path), **options)


def test_load_pretrained_refuses_missing_weights_unless_they_may_miss(gpt2_folder, llama_rm_folder):
    auto_class = AutoModelForSequenceClassification
    refused("lacks the weights score.weight", utils.load_pretrained, auto_class, gpt2_folder, num_labels=1)
    _, missing = utils.load_pretrained(auto_class, gpt2_folder, ["score.weight"], num_labels=1)
    assert missing == ["score.weight"]
    refused("lacks the weights lm_head.weight", utils.load_pretrained, AutoModelForCausalLM, llama_rm_folder)


# ----------------------------------------------------------------------------------------------------------------------
# Run folders


def metric_lines(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def test_a_run_folder_holds_arguments_metrics_and_complete_checkpoints(tmp_path):
    args = Args(output_dir=str(tmp_path / "run"), lr=0.5)
    utils.prepare(args)
    run = utils.Run(args, ONE, "sft")
    run.log(1, {"train/sft/loss": 2.0})
    run.log(2, {"train/sft/loss": 1.0, "eval/sft/loss": 3.0}, show=["train/sft/loss", "eval/sft/loss", "absent"])
    run.save_checkpoint(2, model={"w": torch.arange(3)})

    record = json.loads((run.folder / "args.json").read_text())
    assert record["args"]["lr"] == 0.5 and record["world_size"] == 1
    assert {"argv", "commit", "dirty", "versions"} <= set(record)
    assert {"torch", "transformers"} <= set(record["versions"])
    assert metric_lines(run.folder)[1] == {"step": 2, "train/sft/loss": 1.0, "eval/sft/loss": 3.0}
    assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["step_000002.pt"]


def test_a_machine_without_git_can_train(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    utils.Run(Args(output_dir=str(tmp_path / "run")), ONE, "sft")
    record = json.loads((tmp_path / "run" / "args.json").read_text())
    assert not record["commit"]


def test_an_existing_run_folder_is_refused_and_left_alone(tmp_path):
    args = Args(output_dir=str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("precious")
    refused("--output_dir .*run: exists already", utils.prepare, args)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious.txt"]


def test_only_rank_zero_writes(tmp_path):
    args = Args(output_dir=str(tmp_path / "run"))
    run = utils.Run(args, utils.Ranks(1, 2, torch.device("cpu")), "sft")
    run.log(1, {"a": 1.0})
    run.save_checkpoint(1, model={})
    assert not (tmp_path / "run").exists()


def test_resuming_cuts_later_lines_and_takes_the_newest_complete_checkpoint(tmp_path):
    args = Args(output_dir=str(tmp_path / "run"))
    run = utils.Run(args, ONE, "sft")
    for step in range(1, 16):
        run.log(step, {"a": step / 2})
        if step % 5 == 0:
            run.save_checkpoint(step, model={"w": torch.tensor([step])})
    (run.folder / "samples.jsonl").write_text('{"step": 9, "query": "a"}\n{"step": 11, "query": "b"}\n')
    (run.folder / "my_prompts.jsonl").write_text('{"prompt": "a file of the user\'s"}\n')
    (run.folder / "checkpoints" / "step_000015.pt").rename(run.folder / "checkpoints" / "step_000015.pt.tmp")
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 16, "a"')  # the process died while it wrote
    arguments = (run.folder / "args.json").read_text()

    run = utils.Run(utils.prepare(Args(resume=str(run.folder))), ONE, "sft")
    state = run.load_checkpoint()
    assert state["step"] == 10 and state["model"]["w"].item() == 10
    assert [line["step"] for line in metric_lines(run.folder)] == list(range(1, 11))
    assert (run.folder / "samples.jsonl").read_text() == '{"step": 9, "query": "a"}\n'
    assert (run.folder / "args.json").read_text() == arguments
    run.log(11, {"a": 0.0})
    assert [line["step"] for line in metric_lines(run.folder)] == list(range(1, 12))


def test_resuming_without_a_checkpoint_is_refused(tmp_path):
    utils.Run(Args(output_dir=str(tmp_path / "run")), ONE, "sft")
    run = utils.Run(utils.prepare(Args(resume=str(tmp_path / "run"))), ONE, "sft")
    refused("--resume .*no checkpoint.*--save_every", run.load_checkpoint)


def test_resuming_takes_the_runs_own_arguments_and_refuses_others(tmp_path):
    folder = str(tmp_path / "run")
    utils.Run(Args(output_dir=folder, lr=0.5, seed=7), ONE, "sft")
    assert utils.prepare(Args(lr=3.0)) == Args(lr=3.0)  # nothing to resume
    args = utils.prepare(Args(resume=folder))
    assert (args.lr, args.seed, args.output_dir, args.resume) == (0.5, 7, folder, folder)
    assert utils.prepare(Args(resume=folder, lr=0.5)).lr == 0.5  # the same value may be repeated
    refused("--lr .*differs", utils.prepare, Args(resume=folder, lr=0.25))
    refused("--output_dir .*differs", utils.prepare, Args(resume=folder, output_dir=str(tmp_path / "other")))
    refused("--resume .*nowhere.*args.json", utils.prepare, Args(resume=str(tmp_path / "nowhere")))
    record = json.loads((tmp_path / "run" / "args.json").read_text())
    record["args"]["flag_of_another_script"] = 1
    (tmp_path / "run" / "args.json").write_text(json.dumps(record))
    refused("--flag_of_another_script differs", utils.prepare, Args(resume=folder))


def test_numbers_that_turn_an_objective_round_are_refused():
    @dataclass
    class Numbers(Args):
        price: float | None = None
        penalty: float | str = -1.0
        num_epochs: int = 3
        save_every: int = 0

    fine = Numbers(lr=0.0, seed=-3, price=0.0, penalty=-5.0)
    assert utils.prepare(fine) == fine
    for name, value in {"lr": -0.1, "price": -0.1, "num_epochs": 0, "save_every": -1}.items():
        refused(f"--{name} {value}: must be at least", utils.prepare, Numbers(**{name: value}))
    for value in (math.nan, math.inf):
        refused("--price .* finite", utils.prepare, Numbers(price=value))
    for value in (math.nan, math.inf, -math.inf):
        refused(f"--penalty {value}: must be finite", utils.prepare, Numbers(penalty=value))


def test_a_moved_run_can_be_resumed(tmp_path):
    utils.Run(Args(output_dir=str(tmp_path / "run"), lr=0.5), ONE, "sft")
    (tmp_path / "run").rename(tmp_path / "moved")
    args = utils.prepare(Args(resume=str(tmp_path / "moved")))
    assert args.lr == 0.5 and args.output_dir == str(tmp_path / "moved")


def test_newest_run_is_the_newest_finished_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(r"`python sft.py`", utils.newest_run, "sft")
    for i, name in enumerate(["sft__1__300", "sft__2__200", "reward_model__1__400"]):
        model = Path("runs") / name / "model"
        model.mkdir(parents=True)
        (model / "config.json").write_text("{}")
        for path in (model / "config.json", model):
            os.utime(path, (1000 + i, 1000 + i))
    Path("runs/sft__3__500/checkpoints").mkdir(parents=True)  # unfinished
    assert utils.newest_run("sft") == "runs/sft__2__200/model"
    refused(r"`python ppo_rlhf.py`", utils.newest_run, "ppo_rlhf")


def test_save_pretrained_shows_a_folder_when_it_is_complete(tmp_path, tokenizer):
    class Broken:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        utils.save_pretrained(tmp_path / "model", tokenizer, Broken())
    assert not (tmp_path / "model").exists()
    utils.save_pretrained(tmp_path / "model", tokenizer)
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_launch_turns_a_user_error_into_one_line(capsys):
    def main(args):
        raise utils.UserError(f"{args}: wrong")

    with pytest.raises(SystemExit) as caught:
        utils.launch(main, "this")
    assert caught.value.code == 1 and capsys.readouterr().err == "error: this: wrong\n"
    with pytest.raises(ZeroDivisionError):  # a mistake of ours keeps its traceback
        utils.launch(lambda args: 1 / 0, None)


@pytest.mark.parametrize("name", ["there", "file/run"])
def test_a_run_folder_that_cannot_be_made_ends_in_one_line(tmp_path, capsys, name):
    """Another run has made it since the flags were read (two runs of one seed in one second), or a file is in its way."""
    (tmp_path / "there" / "checkpoints").mkdir(parents=True)
    (tmp_path / "file").touch()

    def main(args):
        utils.Run(args, utils.Ranks(0, 1, torch.device("cpu")), "ppo_rlhf")

    with pytest.raises(SystemExit) as caught:
        utils.launch(main, ppo_rlhf.Args(output_dir=str(tmp_path / name)))
    error = capsys.readouterr().err
    assert caught.value.code == 1 and error.startswith("error: ") and str(tmp_path / name) in error
    assert error.count("\n") == 1


def test_check_divides():
    utils.check_divides(4, 8, "--batch_size by the number of ranks")
    for divisor, number in [(3, 8), (0, 8), (2, 0)]:
        with pytest.raises(utils.UserError, match=re.escape("--batch_size by the number of ranks")):
            utils.check_divides(divisor, number, "--batch_size by the number of ranks")


def test_gelu_is_computed_in_one_kernel_and_is_the_same_function(gpt2_folder):
    """transformers' gelu_new is eight operations on the widest tensor of a GPT-2; torch has the same formula as one."""
    plain = AutoModelForCausalLM.from_pretrained(gpt2_folder).eval()
    ours, _ = utils.load_pretrained(AutoModelForCausalLM, gpt2_folder)
    assert plain.config.activation_function == "gelu_new" and ours.config.activation_function == "gelu_pytorch_tanh"
    ids = torch.arange(3, 11)[None]
    torch.testing.assert_close(ours(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-6)


SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 16, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
CAUSAL = {
    "gpt2": GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=16, bos_token_id=0, eos_token_id=0),
    "grouped queries": LlamaConfig(**SIZES),
    "a window of 3": MistralConfig(sliding_window=3, **SIZES),
    "capped logits": Gemma2Config(attn_logit_softcapping=1.0, query_pre_attn_scalar=4, sliding_window=4, **SIZES),
}


def with_plain_attention(config, folder, T):
    """(model as the scripts load it, ids and mask (3,T): whole, left padded, right padded), weights not small."""
    torch.manual_seed(0)
    config.save_pretrained(folder)
    model, _ = utils.load_pretrained(AutoModelForCausalLM, str(folder))
    model.set_attn_implementation("eager")  # on CUDA too
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    mask = torch.ones(3, T, dtype=torch.long)
    mask[1, : T // 3], mask[2, T - T // 3 :] = 0, 0
    return model, torch.randint(16, (3, T)), mask


@pytest.mark.parametrize("T", [1, 2, 9, 16])
@pytest.mark.parametrize("kind", CAUSAL)
def test_causal_attention_is_attention(kind, T, tmp_path, monkeypatch):
    """Logits and gradients are those of the model's own attention in one call, and no half of the queries that cannot
    see the second half of the keys meets it."""
    model, ids, mask = with_plain_attention(CAUSAL[kind], tmp_path, T)
    module = sys.modules[type(model).__module__]
    plain, met = module.eager_attention_forward, []

    def spy(layer, query, key, *others, **options):
        met.append((query.shape[2], key.shape[2]))
        return plain(layer, query, key, *others, **options)

    monkeypatch.setattr(module, "eager_attention_forward", spy)
    results = []
    for is_causal in (True, False):
        for layer in model.modules():
            if hasattr(layer, "is_causal"):
                layer.is_causal = is_causal
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        grads = torch.autograd.grad(torch.where(mask[..., None] == 1, logits, 0).square().sum(), [*model.parameters()])
        results.append([torch.where(mask[..., None] == 1, logits, 0), *grads])
    assert met == [(T // 2, T // 2), (T - T // 2, T)] * 2 + [(T, T)] * 2
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", CAUSAL)
def test_attention_for_the_one_token_of_a_row_that_is_read(kind, tmp_path, monkeypatch):
    """Logits and gradients at that token are those of the whole; the last layer, which is told of it, has one query a row."""
    model, ids, mask = with_plain_attention(CAUSAL[kind], tmp_path, 9)
    module, reads = sys.modules[type(model).__module__], (torch.arange(3), torch.tensor([8, 7, 5]))
    plain, met, results = module.eager_attention_forward, [], []

    def spy(layer, query, key, *others, **options):
        met.append((query.shape[2], key.shape[2]))
        return plain(layer, query, key, *others, **options)

    monkeypatch.setattr(module, "eager_attention_forward", spy)
    *_, last = (layer for layer in model.modules() if hasattr(layer, "is_causal"))
    for last.reads in (reads, None):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[reads]
        results.append([logits, *torch.autograd.grad(logits.square().sum(), [*model.parameters()])])
    assert met == [(4, 4), (5, 9), (1, 9), (4, 4), (5, 9), (4, 4), (5, 9)]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_attention_that_is_not_causal_is_left_whole(tmp_path):
    """A config can make a causal model see both ways; the first hidden state then answers to the last token."""
    model, ids, mask = with_plain_attention(LlamaConfig(is_causal=False, **SIZES), tmp_path, 8)
    first = [
        model(torch.cat([ids[:, :7], ids[:, 7:] * 0 + last], 1), attention_mask=mask).logits[0, 0] for last in (3, 4)
    ]
    assert (first[0] - first[1]).abs().max() > 1e-3


def test_attention_is_halved_only_where_nothing_else_has_positions(tmp_path):
    """A bias of each pair of positions is no mask and is not cut; a module that does not say that it is causal is not."""
    model, _, _ = with_plain_attention(CAUSAL["grouped queries"], tmp_path, 8)
    module, options = model.model.layers[0].self_attn, {"scaling": 0.5, "dropout": 0.0}
    query, (key, value) = torch.randn(3, 4, 8, 4), torch.randn(2, 3, 2, 8, 4)
    options["attention_mask"] = torch.full((8, 8), -1e9).triu(1).expand(3, 1, 8, 8)
    halved, weights = utils.causal_attention(module, query, key, value, **options)
    assert weights is None and halved.shape == (3, 8, 4, 4)
    whole, weights = utils.causal_attention(module, query, key, value, **options, bias=torch.zeros(1, 4, 8, 8))
    assert weights.shape == (3, 4, 8, 8)
    torch.testing.assert_close(halved, whole, rtol=1e-4, atol=1e-5)
    del module.is_causal
    assert utils.causal_attention(module, query, key, value, **options)[1] is not None


def test_causal_attention_reads_a_cache_whole(tmp_path):
    """Behind a prompt the next tokens see all slots that are written, their own half or not."""
    model, ids, _ = with_plain_attention(CAUSAL["grouped queries"], tmp_path, 12)
    whole, cache = model(ids).logits, DynamicCache(config=model.config)
    parts = [model(x, past_key_values=cache).logits for x in (ids[:, :5], ids[:, 5:11], ids[:, 11:])]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


def test_attention_is_not_cudnns():
    """Its gradients are NaN with a mask at some lengths on H100 and H200 under torch 2.13 (pytorch issue 196678)."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    utils.init_ranks()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.skipif(not hasattr(sdpa_attention, "pack_gqa"), reason="older transformers repeat the keys")
def test_a_compiled_step_repeats_no_key_of_grouped_queries(tmp_path):
    """With torch's attention, which CUDA uses: it gets the cache as it lies, and the tokens are those of plain attention."""
    model, _, _ = with_plain_attention(CAUSAL["grouped queries"], tmp_path, 8)
    queries, uniforms = torch.randint(2, 16, (3, 5)), torch.rand(3, 6)
    mask = torch.tensor([[True] * 5, [False] * 2 + [True] * 3, [False] + [True] * 4])
    inputs = (queries, mask, uniforms, 1.0, [0], 1)
    expected = ppo_rlhf.generate(model, *inputs)
    model.set_attn_implementation("sdpa")
    shapes = []

    def look(graph, inputs):
        attention = [node for node in graph.graph.nodes if "scaled_dot_product" in str(node.target)]
        shapes.extend(tuple(x.meta["val"].shape) for node in attention for x in node.args[:3])
        return graph.forward

    backend = functools.partial(aot_module_simplified, fw_compiler=look)
    step = torch.compile(ppo_rlhf.decode_step, fullgraph=True, backend=backend)
    cache = StaticCache(config=model.config, max_cache_len=11)
    assert torch.equal(ppo_rlhf.generate(model, *inputs, step=step, cache=cache), expected)
    assert shapes == [(3, 2, 2, 4), (3, 2, 11, 4), (3, 2, 11, 4)] * 2  # 4 heads, 2 of keys and values


@pytest.mark.skipif(torch.cuda.is_available(), reason="settings of the CPU compiler")
def test_compiled_on_cpu_tanh_is_computed_by_exp_and_no_boolean_mask_is_stored():
    """A stored mask of booleans is read one by one (ReLU's backward took 20 times as long), tanh costs twice an exp."""
    utils.init_ranks()
    generator = torch.Generator().manual_seed(0)
    x, *weights = (torch.randn(4, 16, 16, generator=generator, requires_grad=True) for _ in range(3))
    weights = [weight[0].detach().requires_grad_() for weight in weights]

    def layers(x, w, u):
        hidden = torch.relu(torch.nn.functional.linear(x, w))
        return torch.nn.functional.gelu(torch.nn.functional.linear(hidden, u) / 4, approximate="tanh")

    stored = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: stored.append(y.dtype) or y, lambda y: y):
        y, codes = run_and_get_code(torch.compile(layers), x, *weights)
    assert len(stored) > 3 and torch.bool not in stored
    assert ".exp()" in codes[0] and ".tanh()" not in codes[0]
    y.sum().backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, *weights)]
    layers(*exact).sum().backward()
    torch.testing.assert_close(y.double(), layers(*exact), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip((x, *weights), exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4)


def test_compiled_on_cpu_no_softmax_is_computed_twice(monkeypatch):
    """Its output is stored: the setting that would also keep masks of booleans out computes it anew in the backward."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the settings of a machine without
    utils.init_ranks()
    query, key, value = (torch.randn(4, 16, 8, requires_grad=True) for _ in range(3))

    def attention():
        return (query @ key.transpose(1, 2)).softmax(-1) @ value

    def gradients(function):
        return torch.autograd.grad(function().square().sum(), (query, key, value))

    result, codes = run_and_get_code(gradients, torch.compile(attention))
    torch.testing.assert_close(result, gradients(attention), rtol=1e-4, atol=1e-4)
    assert [".exp()" in code for code in codes] == [True, False]  # the forward, the backward


def test_compiled_gradients_of_an_embedding_are_the_same_every_time():
    """Left to itself the compiler adds rows that meet in one id atomically: two threads round differently each time."""
    threads, weight = torch.get_num_threads(), torch.nn.Embedding(64, 256)
    torch.manual_seed(0)
    ids, y = torch.randint(64, (64, 128)), torch.randn(64, 128, 256)
    torch.set_num_threads(2)
    try:
        with fresh_cache():
            torch.autograd.grad((torch.compile(weight)(ids) * y).sum(), weight.weight)  # leaves its graph in the cache
            torch.compiler.reset()
            compiled = utils.wrap(weight, ONE, compiled=True)
            grads = [torch.autograd.grad((compiled(ids) * y).sum(), weight.weight)[0] for _ in range(12)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(grad, grads[0]) for grad in grads)
    exact = torch.zeros(64, 256, dtype=torch.double).index_add_(0, ids.flatten(), y.double().flatten(0, 1))
    torch.testing.assert_close(grads[0].double(), exact, rtol=1e-5, atol=1e-4)


def test_compiled_on_cpu_the_logits_are_stored_once():
    """Storing what takes a few operations, for the mask's sake, must not store another tensor of the logits' size: neither
    for the log-probabilities nor, beside the gradient itself, in their backward."""
    utils.init_ranks()
    logits, tokens = torch.randn(4, 6, 4096, requires_grad=True), torch.arange(24).view(4, 6)
    inputs = (logits, tokens, 0.7, torch.zeros(4096), False)

    def gradient(function):
        return torch.autograd.grad(function(*inputs)[0].sum(), logits)[0]

    compiled = torch.compile(ppo_rlhf.token_logprobs, dynamic=True)
    result, codes = run_and_get_code(gradient, compiled)
    torch.testing.assert_close(result, gradient(ppo_rlhf.token_logprobs), rtol=1e-4, atol=1e-6)
    sizes = [re.findall(r"empty_strided_cpu\(\(([^)]*)\)", code) for code in codes]
    assert [
        sum(len(size.split(",")) == 3 and size.split(",")[2].strip() != "1" for size in found) for found in sizes
    ] == [0, 1]


@pytest.mark.parametrize("script", ["ilql_rlhf", "reward_model", "sft"])
def test_compiled_on_cpu_the_causal_mask_is_computed_once(tmp_path, monkeypatch, script):
    """In what the scripts compile whole. Left to itself the compiler computes it, or the choice between 0 and the least number
    by a mask of booleans, anew for every element of every layer's softmax."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the settings of a machine without
    utils.init_ranks()
    ids, mask = torch.arange(48).view(4, 12) % 16, torch.ones(4, 12, dtype=torch.long)
    mask[:2, 7:] = 0
    GPT2Config(
        n_layer=3, n_embd=24, n_head=2, vocab_size=16, n_positions=16, bos_token_id=0, eos_token_id=0, pad_token_id=0
    ).save_pretrained(tmp_path)
    if script == "reward_model":
        classifier, _ = utils.load_pretrained(AutoModelForSequenceClassification, str(tmp_path), num_labels=1)
        module, inputs = reward_model.Scorer(classifier), (ids, mask)
    else:
        model, _ = utils.load_pretrained(AutoModelForCausalLM, str(tmp_path))
        states = torch.arange(5, 11).expand(4, -1)
        module = sft.LabelledLogits(model) if script == "sft" else ilql_rlhf.ILQL(model, 2)
        inputs = (ids, mask, 7 if script == "sft" else states)
    result, codes = run_and_get_code(utils.wrap(module, ONE, True), *inputs)
    torch.testing.assert_close(result, module(*inputs), rtol=1e-4, atol=1e-5)
    calls = []
    for name, kernel in re.findall(r"(\w+) = async_compile\.cpp_pybinding\(.*?r'''(.*?)'''", codes[0], re.DOTALL):
        if str(torch.finfo(torch.float32).min) in kernel:
            calls += re.findall(rf"^ +{name}\(", codes[0], re.MULTILINE)
    assert len(calls) == 1
