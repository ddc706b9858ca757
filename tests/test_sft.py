"""Supervised fine-tuning: the loss, the tokens that carry it, the loop on one and two ranks."""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

import sft
import utils
from conftest import (
    assert_same_gradients,
    build_tokenizer,
    gradients_of,
    read_jsonl,
    refuses,
    write_jsonl,
)

CPU = torch.device("cpu")
EOS = 1
# U for the user, A for the assistant, and an EOS after each turn.
TEMPLATE = "{% for m in messages %}{{ m.role[0] | upper }}{{ m.content }}|{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}A{% endif %}"

# Eleven rows of 3 to 15 tokens. With 4 a batch, the last batch of an epoch has 3, an uneven share
# for two ranks.
ROWS = [
    {"prompt": "abcdefgh"[: 1 + i % 7], "completion": "zyxwvutsr"[: 1 + (5 * i) % 8]}
    for i in range(11)
]


@pytest.fixture
def dataset(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def options(tmp_path, dataset, gpt2_folder):
    """Three steps an epoch over ROWS, no clipping, no held-out rows, every step logged."""
    return {
        "model": gpt2_folder,
        "dataset": dataset,
        "output_dir": str(tmp_path / "run"),
        "batch_size": 4,
        "micro_batch_size": 4,
        "num_epochs": 1,
        "lr": 0.01,
        "max_grad_norm": 0.0,
        "log_every": 1,
        "precision": "fp32",
        "compile": False,
    }


@pytest.fixture
def encode(tmp_path):
    """`encode(rows, tokenizer)`: (input_ids, labels) of each row that is trained on."""

    def load(rows, tokenizer, **options):
        path = write_jsonl(tmp_path / "encoded.jsonl", rows)
        loaded = sft.load_demonstrations(path, tokenizer, sft.Args(**options))
        batches = [sft.collate([row], EOS) for row in loaded]
        return [(batch["input_ids"][0].tolist(), batch["labels"][0].tolist()) for batch in batches]

    return load


def train(options):
    """Run the script in this process; returns the lines of its metrics."""
    sft.main(sft.Args(**options))
    return read_jsonl(f"{options['output_dir']}/metrics.jsonl")


def weights(folder):
    return (Path(folder) / "model" / "model.safetensors").read_bytes()


# --------------------------------------------------------------------------------------------------
# The loss


def random_batch(seed=0, B=3, T=6, V=9):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, T, V, generator=generator)
    labels = torch.randint(V, (B, T), generator=generator)
    has_label = torch.rand(B, T, generator=generator) > 0.4
    return logits, torch.where(has_label, labels, -100)


@pytest.mark.fast
def test_token_loss_against_a_loop():
    logits, labels = random_batch()
    total = 0
    count = 0
    unshifted = 0
    for b in range(3):
        for t in range(6):
            if labels[b, t] == -100:
                continue
            unshifted -= logits[b, t].double().log_softmax(0)[labels[b, t]].item()
            if t > 0:  # No logits come before the first token.
                total -= logits[b, t - 1].double().log_softmax(0)[labels[b, t]].item()
                count += 1
    loss_sum, token_count = sft.token_loss(logits, labels)
    assert loss_sum.shape == token_count.shape == ()
    assert token_count == count
    assert loss_sum.item() == pytest.approx(total, rel=1e-6)
    assert abs(loss_sum.item() - unshifted) > 0.1


@pytest.mark.fast
def test_token_loss_of_uniform_logits_is_log_v_a_token():
    labels = torch.ones(2, 5, dtype=torch.long)
    loss_sum, token_count = sft.token_loss(torch.zeros(2, 5, 7), labels)
    assert token_count == 8
    assert loss_sum.item() == pytest.approx(8 * math.log(7))


