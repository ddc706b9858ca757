"""Supervised fine-tuning: the loss against its definition, the tokens that carry it, and the loop on one and two ranks."""

import json
import math
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import sft
import utils
from conftest import FAMILIES, assert_same_gradients, build_tokenizer, gradients_of, read_jsonl, refuses, write_jsonl

CPU = torch.device("cpu")
EOS = 1
TEMPLATE = "{% for m in messages %}{{ m.role[0] | upper }}{{ m.content }}|{% endfor %}"  # U for user, A for assistant
TEMPLATE += "{% if add_generation_prompt %}A{% endif %}"

# Eleven rows of 3 to 15 tokens: with 4 a batch, the last batch of an epoch has 3, an uneven share for two ranks.
ROWS = [{"prompt": "abcdefgh"[: 1 + i % 7], "completion": "zyxwvutsr"[: 1 + (5 * i) % 8]} for i in range(11)]


@pytest.fixture
def dataset(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def options(tmp_path, dataset, gpt2_folder):
    """Three steps an epoch over ROWS, no clipping, no held-out rows, every step logged."""
    sizes = {"batch_size": 4, "micro_batch_size": 4, "num_epochs": 1, "log_every": 1, "max_grad_norm": 0.0}
    paths = {"model": gpt2_folder, "dataset": dataset, "output_dir": str(tmp_path / "run")}
    return {**sizes, **paths, "lr": 0.01, "compile": False}


def encode(rows, tokenizer, max_length=64):
    return sft.encode_demonstrations(datasets.Dataset.from_list(rows), tokenizer, max_length, "rows.jsonl")


def weights(folder):
    return (Path(folder) / "model" / "model.safetensors").read_bytes()


# ----------------------------------------------------------------------------------------------------------------------
# The loss


def random_batch(seed=0, B=3, T=6, V=9):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, T, V, generator=generator, dtype=torch.float64)
    labels = torch.randint(V, (B, T), generator=generator)
    return logits, torch.where(torch.rand(B, T, generator=generator) < 0.4, -100, labels)


def test_token_loss_against_a_loop():
    logits, labels = random_batch()
    total = count = unshifted = 0
    for b in range(3):
        for t in range(6):
            if labels[b, t] != -100:
                unshifted -= logits[b, t].log_softmax(0)[labels[b, t]].item()
                if t > 0:  # no logits come before the first token
                    total -= logits[b, t - 1].log_softmax(0)[labels[b, t]].item()
                    count += 1
    loss_sum, token_count = sft.token_loss(logits, labels)
    assert loss_sum.shape == token_count.shape == () and token_count == count
    assert abs(loss_sum.item() - total) < 1e-12
    assert abs(loss_sum.item() - unshifted) > 0.1


def test_token_loss_of_uniform_logits_is_log_v_a_token():
    loss_sum, token_count = sft.token_loss(torch.zeros(2, 5, 7), torch.ones(2, 5, dtype=torch.long))
    assert token_count == 8 and loss_sum.item() == pytest.approx(8 * math.log(7))


