"""The reward model: Bradley-Terry loss, the score of the last real token under any padding, centring, and the loop."""

import copy
import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import (
    AttentionInterface,
    AutoModelForSequenceClassification,
    DiffLlamaConfig,
    GPT2LMHeadModel,
    PhiConfig,
)

import reward_model
import utils
from conftest import (
    FAMILIES,
    GROUPED,
    SMALL,
    assert_same_gradients,
    build_config,
    build_tokenizer,
    gradients_of,
    read_jsonl,
    refuses,
    write_jsonl,
)

EOS = 1
LETTERS = "abcdefghijklmnopqrstuvwxyz"

# Eleven pairs of uneven lengths; the longer side is chosen in some and rejected in others.
ROWS = [
    {"prompt": LETTERS[: 1 + i % 5], "chosen": LETTERS[i : i + 1 + i % 7], "rejected": LETTERS[3 : 4 + (3 * i) % 8]}
    for i in range(11)
]
DEMONSTRATIONS = [{"prompt": LETTERS[i : i + 3], "completion": LETTERS[2 * i : 2 * i + 1 + i]} for i in range(7)]


@pytest.fixture
def options(tmp_path, gpt2_rm_folder):
    """Three steps an epoch over ROWS from a reward model that has a head, no clipping, no held-out rows, no centre."""
    sizes = {"batch_size": 4, "micro_batch_size": 4, "num_epochs": 1, "log_every": 1, "max_grad_norm": 0.0, "lr": 0.01}
    dataset = write_jsonl(tmp_path / "pairs.jsonl", ROWS)
    paths = {"model": gpt2_rm_folder, "dataset": dataset, "output_dir": str(tmp_path / "run")}
    return {**sizes, **paths, "compile": False}


def load(folder):
    return utils.load_pretrained(AutoModelForSequenceClassification, str(folder), num_labels=1)[0]


def encode(rows, tokenizer, **options):
    args = reward_model.Args(**{"max_length": 64, **options})
    return reward_model.encode_comparisons(datasets.Dataset.from_list(rows), tokenizer, args, "pairs.jsonl")


def weights(folder):
    return (Path(folder) / "model" / "model.safetensors").read_bytes()


def score_alone(model, ids):
    """The definition: the head on the hidden state of the last of these tokens, without padding, minus the centre."""
    hidden = model.base_model(torch.tensor([ids])).last_hidden_state
    return (hidden[0, -1] @ model.score.weight[0]).item() - getattr(model.config, "score_mean", 0.0)


# ----------------------------------------------------------------------------------------------------------------------
# The loss


def test_preference_loss_against_its_definition():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected, margin = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    for delta, args in [(chosen - rejected, ()), (chosen - rejected - margin, (margin,))]:
        loss = reward_model.preference_loss(chosen, rejected, *args)
        assert loss.shape == (6,)
        assert np.abs(loss.numpy() + np.log(1 / (1 + np.exp(-delta.numpy())))).max() < 1e-12


def test_preference_loss_at_equal_scores_is_log_2():
    scores = torch.tensor([-3.0, 0.0, 40.0])
    assert reward_model.preference_loss(scores, scores).tolist() == pytest.approx([math.log(2)] * 3)


def test_preference_loss_sees_differences_alone():
    chosen, rejected = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    loss = reward_model.preference_loss(chosen, rejected)
    assert torch.allclose(reward_model.preference_loss(chosen + 7, rejected + 7), loss, atol=1e-6)
    # log sigmoid(x) - log sigmoid(-x) = x: swapping the two sides turns the sign of the difference
    assert torch.allclose(reward_model.preference_loss(rejected, chosen) - loss, chosen - rejected, atol=1e-6)


def test_a_margin_asks_for_more():
    chosen, rejected = torch.tensor([1.0]), torch.tensor([0.0])
    with_margin = reward_model.preference_loss(chosen, rejected, torch.tensor([1.0]))
    assert with_margin.item() == pytest.approx(math.log(2)) and with_margin > reward_model.preference_loss(
        chosen, rejected
    )


def test_preference_loss_is_finite_far_out():
    chosen = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = reward_model.preference_loss(chosen, torch.zeros(2))
    loss.sum().backward()
    assert loss.tolist() == [1e4, 0.0] and chosen.grad.tolist() == [-1.0, 0.0]


# ----------------------------------------------------------------------------------------------------------------------
# The score of the last real token

