"""The reward model: Bradley-Terry loss, scores under any padding, centring, and the loop."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, GPT2LMHeadModel

import reward_model
import utils
from conftest import (
    assert_same_gradients,
    build_config,
    build_tokenizer,
    gradients_of,
    read_jsonl,
    refuses,
    write_jsonl,
)

CPU = torch.device("cpu")
EOS = 1
LETTERS = "abcdefghijklmnopqrstuvwxyz"

# Eleven pairs of uneven lengths; the longer side is chosen in some and rejected in others.
ROWS = [
    {
        "prompt": LETTERS[: 1 + i % 5],
        "chosen": LETTERS[i : i + 1 + i % 7],
        "rejected": LETTERS[3 : 4 + (3 * i) % 8],
        "margin": i / 3,
    }
    for i in range(11)
]
DEMONSTRATIONS = [
    {"prompt": LETTERS[i : i + 3], "completion": LETTERS[2 * i : 2 * i + 1 + i]} for i in range(7)
]


@pytest.fixture
def options(tmp_path, gpt2_rm_folder):
    """Three steps an epoch over ROWS, without clipping, held-out rows or demonstrations.

    The model is a reward model that has a head already.
    """
    return {
        "model": gpt2_rm_folder,
        "dataset": write_jsonl(tmp_path / "pairs.jsonl", ROWS),
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
    """`encode(rows, tokenizer)`: the pairs that are trained on."""

    def load_pairs(rows, tokenizer, **options):
        path = write_jsonl(tmp_path / "encoded.jsonl", rows)
        args = reward_model.Args(**options)
        return reward_model.load_comparisons(path, tokenizer, args)

    return load_pairs


def load(folder):
    kind = AutoModelForSequenceClassification
    return utils.load_pretrained(kind, str(folder), num_labels=1)[0]


def train(options):
    """Run the script in this process; returns the lines of its metrics."""
    reward_model.main(reward_model.Args(**options))
    return read_jsonl(f"{options['output_dir']}/metrics.jsonl")


def weights(folder):
    return (Path(folder) / "model" / "model.safetensors").read_bytes()


def score_alone(model, ids):
    """The definition: the head on the last token's hidden state, without padding or centre."""
    hidden = model.base_model(torch.tensor([ids])).last_hidden_state
    return hidden[0, -1] @ model.score.weight[0]


def joined(side):
    """The ids of a prompt and its response."""
    prompt_ids, response_ids = side
    return prompt_ids + response_ids


# --------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.fast
def test_preference_loss_against_its_definition():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected, margin = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    plain = reward_model.preference_loss(chosen, rejected)
    with_margin = reward_model.preference_loss(chosen, rejected, margin)
    for loss, difference in (
        (plain, chosen - rejected),
        (with_margin, chosen - rejected - margin),
    ):
        assert loss.shape == (6,)
        expected = -np.log(1 / (1 + np.exp(-difference.numpy())))
        assert np.abs(loss.numpy() - expected).max() < 1e-12


@pytest.mark.fast
def test_preference_loss_at_equal_scores_is_log_2():
    scores = torch.tensor([-3.0, 0.0, 40.0])
    loss = reward_model.preference_loss(scores, scores)
    assert loss.tolist() == pytest.approx([math.log(2)] * 3)


@pytest.mark.fast
def test_preference_loss_sees_differences_alone():
    chosen = torch.tensor([1.0, -2.0])
    rejected = torch.tensor([0.5, 3.0])
    loss = reward_model.preference_loss(chosen, rejected)
    shifted = reward_model.preference_loss(chosen + 7, rejected + 7)
    assert torch.allclose(shifted, loss, atol=1e-6)
    # log sigmoid(x) - log sigmoid(-x) = x: swapping the sides turns the sign of the difference.
    swapped = reward_model.preference_loss(rejected, chosen)
    assert torch.allclose(swapped - loss, chosen - rejected, atol=1e-6)