def test_token_loss_reads_no_logits_of_unlabelled_tokens():
    logits, labels = random_batch()
    logits.requires_grad_()
    sft.token_loss(logits, labels)[0].backward()
    predicts = torch.zeros(3, 6, dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != -100
    assert (logits.grad[~predicts] == 0).all() and (logits.grad[predicts].abs().sum(-1) > 0).all()


def test_token_loss_of_no_label_is_zero():
    logits, labels = random_batch()
    logits.requires_grad_()
    loss_sum, token_count = sft.token_loss(logits, torch.full_like(labels, -100))
    loss_sum.backward()  # a rank without rows takes part
    assert loss_sum == 0 and token_count == 0 and (logits.grad == 0).all()


def test_token_loss_sums_in_fp32():
    logits, labels = random_batch()
    half = logits.bfloat16()
    assert sft.token_loss(half, labels)[0].dtype == torch.float32
    assert torch.equal(sft.token_loss(half, labels)[0], sft.token_loss(half.float(), labels)[0])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_right_padding_does_not_change_the_loss(kind, request, tokenizer):
    model, _ = utils.load_pretrained(AutoModelForCausalLM, request.getfixturevalue(f"{kind}_folder"))
    encoded = encode(
        [{"prompt": "ab", "completion": "cd"}, {"prompt": "abcdefgh", "completion": "ijklmnop"}], tokenizer
    )
    ids, labels = encoded[0]
    alone = sft.token_loss(model(torch.tensor([ids])).logits, torch.tensor([labels]))[0]

    input_ids, labels, attention_mask = sft.collate_labelled(encoded, tokenizer.pad_token_id, 3, CPU)
    assert input_ids.shape == attention_mask.shape == (3, 24)  # the third row only fills up the shape
    assert labels.shape == (3, 23) and (labels[0, 1] != -100)  # the first label of all is that of token 2
    labelled = sft.LabelledLogits(model)
    for padding in (tokenizer.pad_token_id, 7):  # whatever ids the padding holds
        padded_ids = torch.where(attention_mask == 1, input_ids, padding)
        logits = labelled(padded_ids, attention_mask, labels.shape[1])
        whole = labelled(padded_ids, attention_mask, 24)
        torch.testing.assert_close(logits, whole[:, 1:])
        padded = sft.token_loss(logits[:1], labels[:1])[0]
        assert padded.item() == pytest.approx(alone.item(), rel=1e-5)
        assert sft.token_loss(logits[2:], labels[2:])[1] == 0
    assert model(padded_ids, attention_mask=attention_mask).logits.isfinite().all()


@pytest.mark.parametrize(("config", "mlp"), FAMILIES, ids=[config.model_type for config, _ in FAMILIES])
def test_the_last_mlp_computes_the_tokens_that_predict_a_label(config, mlp):
    torch.manual_seed(0)
    model, given = AutoModelForCausalLM.from_config(config).eval(), []
    input_ids, lengths = torch.randint(2, 32, (3, 12)), torch.tensor([12, 9, 5])
    attention_mask = (torch.arange(12) < lengths[:, None]).long()
    labels = torch.where(attention_mask == 1, input_ids, -100)[:, -8:]  # the first label is that of token 5
    names, position_ids = list(model.state_dict()), (attention_mask.cumsum(1) - 1).clamp(min=0)

    def gradients(logits):
        model.zero_grad()
        sft.token_loss(logits[:, -8:], labels)[0].backward()
        return [x.grad.double().numpy() for x in model.parameters() if x.grad is not None]

    def whole():
        return model(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False).logits

    expected, expected_gradients, labelled = whole(), gradients(whole()), sft.LabelledLogits(model)
    if mlp is not None:
        last = getattr(model.base_model, "layers", getattr(model.base_model, "h", None))[-1].mlp
        last.register_forward_pre_hook(lambda mlp, inputs: given.append(inputs[0].shape[:2].numel()))
    ours = labelled(input_ids, attention_mask, 8)
    assert ours.shape == (3, 8, 32) and ours.std() > 0.1
    torch.testing.assert_close(ours, expected[:, -8:], atol=1e-5, rtol=1e-5)
    assert_same_gradients(gradients(ours), expected_gradients)
    assert given == {"alone": [3 * 8], "residual": [3 * 12], None: []}[mlp]
    assert list(model.state_dict()) == names
    torch.testing.assert_close(whole(), expected)  # outside of a forward of the module the model is whole
    torch.testing.assert_close(labelled(input_ids, attention_mask, 12), expected, atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Tokens


def test_labels_are_the_completion_and_one_eos(tokenizer):
    rows = [{"prompt": "ab", "completion": "cde"}, {"prompt": "a", "completion": "b"}]
    encoded = encode(rows, tokenizer)
    assert encoded[0] == ([2, 3, 4, 5, 6, EOS], [-100, -100, 4, 5, 6, EOS])
    input_ids, labels, attention_mask = sft.collate_labelled(encoded, tokenizer.pad_token_id, 2, CPU)
    assert (labels[attention_mask == 0] == -100).all() and (input_ids[attention_mask == 0] == 0).all()
    assert attention_mask.sum(1).tolist() == [6, 3]
    assert ((labels == EOS).sum(1) == 1).all()
    assert (
        sft.token_loss(torch.zeros(2, 8, 31), labels)[1] == 4 + 2
    )  # EOS is counted, the prompt and the padding are not


def test_logits_begin_where_the_first_label_needs_them():
    rows = [([1, 2, 3, 4, 5, 6], [-100] * 4 + [5, 6]), ([1, 2, 3, 4], [-100] * 3 + [4]), ([1], [-100])]
    for num_rows, labels in ((3, [[-100, -100, 5, 6] + [-100] * 2, [-100, 4] + [-100] * 4, [-100] * 6]), (4, None)):
        batch = sft.collate_labelled(rows, 0, num_rows, CPU)[1]
        assert batch.shape == (num_rows, 6) and (labels is None or batch.tolist() == labels)
    assert sft.collate_labelled([], 0, 2, CPU)[1].tolist() == [[-100, -100]] * 2  # no label anywhere
    assert sft.collate_labelled([([1, 2], [1, 2])], 0, 1, CPU)[1].tolist() == [[1, 2] + [-100] * 6]


def test_text_rows_carry_loss_everywhere(tokenizer):
    assert encode([{"text": "abc"}], tokenizer) == [([2, 3, 4, EOS], [2, 3, 4, EOS])]


def test_text_may_stand_beside_other_columns(tokenizer):
    assert encode([{"text": "abc", "prompt": "a"}], tokenizer) == encode([{"text": "abc"}], tokenizer)


def test_an_eos_in_the_text_ends_the_row(tokenizer):
    assert encode([{"prompt": "a", "completion": "bc|"}], tokenizer)[0][0] == [2, 3, 4, EOS]
    assert encode([{"prompt": "a", "completion": "b|c"}], tokenizer)[0][0] == [2, 3, EOS]


def test_long_rows_are_left_out_and_counted(tokenizer, capsys):
    rows = [{"prompt": "ab", "completion": "cd"}, {"prompt": "ab", "completion": "cde"}]
    assert [len(ids) for ids, _ in encode(rows, tokenizer, max_length=5)] == [5]
    assert re.search(r"rows.jsonl: left out 1 of 2 rows", capsys.readouterr().out)
    with pytest.raises(utils.UserError, match=r"rows.jsonl: .*--max_length 4"):
        encode(rows, tokenizer, max_length=4)


@pytest.mark.parametrize("pad_token", ["|", None])
@pytest.mark.parametrize("spare", [True, False])
def test_pad_is_never_eos(tmp_path, pad_token, spare):
    tokenizer = build_tokenizer(pad_token)
    if spare:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved_0|>"]})
    tokenizer.save_pretrained(tmp_path)
    loaded = sft.load_tokenizer(str(tmp_path))
    assert loaded.pad_token_id not in (None, loaded.eos_token_id) and loaded.eos_token_id == EOS
    assert loaded.pad_token == ("<|reserved_0|>" if spare else "[PAD]")
    encoded = encode([{"prompt": "a", "completion": "bc"}, {"prompt": "a", "completion": "b"}], loaded)
    labels = sft.collate_labelled(encoded, loaded.pad_token_id, 2, CPU)[1]
    assert (labels == EOS).sum() == 2 and (labels == loaded.pad_token_id).sum() == 0


def test_an_eos_that_is_called_pad_is_no_padding(tmp_path):
    tokenizer = build_tokenizer("|")
    tokenizer.add_special_tokens({"eos_token": "<|endofpad|>", "pad_token": "<|endofpad|>"})
    tokenizer.save_pretrained(tmp_path)
    loaded = sft.load_tokenizer(str(tmp_path))
    assert loaded.eos_token == "<|endofpad|>" and loaded.pad_token not in (None, "<|endofpad|>")


def special_tokenizer(folder, pattern):
    """A tokenizer that adds BOS 'U' and EOS '|' where the pattern says so, as many published ones do."""
    characters = build_tokenizer().backend_tokenizer
    characters.post_processor = TemplateProcessing(single=pattern, special_tokens=[("U", 29), ("|", EOS)])
    options = {"bos_token": "U", "eos_token": "|", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=characters, **options).save_pretrained(folder)
    return sft.load_tokenizer(str(folder))


@pytest.mark.parametrize("pattern", ["$A", "U $A", "$A |", "U $A |"])
def test_one_bos_and_one_eos_whatever_the_tokenizer_adds(tmp_path, pattern):
    tokenizer = special_tokenizer(tmp_path, pattern)
    adds_bos = pattern.startswith("U")
    for prompt in ("abc", "Uabc"):  # the second brings its own BOS
        prompt_ids = sft.encode_prompt(tokenizer, prompt)
        bos = [29] if adds_bos or prompt[0] == "U" else []
        assert prompt_ids == [*bos, 2, 3, 4]
        [(ids, labels)] = encode([{"prompt": prompt, "completion": "de"}], tokenizer)
        assert ids[: len(prompt_ids)] == prompt_ids  # nothing is merged or added between the two
        assert ids == [*prompt_ids, 5, 6, EOS] and labels == [-100] * len(prompt_ids) + [5, 6, EOS]
    [(ids, labels)] = encode([{"text": "abc"}], tokenizer)
    assert ids == [29] * adds_bos + [2, 3, 4, EOS]
    assert labels[-4:] == [2, 3, 4, EOS]


def test_a_bos_that_is_also_the_eos_stays_in_front_of_no_prompt(tmp_path):
    tokenizer = special_tokenizer(tmp_path, "| $A")
    tokenizer.bos_token = "|"
    assert sft.encode_prompt(tokenizer, "ab") == [EOS, 2, 3] and sft.encode_prompt(tokenizer, "") == [EOS]
    assert encode([{"text": "ab"}], tokenizer) == [([EOS, 2, 3, EOS], [-100, 2, 3, EOS])]


@pytest.fixture
def chat_tokenizer():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def turns(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def spoken(tokenizer, row):
    """(whole text, text that carries loss) of an encoded row."""
    ids, labels = row
    return tokenizer.decode(ids), tokenizer.decode([label for label in labels if label != -100])


def test_messages_go_through_the_chat_template(chat_tokenizer):
    [row] = encode([{"messages": turns("ab", "cd")}], chat_tokenizer)
    assert spoken(chat_tokenizer, row) == ("Uab|Acd|", "cd|")


def test_every_assistant_turn_is_a_response_to_the_turns_before_it(chat_tokenizer):
    rows = encode([{"messages": turns("a", "b", "c", "de")}], chat_tokenizer)
    assert [spoken(chat_tokenizer, row) for row in rows] == [("Ua|Ab|", "b|"), ("Ua|Ab|Uc|Ade|", "de|")]


def test_prompt_and_completion_may_be_messages(chat_tokenizer):
    messages = turns("a", "b", "c", "d")
    [row] = encode([{"prompt": messages[:3], "completion": messages[3:]}], chat_tokenizer)
    assert spoken(chat_tokenizer, row) == ("Ua|Ab|Uc|Ad|", "d|")


def test_a_row_that_cannot_be_rendered_is_named(chat_tokenizer):
    rows = [{"messages": turns("a", "b")}, {"messages": turns("a", "c")}]
    chat_tokenizer.chat_template += "{{ raise_exception('no c, please') if messages[-1].content == 'c' }}"
    with pytest.raises(utils.UserError, match="rows.jsonl: row 2: no c, please"):
        encode(rows, chat_tokenizer)
    with pytest.raises(utils.UserError, match="rows.jsonl: row 1: "):
        encode([{"prompt": "a", "completion": turns("a", "b")[1:]}], chat_tokenizer)


def test_a_template_that_rewrites_its_prompt_is_refused(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ messages | length }}{{ messages[0].content }}"
    with pytest.raises(utils.UserError, match="chat template"):
        sft.encode_response(chat_tokenizer, turns("a"), turns("a", "b")[1:])


# ----------------------------------------------------------------------------------------------------------------------
# The loop


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_micro_batch_size_does_not_change_a_gradient(kind, request, options, tmp_path):
    options["model"] = request.getfixturevalue(f"{kind}_folder")
    histories = {}
    for size in (1, 3, 4):
        options |= {"micro_batch_size": size, "output_dir": str(tmp_path / f"run{size}")}
        histories[size], _ = gradients_of(None, "sft", options)
    assert len(histories[4]) == 3
    assert_same_gradients(histories[1], histories[4])
    assert_same_gradients(histories[3], histories[4])


def test_the_gradient_is_that_of_the_mean_over_the_batch(options, tokenizer):
    """Not the mean of the rows' means: the rows have 2 to 9 tokens that count."""
    options["batch_size"] = options["micro_batch_size"] = 11
    history, _ = gradients_of(None, "sft", options)
    model, _ = utils.load_pretrained(AutoModelForCausalLM, options["model"])
    sums, counts = [], []
    for ids, labels in encode(ROWS, tokenizer):
        loss_sum, count = sft.token_loss(model(torch.tensor([ids])).logits, torch.tensor([labels]))
        sums.append(loss_sum)
        counts.append(count)
    mean = torch.stack(sums).sum() / torch.stack(counts).sum()
    expected = [gradient.numpy() for gradient in torch.autograd.grad(mean, list(model.parameters()), retain_graph=True)]
    assert_same_gradients(history, [expected])
    metrics = read_jsonl(f"{options['output_dir']}/metrics.jsonl")
    assert metrics[0]["train/sft/loss"] == pytest.approx(mean.item(), rel=1e-5)
    norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in expected))
    assert metrics[0]["optim/grad_norm"] == pytest.approx(norm, rel=1e-4)

    mean_of_means = (torch.stack(sums) / torch.stack(counts)).mean()
    other = [gradient.numpy() for gradient in torch.autograd.grad(mean_of_means, list(model.parameters()))]
    with pytest.raises(AssertionError):
        assert_same_gradients([other], [expected], tolerance=1e-2)