SEQUENCES = [[2, 3, EOS], [9, 8, 7, 6, 5, 4, EOS], [2, 0, 3, EOS], [5], [4, 4, 20, 21]]  # the third holds the pad id


def padded(sequences, left, right, filler):
    """(input_ids, attention_mask) with at least that much padding on either side; the mask alone tells what is real."""
    T = left + max(map(len, sequences)) + right
    input_ids = torch.full((len(sequences), T), filler)
    attention_mask = torch.zeros_like(input_ids)
    for b, ids in enumerate(sequences):
        start = left if right else T - len(ids)
        input_ids[b, start : start + len(ids)] = torch.tensor(ids)
        attention_mask[b, start : start + len(ids)] = 1
    return input_ids, attention_mask


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(("left", "right"), [(0, 4), (5, 0), (3, 6)])
@pytest.mark.parametrize("filler", [0, EOS, 17, -100, 10**6])
def test_scores_do_not_depend_on_padding(kind, left, right, filler, request):
    model = load(request.getfixturevalue(f"{kind}_rm_folder"))
    input_ids, attention_mask = padded(SEQUENCES, left, right, filler)
    for mask in (attention_mask, attention_mask.bool()):
        scores = reward_model.last_token_scores(model, input_ids, mask)
        assert scores.shape == (5,) and scores.dtype == torch.float32
        assert scores.tolist() == pytest.approx([score_alone(model, ids) for ids in SEQUENCES], abs=1e-5)
    assert (input_ids[attention_mask == 0] == filler).all()  # the caller's tensor is left alone
    neighbours = torch.tensor([score_alone(model, ids[:-1]) for ids in SEQUENCES if len(ids) > 1])
    assert (scores[[0, 1, 2, 4]] - neighbours).abs().min() > 1e-3  # one token earlier is another score


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_tokens_behind_the_end_have_no_influence(kind, request):
    model = load(request.getfixturevalue(f"{kind}_rm_folder"))
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 2)
    scores = reward_model.last_token_scores(model, torch.tensor([[2, 3, EOS, 0, 0], [2, 3, EOS, 9, 5]]), mask)
    assert scores[0] == scores[1]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_plain_class_gives_the_raw_score(kind, request):
    model = load(request.getfixturevalue(f"{kind}_rm_folder"))
    sequences = [ids for ids in SEQUENCES if 0 not in ids]
    input_ids, attention_mask = padded(sequences, 0, 3, 0)
    raw = model(input_ids, attention_mask=attention_mask).logits[:, 0]
    scores = reward_model.last_token_scores(model, input_ids, attention_mask)
    centre = {"gpt2": 0.0, "llama": 0.75}[kind]
    assert torch.allclose(scores, raw - centre, atol=1e-5)


def test_an_eos_that_doubles_as_padding_is_read(gpt2_rm_folder):
    model = load(gpt2_rm_folder)
    model.config.pad_token_id = EOS
    input_ids, attention_mask = padded([[2, 3, EOS], [4, 5, 6, 7, EOS]], 0, 2, EOS)
    scores = reward_model.last_token_scores(model, input_ids, attention_mask)
    assert scores[0].item() == pytest.approx(score_alone(model, [2, 3, EOS]), abs=1e-5)
    plain = model(input_ids, attention_mask=attention_mask).logits[:, 0]
    assert (plain - scores).abs().min() > 1e-3  # who looks for the first pad id stops a token early


def test_scores_are_fp32_under_autocast(llama_rm_folder):
    model = load(llama_rm_folder)
    input_ids, attention_mask = padded(SEQUENCES, 2, 2, 0)
    exact = reward_model.last_token_scores(model, input_ids, attention_mask)
    with torch.autocast("cpu", torch.bfloat16):
        scores = reward_model.last_token_scores(model, input_ids, attention_mask)
    assert scores.dtype == torch.float32 and not torch.equal(scores, exact)
    assert not torch.equal(scores, scores.bfloat16().float())  # the head itself is not rounded to bf16
    assert torch.allclose(scores, exact, atol=0.1)


MORE = [  # whose attention's projection is called dense; which calls attention twice
    (PhiConfig(**GROUPED | {"num_key_value_heads": 2}, **SMALL), "alone"),
    (DiffLlamaConfig(**GROUPED | {"num_key_value_heads": 2}, **SMALL), "alone"),
]