@pytest.mark.fast
def test_token_loss_reads_no_logits_of_unlabelled_tokens():
    logits, labels = random_batch()
    logits.requires_grad_()
    sft.token_loss(logits, labels)[0].backward()
    predicts = torch.zeros(3, 6, dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != -100
    assert (logits.grad[~predicts] == 0).all()
    assert (logits.grad[predicts].abs().sum(-1) > 0).all()


@pytest.mark.fast
@pytest.mark.parametrize("T", [1, 6])
def test_token_loss_of_no_label_is_zero(T):
    """Such as that of a row of empty text, whose one token has none."""
    logits, labels = random_batch(T=T)
    logits.requires_grad_()
    loss_sum, token_count = sft.token_loss(logits, torch.full_like(labels, -100))
    loss_sum.backward()
    assert loss_sum == 0
    assert token_count == 0
    assert (logits.grad == 0).all()


@pytest.mark.fast
def test_token_loss_sums_in_fp32():
    logits, labels = random_batch()
    half = logits.bfloat16()
    loss_sum, _ = sft.token_loss(half, labels)
    assert loss_sum.dtype == torch.float32
    assert torch.equal(loss_sum, sft.token_loss(half.float(), labels)[0])


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@torch.no_grad()
def test_the_loss_of_a_batch_is_that_of_its_rows_alone(kind, request, tokenizer, encode):
    """Whatever ids the padding holds, and although only the last logits are computed."""
    folder = request.getfixturevalue(f"{kind}_folder")
    model, _ = utils.load_pretrained(AutoModelForCausalLM, folder)
    expected = 0
    rows = []
    for ids, labels in encode(ROWS, tokenizer):
        rows.append({"input_ids": ids, "num_unlabelled": labels.count(-100)})
        output = model(torch.tensor([ids]))
        expected += sft.token_loss(output.logits, torch.tensor([labels]))[0].item()
    for pad_id in (0, EOS, 7):
        means = utils.Means()
        loss_sum = sft.micro_batch_loss(model, rows, means, sft.token_loss, pad_id, CPU)
        assert loss_sum.item() == pytest.approx(expected, rel=1e-5)
        num_tokens = sum(len(row["completion"]) + 1 for row in ROWS)
        loss = pytest.approx(expected / num_tokens, rel=1e-5)
        assert means.over_ranks() == {"sft/loss": loss}


# --------------------------------------------------------------------------------------------------
# Tokens


@pytest.mark.fast
def test_labels_are_the_completion_and_one_eos(tokenizer, encode):
    rows = [{"prompt": "ab", "completion": "cde"}, {"prompt": "a", "completion": "b"}]
    first, second = encode(rows, tokenizer)
    assert first == ([2, 3, 4, 5, 6, EOS], [-100, -100, 4, 5, 6, EOS])
    assert second == ([2, 3, EOS], [-100, 3, EOS])


@pytest.mark.fast
def test_rows_are_padded_on_the_right_without_labels():
    rows = [
        {"input_ids": [1, 2, 3, 4, 5, 6], "num_unlabelled": 4},
        {"input_ids": [1, 2, 3, 4], "num_unlabelled": 1},
    ]
    batch = sft.collate(rows, 9)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 9, 9]]
    assert batch["labels"].tolist() == [[-100] * 4 + [5, 6], [-100, 2, 3, 4, -100, -100]]


@pytest.mark.fast
@pytest.mark.parametrize(("unlabelled", "num_logits"), [((4, 3), 4), ((5, 1), 6), ((1, 3), 6)])
def test_logits_are_computed_from_the_first_that_predicts_a_label(unlabelled, num_logits):
    asked = []

    def model(input_ids, use_cache, logits_to_keep):
        asked.append(logits_to_keep)
        return SimpleNamespace(logits=torch.zeros(2, logits_to_keep, 31))

    lengths = (6, 4)
    rows = []
    for length, n in zip(lengths, unlabelled, strict=True):
        rows.append({"input_ids": list(range(length)), "num_unlabelled": n})
    means = utils.Means()
    loss_sum = sft.micro_batch_loss(model, rows, means, sft.token_loss, EOS, CPU)
    assert asked == [num_logits]
    num_labels = sum(lengths) - sum(unlabelled)
    assert loss_sum.item() == pytest.approx(num_labels * math.log(31), rel=1e-5)