def test_two_ranks_take_the_gradients_of_one_and_see_every_row_once(options, tmp_path, on_two_ranks):
    options |= {"batch_size": 6, "micro_batch_size": 2, "num_epochs": 2}  # 6 and 5 rows: 3 + 3, then 3 + 2
    alone, batches = gradients_of(None, "sft", {**options, "output_dir": str(tmp_path / "alone")})
    (first, first_batches), (second, second_batches) = on_two_ranks(gradients_of, "sft", options)
    assert len(alone) == 4
    assert_same_gradients(first, alone)
    for step, other_step in zip(first, second, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(step, other_step, strict=True))

    everything = sorted(row for batch in batches[:2] for row in batch)
    assert len(everything) == 11
    for epoch in (0, 2):
        parts = first_batches[epoch : epoch + 2] + second_batches[epoch : epoch + 2]
        assert sorted(row for part in parts for row in part) == everything
    assert batches[:2] != batches[2:]  # another order in the second epoch
    lines, other_lines = (read_jsonl(f"{folder}/metrics.jsonl") for folder in (tmp_path / "alone", tmp_path / "run"))
    for line, other in zip(lines, other_lines, strict=True):
        assert line == pytest.approx(other, rel=1e-5)


def test_a_rank_without_a_row_in_the_last_batch_takes_part(options, tmp_path, on_two_ranks):
    options |= {"batch_size": 10}  # 10 rows and 1
    alone, _ = gradients_of(None, "sft", {**options, "output_dir": str(tmp_path / "alone")})
    (history, _), (_, batches) = on_two_ranks(gradients_of, "sft", options)
    assert [len(batch) for batch in batches] == [5, 0]
    assert_same_gradients(history, alone)


