"""Bugs planted one at a time in a copy of ilql_rlhf.py: tests of its parts and runs must see each.

A bug counts as seen only if every test that is named with it fails by an assertion, not by an
exception that any change might raise; and the same tests pass on a copy without a bug. The tests
look the script up by its name when they are called, so that the copy can stand in for it.

The bugs that matter most run with the other tests, all of them with `bash test.sh --slow`.
"""

import importlib.util
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import test_ilql_rlhf as parts
import test_ilql_runs as runs
from conftest import ROOT, assert_same_gradients
from test_ilql_rlhf import chat_tokenizer, encode  # noqa: F401  (Fixtures.)
from test_ilql_runs import settings  # noqa: F401
from test_mutations import plant

SOURCE = (ROOT / "ilql_rlhf.py").read_text()

# Tests, and the arguments that are not fixtures.
CHECKS = {
    "loss": (parts.test_the_loss_is_the_definition, {"num_qs": 2, "changes": {}}),
    "q gradient": (
        parts.test_where_each_loss_sends_its_gradient,
        {"name": "q", "learning": {"qs0", "qs1", "rewards"}},
    ),
    "v gradient": (
        parts.test_where_each_loss_sends_its_gradient,
        {"name": "v", "learning": {"vs"}},
    ),
    "awac gradient": (
        parts.test_where_each_loss_sends_its_gradient,
        {"name": "awac", "learning": {"logits"}},
    ),
    "padding": (parts.test_nothing_outside_the_mask_reaches_a_number_or_a_gradient, {}),
    "example": (parts.test_the_worked_example_of_the_manual, {"reward": [0.5, -1.5]}),
    "network": (
        parts.test_a_network_has_one_hidden_layer_of_twice_the_width_and_starts_at_zero,
        {},
    ),
    "rows alone": (parts.test_a_batch_is_its_rows_without_padding, {}),
    "embeddings": (
        parts.test_embedding_q_is_a_product_with_the_rows_of_the_lm_head_and_the_states_own_worth,
        {},
    ),
    "untaken id": (parts.test_an_id_that_the_data_never_takes, {"q_rows": "embeddings"}),
    "standardised": (
        parts.test_inputs_are_standardised_over_the_states_of_rows_spread_over_the_data,
        {},
    ),
    "targets": (parts.test_targets_start_as_copies_and_follow, {"q_rows": "ids"}),
    "frozen targets": (parts.test_no_gradient_goes_through_a_target, {}),
    "fp32": (parts.test_qs_and_values_are_fp32_under_bf16_autocast, {}),
    "saved": (parts.test_saved_and_loaded_again, {"q_rows": "embeddings"}),
    "steer": (parts.test_steer_is_the_definition, {}),
    "decoding": (
        parts.test_generate_steered_is_the_slow_loop,
        {"beta": 1.5, "temperature": 0.5},
    ),
    "greedy": (
        parts.test_generate_steered_is_the_slow_loop,
        {"beta": 4.0, "temperature": 0},
    ),
    "forbidden ids": (parts.test_forbidden_ids_are_never_sampled_however_good, {}),
    "completion": (parts.test_the_actions_of_a_completion_are_its_tokens_and_one_eos, {}),
    "dialogue": (parts.test_tokens_of_the_environment_are_no_actions, {"reward": [0.5, -1.5]}),
    "one reward": (parts.test_tokens_of_the_environment_are_no_actions, {"reward": 2.0}),
    "line break": (
        parts.test_what_the_template_writes_after_a_turn_is_the_environments,
        {},
    ),
    "turns of a prompt": (parts.test_assistant_turns_inside_a_prompt_are_no_actions, {}),
    "long rows": (parts.test_rows_over_max_length_are_left_out_and_counted, {}),
    "normalised": (parts.test_rewards_are_floats_and_may_be_normalised, {}),
    "step": (runs.test_a_step_is_the_gradient_of_the_definitions, {}),
    "micro-batches": (runs.test_micro_batches_do_not_change_a_gradient, {}),
    "policy rate": (runs.test_the_policy_learns_at_its_own_rate, {"scale": 0.25}),
    "every step": (runs.test_targets_follow_every_optimizer_step, {}),
    "rates": (runs.test_the_learning_rate_falls_from_lr_to_one_last_step, {}),
    "clipping": (runs.test_gradients_are_scaled_down_to_max_grad_norm, {}),
    "samples": (runs.test_what_is_sampled_and_scored, {}),
    "moment": (runs.test_the_samples_are_those_of_the_model_of_the_moment, {}),
    "better letter": (runs.test_steering_learns_the_better_letter, {}),
    "metrics": (runs.test_metrics_are_the_documented_ones, {}),
    "means": (runs.test_metrics_of_several_steps_are_means_over_their_actions, {}),
    "resumed": (runs.test_a_resumed_run_ends_in_the_same_bits, {"step": 4}),
}