@pytest.mark.fast
def test_text_rows_carry_loss_everywhere_but_on_their_first_token(tokenizer, encode):
    """Nothing stands before it that could predict it."""
    assert encode([{"text": "abc"}], tokenizer) == [([2, 3, 4, EOS], [-100, 3, 4, EOS])]


@pytest.mark.fast
def test_text_may_stand_beside_other_columns(tokenizer, encode):
    alone = encode([{"text": "abc"}], tokenizer)
    assert encode([{"text": "abc", "prompt": "a"}], tokenizer) == alone


@pytest.mark.fast
def test_an_eos_in_the_text_ends_the_row(tokenizer, encode):
    for completion, ids in (("bc|", [2, 3, 4, EOS]), ("b|c", [2, 3, EOS])):
        assert encode([{"prompt": "a", "completion": completion}], tokenizer)[0][0] == ids


@pytest.mark.fast
def test_a_bos_that_the_tokenizer_adds_belongs_to_the_prompt(encode):
    """Also where a row of text has no other prompt: nothing stands before it to predict it."""
    tokenizer = build_tokenizer()
    both = TemplateProcessing(single="| $A |", special_tokens=[("|", EOS)])
    tokenizer.backend_tokenizer.post_processor = both
    rows = [{"prompt": "ab", "completion": "c"}]
    labels = [-100, -100, -100, 4, EOS]
    assert encode(rows, tokenizer) == [([EOS, 2, 3, 4, EOS], labels)]
    assert encode([{"text": "ab"}], tokenizer) == [([EOS, 2, 3, EOS], [-100, 2, 3, EOS])]


@pytest.mark.fast
def test_long_rows_are_left_out_and_counted(tokenizer, encode, capsys):
    rows = [{"prompt": "ab", "completion": "cd"}, {"prompt": "ab", "completion": "cde"}]
    assert [len(ids) for ids, _ in encode(rows, tokenizer, max_length=5)] == [5]
    assert re.search(r"encoded.jsonl: left out 1 of 2 rows", capsys.readouterr().out)
    with pytest.raises(utils.UserError, match=r"encoded.jsonl: .* over 4 tokens \(--max_length\)"):
        encode(rows, tokenizer, max_length=4)