@pytest.mark.fast
def test_a_margin_asks_for_more():
    chosen = torch.tensor([1.0])
    rejected = torch.tensor([0.0])
    with_margin = reward_model.preference_loss(chosen, rejected, torch.tensor([1.0]))
    assert with_margin.item() == pytest.approx(math.log(2))
    assert with_margin > reward_model.preference_loss(chosen, rejected)


@pytest.mark.fast
def test_preference_loss_is_finite_far_out():
    chosen = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = reward_model.preference_loss(chosen, torch.zeros(2))
    loss.sum().backward()
    assert loss.tolist() == [1e4, 0.0]
    assert chosen.grad.tolist() == [-1.0, 0.0]


# --------------------------------------------------------------------------------------------------
# The score of the last real token

# The third one holds the id of the padding.
SEQUENCES = [[2, 3, EOS], [9, 8, 7, 6, 5, 4, EOS], [2, 0, 3, EOS], [5], [4, 4, 20, 21]]


def padded(sequences, left, right, filler):
    """(input_ids, attention_mask) with at least that much padding on either side.

    The mask alone tells what is real.
    """
    T = left + max(map(len, sequences)) + right
    input_ids = torch.full((len(sequences), T), filler)
    attention_mask = torch.zeros_like(input_ids)
    for b, ids in enumerate(sequences):
        start = left if right else T - len(ids)
        input_ids[b, start : start + len(ids)] = torch.tensor(ids)
        attention_mask[b, start : start + len(ids)] = 1
    return input_ids, attention_mask


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(("left", "right"), [(0, 4), (5, 0), (3, 6)])
@pytest.mark.parametrize("filler", [0, EOS, 17, -100, 10**6])
@torch.no_grad()
def test_scores_do_not_depend_on_padding(kind, left, right, filler, request):
    model = load(request.getfixturevalue(f"{kind}_rm_folder"))
    centre = {"gpt2": 0.0, "llama": 0.75}[kind]
    expected = [score_alone(model, ids).item() - centre for ids in SEQUENCES]
    input_ids, attention_mask = padded(SEQUENCES, left, right, filler)
    for mask in (attention_mask, attention_mask.bool()):
        scores = reward_model.last_token_scores(model, input_ids, mask)
        assert scores.shape == (5,)
        assert scores.dtype == torch.float32
        assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert (input_ids[attention_mask == 0] == filler).all()  # The caller's tensor is left alone.
    for i, ids in enumerate(SEQUENCES):
        if len(ids) > 1:  # One token earlier is another score.
            earlier = score_alone(model, ids[:-1]).item() - centre
            assert abs(scores[i].item() - earlier) > 1e-3


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_tokens_after_the_end_have_no_influence(kind, request):
    model = load(request.getfixturevalue(f"{kind}_rm_folder"))
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 2)
    input_ids = torch.tensor([[2, 3, EOS, 0, 0], [2, 3, EOS, 9, 5]])
    scores = reward_model.last_token_scores(model, input_ids, mask)
    assert scores[0] == scores[1]


@pytest.mark.fast
@pytest.mark.parametrize(("kind", "centre"), [("gpt2", 0.0), ("llama", 0.75)])
def test_the_plain_class_gives_the_raw_score(kind, centre, request):
    model = load(request.getfixturevalue(f"{kind}_rm_folder"))
    sequences = [ids for ids in SEQUENCES if 0 not in ids]
    input_ids, attention_mask = padded(sequences, 0, 3, 0)
    raw = model(input_ids, attention_mask=attention_mask).logits[:, 0]
    scores = reward_model.last_token_scores(model, input_ids, attention_mask)
    assert torch.allclose(scores, raw - centre, atol=1e-5)