def test_torchrun_writes_one_run(options, tmp_path, run_script):
    options |= {"batch_size": 6, "micro_batch_size": 3}
    del options["compile"]
    args = [part for name, value in options.items() for part in (f"--{name}", value)]
    done = run_script("sft.py", [*args, "--no-compile"], nproc=2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    sft.main(sft.Args(**{**options, "output_dir": str(tmp_path / "alone"), "compile": False}))
    lines, other_lines = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("run", "alone"))
    assert lines[0] == pytest.approx(other_lines[0], rel=1e-4) and len(lines) == len(other_lines) == 2
    assert json.loads((tmp_path / "run" / "args.json").read_text())["world_size"] == 2


def test_the_learning_rate_falls_from_lr_to_one_last_step(options):
    sft.main(sft.Args(**options))
    rates = [line["train/sft/lr"] for line in read_jsonl(f"{options['output_dir']}/metrics.jsonl")]
    assert rates == pytest.approx([0.01, 0.01 * 2 / 3, 0.01 / 3])


def test_lr_zero_changes_nothing_and_held_out_loss_is_the_same_mean(options, dataset, gpt2_folder):
    options |= {"lr": 0.0, "batch_size": 11, "micro_batch_size": 3, "eval_dataset": dataset}
    sft.main(sft.Args(**options))
    [line] = read_jsonl(f"{options['output_dir']}/metrics.jsonl")
    assert line["eval/sft/loss"] == pytest.approx(line["train/sft/loss"], rel=1e-5)
    before, after = (AutoModelForCausalLM.from_pretrained(f) for f in (gpt2_folder, f"{options['output_dir']}/model"))
    assert all(torch.equal(after.state_dict()[name], weight) for name, weight in before.state_dict().items())