@pytest.fixture
def chat_tokenizer():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def turns(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def spoken(tokenizer, row):
    """(whole text, text that carries loss) of an encoded row."""
    ids, labels = row
    return tokenizer.decode(ids), tokenizer.decode([label for label in labels if label != -100])


@pytest.mark.fast
def test_messages_go_through_the_chat_template(chat_tokenizer, encode):
    [row] = encode([{"messages": turns("ab", "cd")}], chat_tokenizer)
    assert spoken(chat_tokenizer, row) == ("Uab|Acd|", "cd|")


@pytest.mark.fast
def test_every_assistant_turn_is_a_response_to_the_turns_before_it(chat_tokenizer, encode):
    rows = encode([{"messages": turns("a", "b", "c", "de")}], chat_tokenizer)
    expected = [("Ua|Ab|", "b|"), ("Ua|Ab|Uc|Ade|", "de|")]
    assert [spoken(chat_tokenizer, row) for row in rows] == expected


@pytest.mark.fast
def test_prompt_and_completion_may_be_messages(chat_tokenizer, encode):
    messages = turns("a", "b", "c", "d")
    [row] = encode([{"prompt": messages[:3], "completion": messages[3:]}], chat_tokenizer)
    assert spoken(chat_tokenizer, row) == ("Ua|Ab|Uc|Ad|", "d|")


@pytest.mark.fast
def test_a_row_that_cannot_be_rendered_is_named(chat_tokenizer, encode):
    rows = [{"messages": turns("a", "b")}, {"messages": turns("a", "c")}]
    refuses_c = "{{ raise_exception('no c, please') if messages[-1].content == 'c' }}"
    chat_tokenizer.chat_template += refuses_c
    with pytest.raises(utils.UserError, match=r"encoded.jsonl: row 2: no c, please"):
        encode(rows, chat_tokenizer)
    with pytest.raises(utils.UserError, match=r"encoded.jsonl: row 1: "):
        encode([{"prompt": "a", "completion": turns("a", "b")[1:]}], chat_tokenizer)


# --------------------------------------------------------------------------------------------------
# The loop


def test_the_micro_batch_size_does_not_change_a_gradient(options, tmp_path, llama_folder):
    options["model"] = llama_folder
    histories = {}
    for size in (1, 3, 4):
        options |= {"micro_batch_size": size, "output_dir": str(tmp_path / f"run{size}")}
        histories[size], _ = gradients_of(None, "sft", options)
    assert len(histories[4]) == 3
    assert_same_gradients(histories[1], histories[4])
    assert_same_gradients(histories[3], histories[4])


def test_the_gradient_is_that_of_the_mean_over_the_batch(options, tokenizer, encode):
    """Not the mean of the rows' means: the rows have 2 to 9 tokens that count."""
    options |= {"batch_size": 11, "micro_batch_size": 11}
    history, _ = gradients_of(None, "sft", options)
    model, _ = utils.load_pretrained(AutoModelForCausalLM, options["model"])
    sums = []
    counts = []
    for ids, labels in encode(ROWS, tokenizer):
        output = model(torch.tensor([ids]))
        loss_sum, count = sft.token_loss(output.logits, torch.tensor([labels]))
        sums.append(loss_sum)
        counts.append(count)
    sums = torch.stack(sums)
    counts = torch.stack(counts)
    mean = sums.sum() / counts.sum()
    parameters = list(model.parameters())
    expected = torch.autograd.grad(mean, parameters, retain_graph=True)
    expected = [gradient.numpy() for gradient in expected]
    assert_same_gradients(history, [expected])
    [line] = read_jsonl(f"{options['output_dir']}/metrics.jsonl")
    assert line["train/sft/loss"] == pytest.approx(mean.item(), rel=1e-5)
    norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in expected))
    assert line["optim/grad_norm"] == pytest.approx(norm, rel=1e-4)

    mean_of_means = (sums / counts).mean()
    other = [gradient.numpy() for gradient in torch.autograd.grad(mean_of_means, parameters)]
    with pytest.raises(AssertionError):
        assert_same_gradients([other], [expected], tolerance=1e-2)


def test_gradients_are_scaled_down_to_max_grad_norm(options, tmp_path):
    options["num_steps"] = 1
    whole, _ = gradients_of(None, "sft", options)
    [before] = read_jsonl(f"{options['output_dir']}/metrics.jsonl")
    norm = before["optim/grad_norm"]
    for factor, scale in ((0.5, 0.5), (2.0, 1.0)):
        folder = str(tmp_path / f"clipped{factor}")
        options |= {"max_grad_norm": factor * norm, "output_dir": folder}
        clipped, _ = gradients_of(None, "sft", options)
        assert_same_gradients(clipped, [[scale * gradient for gradient in whole[0]]])
        [line] = read_jsonl(f"{folder}/metrics.jsonl")
        assert line["optim/grad_norm"] == pytest.approx(norm)  # The norm before clipping.


def keys_of(rows):
    """Something of each row that can be sorted."""
    return sorted(tuple(row["input_ids"]) for row in rows)