@pytest.mark.parametrize(("config", "mlp"), FAMILIES + MORE, ids=lambda x: getattr(x, "model_type", ""))
@pytest.mark.parametrize("attention", ["eager", "sdpa"])  # plain as on CPU, or torch's as on CUDA
def test_the_last_layer_computes_the_token_that_is_scored(config, mlp, attention):
    tokens = {"alone": 5, "residual": 60, None: None}[mlp]  # of five rows of twelve

    def scores_and_gradients(function, *model):
        scores = function(*model, input_ids, attention_mask)
        whole.zero_grad()
        scores.square().sum().backward()
        return scores, [x.grad if x.grad is None else x.grad.double().numpy() for x in whole.parameters()]

    torch.manual_seed(0)
    AttentionInterface.register("eager", utils.causal_attention)  # as utils.load_pretrained does
    try:
        whole = AutoModelForSequenceClassification.from_config(
            copy.deepcopy(config), attn_implementation=attention
        ).eval()
    except ValueError:
        pytest.skip("no such attention")
    input_ids, attention_mask = padded(SEQUENCES, 2, 3, 0)
    scores, gradients = scores_and_gradients(reward_model.last_token_scores, whole)
    names, scorer, given, projected = list(whole.state_dict()), reward_model.Scorer(whole), [], []
    last = getattr(whole.base_model, "layers", getattr(whole.base_model, "h", [torch.nn.Identity()]))[-1]
    for name, part in last.named_modules():
        if name in ("mlp", "self_attn.o_proj", "attn.c_proj"):
            met = given if name == "mlp" else projected
            part.register_forward_pre_hook(lambda part, inputs, met=met: met.append(inputs[0].shape[:2].numel()))
    ours, our_gradients = scores_and_gradients(scorer)
    assert torch.allclose(ours, scores, atol=1e-5) and scores.std() > 0.1
    assert [x is None for x in our_gradients] == [x is None for x in gradients]
    assert_same_gradients(*([[x for x in step if x is not None]] for step in (our_gradients, gradients)))
    assert given == [tokens] * (tokens is not None) and list(whole.state_dict()) == names
    assert projected == [5] * (config.model_type not in ("falcon", "bloom", "opt", "phi"))  # (other names)
    others = padded(SEQUENCES[1:], 0, 1, 0)
    again = scorer(*others)
    assert again.tolist() == pytest.approx(scores[1:].tolist(), abs=1e-5)
    assert reward_model.last_token_scores(whole, *others).tolist() == pytest.approx(again.tolist(), abs=1e-5)
    if tokens is not None:
        assert given[-1] == others[0].numel()  # beside the scorer the model is whole
    assert projected[2:] == [others[0].numel()] * bool(projected)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_one_compiled_graph_for_all_lengths_but_the_first(kind, request):
    counter = CompileCounter()
    torch._dynamo.reset()
    scorer = torch.compile(reward_model.Scorer(load(request.getfixturevalue(f"{kind}_rm_folder"))), backend=counter)
    for T in (8, 16, 24, 32, 40):
        ids = torch.full((5, T), 3)
        scorer(ids, torch.ones_like(ids)).sum().backward()
    assert counter.frame_count == 2


# ----------------------------------------------------------------------------------------------------------------------
# Pairs


def test_pairs_end_with_one_eos_and_share_their_prompt(tokenizer):
    rows = [{"prompt": "ab", "chosen": "c", "rejected": "de|"}]
    assert encode(rows, tokenizer) == [([2, 3, 4, EOS], [2, 3, 5, 6, EOS], 0.0)]
    joined = [{"chosen": "abc", "rejected": "abde"}]  # the prompt inside both
    assert encode(joined, tokenizer) == encode(rows, tokenizer)


def test_pairs_may_be_messages():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] | upper }}{{ m.content }}|{% endfor %}"
        "{% if add_generation_prompt %}A{% endif %}"
    )
    prompt = [{"role": "user", "content": "ab"}]
    chosen, rejected = ([{"role": "assistant", "content": content}] for content in ("c", "de"))
    apart = encode([{"prompt": prompt, "chosen": chosen, "rejected": rejected}], tokenizer)
    inside = encode([{"chosen": prompt + chosen, "rejected": prompt + rejected}], tokenizer)
    beside = encode([{"prompt": "ab", "chosen": prompt + chosen, "rejected": prompt + rejected}], tokenizer)
    assert apart == inside == beside  # the last: a text beside whole conversations, as in UltraFeedback
    assert [tokenizer.decode(ids) for ids in apart[0][:2]] == ["Uab|Ac|", "Uab|Ade|"]