@dataclass(frozen=True)
class Bug:
    """A mistake, and the tests that must see it.

    checks: names in CHECKS; each must fail. old: a text that the script holds exactly once. new:
    what stands there instead.
    """

    name: str
    checks: list
    old: str
    new: str
    matters: bool = False


BUGS = [
    # ---- The temporal difference
    Bug(
        "the value after the end is bootstrapped",
        checks=["loss", "step"],
        old="next_vs.masked_fill(~mask | terminal, 0.0)",
        new="next_vs.masked_fill(~mask, 0.0)",
        matters=True,
    ),
    Bug(
        "terminal means not terminal",
        checks=["loss", "step"],
        old="next_vs.masked_fill(~mask | terminal, 0.0)",
        new="next_vs.masked_fill(~mask | ~terminal, 0.0)",
    ),
    Bug(
        "the first action is terminal",
        checks=["example", "step"],
        old="column == num_actions - 1",
        new="column == 0 * num_actions",
    ),
    Bug(
        "the value of the same state is bootstrapped",
        checks=["example", "step"],
        old='F.pad(output["vs"][:, 1:], (0, 1))',
        new='output["vs"]',
        matters=True,
    ),
    Bug(
        "the value of two actions on is bootstrapped",
        checks=["example", "step"],
        old='F.pad(output["vs"][:, 1:], (0, 1))',
        new='F.pad(output["vs"][:, 2:], (0, 2))',
    ),
    Bug(
        "the next value learns to be what Q says",
        checks=["q gradient", "step"],
        old="args.gamma * next_vs.detach()",
        new="args.gamma * next_vs",
        matters=True,
    ),
    Bug(
        "no discount",
        checks=["loss", "step"],
        old="args.gamma * next_vs.detach()",
        new="next_vs.detach()",
    ),
    Bug(
        "the error of one Q alone",
        checks=["loss", "step"],
        old="(backup - q) ** 2 for q in taken_qs)",
        new="(backup - q) ** 2 for q in taken_qs[:1])",
    ),
    # ---- Value, CQL and AWAC
    Bug(
        "the larger target",
        checks=["loss", "step"],
        old="torch.stack(taken_target_qs).amin(0).detach()",
        new="torch.stack(taken_target_qs).amax(0).detach()",
        matters=True,
    ),
    Bug(
        "targets learn through the value's loss",
        checks=["v gradient"],
        old="torch.stack(taken_target_qs).amin(0).detach()",
        new="torch.stack(taken_target_qs).amin(0)",
    ),
    Bug(
        "the expectile is that of 1 - tau",
        checks=["loss", "step"],
        old="torch.where(target_q >= vs, args.tau, 1 - args.tau)",
        new="torch.where(target_q < vs, args.tau, 1 - args.tau)",
        matters=True,
    ),
    Bug(
        "one Q in CQL",
        checks=["loss", "step"],
        old="zip(qs, taken_qs, strict=True)",
        new="zip(qs, taken_qs[:1], strict=False)",
    ),
    Bug(
        "AWAC's weight learns",
        checks=["awac gradient", "step"],
        old="torch.exp(args.beta * (target_q - vs)).detach()",
        new="torch.exp(args.beta * (target_q - vs))",
        matters=True,
    ),
    Bug(
        "bad actions are cloned",
        checks=["loss", "step"],
        old="torch.exp(args.beta * (target_q - vs)).detach()",
        new="torch.exp(args.beta * (vs - target_q)).detach()",
    ),
    # ---- Sums and padding
    Bug(
        "padding in the sum",
        checks=["loss", "padding"],
        old="loss.masked_fill(~mask, 0.0).sum()",
        new="loss.sum()",
    ),
    Bug(
        "a NaN of the padding reaches the gradient",
        checks=["padding"],
        old="logits = logits.masked_fill(~mask[..., None], 0.0)",
        new="pass",
    ),
    Bug(
        "a mean of means",
        checks=["micro-batches"],
        old="        num_tokens=num_actions,\n",
        new="",
        matters=True,
    ),
    Bug(
        "metrics are means of means",
        checks=["means"],
        old="losses[name] * num_actions, mask.sum())",
        new="losses[name] * num_actions / mask.sum(), torch.ones(()))",
    ),
    # ---- Networks and targets
    Bug(
        "random values are bootstrapped at first",
        checks=["network", "targets"],
        old="    torch.nn.init.zeros_(last.weight)\n",
        new="",
    ),
    Bug(
        "targets take the steps of the Qs",
        checks=["frozen targets"],
        old="copy.deepcopy(self.qs).requires_grad_(False)",
        new="copy.deepcopy(self.qs)",
    ),
    Bug(
        "targets are the Qs",
        checks=["targets"],
        old="copy.deepcopy(self.qs).requires_grad_(False)",
        new="self.qs",
    ),
    Bug(
        "targets follow once an epoch",
        checks=["every step"],
        old="        ilql.update_targets(args.alpha)",
        new="        if step == num_steps:\n            ilql.update_targets(args.alpha)",
        matters=True,
    ),
    Bug(
        "targets keep alpha of themselves",
        checks=["targets", "every step"],
        old="target.lerp_(parameter, alpha)",
        new="target.lerp_(parameter, 1 - alpha)",
    ),
    Bug(
        "states one token early",
        checks=["rows alone", "step"],
        old="hidden.gather(1, states[..., None].expand(-1, -1, hidden.shape[-1]))\n        return",
        new=(
            "hidden.roll(1, 1).gather(1, states[..., None].expand(-1, -1, hidden.shape[-1]))\n"
            "        return"
        ),
    ),
    Bug(
        "Qs in bf16",
        checks=["fp32"],
        old="torch.autocast(hidden.device.type, enabled=False)",
        new="torch.autocast(hidden.device.type, enabled=torch.is_autocast_enabled('cpu'))",
    ),
    Bug(
        "the state's own worth is forgotten",
        checks=["embeddings"],
        old="output[..., :-1] @ self.rows.T + output[..., -1:]",
        new="output[..., :-1] @ self.rows.T",
    ),
    Bug(
        "hidden states enter as they are",
        checks=["embeddings"],
        old="(hidden.float() - self.hidden_mean) / self.hidden_std",
        new="hidden.float()",
    ),
    Bug(
        "padding in the mean by which inputs are standardised",
        checks=["standardised"],
        old='hidden.gather(1, states)[batch["mask"]]',
        new="hidden.gather(1, states).flatten(0, 1)",
    ),
    Bug(
        "rows of the head that learn",
        checks=["untaken id"],
        old='self.register_buffer("rows", rows)',
        new="self.rows = torch.nn.Parameter(rows)",
    ),
    Bug(
        "rows of the head as it is when the model is loaded",
        checks=["saved"],
        old="if not name.startswith",
        new='if not name.endswith("rows") and not name.startswith',
    ),
    # ---- Steering and decoding
    Bug(
        "steering by the larger target",
        checks=["steer", "decoding"],
        old="torch.stack(target_qs).amin(0) - vs",
        new="torch.stack(target_qs).amax(0) - vs",
    ),
    Bug(
        "steering by the Qs",
        checks=["decoding"],
        old='steer(logits, values["target_qs"]',
        new='steer(logits, values["qs"]',
        matters=True,
    ),
    Bug(
        "the temperature divides pi_beta alone",
        checks=["decoding"],
        old="sample_tokens(ilql.steered_logits(hidden, beta), uniforms",
        new="sample_tokens(ilql.steered_logits(hidden, beta * (temperature or 1)), uniforms",
    ),
    Bug(
        "greedy decoding samples",
        checks=["greedy"],
        old="    if temperature == 0:\n        return likeliest.squeeze(1)\n",
        new="    temperature = temperature or 1.0\n",
    ),
    Bug(
        "an id that is forbidden is brought back",
        checks=["forbidden ids"],
        old="logits = logits.masked_fill(~allowed, -math.inf)",
        new="logits = logits.masked_fill(~allowed, -10)",
    ),
    Bug(
        "padding counts as positions of the prompt",
        checks=["decoding"],
        old="positions = (slot_mask.cumsum(1) - 1).clamp(min=0)",
        new="positions = torch.arange(P + R).expand(B, P + R)",
    ),
    Bug(
        "a new token one position late",
        checks=["decoding"],
        old="position_ids=positions[:, start:end],",
        new="position_ids=positions[:, start:end] + int(t > 0),",
    ),
    Bug(
        "the response cannot be read",
        checks=["decoding"],
        old="F.pad(query_mask.long(), (0, R), value=1)",
        new="F.pad(query_mask.long(), (0, R), value=0)",
    ),
    Bug(
        "all rows end with the first that ends",
        checks=["decoding"],
        old="ended.all()",
        new="ended.any()",
    ),
    Bug(
        "tokens after the stop",
        checks=["decoding"],
        old="torch.where(ended, pad_id, next_tokens)",
        new="next_tokens",
    ),
    # ---- Rows
    Bug(
        "the environment acts",
        checks=["dialogue", "example"],
        old="range(len(ids) - 1, len(ids) - 1 + len(said))",
        new="range(len(ids) - len(before), len(ids) - 1 + len(said))",
        matters=True,
    ),
    Bug(
        "a turn's reward is paid for its first token",
        checks=["completion", "dialogue", "step"],
        old="[None] * (len(said) - 1) + [reward]",
        new="[reward] + [None] * (len(said) - 1)",
    ),
    Bug(
        "rewards of the turns in reverse",
        checks=["dialogue", "step"],
        old="zip(turns, turn_rewards, strict=True)",
        new="zip(turns, turn_rewards[::-1], strict=True)",
    ),
    Bug(
        "one reward for a dialogue is paid in its first turn",
        checks=["one reward"],
        old="[None] * (len(turns) - 1) + [turn_rewards]",
        new="[turn_rewards] + [None] * (len(turns) - 1)",
    ),
    Bug(
        "no EOS is an action",
        checks=["completion"],
        old="[*said, tokenizer.eos_token_id])]",
        new="said)]",
    ),
    Bug(
        "what the template writes after the EOS is lost",
        checks=["line break"],
        old="new_text = before[len(rendered) :]",
        new="new_text = before[len(rendered) :].lstrip()",
    ),
    Bug(
        "assistant turns of a prompt act",
        checks=["turns of a prompt"],
        old='message["role"] != "assistant" or i < num_given',
        new='message["role"] != "assistant"',
    ),
    Bug(
        "rows of one token more than --max_length",
        checks=["long rows"],
        old='return len(row["input_ids"])',
        new='return len(row["input_ids"]) - 1',
    ),
    Bug(
        "rewards cut to integers, as in the code of the paper's per-utterance variant",
        checks=["normalised"],
        old="else (x - mean) / std",
        new="else int((x - mean) / std)",
        matters=True,
    ),
    Bug(
        "actions without a reward get minus the mean",
        checks=["normalised"],
        old="[0.0 if x is None else (x - mean) / std",
        new="[((x or 0.0) - mean) / std",
    ),
    # ---- Runs
    Bug(
        "the learning rate of the step after",
        checks=["rates", "metrics"],
        old="(1 - (step - 1) / num_steps)",
        new="(1 - step / num_steps)",
    ),
    Bug(
        "the policy learns as fast as the values",
        checks=["policy rate"],
        old="args.policy_lr_scale * lr",
        new="lr",
    ),
    Bug(
        "gradients of the language model alone are scaled down",
        checks=["clipping"],
        old="clip_grad_norm_(ilql.parameters(), max_norm)",
        new="clip_grad_norm_(ilql.policy.parameters(), max_norm)",
    ),
    Bug(
        "samples of the model as it was at the start",
        checks=["better letter", "moment"],
        old="                utils.copy_weights(ilql, sampler)\n",
        new="",
        matters=True,
    ),
    Bug(
        "the same noise in every evaluation",
        checks=["samples"],
        old='utils.seeded(args.seed, "samples", step)',
        new='utils.seeded(args.seed, "samples")',
    ),
    Bug(
        "optimizer state lost on resume",
        checks=["resumed"],
        old="run.load_checkpoint(state)",
        new='run.load_checkpoint({"model": ilql})',
    ),
]


