"""Planted bugs: each is put into a copy of ilql_rlhf.py alone, and a test of the formulas or of a step must fail on it.

The tests look up `ilql_rlhf` in their own module, so a mutant stands in for it there. Caught means an assertion that
fails: a mutant that merely cannot run would prove nothing.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import test_ilql_rlhf as parts
import test_ilql_runs as runs
from test_ilql_rlhf import chat_tokenizer  # noqa: F401  (a fixture)
from test_ilql_runs import settings  # noqa: F401  (a fixture)

SOURCE = (Path(__file__).resolve().parent.parent / "ilql_rlhf.py").read_text()


def loss(request):
    parts.test_the_loss_is_the_definition(2)


def gradient(request):
    parts.test_where_each_loss_sends_its_gradient()


def padding(request):
    parts.test_nothing_behind_the_mask_reaches_a_number_or_a_gradient()


def step(request):
    fixtures = [request.getfixturevalue(name) for name in ("settings", "tmp_path", "gpt2_folder")]
    runs.test_a_step_is_the_gradient_of_the_definitions(*fixtures)


def sync(request):
    runs.test_targets_follow_every_optimizer_step(*map(request.getfixturevalue, ("settings", "tmp_path")))


def micro(request):
    """The part of the test of ranks that needs one process: four micro-batches against one."""
    flags, folder = (
        request.getfixturevalue("settings")("", max_grad_norm=0.0, reward_fn=None),
        request.getfixturevalue("tmp_path"),
    )
    whole, parted = (runs.share(None, flags, size, folder / "run") for size in (4, 1))
    runs.assert_same_gradients(parted, whole)


def dialogue(request):
    parts.test_tokens_of_the_environment_are_no_actions(request.getfixturevalue("chat_tokenizer"), [0.5, -1.5])


def steering(request):
    parts.test_steer_is_the_definition()


def decoding(request):
    parts.test_generate_steered_is_the_slow_loop(request.getfixturevalue("gpt2_folder"), 1.5, 1.0)


def cuts(request):
    parts.test_cuts_are_made_under_the_behaviour_policy_before_the_shift(request.getfixturevalue("gpt2_folder"))


def padded_heads(request):
    parts.test_heads_stand_at_the_states_of_rows_without_padding(request.getfixturevalue("gpt2_folder"))


def embedding_rows(request):
    parts.test_embedding_rows_are_the_product_with_the_lm_heads_rows_plus_the_states_own_worth(
        request.getfixturevalue("gpt2_folder")
    )


def rows_at_actions(request):
    parts.test_heads_at_the_actions_alone_are_the_whole_ones_there(request.getfixturevalue("gpt2_folder"), "embeddings")


def untaken_id(request):
    parts.test_with_embedding_rows_an_id_that_the_data_never_takes_is_worth_what_its_likes_are(
        request.getfixturevalue("gpt2_folder")
    )


def long_rows(request):
    parts.test_long_prompts_lose_their_start_and_no_row_its_end(
        *map(request.getfixturevalue, ("tokenizer", "chat_tokenizer", "capsys"))
    )


BACKUP = "backup = rewards + gamma * next_vs.detach().masked_fill(terminal, 0.0)"
MINIMUM = "torch.stack([q.gather(-1, index % q.shape[-1]).squeeze(-1) for q in target_qs]).amin(0).detach()"
MUTANTS = {
    "terminal inverted": (BACKUP, BACKUP.replace("(terminal,", "(~terminal,"), (loss, step)),
    "terminal ignored": (BACKUP, BACKUP.replace(".masked_fill(terminal, 0.0)", ""), (loss,)),
    "terminal at the first action": ("left == 1, left > 0", "left == left[:, :1], left > 0", (step,)),
    "V of the same state": ("next_vs = F.pad(vs[:, 1:], (0, 1))", "next_vs = vs", (step,)),
    "V two actions on": ("next_vs = F.pad(vs[:, 1:], (0, 1))", "next_vs = F.pad(vs[:, 2:], (0, 2))", (step,)),
    "bootstrap not detached": (BACKUP, BACKUP.replace(".detach()", ""), (gradient, step)),
    "target not detached": (MINIMUM, MINIMUM.replace(".detach()", ""), (gradient,)),
    "one sync an epoch": (
        "        ilql.update_targets(args.alpha)",
        "        i + 1 == steps_per_epoch and ilql.update_targets(args.alpha)",
        (sync,),
    ),
    "Polyak the wrong way round": ("ilql.update_targets(args.alpha)", "ilql.update_targets(1 - args.alpha)", (sync,)),
    "maximum for minimum": (MINIMUM, MINIMUM.replace("amin", "amax"), (loss, step)),
    "maximum in steering": (
        "torch.stack(target_qs).amin(0) - vs",
        "torch.stack(target_qs).amax(0) - vs",
        (steering, decoding),
    ),
    "expectile weights swapped": ("(tau - (target_q < vs)", "(tau - (target_q >= vs)", (loss, step)),
    "the environment acts": (
        "states += range(len(ids) - len(response) - 1, len(ids) - 1)",
        "states += range(len(ids) - len(response) - len(environment), len(ids) - 1)",
        (dialogue, step),
    ),
    "AWAC weight not detached": (
        "weight = torch.exp(beta * (target_q - vs)).detach()",
        "weight = torch.exp(beta * (target_q - vs))",
        (gradient, step),
    ),
    "AWAC weight the other way": (
        "torch.exp(beta * (target_q - vs)).detach()",
        "torch.exp(beta * (vs - target_q)).detach()",
        (loss,),
    ),
    "one head in CQL": ("for q, taken_q in zip(qs, taken_qs)", "for q, taken_q in zip(qs[:1], taken_qs)", (loss, step)),
    "discount forgotten": (BACKUP, BACKUP.replace("gamma * ", ""), (loss, step)),
    "padding in the sum": ("loss.masked_fill(~mask, 0.0).sum()", "loss.sum()", (loss, padding)),
    "mean of means": ("*weights, num_tokens)", "*weights)", (micro,)),
    "reward of the first turn": (
        "dict(zip(ends[-len(rewards) :], rewards))",
        "dict(zip(ends[::-1], rewards))",
        (dialogue, step),
    ),
    "the state's own output is forgotten": ("(0, 1), value=1.0)", "(0, 1), value=0.0)", (embedding_rows,)),
    "hidden states enter as they are": (
        "hidden = (hidden.to(mean.dtype) - mean) / deviation",
        "hidden = hidden.to(mean.dtype)",
        (embedding_rows,),
    ),
    "one id's row for all actions": (
        "F.embedding(actions, head[-1].weight)",
        "F.embedding(actions[:1, :1], head[-1].weight)",
        (rows_at_actions,),
    ),
    "rows that learn": ("bias=False).requires_grad_(False))", "bias=False))", (untaken_id,)),
    "rewards cut to integers": ("[0.0 if x is None else (x - mean)", "[0.0 if x is None else (int(x) - mean)", (step,)),
    "a row cut at its end": (
        "kept.append((ids[cut:-1], [i - cut for",
        "kept.append((ids[: len(ids) - 1 - cut], [i - 0 * cut for",
        (long_rows,),
    ),
    "states one early": (
        "attention_mask).take_along_dim(states[..., None]",
        "attention_mask).take_along_dim((states - 1).clamp(min=0)[..., None]",
        (padded_heads,),
    ),
    "steering by the online Q": (
        'steer(logits, self.values("target_q", hidden)',
        'steer(logits, self.values("q", hidden)',
        (decoding,),
    ),
    "positions of the slots, padding counted": (
        "(key_mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]",
        "(torch.ones_like(key_mask).cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]",
        (decoding,),
    ),
    "the last token cannot be read": ("key_mask[:, P + t - 1] = 1", "key_mask[:, P + t - 2] = 1", (decoding,)),
    "an end to all with the first row's": (".any(1).all():", ".any(1).any():", (decoding,)),
    "tokens behind the stop": ("(response_mask(responses, stop_ids),", "(torch.tensor(True),", (decoding,)),
    "temperature on the sum": (
        "float() / (temperature or 1.0) + bias\n",
        "float() + bias\n        beta = beta / (temperature or 1.0)\n",
        (cuts,),
    ),
}


def plant(monkeypatch, tmp_path, old, new):
    """The script with one replacement, in the place of the script in both test modules."""
    assert SOURCE.count(old) == 1, f"{old!r} stands {SOURCE.count(old)} times in the script"
    path = tmp_path / "ilql_mutant.py"
    path.write_text(SOURCE.replace(old, new))
    spec = importlib.util.spec_from_file_location("ilql_mutant", path)
    mutant = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ilql_mutant", mutant)
    spec.loader.exec_module(mutant)
    for module in (parts, runs):
        monkeypatch.setattr(module, "ilql_rlhf", mutant)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_caught(name, request, monkeypatch, tmp_path):
    old, new, checks = MUTANTS[name]
    plant(monkeypatch, tmp_path, old, new)
    with pytest.raises(AssertionError):
        checks[0](request)


@pytest.mark.parametrize("name", [name for name, mutant in MUTANTS.items() if mutant[2][1:]])
def test_a_planted_bug_in_the_loss_is_seen_in_a_step_too(name, request, monkeypatch, tmp_path):
    old, new, checks = MUTANTS[name]
    plant(monkeypatch, tmp_path, old, new)
    with pytest.raises(AssertionError):
        checks[1](request)


@pytest.mark.parametrize("check", sorted({check for *_, checks in MUTANTS.values() for check in checks}, key=str))
def test_without_a_bug_every_check_passes(check, request, monkeypatch, tmp_path):
    plant(monkeypatch, tmp_path, "class ILQL(", "class ILQL(")
    check(request)