def test_the_margin_column_is_read_unless_told_otherwise(tokenizer):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2}]
    assert encode(rows, tokenizer)[0][2] == 2.0
    assert encode(rows, tokenizer, use_margin=False)[0][2] == 0.0


def test_pairs_with_a_long_side_are_left_out_and_counted(tokenizer, capsys):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "a", "chosen": "b", "rejected": "bcd"}]
    assert len(encode(rows, tokenizer, max_length=4)) == 1
    assert "pairs.jsonl: left out 1 of 2 pairs" in capsys.readouterr().out
    with pytest.raises(utils.UserError, match=r"pairs.jsonl: .*--max_length 2"):
        encode(rows, tokenizer, max_length=2)


# ----------------------------------------------------------------------------------------------------------------------
# The loop


def expected_step(folder, tokenizer, rows, with_margin=False):
    """(gradients, metrics) of the mean loss over pairs, each side scored by itself and without padding."""
    model = load(folder)
    sides = [[], []]
    for pair in encode(rows, tokenizer):
        for side, ids in zip(sides, pair, strict=False):
            side.append(model.base_model(torch.tensor([ids])).last_hidden_state[0, -1] @ model.score.weight[0])
    delta = torch.stack(sides[0]) - torch.stack(sides[1])
    margin = torch.tensor([float(row["margin"]) for row in rows]) if with_margin else 0.0
    loss = -torch.sigmoid(delta - margin).log().mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    accuracy = (delta > 0).double().mean().item()
    metrics = {"loss": loss.item(), "accuracy": accuracy, "margin": delta.mean().item()}
    return [gradient.numpy() for gradient in gradients], metrics


@pytest.mark.parametrize("with_margin", [False, True])
def test_the_gradient_is_that_of_the_mean_over_pairs(with_margin, options, tokenizer, tmp_path, gpt2_rm_folder):
    rows = [{**row, "margin": i / 3} for i, row in enumerate(ROWS)]
    options |= {"dataset": write_jsonl(tmp_path / "margins.jsonl", rows), "use_margin": with_margin}
    history, _ = gradients_of(None, "reward_model", options | {"batch_size": 11, "micro_batch_size": 11})
    gradients, metrics = expected_step(gpt2_rm_folder, tokenizer, rows, with_margin)
    assert_same_gradients(history, [gradients])
    [line] = read_jsonl(f"{options['output_dir']}/metrics.jsonl")
    assert {name: line[f"train/rm/{name}"] for name in metrics} == pytest.approx(metrics, rel=1e-4)
    others, _ = expected_step(gpt2_rm_folder, tokenizer, rows, not with_margin)
    with pytest.raises(AssertionError):
        assert_same_gradients([others], [gradients], tolerance=1e-2)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_micro_batch_size_does_not_change_a_gradient(kind, request, options, tmp_path):
    options["model"] = request.getfixturevalue(f"{kind}_rm_folder")
    histories = {}
    for size in (1, 3, 4):
        options |= {"micro_batch_size": size, "output_dir": str(tmp_path / f"run{size}")}
        histories[size], _ = gradients_of(None, "reward_model", options)
    assert_same_gradients(histories[1], histories[4])
    assert_same_gradients(histories[3], histories[4])


def test_two_ranks_take_the_gradients_of_one(options, tmp_path, on_two_ranks):
    demonstrations = write_jsonl(tmp_path / "demonstrations.jsonl", DEMONSTRATIONS)
    options |= {"batch_size": 10, "micro_batch_size": 2, "demonstrations": demonstrations}  # 5 + 5, then 1 + 0
    options |= {"eval_dataset": options["dataset"]}
    alone, batches = gradients_of(None, "reward_model", {**options, "output_dir": str(tmp_path / "alone")})
    (first, first_batches), (second, second_batches) = on_two_ranks(gradients_of, "reward_model", options)
    assert len(alone) == 2
    assert_same_gradients(first, alone)
    for step, other_step in zip(first, second, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(step, other_step, strict=True))
    shares = [len(batch) for batch in first_batches[:2]], [len(batch) for batch in second_batches[:2]]
    assert shares == ([5, 1], [5, 0])
    seen = [pair for part in first_batches[:2] + second_batches[:2] for pair in part]
    assert sorted(seen) == sorted(pair for part in batches[:2] for pair in part)
    for line, other in zip(*(read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("run", "alone")), strict=True):
        assert line == pytest.approx(other, rel=1e-4)
    centres = [load(tmp_path / name / "model").config.score_mean for name in ("run", "alone")]
    assert centres[0] == pytest.approx(centres[1], rel=1e-4)