def test_two_ranks_take_the_gradients_of_one_and_see_every_row_once(
    options, tmp_path, on_two_ranks
):
    """Batches of 6 and 5 rows, of which the ranks get 3 + 3 and 3 + 2; evaluations of all 11."""
    options |= {"batch_size": 6, "micro_batch_size": 2, "num_epochs": 2, "eval_every": 2}
    options["eval_dataset"] = options["dataset"]
    alone, batches = gradients_of(None, "sft", {**options, "output_dir": str(tmp_path / "alone")})
    both = on_two_ranks(gradients_of, "sft", options)
    assert len(alone) == 4
    for history, _ in both:
        assert_same_gradients(history, alone)
    for step, other_step in zip(both[0][0], both[1][0], strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(step, other_step, strict=True))

    # Before each epoch and at the end there is an evaluation.
    is_evaluation = [True, False, False, True, False, False, True]
    assert [len(batch) for batch in batches] == [11, 6, 5, 11, 6, 5, 11]
    everything = keys_of(batches[0])
    for start in (1, 4):
        assert keys_of(batches[start] + batches[start + 1]) == everything
    assert keys_of(batches[1]) != keys_of(batches[4])  # Another order in the second epoch.
    shares = [rank_batches for _, rank_batches in both]
    sizes = [[len(batch) for batch in rank_batches] for rank_batches in shares]
    assert sizes == [[6, 3, 3, 6, 3, 3, 6], [5, 3, 2, 5, 3, 2, 5]]
    for i in range(len(is_evaluation)):
        assert keys_of(shares[0][i] + shares[1][i]) == keys_of(batches[i])
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    other_lines = read_jsonl(tmp_path / "alone" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    for line, other in zip(lines, other_lines, strict=True):
        assert line == pytest.approx(other, rel=1e-5)


def test_a_rank_without_a_row_in_the_last_batch_takes_part(options, tmp_path, on_two_ranks):
    """Ten rows, and then one; of the one row to evaluate, the second rank has none."""
    options["batch_size"] = 10
    options["eval_dataset"] = write_jsonl(tmp_path / "one.jsonl", ROWS[:1])
    alone, _ = gradients_of(None, "sft", {**options, "output_dir": str(tmp_path / "alone")})
    (history, _), (_, batches) = on_two_ranks(gradients_of, "sft", options)
    assert [len(batch) for batch in batches] == [0, 5, 0, 0]
    assert_same_gradients(history, alone)
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    other_lines = read_jsonl(tmp_path / "alone" / "metrics.jsonl")
    for line, other in zip(lines, other_lines, strict=True):
        assert line == pytest.approx(other, rel=1e-5)


def test_torchrun_writes_one_run(options, tmp_path, run_script):
    options |= {"batch_size": 6, "micro_batch_size": 3}
    del options["compile"]
    args = [part for name, value in options.items() for part in (f"--{name}", value)]
    done = run_script("sft.py", [*args, "--no-compile"], nproc=2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    alone = train({**options, "compile": False, "output_dir": str(tmp_path / "alone")})
    assert len(lines) == len(alone) == 2
    assert lines[0] == pytest.approx(alone[0], rel=1e-4)
    record = json.loads((tmp_path / "run" / "args.json").read_text())
    assert record["world_size"] == 2
    assert record["script"] == "sft.py"


def test_the_learning_rate_falls_from_lr_to_one_last_step(options):
    rates = [line["train/sft/lr"] for line in train(options)]
    assert rates == pytest.approx([0.01, 0.01 * 2 / 3, 0.01 / 3])


def test_num_steps_counts_the_steps_whatever_the_epochs(options):
    """Three steps are an epoch; the learning rate falls over all five."""
    lines = train(options | {"num_steps": 5})
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["epoch"] for line in lines] == [1, 1, 1, 2, 2]
    rates = [line["train/sft/lr"] for line in lines]
    assert rates == pytest.approx([0.01 * (5 - i) / 5 for i in range(5)])


def test_max_rows_keeps_the_first_rows_and_all_that_are_evaluated(options, tokenizer, encode):
    options |= {"max_rows": 5, "eval_dataset": options["dataset"]}
    _, batches = gradients_of(None, "sft", options)
    first_five = keys_of({"input_ids": ids} for ids, _ in encode(ROWS[:5], tokenizer))
    assert [len(batch) for batch in batches] == [11, 4, 1, 11]
    assert keys_of(batches[1] + batches[2]) == first_five


def test_held_out_rows_are_evaluated_before_the_first_step(options, tokenizer, encode):
    """The loss of the model as it was given, and nothing else in that line."""
    options["eval_dataset"] = options["dataset"]
    lines = train(options | {"eval_every": 2})
    model, _ = utils.load_pretrained(AutoModelForCausalLM, options["model"])
    total = 0
    count = 0
    for ids, labels in encode(ROWS, tokenizer):
        output = model(torch.tensor([ids]))
        loss_sum, token_count = sft.token_loss(output.logits, torch.tensor([labels]))
        total += loss_sum.item()
        count += token_count.item()
    assert lines[0] == {"step": 0, "eval/sft/loss": pytest.approx(total / count, rel=1e-5)}
    assert ["eval/sft/loss" in line for line in lines] == [True, False, True, True]
    assert lines[-1]["eval/sft/loss"] < lines[0]["eval/sft/loss"]


def test_lr_zero_changes_nothing_and_held_out_loss_is_the_same_mean(options, dataset, gpt2_folder):
    options |= {"lr": 0.0, "batch_size": 11, "micro_batch_size": 3, "eval_dataset": dataset}
    lines = train(options)
    assert [line["step"] for line in lines] == [0, 1]
    before, after = lines
    assert after["eval/sft/loss"] == before["eval/sft/loss"]
    assert after["eval/sft/loss"] == pytest.approx(after["train/sft/loss"], rel=1e-5)
    given = AutoModelForCausalLM.from_pretrained(gpt2_folder).state_dict()
    saved = AutoModelForCausalLM.from_pretrained(f"{options['output_dir']}/model").state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in given.items())