def test_the_logged_loss_of_several_steps_is_the_mean_over_their_tokens(options, dataset):
    """Not the mean of the steps' means: the batches hold unequal numbers of tokens."""
    options |= {"lr": 0.0, "log_every": 3, "eval_dataset": dataset}
    sft.main(sft.Args(**options))
    [line] = read_jsonl(f"{options['output_dir']}/metrics.jsonl")
    assert line["train/sft/loss"] == pytest.approx(line["eval/sft/loss"], rel=1e-5)  # one epoch, each row once


def test_held_out_rows_are_not_trained_on(options, tmp_path, monkeypatch):
    rows = [{"prompt": a, "completion": b} for a in "abcdefgh" for b in "uvwxyz"]  # 48, all different
    options |= {"dataset": write_jsonl(tmp_path / "many.jsonl", rows), "batch_size": 16, "micro_batch_size": 16}
    held_out, held_out_loss = [], sft.held_out_loss

    def record(model, rows, *args):
        held_out.extend(tuple(ids) for ids, _ in rows)
        return held_out_loss(model, rows, *args)

    monkeypatch.setattr(sft, "held_out_loss", record)
    _, batches = gradients_of(None, "sft", options)
    seen = [tuple(ids) for batch in batches for ids, _ in batch]
    trained = seen[: -len(held_out)]  # the evaluation is the last to ask for its rows
    assert len(held_out) == 2 and len(trained) == len(set(trained)) == 46
    assert not set(trained) & set(held_out)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_saved_folder_opens_anywhere_with_the_same_logits(kind, request, options, monkeypatch):
    options["model"] = request.getfixturevalue(f"{kind}_folder")
    saved, save_pretrained = [], sft.save_pretrained

    def record(folder, model, tokenizer):
        saved.append(model)
        save_pretrained(folder, model, tokenizer)

    monkeypatch.setattr(sft, "save_pretrained", record)
    sft.main(sft.Args(**options))
    folder = f"{options['output_dir']}/model"
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    input_ids = torch.tensor([[2, 3, 4, 5]])
    model.set_attn_implementation(saved[0].config._attn_implementation)  # the same weights and the same kernels
    assert torch.equal(model(input_ids).logits, saved[0](input_ids).logits)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("ab|").input_ids == [2, 3, EOS]
    assert model.config.eos_token_id == tokenizer.eos_token_id == EOS
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0