def test_the_head_of_a_language_model_starts_small(options, tmp_path, tokenizer):
    torch.manual_seed(0)
    config = build_config("gpt2", tokenizer)
    config.n_embd, config.n_layer = 256, 1
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    heads = []
    for seed in (1, 1, 2):
        run = str(tmp_path / f"run{len(heads)}")
        options |= {"model": str(tmp_path / "wide"), "lr": 0.0, "seed": seed, "output_dir": run}
        reward_model.main(reward_model.Args(**options))
        heads.append(load(f"{run}/model").score.weight)
    assert heads[0].shape == (1, 256)
    assert heads[0].std().item() == pytest.approx(257**-0.5, rel=0.15)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_a_reward_model_keeps_its_head(options, gpt2_rm_folder):
    reward_model.main(reward_model.Args(**options | {"lr": 0.0}))
    before, after = load(gpt2_rm_folder).state_dict(), load(f"{options['output_dir']}/model").state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_saved_folder_is_centred_on_the_demonstrations_and_opens_anywhere(
    kind, request, options, tmp_path, tokenizer
):
    write_jsonl(tmp_path / "demonstrations.jsonl", DEMONSTRATIONS)  # beside the data set: found without a flag
    options |= {"model": request.getfixturevalue(f"{kind}_folder"), "micro_batch_size": 2}
    reward_model.main(reward_model.Args(**options))
    folder = f"{options['output_dir']}/model"
    plain, info = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]

    sequences = [
        reward_model.encode_pair(tokenizer, row["prompt"], row["completion"]) for row in DEMONSTRATIONS
    ]  # ids without padding, the EOS at their end
    raw = [plain(torch.tensor([ids])).logits.item() for ids in sequences]
    scores = reward_model.last_token_scores(load(folder), *padded(sequences, 2, 1, 0))
    assert plain.config.score_mean == pytest.approx(np.mean(raw), abs=1e-5)
    assert abs(np.mean(raw)) > 1e-2 and abs(scores.mean().item()) < 1e-5
    assert scores.tolist() == pytest.approx([r - plain.config.score_mean for r in raw], abs=1e-5)


def test_without_demonstrations_the_score_is_raw(options, llama_rm_folder, tmp_path, capsys):
    reward_model.main(reward_model.Args(**options | {"model": llama_rm_folder}))
    assert load(f"{options['output_dir']}/model").config.score_mean == 0.0
    options |= {"output_dir": str(tmp_path / "long"), "max_length": 20}
    options["demonstrations"] = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "a", "completion": "b" * 30}])
    reward_model.main(reward_model.Args(**options))
    assert capsys.readouterr().out.count("score_mean        0.0000 (not centred)") == 2


def test_sides_of_more_tokens_than_the_model_has_positions_are_refused(options, tmp_path, capsys):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c" * 63}]  # 65 with the EOS
    options["dataset"] = write_jsonl(tmp_path / "long.jsonl", rows)
    refuses(capsys, "reward_model", options, "--max_length: sides of 65 tokens")


def test_a_gradient_that_is_not_finite_ends_the_run(options):
    with pytest.raises(utils.UserError, match="step 2: the gradient is not finite; lower --lr"):
        reward_model.main(reward_model.Args(**options | {"lr": 1e30}))
    assert not Path(options["output_dir"], "model").exists()


def test_it_learns_that_longer_is_better(options, tmp_path, tokenizer):
    generator = np.random.default_rng(0)

    def text(length):
        return "".join(generator.choice(list("abcdefgh"), length))

    rows = []
    for _ in range(320):
        short, long = sorted(generator.choice(np.arange(1, 12), 2, replace=False))
        rows.append({"prompt": text(3), "chosen": text(long), "rejected": text(short)})
    options |= {"dataset": write_jsonl(tmp_path / "train.jsonl", rows[:256]), "batch_size": 32, "micro_batch_size": 32}
    options |= {"eval_dataset": write_jsonl(tmp_path / "test.jsonl", rows[256:]), "max_grad_norm": 1.0}
    accuracy = {}
    for lr, num_epochs in [(0.0, 1), (0.01, 6)]:
        folder = str(tmp_path / f"lr{lr}")
        reward_model.main(reward_model.Args(**options | {"lr": lr, "num_epochs": num_epochs, "output_dir": folder}))
        accuracy[lr] = read_jsonl(f"{folder}/metrics.jsonl")[-1]["eval/rm/accuracy"]
    assert accuracy[0.01] > 0.95 and accuracy[0.0] < 0.8
    model = load(f"{tmp_path / 'lr0.01'}/model")
    pairs = encode(rows[256:], tokenizer)
    right = [score_alone(model, chosen) > score_alone(model, rejected) for chosen, rejected, _ in pairs]
    assert np.mean(right) == pytest.approx(accuracy[0.01], abs=1e-6)