@pytest.mark.fast
def test_an_eos_that_doubles_as_padding_is_read(gpt2_rm_folder):
    model = load(gpt2_rm_folder)
    model.config.pad_token_id = EOS
    input_ids, attention_mask = padded([[2, 3, EOS], [4, 5, 6, 7, EOS]], 0, 2, EOS)
    scores = reward_model.last_token_scores(model, input_ids, attention_mask)
    assert scores[0].item() == pytest.approx(score_alone(model, [2, 3, EOS]).item(), abs=1e-5)
    # Who looks for the first id of the padding stops a token early.
    plain = model(input_ids, attention_mask=attention_mask).logits[:, 0]
    assert (plain - scores).abs().min() > 1e-3


@pytest.mark.fast
def test_scores_are_fp32_under_autocast(llama_rm_folder):
    model = load(llama_rm_folder)
    input_ids, attention_mask = padded(SEQUENCES, 2, 2, 0)
    exact = reward_model.last_token_scores(model, input_ids, attention_mask)
    with torch.autocast("cpu", torch.bfloat16):
        scores = reward_model.last_token_scores(model, input_ids, attention_mask)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, exact)
    assert not torch.equal(scores, scores.bfloat16().float())  # The head is not rounded to bf16.
    assert torch.allclose(scores, exact, atol=0.1)


# --------------------------------------------------------------------------------------------------
# Pairs


@pytest.mark.fast
def test_pairs_end_with_one_eos_and_share_their_prompt(tokenizer, encode):
    pair = {"chosen": ([2, 3], [4, EOS]), "rejected": ([2, 3], [5, 6, EOS]), "margin": 0.0}
    assert encode([{"prompt": "ab", "chosen": "c", "rejected": "de|"}], tokenizer) == [pair]
    # The prompt may be inside both.
    pair = {"chosen": ([], [2, 3, 4, EOS]), "rejected": ([], [2, 3, 5, 6, EOS]), "margin": 0.0}
    assert encode([{"chosen": "abc", "rejected": "abde"}], tokenizer) == [pair]


@pytest.mark.fast
def test_pairs_may_be_messages(encode):
    tokenizer = build_tokenizer()
    template = "{% for m in messages %}{{ m.role[0] | upper }}{{ m.content }}|{% endfor %}"
    tokenizer.chat_template = template + "{% if add_generation_prompt %}A{% endif %}"
    prompt = [{"role": "user", "content": "ab"}]
    chosen = [{"role": "assistant", "content": "c"}]
    rejected = [{"role": "assistant", "content": "de"}]
    whole = {"chosen": prompt + chosen, "rejected": prompt + rejected}
    apart = encode([{"prompt": prompt, "chosen": chosen, "rejected": rejected}], tokenizer)
    assert encode([whole], tokenizer) == apart
    # A text beside whole conversations, as in UltraFeedback.
    assert encode([{"prompt": "ab", **whole}], tokenizer) == apart
    assert tokenizer.decode(joined(apart[0]["chosen"])) == "Uab|Ac|"
    assert tokenizer.decode(joined(apart[0]["rejected"])) == "Uab|Ade|"


@pytest.mark.fast
def test_the_margin_column_is_read_unless_told_otherwise(tokenizer, encode):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2}]
    assert encode(rows, tokenizer)[0]["margin"] == 2.0
    assert encode(rows, tokenizer, use_margin=False)[0]["margin"] == 0.0


@pytest.mark.fast
def test_pairs_with_a_long_side_are_left_out_and_counted(tokenizer, encode, capsys):
    short = {"prompt": "a", "chosen": "b", "rejected": "c"}
    rows = [short, {**short, "rejected": "bcd"}, {**short, "chosen": "bcd"}]
    assert len(encode(rows, tokenizer, max_length=4)) == 1
    assert "encoded.jsonl: left out 2 of 3 rows" in capsys.readouterr().out
    with pytest.raises(utils.UserError, match=r"encoded.jsonl: .* over 2 tokens \(--max_length\)"):
        encode(rows, tokenizer, max_length=2)