def test_a_batch_without_a_label_changes_nothing(options, tmp_path, gpt2_folder):
    options |= {"batch_size": 1, "dataset": write_jsonl(tmp_path / "rows.jsonl", [{"text": ""}])}
    [line] = train(options)
    assert line["train/sft/loss"] == line["optim/grad_norm"] == 0
    given = AutoModelForCausalLM.from_pretrained(gpt2_folder).state_dict()
    saved = AutoModelForCausalLM.from_pretrained(f"{options['output_dir']}/model").state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in given.items())


def test_the_logged_loss_of_several_steps_is_the_mean_over_their_tokens(options, dataset):
    """Not the mean of the steps' means: the batches hold unequal numbers of tokens."""
    lines = train(options | {"lr": 0.0, "log_every": 3, "eval_dataset": dataset})
    line = lines[-1]
    assert line["train/sft/loss"] == pytest.approx(line["eval/sft/loss"], rel=1e-5)


def test_held_out_rows_are_not_trained_on(options, tmp_path):
    """48 rows that all differ, of which 2 are held out; an epoch is 3 steps."""
    rows = [{"prompt": a, "completion": b} for a in "abcdefgh" for b in "uvwxyz"]
    options |= {"dataset": write_jsonl(tmp_path / "many.jsonl", rows), "batch_size": 16}
    _, batches = gradients_of(None, "sft", options)
    before, *trained, after = [keys_of(batch) for batch in batches]
    assert before == after
    assert len(before) == 2
    trained = [row for batch in trained for row in batch]
    assert len(trained) == len(set(trained)) == 46
    assert not set(trained) & set(before)