# --------------------------------------------------------------------------------------------------
# How a bug is planted, and how it is seen


@pytest.fixture
def folder(gpt2_folder):
    """The tests that take every kind of model get one kind here."""
    return gpt2_folder


@pytest.fixture
def finished(settings, tmp_path_factory):  # noqa: F811
    """The run that the tests of whole runs share: here each bug has its own."""
    run_folder = tmp_path_factory.mktemp("runs") / "finished"
    return runs.run(settings(run_folder, num_epochs=2, save_every=1, eval_every=2))


def stand_in(patch, source, path):
    """Let a source stand in for the script wherever the tests look it up."""
    Path(path).write_text(source)
    spec = importlib.util.spec_from_file_location("ilql_rlhf", path)
    copy = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, "ilql_rlhf", copy)
    spec.loader.exec_module(copy)
    patch.setattr(parts, "ilql_rlhf", copy)
    patch.setattr(runs, "ilql_rlhf", copy)


def call(check, request):
    """Call a test as pytest would: what it does not get as a parameter is a fixture."""
    test, parameters = CHECKS[check]
    arguments = dict(parameters)
    for name in inspect.signature(test).parameters:
        if name not in arguments:
            arguments[name] = request.getfixturevalue(name)
    test(**arguments)


def cases():
    """(bug, check) for each test that must see a bug."""
    found = []
    for bug in BUGS:
        for check in bug.checks:
            marks = [] if bug.matters and check == bug.checks[0] else [pytest.mark.slow]
            found.append(pytest.param(bug, check, id=f"{bug.name}, {check}", marks=marks))
    return found