def first_ids(model, input_ids, attention_mask):
    """Scores that are the first ids of the sequences."""
    return input_ids[:, 0].float()


@pytest.mark.fast
def test_the_metrics_of_a_batch_are_their_definitions(monkeypatch):
    """A margin is part of the loss alone, and a tie is half right."""
    rows = [
        {"chosen": ([5], [EOS]), "rejected": ([3, 7], [EOS]), "margin": 0.5},
        {"chosen": ([], [4, EOS]), "rejected": ([4], [EOS]), "margin": 0.0},
        {"chosen": ([2, 8], [8, EOS]), "rejected": ([6], [EOS]), "margin": 0.0},
    ]
    expected = [-math.log(1 / (1 + math.exp(-x))) for x in (5 - 3 - 0.5, 0.0, 2 - 6)]
    monkeypatch.setattr(reward_model, "last_token_scores", first_ids)
    means = utils.Means()
    loss_sum = reward_model.micro_batch_loss(None, rows, means, EOS, CPU)
    assert loss_sum.item() == pytest.approx(sum(expected), rel=1e-6)
    assert means.over_ranks() == {
        "rm/loss": pytest.approx(sum(expected) / 3, rel=1e-6),
        "rm/accuracy": pytest.approx(1.5 / 3),
        "rm/margin": pytest.approx((2 + 0 - 4) / 3),
    }


# --------------------------------------------------------------------------------------------------
# The loop


def expected_step(folder, pairs):
    """(gradients, metrics) of the mean loss over pairs, each side scored alone."""
    model = load(folder)
    chosen = torch.stack([score_alone(model, joined(pair["chosen"])) for pair in pairs])
    rejected = torch.stack([score_alone(model, joined(pair["rejected"])) for pair in pairs])
    margin = torch.tensor([pair["margin"] for pair in pairs])
    difference = chosen - rejected
    loss = -torch.sigmoid(difference - margin).log().mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    accuracy = (difference > 0).double().mean().item()
    metrics = {"loss": loss.item(), "accuracy": accuracy, "margin": difference.mean().item()}
    return [gradient.numpy() for gradient in gradients], metrics