class PowerCut(Exception):
    pass


def test_a_resumed_run_ends_in_the_same_bits(options, tmp_path, monkeypatch, gpt2_folder, capsys):
    write_jsonl(tmp_path / "demonstrations.jsonl", DEMONSTRATIONS)
    options |= {"model": gpt2_folder, "num_epochs": 2, "save_every": 2}
    reward_model.main(reward_model.Args(**options | {"output_dir": str(tmp_path / "whole")}))
    save_checkpoint = utils.Run.save_checkpoint

    def save_and_die(self, step, **state):
        save_checkpoint(self, step, **state)
        if step == 4:
            raise PowerCut

    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(utils.Run, "save_checkpoint", save_and_die)
        reward_model.main(reward_model.Args(**options))
    reward_model.main(reward_model.Args(resume=str(tmp_path / "run")))
    assert "held-out accuracy not measured" in capsys.readouterr().out  # ROWS are all trained on
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl") == read_jsonl(tmp_path / "whole" / "metrics.jsonl")
    centres = [load(tmp_path / name / "model").config.score_mean for name in ("run", "whole")]
    assert centres[0] == centres[1] != 0


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


def no_model(tmp_path):
    (tmp_path / "nothing").mkdir()
    return {"model": str(tmp_path / "nothing")}


def no_eos(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "mute")
    return {"model": str(tmp_path / "mute")}


def data(*rows, flag="dataset"):
    return lambda tmp_path: {flag: write_jsonl(tmp_path / "bad.jsonl", rows)}


def existing_run(tmp_path):
    (tmp_path / "run").mkdir()
    return {}


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
MISTAKES = {
    "no data set": (lambda tmp_path: {"dataset": str(tmp_path / "nowhere.jsonl")}, "nowhere.jsonl"),
    "no model": (no_model, "nothing"),
    "no EOS": (no_eos, "mute.*EOS"),
    "no stage before": (lambda tmp_path: {"model": None}, "`python sft.py`"),
    "a run folder": (existing_run, "--output_dir .*run: exists"),
    "no column": (data({"prompt": "a", "chosen": "b"}), r"bad.jsonl.*chosen\+rejected.*prompt, chosen"),
    "no row": (data(), "bad.jsonl.*empty"),
    "an empty cell": (data(PAIR, {**PAIR, "rejected": None}), "bad.jsonl"),
    "an empty margin": (data({**PAIR, "margin": 1.0}, {**PAIR, "margin": None}), "bad.jsonl.*margin"),
    "a margin that is no number": (data({**PAIR, "margin": math.nan}), "bad.jsonl: row 1: margin is nan"),
    "a margin in words": (data({**PAIR, "margin": "much"}), "bad.jsonl: row 1: margin is 'much'"),
    "no template": (data({"chosen": [{"role": "user", "content": "a"}], "rejected": []}), "bad.jsonl|template"),
    "no demonstration": (lambda tmp_path: {"demonstrations": str(tmp_path / "nowhere.jsonl")}, "nowhere.jsonl"),
    "other demonstrations": (data({"text": "a"}, flag="demonstrations"), r"bad.jsonl.*prompt\+completion"),
    "batch size zero": (lambda tmp_path: {"batch_size": 0}, "--batch_size"),
    "micro-batch size zero": (lambda tmp_path: {"micro_batch_size": 0}, "--micro_batch_size"),
    "no epoch": (lambda tmp_path: {"num_epochs": 0}, "--num_epochs"),
    "ascent": (lambda tmp_path: {"lr": -1e-3}, "--lr -0.001: must be at least 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_and_writes_nothing(mistake, options, tmp_path, capsys, monkeypatch):
    change, match = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)  # no runs/ here
    monkeypatch.setattr(reward_model, "load_pretrained", None)  # all are found out before a model is loaded
    refuses(capsys, "reward_model", {**options, **change(tmp_path)}, match)