def test_bf16_computes_in_bf16_and_keeps_weights_in_fp32(options, tmp_path, monkeypatch):
    kinds = set()
    token_loss = sft.token_loss

    def record(logits, labels):
        kinds.add(logits.dtype)
        return token_loss(logits, labels)

    monkeypatch.setattr(sft, "token_loss", record)
    exact = train(options)
    half = train(options | {"precision": "bf16", "output_dir": str(tmp_path / "half")})
    assert kinds == {torch.float32, torch.bfloat16}
    assert half[0]["train/sft/loss"] != exact[0]["train/sft/loss"]
    assert half[0]["train/sft/loss"] == pytest.approx(exact[0]["train/sft/loss"], rel=1e-2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half" / "model", dtype="auto")
    assert model.dtype == torch.float32


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_saved_folder_opens_anywhere_with_the_same_logits(kind, request, options, monkeypatch):
    options["model"] = request.getfixturevalue(f"{kind}_folder")
    saved = []
    save_pretrained = utils.save_pretrained

    def record(folder, model, tokenizer):
        saved.append(model)
        save_pretrained(folder, model, tokenizer)

    monkeypatch.setattr(utils, "save_pretrained", record)
    train(options)
    folder = f"{options['output_dir']}/model"
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    input_ids = torch.tensor([[2, 3, 4, 5]])
    # The same weights give the same bits by the same kernels.
    model.set_attn_implementation(saved[0].config._attn_implementation)
    assert torch.equal(model(input_ids).logits, saved[0](input_ids).logits)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("ab|").input_ids == [2, 3, EOS]
    assert model.config.eos_token_id == tokenizer.eos_token_id == EOS
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0


def test_a_new_pad_token_gets_a_row_of_the_embedding(options, tmp_path, gpt2_folder):
    shutil.copytree(gpt2_folder, tmp_path / "model")
    build_tokenizer("|").save_pretrained(tmp_path / "model")
    train(options | {"model": str(tmp_path / "model")})
    folder = f"{options['output_dir']}/model"
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.get_input_embeddings().num_embeddings == 32
    assert model.config.pad_token_id == 31


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(options, tmp_path):
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        train(options | {"output_dir": str(tmp_path / name), "seed": seed})
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert weights(tmp_path / "a") != weights(tmp_path / "c")


class PowerCut(Exception):
    pass


def cut_after(step, monkeypatch):
    """Let the run die right after its checkpoint of that step."""
    save_checkpoint = utils.Run.save_checkpoint

    def save_and_die(self, at, objects):
        save_checkpoint(self, at, objects)
        if at == step:
            raise PowerCut

    monkeypatch.setattr(utils.Run, "save_checkpoint", save_and_die)


def test_a_resumed_run_ends_in_the_same_bits(options, tmp_path, monkeypatch):
    """Cut in the middle of the second epoch, with evaluations before and after."""
    options |= {"num_epochs": 2, "save_every": 2, "eval_every": 3}
    options["eval_dataset"] = options["dataset"]
    whole = train(options | {"output_dir": str(tmp_path / "whole")})
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_after(4, patch)
        sft.main(sft.Args(**options))
    assert not (tmp_path / "run" / "model").exists()
    sft.main(sft.Args(resume=str(tmp_path / "run")))
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert [line["step"] for line in whole] == list(range(7))
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl") == whole


def test_a_run_resumed_after_its_last_step_says_that_it_measured_nothing(
    options, tmp_path, monkeypatch, capsys
):
    """With held-out rows, of which the run that is not interrupted says the last loss."""
    options |= {"save_every": 3, "eval_dataset": options["dataset"]}
    lines = train(options | {"output_dir": str(tmp_path / "whole")})
    assert f"held-out loss {lines[-1]['eval/sft/loss']:.4f} nats" in capsys.readouterr().out
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_after(3, patch)
        sft.main(sft.Args(**options))
    sft.main(sft.Args(resume=str(tmp_path / "run")))
    assert "held-out loss not measured" in capsys.readouterr().out
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_resuming_a_finished_run_changes_nothing(options, tmp_path, capsys):
    train(options | {"save_every": 3})
    before = weights(tmp_path / "run")
    refuses(capsys, "sft", {"resume": str(tmp_path / "run")}, "--resume .*the run is finished")
    assert weights(tmp_path / "run") == before


# --------------------------------------------------------------------------------------------------
# Mistakes


def no_model(tmp_path):
    (tmp_path / "nothing").mkdir()
    return {"model": str(tmp_path / "nothing")}


def no_config(tmp_path):
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return {"model": str(tmp_path / "tokenizer")}


def no_eos(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "mute")
    return {"model": str(tmp_path / "mute")}


def nowhere(flag):
    return lambda tmp_path: {flag: str(tmp_path / "nowhere.jsonl")}


def data(*rows):
    return lambda tmp_path: {"dataset": write_jsonl(tmp_path / "bad.jsonl", rows)}


def existing_run(tmp_path):
    (tmp_path / "run").mkdir()
    return {}


def flag(**change):
    return lambda tmp_path: change


ROW = {"prompt": "a", "completion": "b"}
MISTAKES = {
    "no data set": (nowhere("dataset"), "nowhere.jsonl: no such file"),
    "no held-out data": (nowhere("eval_dataset"), "nowhere.jsonl: no such file"),
    "no model": (no_model, "nothing"),
    "no model at all": (nowhere("model"), "nowhere"),
    "no config": (no_config, "config.json"),
    "no EOS": (no_eos, "mute.*EOS"),
    "a run folder": (existing_run, "--output_dir .*run: exists"),
    "no column": (
        data({"prompt": "a", "answer": "b"}),
        r"bad.jsonl.*prompt\+completion.*prompt, answer",
    ),
    "no row": (data(), "bad.jsonl.*empty"),
    "an empty cell": (data(ROW, {**ROW, "completion": None}), "bad.jsonl: row 2"),
    "a number for a text": (data({**ROW, "completion": 5}), "bad.jsonl: row 1"),
    "no template": (data({"messages": turns("a", "b")}), "bad.jsonl: row 1: .*template"),
    "nobody speaks": (data({"messages": turns("a")}), "bad.jsonl: no message of an assistant"),
    "one row over and over": (data(*[ROW] * 20), "--dataset: every row is a copy"),
    "batch size zero": (flag(batch_size=0), "--batch_size 0: must be at least 1"),
    "micro-batch size zero": (flag(micro_batch_size=0), "--micro_batch_size 0: "),
    "no epoch": (flag(num_epochs=0), "--num_epochs 0: "),
    "no step": (flag(num_steps=0), "--num_steps 0: "),
    "no row wanted": (flag(max_rows=0), "--max_rows 0: "),
    "no token": (flag(max_length=0), "--max_length 0: "),
    "never logged": (flag(log_every=0), "--log_every 0: "),
    "never evaluated": (flag(eval_every=0), "--eval_every 0: "),
    "ascent": (flag(lr=-1e-3), "--lr -0.001: must be at least 0"),
    "no number": (flag(lr=math.nan), "--lr nan: must be at least 0 and finite"),
    "gradients turned round": (flag(max_grad_norm=-1.0), "--max_grad_norm -1.0: "),
    "no time": (flag(timeout_minutes=0.0), "--timeout_minutes 0.0: must be above 0"),
    "no checkpoint": (
        lambda tmp_path: {"resume": str(tmp_path), "output_dir": None},
        "--resume .*args.json",
    ),
}


@pytest.mark.fast
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_and_writes_nothing(
    mistake, options, tmp_path, capsys, monkeypatch
):
    change, match = MISTAKES[mistake]
    if mistake != "no config":  # All others are found out before a model is loaded.
        monkeypatch.setattr(utils, "load_pretrained", None)
    refuses(capsys, "sft", {**options, **change(tmp_path)}, match)


def test_rows_of_more_tokens_than_the_model_has_positions_are_refused(options, tmp_path, capsys):
    options["dataset"] = write_jsonl(tmp_path / "long.jsonl", [{"text": "a" * 64}])
    match = "--max_length: 65 tokens are more than the 64 positions of"  # One is the EOS.
    refuses(capsys, "sft", options, match)
    options["dataset"] = write_jsonl(tmp_path / "fits.jsonl", [{"text": "a" * 63}])
    train(options)


def test_a_gradient_that_is_not_finite_ends_the_run(options):
    """At once, also between two lines of metrics."""
    options |= {"lr": 1e30, "log_every": 3}
    with pytest.raises(utils.UserError, match="step 2: the gradient is not finite; lower --lr"):
        sft.main(sft.Args(**options))
    assert not Path(options["output_dir"], "model").exists()


def test_a_batch_that_the_ranks_cannot_share_is_refused(options, capsys, monkeypatch):
    monkeypatch.setattr(utils, "init_ranks", lambda timeout_minutes: utils.Ranks(0, 2, CPU))
    monkeypatch.setattr(utils, "load_pretrained", None)
    refuses(capsys, "sft", {**options, "batch_size": 5}, "--batch_size")


def test_the_command_line_reports_a_mistake_without_a_traceback(tmp_path, run_script, gpt2_folder):
    args = ["--model", gpt2_folder, "--dataset", tmp_path / "nowhere.jsonl"]
    done = run_script("sft.py", [*args, "--output_dir", tmp_path / "run"])
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert not (tmp_path / "run").exists()