def test_a_new_pad_token_gets_a_row_of_the_embedding(options, tmp_path, gpt2_folder):
    shutil.copytree(gpt2_folder, tmp_path / "model")
    build_tokenizer("|").save_pretrained(tmp_path / "model")
    sft.main(sft.Args(**options | {"model": str(tmp_path / "model")}))
    model, info = AutoModelForCausalLM.from_pretrained(f"{options['output_dir']}/model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.get_input_embeddings().num_embeddings == 32 and model.config.pad_token_id == 31


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(options, tmp_path):
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        sft.main(sft.Args(**options | {"output_dir": str(tmp_path / name), "seed": seed}))
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


class PowerCut(Exception):
    pass


def cut_after(step, monkeypatch):
    """Let the run die right after its checkpoint of that step."""
    save_checkpoint = utils.Run.save_checkpoint

    def save_and_die(self, at, **state):
        save_checkpoint(self, at, **state)
        if at == step:
            raise PowerCut

    monkeypatch.setattr(utils.Run, "save_checkpoint", save_and_die)


def test_a_resumed_run_ends_in_the_same_bits(options, tmp_path, monkeypatch):
    options |= {"num_epochs": 2, "save_every": 2}
    sft.main(sft.Args(**options | {"output_dir": str(tmp_path / "whole")}))
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_after(4, patch)
        sft.main(sft.Args(**options))
    assert not (tmp_path / "run" / "model").exists()
    sft.main(sft.Args(resume=str(tmp_path / "run")))
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl") == read_jsonl(tmp_path / "whole" / "metrics.jsonl")


def test_a_run_resumed_behind_its_last_step_says_that_it_measured_nothing(options, tmp_path, monkeypatch, capsys):
    """With held-out rows, of which the run that is not interrupted says the last loss."""
    options |= {"save_every": 3, "eval_dataset": options["dataset"]}
    sft.main(sft.Args(**options | {"output_dir": str(tmp_path / "whole")}))
    last = read_jsonl(tmp_path / "whole" / "metrics.jsonl")[-1]["eval/sft/loss"]
    assert f"held-out loss {last:.4f} nats" in capsys.readouterr().out
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        cut_after(3, patch)
        sft.main(sft.Args(**options))
    sft.main(sft.Args(resume=str(tmp_path / "run")))
    assert "held-out loss not measured" in capsys.readouterr().out
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_resuming_a_finished_run_changes_nothing(options, tmp_path, capsys):
    sft.main(sft.Args(**options | {"save_every": 3}))
    before = weights(tmp_path / "run")
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        utils.launch(sft.main, sft.Args(resume=str(tmp_path / "run")))
    assert ended.value.code == 1 and capsys.readouterr().err.startswith("error: ")
    assert weights(tmp_path / "run") == before


# ----------------------------------------------------------------------------------------------------------------------
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


def data(*rows):
    return lambda tmp_path: {"dataset": write_jsonl(tmp_path / "bad.jsonl", rows)}


def existing_run(tmp_path):
    (tmp_path / "run").mkdir()
    return {}


MISTAKES = {
    "no data set": (lambda tmp_path: {"dataset": str(tmp_path / "nowhere.jsonl")}, "nowhere.jsonl"),
    "no model": (no_model, "nothing"),
    "no model at all": (lambda tmp_path: {"model": str(tmp_path / "nowhere")}, "nowhere"),
    "no config": (no_config, "config.json"),
    "no EOS": (no_eos, "mute.*EOS"),
    "a run folder": (existing_run, "--output_dir .*run: exists"),
    "no column": (data({"prompt": "a", "answer": "b"}), r"bad.jsonl.*prompt\+completion.*prompt, answer"),
    "no row": (data(), "bad.jsonl.*empty"),
    "an empty cell": (data({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}), "bad.jsonl"),
    "a number for a text": (data({"prompt": "a", "completion": 5}), "bad.jsonl"),
    "no template": (data({"messages": turns("a", "b")}), "template"),
    "batch size zero": (lambda tmp_path: {"batch_size": 0}, "--batch_size"),
    "micro-batch size zero": (lambda tmp_path: {"micro_batch_size": 0}, "--micro_batch_size"),
    "no epoch": (lambda tmp_path: {"num_epochs": 0}, "--num_epochs"),
    "gradients turned round": (lambda tmp_path: {"max_grad_norm": -1.0}, "--max_grad_norm -1.0: must be at least 0"),
    "no checkpoint": (lambda tmp_path: {"resume": str(tmp_path), "output_dir": None}, "--resume .*args.json"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_and_writes_nothing(mistake, options, tmp_path, capsys, monkeypatch):
    change, match = MISTAKES[mistake]
    if "no config" not in mistake and "no model" not in mistake:  # found out before a model is loaded
        monkeypatch.setattr(sft, "load_pretrained", None)
    refuses(capsys, "sft", {**options, **change(tmp_path)}, match)


def test_rows_of_more_tokens_than_the_model_has_positions_are_refused(options, tmp_path, capsys):
    options["dataset"] = write_jsonl(tmp_path / "long.jsonl", [{"text": "a" * 64}])  # 65 with the EOS
    refuses(capsys, "sft", options, "--max_length: rows of 65 tokens")
    options["dataset"] = write_jsonl(tmp_path / "fits.jsonl", [{"text": "a" * 63}])
    sft.main(sft.Args(**options))


def test_a_gradient_that_is_not_finite_ends_the_run(options):
    with pytest.raises(utils.UserError, match="step 2: the gradient is not finite; lower --lr"):
        sft.main(sft.Args(**options | {"lr": 1e30}))
    assert not Path(options["output_dir"], "model").exists()


def test_a_batch_that_the_ranks_cannot_share_is_refused(options, capsys, monkeypatch):
    monkeypatch.setattr(sft, "init_ranks", lambda: utils.Ranks(0, 2, CPU))
    monkeypatch.setattr(sft, "load_pretrained", None)
    refuses(capsys, "sft", {**options, "batch_size": 5}, "--batch_size")


def test_the_command_line_reports_a_mistake_without_a_traceback(tmp_path, run_script, gpt2_folder):
    args = ["--model", gpt2_folder, "--dataset", tmp_path / "nowhere.jsonl", "--output_dir", tmp_path / "run"]
    done = run_script("sft.py", args)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] == done.stderr.splitlines()
    assert not (tmp_path / "run").exists()