@pytest.mark.parametrize("use_margin", [False, True])
def test_the_gradient_is_that_of_the_mean_over_pairs(use_margin, options, tokenizer, encode):
    """Held-out pairs are measured in the same way, before the step and after it."""
    options |= {"use_margin": use_margin, "batch_size": 11, "micro_batch_size": 11}
    options["eval_dataset"] = options["dataset"]
    history, _ = gradients_of(None, "reward_model", options)
    pairs = encode(ROWS, tokenizer, use_margin=use_margin)
    gradients, metrics = expected_step(options["model"], pairs)
    assert_same_gradients(history, [gradients])
    lines = read_jsonl(f"{options['output_dir']}/metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1]
    before, line = lines
    logged = {name: line[f"train/rm/{name}"] for name in metrics}
    assert logged == pytest.approx(metrics, rel=1e-4)
    held_out = {f"eval/rm/{name}": value for name, value in metrics.items()}
    assert before == pytest.approx({"step": 0, **held_out}, rel=1e-4)
    _, after = expected_step(f"{options['output_dir']}/model", pairs)
    logged = {name: line[f"eval/rm/{name}"] for name in after}
    assert logged == pytest.approx(after, rel=1e-4)

    others = encode(ROWS, tokenizer, use_margin=not use_margin)
    other_gradients, _ = expected_step(options["model"], others)
    with pytest.raises(AssertionError):
        assert_same_gradients([other_gradients], [gradients], tolerance=1e-2)


def test_the_micro_batch_size_does_not_change_a_gradient(options, tmp_path, llama_rm_folder):
    options["model"] = llama_rm_folder
    histories = {}
    for size in (1, 3, 4):
        options |= {"micro_batch_size": size, "output_dir": str(tmp_path / f"run{size}")}
        histories[size], _ = gradients_of(None, "reward_model", options)
    assert_same_gradients(histories[1], histories[4])
    assert_same_gradients(histories[3], histories[4])


def test_gradients_are_scaled_down_to_max_grad_norm(options, tmp_path):
    options["num_steps"] = 1
    whole, _ = gradients_of(None, "reward_model", options)
    [before] = read_jsonl(f"{options['output_dir']}/metrics.jsonl")
    norm = before["optim/grad_norm"]
    options |= {"max_grad_norm": 0.5 * norm, "output_dir": str(tmp_path / "clipped")}
    clipped, _ = gradients_of(None, "reward_model", options)
    assert_same_gradients(clipped, [[0.5 * gradient for gradient in whole[0]]])
    [line] = read_jsonl(tmp_path / "clipped" / "metrics.jsonl")
    assert line["optim/grad_norm"] == pytest.approx(norm)  # The norm before clipping.


def keys_of(pairs):
    """Something of each pair that can be sorted."""
    return sorted((pair["chosen"], pair["rejected"]) for pair in pairs)


def test_two_ranks_take_the_gradients_of_one(options, tmp_path, on_two_ranks):
    """Steps of 5 + 5 pairs and of 1 + 0; evaluations and a centre of 11 and 7 rows."""
    demonstrations = write_jsonl(tmp_path / "demonstrations.jsonl", DEMONSTRATIONS)
    options |= {"batch_size": 10, "micro_batch_size": 2, "demonstrations": demonstrations}
    options["eval_dataset"] = options["dataset"]
    folder = str(tmp_path / "alone")
    alone, batches = gradients_of(None, "reward_model", {**options, "output_dir": folder})
    both = on_two_ranks(gradients_of, "reward_model", options)
    assert len(alone) == 2
    for history, _ in both:
        assert_same_gradients(history, alone)
    for step, other_step in zip(both[0][0], both[1][0], strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(step, other_step, strict=True))

    # The evaluation before the first step, two steps, the last evaluation, and the centre.
    shares = [rank_batches for _, rank_batches in both]
    sizes = [[len(batch) for batch in rank_batches] for rank_batches in shares]
    assert sizes == [[6, 5, 1, 6, 0], [5, 5, 0, 5, 0]]
    for batch, share, other_share in zip(batches, *shares, strict=True):
        assert keys_of(share + other_share) == keys_of(batch)
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    other_lines = read_jsonl(tmp_path / "alone" / "metrics.jsonl")
    for line, other in zip(lines, other_lines, strict=True):
        assert line == pytest.approx(other, rel=1e-4)
    centres = [load(tmp_path / name / "model").config.score_mean for name in ("run", "alone")]
    assert centres[0] == pytest.approx(centres[1], rel=1e-4)


def test_two_ranks_centre_on_one_demonstration(options, tmp_path, on_two_ranks):
    """The second rank has none."""
    demonstrations = write_jsonl(tmp_path / "one.jsonl", DEMONSTRATIONS[:1])
    options |= {"demonstrations": demonstrations, "num_steps": 1}
    gradients_of(None, "reward_model", {**options, "output_dir": str(tmp_path / "alone")})
    on_two_ranks(gradients_of, "reward_model", options)
    centres = [load(tmp_path / name / "model").config.score_mean for name in ("run", "alone")]
    assert centres[0] == pytest.approx(centres[1], rel=1e-4)
    assert abs(centres[0]) > 1e-2


def test_num_steps_and_max_rows(options, tokenizer, encode):
    """Five pairs are two steps an epoch; the learning rate falls over all three steps."""
    options |= {"max_rows": 5, "num_steps": 3, "eval_dataset": options["dataset"]}
    _, batches = gradients_of(None, "reward_model", options)
    # Held out, three steps, held out, and the demonstrations, of which there are none.
    assert [len(batch) for batch in batches] == [11, 4, 1, 4, 11, 0]
    first_five = encode(ROWS[:5], tokenizer)
    assert keys_of(batches[1] + batches[2]) == keys_of(first_five)
    lines = read_jsonl(f"{options['output_dir']}/metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert [line["epoch"] for line in lines[1:]] == [1, 1, 2]
    rates = [line["train/rm/lr"] for line in lines[1:]]
    assert rates == pytest.approx([0.01, 0.01 * 2 / 3, 0.01 / 3])


def test_the_head_of_a_language_model_starts_small(options, tmp_path, tokenizer):
    torch.manual_seed(0)
    config = build_config("gpt2", tokenizer, n_embd=256, n_layer=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    heads = []
    for seed in (1, 1, 2):
        folder = str(tmp_path / f"run{len(heads)}")
        changes = {"model": str(tmp_path / "wide"), "lr": 0.0, "seed": seed, "output_dir": folder}
        train(options | changes)
        heads.append(load(f"{folder}/model").score.weight)
    assert heads[0].shape == (1, 256)
    assert heads[0].std().item() == pytest.approx(257**-0.5, rel=0.15)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_reward_model_keeps_its_head(options):
    train(options | {"lr": 0.0})
    before = load(options["model"]).state_dict()
    after = load(f"{options['output_dir']}/model").state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_saved_folder_is_centred_on_the_demonstrations_and_opens_anywhere(
    kind, request, options, tmp_path, tokenizer
):
    """Demonstrations that lie beside the data set are found without a flag."""
    write_jsonl(tmp_path / "demonstrations.jsonl", DEMONSTRATIONS)
    folder = request.getfixturevalue(f"{kind}_folder")
    train(options | {"model": folder, "micro_batch_size": 2})
    folder = f"{options['output_dir']}/model"
    kind = AutoModelForSequenceClassification
    plain, info = kind.from_pretrained(folder, num_labels=1, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]

    sequences = []
    for row in DEMONSTRATIONS:
        ids = tokenizer(row["prompt"] + row["completion"]).input_ids
        sequences.append([*ids, EOS])
    raw = [plain(torch.tensor([ids])).logits.item() for ids in sequences]
    assert plain.config.score_mean == pytest.approx(np.mean(raw), abs=1e-5)
    assert abs(np.mean(raw)) > 1e-2
    scores = reward_model.last_token_scores(load(folder), *padded(sequences, 2, 1, 0))
    assert abs(scores.mean().item()) < 1e-5
    assert scores.tolist() == pytest.approx([x - np.mean(raw) for x in raw], abs=1e-5)


def test_without_demonstrations_the_score_is_raw(options, llama_rm_folder, capsys):
    """Also where the model that is trained on has a centre of its own."""
    train(options | {"model": llama_rm_folder})
    assert load(f"{options['output_dir']}/model").config.score_mean == 0.0
    assert "score_mean        0.0000 (not centred)" in capsys.readouterr().out


def test_long_demonstrations_are_left_out_and_counted(options, tmp_path, tokenizer, capsys):
    rows = [*DEMONSTRATIONS[:2], {"prompt": "a", "completion": "b" * 30}]
    path = write_jsonl(tmp_path / "some.jsonl", rows)
    args = reward_model.Args(**options | {"demonstrations": path, "max_length": 20})
    encoded = reward_model.load_demonstration_sides(args, tokenizer)
    assert [joined(side) for side in encoded] == [[2, 3, 4, 2, EOS], [3, 4, 5, 4, 5, EOS]]
    assert "some.jsonl: left out 1 of 3 rows longer" in capsys.readouterr().out
    path = write_jsonl(tmp_path / "long.jsonl", rows[2:])
    refuses(
        capsys,
        "reward_model",
        options | {"demonstrations": path, "max_length": 20},
        "long.jsonl: no row is left",
    )


def test_sides_of_more_tokens_than_the_model_has_positions_are_refused(options, tmp_path, capsys):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c" * 63}]
    options["dataset"] = write_jsonl(tmp_path / "long.jsonl", rows)
    match = "--max_length: 65 tokens are more than the 64 positions of"  # One is the EOS.
    refuses(capsys, "reward_model", options, match)


def test_demonstrations_of_more_tokens_than_the_model_has_positions_are_refused(
    options, tmp_path, capsys
):
    """Before the training, at whose end they would be scored."""
    rows = [{"prompt": "a", "completion": "c" * 63}]
    options["demonstrations"] = write_jsonl(tmp_path / "long.jsonl", rows)
    match = "--max_length: 65 tokens are more than the 64 positions of"
    refuses(capsys, "reward_model", options, match)


def test_a_gradient_that_is_not_finite_ends_the_run(options):
    """At once, also between two lines of metrics."""
    options |= {"lr": 1e30, "log_every": 3}
    with pytest.raises(utils.UserError, match="step 2: the gradient is not finite; lower --lr"):
        reward_model.main(reward_model.Args(**options))
    assert not Path(options["output_dir"], "model").exists()


def test_it_learns_that_longer_is_better(options, tmp_path, tokenizer, encode):
    generator = np.random.default_rng(0)

    def text(length):
        return "".join(generator.choice(list("abcdefgh"), length))

    rows = []
    for _ in range(320):
        short, long = sorted(generator.choice(np.arange(1, 12), 2, replace=False))
        rows.append({"prompt": text(3), "chosen": text(long), "rejected": text(short)})
    options["dataset"] = write_jsonl(tmp_path / "train.jsonl", rows[:256])
    options["eval_dataset"] = write_jsonl(tmp_path / "test.jsonl", rows[256:])
    options |= {"batch_size": 32, "micro_batch_size": 32, "max_grad_norm": 1.0, "num_epochs": 6}
    lines = train(options)
    assert lines[0]["eval/rm/accuracy"] < 0.8
    assert lines[-1]["eval/rm/accuracy"] > 0.95
    assert lines[-1]["eval/rm/margin"] > 1
    model = load(f"{options['output_dir']}/model")
    right = []
    for pair in encode(rows[256:], tokenizer):
        chosen_score = score_alone(model, joined(pair["chosen"]))
        rejected_score = score_alone(model, joined(pair["rejected"]))
        right.append((chosen_score > rejected_score).item())
    assert np.mean(right) == pytest.approx(lines[-1]["eval/rm/accuracy"], abs=1e-6)


class PowerCut(Exception):
    pass


def test_a_resumed_run_ends_in_the_same_bits(options, tmp_path, monkeypatch, gpt2_folder, capsys):
    write_jsonl(tmp_path / "demonstrations.jsonl", DEMONSTRATIONS)
    options |= {"model": gpt2_folder, "num_epochs": 2, "save_every": 2}
    whole = train(options | {"output_dir": str(tmp_path / "whole")})
    save_checkpoint = utils.Run.save_checkpoint

    def save_and_die(self, step, objects):
        save_checkpoint(self, step, objects)
        if step == 4:
            raise PowerCut

    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(utils.Run, "save_checkpoint", save_and_die)
        reward_model.main(reward_model.Args(**options))
    reward_model.main(reward_model.Args(resume=str(tmp_path / "run")))
    # There are too few rows to hold any out.
    assert "held-out accuracy not measured" in capsys.readouterr().out
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl") == whole
    centres = [load(tmp_path / name / "model").config.score_mean for name in ("run", "whole")]
    assert centres[0] == centres[1] != 0


def test_the_newest_sft_run_on_data_of_the_same_folder_is_trained(
    options, tmp_path, monkeypatch, gpt2_folder
):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "sft__1__100"
    run.mkdir(parents=True)
    (run / "model").symlink_to(gpt2_folder)
    record = {"args": {"dataset": str(tmp_path / "demonstrations.jsonl")}}
    (run / "args.json").write_text(json.dumps(record))
    train(options | {"model": None, "num_steps": 1})
    saved = json.loads(Path(options["output_dir"], "args.json").read_text())
    assert saved["script"] == "reward_model.py"
    assert saved["args"]["model"] == "runs/sft__1__100/model"


# --------------------------------------------------------------------------------------------------
# Mistakes


def no_model(tmp_path):
    (tmp_path / "nothing").mkdir()
    return {"model": str(tmp_path / "nothing")}


def no_eos(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "mute")
    return {"model": str(tmp_path / "mute")}


def nowhere(flag):
    return lambda tmp_path: {flag: str(tmp_path / "nowhere.jsonl")}


def data(*rows, flag="dataset"):
    return lambda tmp_path: {flag: write_jsonl(tmp_path / "bad.jsonl", rows)}


def existing_run(tmp_path):
    (tmp_path / "run").mkdir()
    return {}


def flag(**change):
    return lambda tmp_path: change


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
MISTAKES = {
    "no data set": (nowhere("dataset"), "nowhere.jsonl: no such file"),
    "no held-out data": (nowhere("eval_dataset"), "nowhere.jsonl: no such file"),
    "no demonstration": (nowhere("demonstrations"), "nowhere.jsonl: no such file"),
    "no model": (no_model, "nothing"),
    "no EOS": (no_eos, "mute.*EOS"),
    "no stage before": (flag(model=None), "`python sft.py`"),
    "a run folder": (existing_run, "--output_dir .*run: exists"),
    "no column": (
        data({"prompt": "a", "chosen": "b"}),
        r"bad.jsonl.*chosen\+rejected.*prompt, chosen",
    ),
    "no row": (data(), "bad.jsonl.*empty"),
    "an empty cell": (data(PAIR, {**PAIR, "rejected": None}), "bad.jsonl: row 2"),
    "an empty margin": (
        data({**PAIR, "margin": 1.0}, {**PAIR, "margin": None}),
        "bad.jsonl: row 2: margin is None",
    ),
    "a margin that is no number": (
        data({**PAIR, "margin": math.nan}),
        "bad.jsonl: row 1: margin is nan",
    ),
    "a margin in words": (
        data({**PAIR, "margin": "much"}),
        "bad.jsonl: row 1: margin is 'much'",
    ),
    "no template": (
        data({"chosen": [{"role": "user", "content": "a"}], "rejected": []}),
        "bad.jsonl: row 1",
    ),
    "other demonstrations": (
        data({"text": "a"}, flag="demonstrations"),
        r"bad.jsonl.*prompt\+completion",
    ),
    "one pair over and over": (data(*[PAIR] * 20), "--dataset: every row is a copy"),
    "batch size zero": (flag(batch_size=0), "--batch_size 0: must be at least 1"),
    "micro-batch size zero": (flag(micro_batch_size=0), "--micro_batch_size 0: "),
    "no epoch": (flag(num_epochs=0), "--num_epochs 0: "),
    "no step": (flag(num_steps=0), "--num_steps 0: "),
    "no row wanted": (flag(max_rows=0), "--max_rows 0: "),
    "no token": (flag(max_length=0), "--max_length 0: "),
    "never logged": (flag(log_every=0), "--log_every 0: "),
    "never evaluated": (flag(eval_every=0), "--eval_every 0: "),
    "ascent": (flag(lr=-1e-3), "--lr -0.001: must be at least 0"),
    "no time": (flag(timeout_minutes=0.0), "--timeout_minutes 0.0: must be above 0"),
}


@pytest.mark.fast
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_and_writes_nothing(
    mistake, options, tmp_path, capsys, monkeypatch
):
    """All of them are found out before a model is loaded."""
    change, match = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)  # There is no runs/ here.
    monkeypatch.setattr(utils, "load_pretrained", None)
    refuses(capsys, "reward_model", {**options, **change(tmp_path)}, match)