@pytest.mark.parametrize(("bug", "check"), cases())
def test_planted_bug_is_seen(bug, check, request, monkeypatch, tmp_path):
    path = tmp_path / "copy.py"
    stand_in(monkeypatch, plant(bug.old, bug.new, SOURCE), path)
    with pytest.raises(AssertionError) as caught:
        call(check, request)
    assert str(path) not in {str(entry.path) for entry in caught.traceback}


def checks_without_a_bug():
    """Every check once; those of the bugs that matter most are not slow."""
    first = {bug.checks[0] for bug in BUGS if bug.matters}
    return [
        pytest.param(check, marks=[] if check in first else [pytest.mark.slow]) for check in CHECKS
    ]


@pytest.mark.parametrize("check", checks_without_a_bug())
def test_without_a_bug_every_check_passes(check, request, monkeypatch, tmp_path):
    stand_in(monkeypatch, SOURCE, tmp_path / "copy.py")
    call(check, request)


def test_every_check_has_a_bug():
    assert CHECKS.keys() == {check for bug in BUGS for check in bug.checks}


def gradients_of_a_copy(rank, source, path, flags):
    """For two connected ranks: the gradients of a run of another source."""
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch, source, f"{path}{rank}.py")
        return runs.gradients_on_rank(rank, flags)


@pytest.mark.slow
def test_a_mean_over_ranks_instead_of_a_sum_is_seen(settings, tmp_path, on_two_ranks):  # noqa: F811
    changes = {"max_grad_norm": 0.0, "reward_fn": None}
    alone, _ = runs.recorded(settings(tmp_path / "alone", **changes))
    mean = "(loss / ranks.world_size).backward()"
    for source in (SOURCE, plant("loss.backward()", mean, SOURCE)):
        flags = settings(tmp_path / f"both{len(source)}", **changes)
        path = str(tmp_path / "copy")
        for history in on_two_ranks(gradients_of_a_copy, source, path, flags):
            if source == SOURCE:
                assert_same_gradients(history, alone)
            else:
                with pytest.raises(AssertionError):
                    assert_same_gradients(history, alone)
