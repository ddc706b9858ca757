"""Bugs planted one at a time in a copy of a script or of utils.py: tests must see each of them.

Most of them are bugs that real implementations had. A bug counts as seen only if every test that is
named with it fails by an assertion of the test's own, not by an exception that any change might
raise; and the same tests pass, run in the same way, on a copy without a bug. Each copy runs in a
process of its own, forked from one in which torch and transformers are loaded already; a test's two
ranks are forked from that process in turn, so that they run the same copy.

The bugs that matter most run with the other tests, all of them with `bash test.sh --slow`.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import PRELOAD

TESTS = Path(__file__).resolve().parent
SCRIPTS = ("utils", "ppo_rlhf", "grpo_rlhf", "dpo")
SOURCES = {f"{name}.py": (TESTS.parent / f"{name}.py").read_text() for name in SCRIPTS}
PARTS = ("ppo_rlhf", "ppo_runs", "ppo_options", "utils", "grpo_rlhf", "dpo")
FILES = [TESTS / f"test_{part}.py" for part in PARTS]


@dataclass(frozen=True)
class Bug:
    """A mistake, and the tests that must see it.

    tests: each of them must fail; without [...], with one of its parameters at least. old: a text
    that the file holds exactly once. new: what stands there instead.
    """

    name: str
    reason: str
    tests: list
    old: str
    new: str
    file: str = "ppo_rlhf.py"
    matters: bool = False


BUGS = [
    # ---- Log-probabilities and models
    Bug(
        "dropout alive",
        "DeepSpeed-Chat takes old log-probs in train mode: the clip then answers to noise",
        tests=["test_no_dropout_in_train_mode[gpt2]", "test_no_dropout_in_train_mode[llama]"],
        old="setattr(config, name, 0.0)",
        new="setattr(config, name, value)",
        file="utils.py",
        matters=True,
    ),
    Bug(
        "attention dropout alive",
        "switching off nn.Dropout (TRL) misses the number that Llama hands to its attention",
        tests=["test_no_dropout_in_train_mode[llama]"],
        old='if "drop" in name and',
        new='if "drop" in name and name != "attention_dropout" and',
        file="utils.py",
    ),
    Bug(
        "old log-probs in another precision",
        "old and new ones must come from the same forward: else the first ratio is not 1",
        tests=["test_learning_rate_zero_changes_nothing[gpt2-bf16]"],
        old="with utils.autocast(args, mask.device):\n            output = model(part)",
        new=(
            "with torch.autocast(mask.device.type, enabled=False):\n"
            "            output = model(part)"
        ),
    ),
    Bug(
        "slice off by one",
        "hidden states at a token instead of before it predict the token after it",
        tests=[
            "test_actor_critic_against_rows_without_padding[gpt2]",
            "test_first_step_is_the_policy_gradient[gpt2]",
        ],
        old='batch["prompt_lengths"][:, None] - 1 + t',
        new='batch["prompt_lengths"][:, None] + t',
        matters=True,
    ),
    Bug(
        "prompt lengths off by one",
        "every response is looked for one token too late in its packed row",
        tests=[
            "test_rollout_packs_what_was_sampled[gpt2-0]",
            "test_first_step_is_the_policy_gradient[gpt2]",
        ],
        old='"prompt_lengths": query_mask.sum(1)',
        new='"prompt_lengths": query_mask.sum(1) + 1',
    ),
    Bug(
        "temperature missing in the policy and in the reference",
        "sampling at T and scoring at 1 makes the loss that of another policy",
        tests=["test_logged_statistics_are_those_of_the_real_tokens"],
        old="partial(logprobs_fn, temperature=args.temperature, allowed=allowed)",
        new="partial(logprobs_fn, temperature=1.0, allowed=allowed)",
    ),
    Bug(
        "temperature missing in the reference",
        "the KL is not 0 between equal models",
        tests=["test_logged_statistics_are_those_of_the_real_tokens"],
        old="reference = Actor(reference_policy, logprobs_fn)",
        new="reference = Actor(reference_policy, functools.partial(logprobs_fn, temperature=1.0))",
        matters=True,
    ),
    Bug(
        "forbidden ids keep a probability",
        "the sampler masks ids that the policy gives probability: the ratio and the KL are biased",
        tests=["test_first_step_is_the_policy_gradient[gpt2]"],
        old="partial(logprobs_fn, temperature=args.temperature, allowed=allowed)",
        new="partial(logprobs_fn, temperature=args.temperature)",
    ),
    Bug(
        "log-softmax in bf16",
        "rounding alone then moves the ratio by percents",
        tests=["test_token_logprobs_are_fp32_from_bf16"],
        old=".to(torch.promote_types(logits.dtype, torch.float32))",
        new="",
    ),
    Bug(
        "0 * -inf in the entropy",
        "a single forbidden id makes the entropy NaN",
        tests=["test_token_logprobs_of_forbidden_ids"],
        old="logits.masked_fill(logits == -math.inf, 0.0)",
        new="logits",
    ),
    Bug(
        "reference not frozen",
        "a reference that is the policy itself: the KL stays 0 whatever is learned",
        tests=[
            "test_identities_between_metrics",
            "test_logged_statistics_are_those_of_the_real_tokens",
        ],
        old="reference = copy.deepcopy(policy).requires_grad_(False)",
        new="reference = policy",
        matters=True,
    ),
    Bug(
        "score read at the end of the padding",
        "a row that is shorter than its neighbours is scored after its end",
        tests=[
            "test_last_token_scores_wherever_the_padding_is[gpt2-0-right]",
            "test_scoring_gives_each_row_its_own_numbers[gpt2-4]",
        ],
        old="hidden[rows, lengths - 1]",
        new="hidden[:, -1]",
    ),
    Bug(
        "rows that are scored are not packed",
        "left-padded rows would need a mask and positions, of which there are none",
        tests=[
            "test_last_token_scores_wherever_the_padding_is[gpt2-0-left]",
            "test_rollout_packs_what_was_sampled[gpt2-0]",
            "test_pack_rows_against_a_loop",
        ],
        old="return input_ids.gather(1, order), ",
        new="return input_ids, ",
        file="utils.py",
    ),
    Bug(
        "mean of the reward model ignored",
        "a fixed score for a missing EOS means something only where 0 is average",
        tests=[
            "test_last_token_scores_wherever_the_padding_is[llama-0-left]",
            "test_reward_model_scores_and_starts_the_critic",
        ],
        old='return scores - getattr(model.config, "score_mean", 0.0)',
        new="return scores",
    ),
    Bug(
        "scores in bf16",
        "differences of neighbouring values, which GAE adds up, are lost in the rounding",
        tests=["test_scores_and_values_are_fp32_under_bf16_autocast"],
        old="(hidden.float() * weight).sum(-1)",
        new="F.linear(hidden, weight).float()",
    ),
    Bug(
        "critic reads the policy's hidden states",
        "as if the two always shared a network",
        tests=["test_actor_critic_against_rows_without_padding[gpt2]"],
        old="response_hidden(self.critic, batch)",
        new="response_hidden(self.actor.model, batch)",
    ),
    Bug(
        "value head not zero at first",
        "random values are noise in the first advantages",
        tests=["test_first_loss_of_a_zero_critic"],
        old="torch.nn.init.zeros_(critic.score.weight)",
        new="torch.nn.init.normal_(critic.score.weight)",
    ),
    Bug(
        "critic and reward model are one",
        "the value loss then trains what gives the scores",
        tests=["test_reward_model_scores_and_starts_the_critic"],
        old="load_critic(args, tokenizer, policy))",
        new="reward_model.requires_grad_(True))",
    ),
    # ---- Sampling
    Bug(
        "temperature missing in the sampler",
        "tokens come from another distribution than the one that the loss believes in",
        tests=[
            "test_generate_is_the_slow_loop[gpt2-0.7-0]",
            "test_sampled_entropy_estimates_the_entropy",
        ],
        old="sample_tokens(utils.head_logits(model, hidden), uniforms, temperature, allowed)",
        new="sample_tokens(utils.head_logits(model, hidden), uniforms, 1.0, allowed)",
    ),
    Bug(
        "top-k left on in sampling",
        "transformers' generate cuts at 50 ids unless told otherwise: a biased ratio (TRL)",
        tests=[
            "test_sample_is_the_inverse_cdf[1.0-13]",
            "test_generate_is_the_slow_loop[gpt2-1.0-0]",
        ],
        old=("    probabilities = torch.softmax(logits / temperature, dim=-1)\n    cumulative"),
        new=(
            "    logits = logits.masked_fill(logits < logits.topk(6).values[:, -1:], "
            "-math.inf)\n"
            "    probabilities = torch.softmax(logits / temperature, dim=-1)\n"
            "    cumulative"
        ),
    ),
    Bug(
        "left side of a boundary",
        "an id of probability 0 is taken wherever u is exactly the sum of those before it",
        tests=["test_sample_takes_the_right_side_of_a_boundary"],
        old="torch.searchsorted(cumulative, threshold, right=True)",
        new="torch.searchsorted(cumulative, threshold)",
    ),
    Bug(
        "positions of the padding in sampling",
        "the sampler is off the policy by the length of the padding",
        tests=[
            "test_generate_is_the_slow_loop[gpt2-1.0-0]",
            "test_generate_does_not_see_padding_or_neighbours[gpt2]",
        ],
        old="positions = (slot_mask.cumsum(1) - 1).clamp(min=0)",
        new="positions = torch.arange(P + R).expand(B, P + R)",
        matters=True,
    ),
    Bug(
        "positions of the steps off by one",
        "the prompt and the first token of a response stand at one place",
        tests=["test_generate_is_the_slow_loop[gpt2-1.0-0]"],
        old="position_ids=positions[:, start:end],",
        new="position_ids=positions[:, start:end] - int(t > 0),",
    ),
    Bug(
        "the response cannot be read",
        "every token is chosen by the prompt alone",
        tests=["test_generate_is_the_slow_loop[gpt2-1.0-0]"],
        old="F.pad(query_mask.long(), (0, R), value=1)",
        new="F.pad(query_mask.long(), (0, R), value=0)",
    ),
    Bug(
        "tokens after the stop",
        "a row that has ended is sampled on until all have, and that is no response",
        tests=[
            "test_stopping_early_changes_nothing[gpt2-0]",
            "test_generate_is_the_slow_loop[gpt2-1.0-0]",
        ],
        old="responses[:, t] = torch.where(ended, pad_id, next_tokens)",
        new="responses[:, t] = next_tokens",
        matters=True,
    ),
    Bug(
        "rows that end before min_length",
        "a stop that does not count ends nothing",
        tests=[
            "test_stopping_early_changes_nothing[gpt2-6]",
            "test_generate_is_the_slow_loop[gpt2-1.0-4]",
        ],
        old="if t >= min_length:",
        new="if True:",
    ),
    Bug(
        "the first row to end ends all",
        "the other responses are cut there and then count as unfinished",
        tests=[
            "test_stopping_early_changes_nothing[gpt2-0]",
            "test_generate_is_the_slow_loop[gpt2-1.0-0]",
        ],
        old="ended.all()",
        new="ended.any()",
    ),
    Bug(
        "the same noise in every update",
        "a generator made anew from the seed alone repeats its numbers",
        tests=[
            "test_prompts_and_uniforms_depend_on_seed_and_update_alone",
            "test_every_update_samples_anew",
        ],
        old='utils.seeded(args.seed, "uniforms", update)',
        new='utils.seeded(args.seed, "uniforms")',
    ),
    Bug(
        "the same noise on every rank",
        "ranks that share a seed sample the same noise for different prompts",
        tests=[
            "test_prompts_and_uniforms_depend_on_seed_and_update_alone",
            "test_metrics_on_one_and_two_ranks[gpt2]",
        ],
        old="uniforms[mine].to(",
        new="uniforms[:B].to(",
    ),
    Bug(
        "the same prompts on every rank",
        "each rank reads the batch from its start, and most prompts are never seen",
        tests=["test_prompts_and_uniforms_depend_on_seed_and_update_alone"],
        old="for i in order[mine]]",
        new="for i in order[:B]]",
    ),
    Bug(
        "the same order in every pass over the prompts",
        "a generator seeded outside of the loop of passes",
        tests=["test_prompt_order_is_pass_after_pass"],
        old='seeded(seed, "prompts", number)',
        new='seeded(seed, "prompts")',
        file="utils.py",
    ),
    Bug(
        "sampler not refreshed",
        "RL4LMs rebinds its lagged model, and the sampler keeps the old object",
        tests=[
            "test_the_sampler_is_the_policy_of_the_moment[fp32]",
            "test_the_sampler_is_the_policy_of_the_moment[bf16]",
        ],
        old="        utils.copy_weights(policy, sampler)\n        prompt_ids",
        new="        prompt_ids",
        matters=True,
    ),
    Bug(
        "static cache with a short window",
        "the library's: its shape changes while it is filled, so steps are compiled again",
        tests=["test_steps_through_a_static_cache_are_one_forward"],
        old="cache.layers = [StaticLayer(length) for _ in cache.layers]",
        new="pass",
        file="utils.py",
    ),
    Bug(
        "capped logits sampled without their cap",
        "Gemma 2's head is not only a matrix",
        tests=["test_head_logits_are_the_models_own"],
        old="logits = cap * torch.tanh(logits / cap)",
        new="pass",
        file="utils.py",
    ),
    Bug(
        "prompts cut at the response length",
        "the reimplementation of OpenAI's code in PyTorch passes one length for both",
        tests=["test_long_prompts_are_counted_and_left_out"],
        old='args.query_length, "--query_length")',
        new='args.response_length, "--query_length")',
    ),
    Bug(
        "ids without a token may be sampled",
        "embedding rows that pad the vocabulary have logits too",
        tests=[
            "test_ids_that_no_token_has_are_never_sampled_nor_scored",
            "test_ids_without_a_token_and_the_pad_may_not_be_said",
        ],
        old="allowed[[i for i in ids if i < vocab_size]] = True",
        new=("allowed[:] = True\n    allowed[tokenizer.pad_token_id] = False"),
        file="utils.py",
    ),
    Bug(
        "one EOS of several",
        "a model that ends its turns with another id runs on to the limit and is fined",
        tests=["test_each_eos_of_a_model_ends_a_response_and_stays_in_its_config"],
        old="args.stop_token, policy.config.eos_token_id)",
        new="args.stop_token, None)",
    ),
    # ---- Packed rows
    Bug(
        "the mask goes by the id",
        "with pad_token = eos_token the EOS itself is masked, and with it the score",
        tests=["test_rollout_packs_what_was_sampled[gpt2-0]", "test_samples_add_up_to_the_metrics"],
        old="mask = response_mask(responses, stop_ids, min_length)",
        new="mask = response_mask(responses, stop_ids, min_length)\n"
        "    mask = mask & ~torch.isin(responses, stop_ids)",
    ),
    Bug(
        "a stop before min_length is an end",
        "a response that ran to the limit counts as finished, because it held EOS early on",
        tests=["test_a_stop_before_min_length_is_no_end"],
        old="is_end[:, min_length:].any(1)",
        new="is_end.any(1)",
    ),
    Bug(
        "is_real one token too long",
        "the first token of the padding counts as a token of the row, and is scored",
        tests=[
            "test_rollout_packs_what_was_sampled[gpt2-0]",
            "test_reward_model_scores_and_starts_the_critic",
        ],
        old="device=input_ids.device) < lengths[:, None]",
        new="device=input_ids.device) <= lengths[:, None]",
    ),
    Bug(
        "padding of id 0",
        "which may be the pad, of which the library warns in every forward without a mask",
        tests=["test_rollout_packs_what_was_sampled[gpt2-0]"],
        old="input_ids.masked_fill(~is_real, eos_id)",
        new="input_ids",
    ),
    Bug(
        "micro-batches cut after their shortest row",
        "the last tokens of all longer rows are not read",
        tests=[
            "test_scoring_gives_each_row_its_own_numbers[gpt2-4]",
        ],
        old='part["is_real"].sum(1).max()',
        new='part["is_real"].sum(1).min()',
    ),
    Bug(
        "responses cut after the shortest of a micro-batch",
        "the tokens of all longer rows leave the loss, which is still divided by their number",
        tests=[
            "test_select_takes_rows_of_every_tensor_and_cuts_what_none_of_them_needs",
            "test_gradients_on_two_ranks_and_in_micro_batches[gpt2]",
        ],
        old='part["mask"].sum(1).max()',
        new='part["mask"].sum(1).min()',
    ),
    Bug(
        "micro-batches of any lengths",
        "each of them is as wide as its longest row: right, and up to twice the work",
        tests=[
            "test_rows_of_similar_length_go_together",
            "test_scoring_and_update_compute_little_padding",
        ],
        old="sorted((int(row) for row in rows), key=lambda row: lengths[row])",
        new="[int(row) for row in rows]",
        file="utils.py",
    ),
    Bug(
        "values after the end of a response",
        "the critic's value of the padding stands where every reader expects 0",
        tests=["test_scoring_gives_each_row_its_own_numbers[gpt2-4]"],
        old='torch.where(part["mask"], x, 0.0)',
        new='torch.where(part["mask"] | torch.tensor(name == "values"), x, 0.0)',
    ),
    Bug(
        "scores in the order of the rows' lengths",
        "every score is paid to another row: training goes on, and learns nothing",
        tests=[
            "test_scoring_gives_each_row_its_own_numbers[gpt2-4]",
            "test_reward_model_scores_and_starts_the_critic",
        ],
        old="scores[rows] = last_token_scores(",
        new="scores[sorted(rows)] = last_token_scores(",
    ),
    # ---- Scores and rewards
    Bug(
        "score one position late",
        "TRL and the TL;DR reproduction pay it after the EOS, trlX often two positions after it",
        tests=[
            "test_score_is_paid_at_the_last_real_token_only",
            "test_rewards_add_up_to_score_minus_kl",
        ],
        old="is_last = mask & ~F.pad(mask[:, 1:], (0, 1))",
        new="is_last = ~mask & F.pad(mask[:, :-1], (1, 0))",
        matters=True,
    ),
    Bug(
        "sign of the KL penalty",
        "it pays for leaving the reference",
        tests=["test_rewards_add_up_to_score_minus_kl"],
        old="return -kl_coef * log_ratio",
        new="return kl_coef * log_ratio",
    ),
    Bug(
        "KL penalty clamped at 0",
        "the usual mend of a negative KL hides its cause and biases the estimate",
        tests=["test_rewards_add_up_to_score_minus_kl"],
        old="return -kl_coef * log_ratio",
        new="return -kl_coef * log_ratio.clamp(min=0)",
    ),
    Bug(
        "missing-EOS score subtracted",
        "TRL takes it off the score of a text that was cut, which may still be the best",
        tests=[
            "test_final_scores_are_normalised_then_clipped_then_replaced",
            "test_missing_eos_score[-7.0]",
        ],
        old="torch.where(keeps_score, scores, args.missing_eos_score)",
        new="torch.where(keeps_score, scores, scores + args.missing_eos_score)",
    ),
    Bug(
        "replaced scores in the moments",
        "the running mean of scores then follows the share of rows without EOS",
        tests=[
            "test_final_scores_are_normalised_then_clipped_then_replaced",
            "test_scores_are_normalised_then_clipped_then_replaced",
        ],
        old="moments.update(scores, keeps_score)",
        new="moments.update(scores, torch.ones_like(keeps_score))",
    ),
    Bug(
        "moments of each rank by itself",
        "ranks then normalise with different numbers, and equal texts have unequal scores",
        tests=["test_running_moments_pool_the_ranks"],
        old="utils.sum_over_ranks(sums).tolist()",
        new="sums.tolist()",
    ),
    Bug(
        "adaptive KL from the local KL",
        "the reimplementation of OpenAI's code: every rank gets a coefficient of its own",
        tests=["test_kl_coefficient_on_two_ranks_follows_the_kl_of_both"],
        old='controller.update(metrics["objective/kl"], args.batch_size)',
        new=(
            'controller.update((batch["logprobs"] - '
            'batch["ref_logprobs"]).sum(1).mean().item(), args.batch_size)'
        ),
    ),
    Bug(
        "the adaptive coefficient is logged, not charged",
        "the controller moves a number that no reward sees",
        tests=["test_the_coefficient_that_adapts_is_the_one_that_is_charged"],
        old="|= ppo_targets(batch, kl_coef, args)",
        new="|= ppo_targets(batch, args.kl_coef, args)",
    ),
    # ---- Metrics
    Bug(
        "objective of the raw scores",
        "what is logged as the objective is not what is trained on",
        tests=[
            "test_rollout_metrics_are_their_definitions",
            "test_the_coefficient_that_adapts_is_the_one_that_is_charged",
        ],
        old='"objective/rlhf_reward": batch["scores"]',
        new='"objective/rlhf_reward": batch["raw_scores"]',
    ),
    Bug(
        "k3 of the inverse ratio",
        "trlX's logged KL: its mean over the policy's samples is chi-square minus KL",
        tests=[
            "test_rollout_metrics_are_their_definitions",
            "test_logged_statistics_are_those_of_the_real_tokens",
        ],
        old="torch.exp(-log_ratio) - 1 + log_ratio",
        new="torch.exp(log_ratio) - 1 - log_ratio",
    ),
    Bug(
        "k3 without its linear term",
        "not an estimate of the KL at all, and nobody looks at it until k1 goes wrong",
        tests=["test_rollout_metrics_are_their_definitions"],
        old="torch.exp(-log_ratio) - 1 + log_ratio",
        new="torch.exp(-log_ratio) - 1",
    ),
    Bug(
        "padding in the means of the update",
        "approxkl, clip fraction and entropy over all tokens (TRL, the TL;DR reproduction)",
        tests=[
            "test_gradients_on_two_ranks_and_in_micro_batches[gpt2]",
            "test_logged_statistics_are_those_of_the_real_tokens",
        ],
        old='means.add(stats, part["mask"])',
        new="means.add(stats)",
    ),
    Bug(
        "mean of means in the metrics",
        "micro-batches of unequal length count alike",
        tests=[
            "test_means_over_micro_batches_are_means_over_entries",
            "test_gradients_on_two_ranks_and_in_micro_batches[gpt2]",
        ],
        old="pair = torch.stack([total.detach().double(), count.double()])",
        new=(
            "mean = total.detach().double() / count.clamp(min=1)\n"
            "        pair = torch.stack([mean, torch.ones_like(mean)])"
        ),
        file="utils.py",
    ),
    # ---- Advantages
    Bug(
        "unmasked whitening",
        "trlX's moments count the padding",
        tests=[
            "test_targets_are_whitened_advantages_and_returns_of_gae",
            "test_first_step_is_the_policy_gradient[gpt2]",
        ],
        old='"advantages": utils.whiten(advantages, mask)',
        new='"advantages": utils.whiten(advantages, torch.ones_like(mask))',
        matters=True,
    ),
    Bug(
        "whitening of each rank by itself",
        "OpenAI's code and TRL: an advantage's sign depends on the rank that it fell to",
        tests=[
            "test_statistics_of_two_ranks_are_those_of_the_pooled_table",
            "test_micro_batches_and_ranks_do_not_change_the_update[gpt2]",
        ],
        old="total, count = sum_over_ranks(torch.stack([total, count]))",
        new="pass",
        file="utils.py",
    ),
    Bug(
        "returns from whitened advantages",
        "whitened before the values are added, so the critic learns another scale",
        tests=[
            "test_targets_are_whitened_advantages_and_returns_of_gae",
            "test_first_loss_of_a_zero_critic",
        ],
        old='utils.whiten(advantages, mask), "returns": returns}',
        new=(
            "utils.whiten(advantages, mask), "
            '"returns": utils.whiten(advantages, mask) + batch["values"]}'
        ),
    ),
    Bug(
        "whitened rewards lose their mean",
        "the mean of the rewards is what a response is worth at every length",
        tests=[
            "test_targets_are_whitened_advantages_and_returns_of_gae[True]",
            "test_whitened_rewards_keep_their_mean",
        ],
        old="utils.whiten(rewards, mask, shift_mean=False)",
        new="utils.whiten(rewards, mask)",
    ),
    Bug(
        "gamma and lam swapped",
        "two numbers side by side, of which one is 1 by default",
        tests=[
            "test_targets_are_whitened_advantages_and_returns_of_gae",
            "test_first_value_loss_of_a_reward_model",
        ],
        old="mask, args.gamma, args.lam)",
        new="mask, args.lam, args.gamma)",
    ),
    Bug(
        "bootstrap from after the EOS",
        "the critic's value of the padding enters the last real token's advantage",
        tests=["test_gae_is_its_definition", "test_gae_ignores_what_is_outside_the_mask"],
        old=("    values = torch.where(mask, values, 0.0)\n    next_values"),
        new="    next_values",
        matters=True,
    ),
    Bug(
        "GAE runs on across the padding",
        "what stands after the EOS leaks backwards through the recursion",
        tests=["test_gae_is_its_definition", "test_gae_ignores_what_is_outside_the_mask"],
        old=("    rewards = torch.where(mask, rewards, 0.0)\n    values"),
        new="    values",
    ),
    Bug(
        "GAE without lam",
        "every advantage is the Monte Carlo one, whatever the critic says",
        tests=["test_gae_is_its_definition", "test_gae_of_lam_zero_looks_one_step_ahead"],
        old="gamma * lam * advantage",
        new="gamma * advantage",
    ),
    # ---- Losses
    Bug(
        "lower side of the clip missing",
        "a bad token's probability may then fall without bound in one update",
        tests=["test_policy_loss_is_the_definition"],
        old="ratio.clamp(1 - cliprange,",
        new="ratio.clamp(0.0,",
    ),
    Bug(
        "the smaller of the two losses",
        "a maximum of returns is a minimum of losses: the clip takes back what it should keep",
        tests=["test_policy_loss_is_the_definition"],
        old=("loss = torch.maximum(unclipped_loss, clipped_loss)\n    return loss, ratio"),
        new=("loss = torch.minimum(unclipped_loss, clipped_loss)\n    return loss, ratio"),
    ),
    Bug(
        "value clip around the return",
        "the clipped loss is then never the larger one: no clip at all",
        tests=["test_value_loss_is_the_definition"],
        old="new_values.clamp(values - cliprange_value, values + cliprange_value)",
        new="new_values.clamp(returns - cliprange_value, returns + cliprange_value)",
    ),
    Bug(
        "entropy bonus of the wrong sign",
        "the policy is paid for being certain",
        tests=[
            "test_the_loss_adds_up_its_three_parts_over_the_real_tokens",
            "test_entropy_bonus_is_the_gradient_of_the_mean_entropy",
        ],
        old='- args.entropy_coef * new["entropy"]',
        new='+ args.entropy_coef * new["entropy"]',
    ),
    Bug(
        "padding in the loss",
        "what the models say of the padding has a gradient",
        tests=[
            "test_the_loss_adds_up_its_three_parts_over_the_real_tokens",
            "test_the_gradient_is_that_of_the_mean_over_real_tokens",
        ],
        old="torch.where(mask, loss, 0.0).sum(), stats",
        new="loss.sum(), stats",
    ),
    # ---- Update
    Bug(
        "mean of means over micro-batches",
        "TRL and the TL;DR reproduction: 40% off the minibatch's gradient",
        tests=["test_gradients_on_two_ranks_and_in_micro_batches[gpt2]"],
        old="(loss_sum / num_tokens).backward()",
        new=(
            "size = args.micro_batch_size * ranks.world_size\n"
            "        num_parts = math.ceil(len(minibatch) / size) * ranks.world_size\n"
            '        (loss_sum / part["mask"].sum() / num_parts).backward()'
        ),
        matters=True,
    ),
    Bug(
        "gradient over the local token count",
        "a mean of per-rank means: right on one rank, wrong on two of unequal length",
        tests=["test_micro_batches_and_ranks_do_not_change_the_update[gpt2]"],
        old="(loss_sum / num_tokens).backward()",
        new=(
            'lengths = batch["is_real"].sum(1).tolist()\n'
            "        mine = utils.micro_batch_rows(minibatch, lengths, len(lengths), ranks)[0]\n"
            '        num_tokens = batch["mask"][mine].sum() * ranks.world_size\n'
            "        (loss_sum / num_tokens).backward()"
        ),
    ),
    Bug(
        "gradients averaged over the ranks",
        "as DDP does, where they should be added up: the gradient shrinks with every rank",
        tests=["test_gradients_on_two_ranks_and_in_micro_batches[gpt2]"],
        old="(loss_sum / num_tokens).backward()",
        new="(loss_sum / num_tokens / ranks.world_size).backward()",
    ),
    Bug(
        "gradients that stay on their rank",
        "the ILQL authors' loop calls the unwrapped model, so that DDP exchanges nothing",
        tests=["test_gradients_on_two_ranks_and_in_micro_batches[gpt2]"],
        old="    utils.sum_gradients(model)\n",
        new="",
        matters=True,
    ),
    Bug(
        "gradients exchanged in every micro-batch",
        "what the earlier ones have added is added up over the ranks again",
        tests=["test_gradients_on_two_ranks_and_in_micro_batches[gpt2]"],
        old="    # A sum and not a mean, because each share",
        new="        utils.sum_gradients(model)\n    # A sum and not a mean, because each share",
    ),
    Bug(
        "every rank trains on its own rows",
        "the batch of all ranks is not gathered",
        tests=["test_micro_batches_and_ranks_do_not_change_the_update[gpt2]"],
        old="{name: utils.all_gather(x) for name, x in batch.items()}",
        new="{name: torch.cat([x] * ranks.world_size) for name, x in batch.items()}",
    ),
    Bug(
        "an order of its own on every rank",
        "shuffled by a rank's own seed: some rows are never seen (the TL;DR reproduction)",
        tests=["test_micro_batches_and_ranks_do_not_change_the_update[gpt2]"],
        old='"minibatches", update, epoch)',
        new='"minibatches", update, epoch, ranks.rank)',
    ),
    Bug(
        "the same minibatches in every epoch",
        "a generator seeded outside of the loop of epochs",
        tests=["test_every_epoch_is_the_whole_batch_in_another_order"],
        old='"minibatches", update, epoch)',
        new='"minibatches", update)',
    ),
    Bug(
        "minibatches of one seed",
        "runs of another seed share the order of their minibatches",
        tests=["test_everything_random_depends_on_the_seed"],
        old='utils.seeded(args.seed, "minibatches"',
        new='utils.seeded(1, "minibatches"',
    ),
    Bug(
        "minibatches in an unseeded order",
        "TRL permutes with a generator that no seed reaches, so no run can be repeated",
        tests=["test_same_seed_same_run", "test_resumed_run_ends_as_if_never_interrupted[1]"],
        old="torch.randperm(args.batch_size, generator=generator)",
        new="torch.randperm(args.batch_size, generator=(generator.seed(), generator)[1])",
    ),
    Bug(
        "max_grad_norm without effect",
        "TRL accepts the flag and leaves the gradient as it is",
        tests=["test_gradients_are_clipped_to_max_grad_norm"],
        old="max_norm = args.max_grad_norm or math.inf",
        new="max_norm = math.inf",
    ),
    Bug(
        "weight decay by default",
        "torch's AdamW decays by 0.01 unless told otherwise (the TL;DR reproduction)",
        tests=["test_the_optimizer_is_adamw_without_decay"],
        old="weight_decay=0.0, ",
        new="",
    ),
    Bug(
        "schedule that no optimizer follows",
        "the logged learning rate falls, the real one does not",
        tests=["test_metrics_are_the_documented_ones"],
        old='        optimizer.param_groups[0]["lr"] = lr\n',
        new="",
    ),
    Bug(
        "learning rate 0 in the last update",
        "the schedule counts from 1: a whole rollout for a step of length 0",
        tests=["test_metrics_are_the_documented_ones"],
        old="(1 - (update - 1) / num_updates)",
        new="(1 - update / num_updates)",
    ),
    Bug(
        "ratio guard of each rank",
        "ranks that look at their own ratio disagree on whether to step, and part for good",
        tests=["test_all_ranks_skip_together"],
        old="stats = step_means.over_ranks()",
        new=(
            "step_means.over_ranks()\n"
            "        stats = {name: (x[0] / x[1]).item() for name, x in "
            "step_means.sums.items()}"
        ),
    ),
    Bug(
        "ratio guard from above alone",
        "a policy to which its own samples have become impossible takes another step",
        tests=["test_the_ratio_guard"],
        old='1 / args.ratio_guard <= stats["val/ratio"]',
        new='stats["val/ratio"]',
    ),
    Bug(
        "ratio guard of 10 whatever the flag says",
        "a flag that is accepted and not used",
        tests=["test_the_ratio_guard[2]"],
        old='1 / args.ratio_guard <= stats["val/ratio"] <= args.ratio_guard',
        new='0.1 <= stats["val/ratio"] <= 10',
    ),
    Bug(
        "steps of gradients that are not finite",
        "one NaN in the loss, and every weight is NaN for good",
        tests=["test_a_step_of_exploded_ratio_or_gradient_is_skipped"],
        old='if ratio_is_fine and math.isfinite(stats["optim/grad_norm"]):',
        new="if ratio_is_fine:",
    ),
    Bug(
        "an early stop counts as a skipped step",
        "what looks like an accident was asked for",
        tests=["test_early_stop"],
        old='counts["optim/early_stops"] = 1',
        new='counts["optim/skipped"] += 1',
    ),
    Bug(
        "skipped steps in the metrics",
        "one exploded ratio makes the means of the update worthless",
        tests=["test_a_step_of_exploded_ratio_or_gradient_is_skipped"],
        old='            counts["optim/skipped"] += 1\n',
        new=('            counts["optim/skipped"] += 1\n            means.merge(step_means)\n'),
    ),
    # ---- Resuming
    Bug(
        "KL coefficient lost on resume",
        "an adaptive coefficient starts again where the flag says",
        tests=["test_resumed_run_ends_as_if_never_interrupted[2]"],
        old='        "controller": controller,\n',
        new="",
    ),
    Bug(
        "score moments lost on resume",
        "scores jump to another scale in the middle of a run",
        tests=["test_resuming_keeps_the_moments"],
        old='        "moments": moments,\n',
        new="",
    ),
    Bug(
        "optimizer state lost on resume",
        "Adam's moments begin again, and its first step has the full length for every weight",
        tests=["test_resumed_run_ends_as_if_never_interrupted[2]"],
        old='        "optimizer": optimizer,\n',
        new="",
    ),
    Bug(
        "reference taken from the resumed policy",
        "open-r1: the KL is 0 again, and the policy may drift a second time",
        tests=["test_resumed_run_ends_as_if_never_interrupted[2]"],
        old="done = run.load_checkpoint(state) if args.resume else 0",
        new=(
            "done = run.load_checkpoint(state) if args.resume else 0\n"
            "    utils.copy_weights(policy, reference)"
        ),
    ),
    Bug(
        "a checkpoint that is being written counts",
        "the run was killed while it saved, and can never be resumed",
        tests=["test_resuming_cuts_later_lines_and_takes_the_newest_complete_checkpoint"],
        old='.glob("step_*.pt")',
        new='.glob("step_*.pt*")',
        file="utils.py",
    ),
    # ---- GRPO
    Bug(
        "groups across the batch",
        "rows of a group are consecutive; a view the other way mixes prompts",
        tests=["test_advantages_are_their_definition"],
        old="    groups = scores.view(-1, num_generations)\n    # A mean",
        new="    groups = scores.view(num_generations, -1).T\n    # A mean",
        file="grpo_rlhf.py",
        matters=True,
    ),
    Bug(
        "a standard deviation of Bessel's",
        "TRL's: the advantages of small groups are a few percent smaller",
        tests=["test_advantages_are_their_definition[grpo]"],
        old="groups.std(1, correction=0, keepdim=True)",
        new="groups.std(1, correction=1, keepdim=True)",
        file="grpo_rlhf.py",
    ),
    Bug(
        "one standard deviation for the batch",
        "REINFORCE++ does so on purpose; it is another estimator",
        tests=["test_advantages_are_their_definition[grpo]"],
        old="groups.std(1, correction=0, keepdim=True)",
        new="groups.std(correction=0)",
        file="grpo_rlhf.py",
        matters=True,
    ),
    Bug(
        "nothing added to the standard deviation",
        "scores that hardly differ get huge advantages",
        tests=["test_advantages_are_their_definition[grpo]"],
        old="keepdim=True) + 1e-4)",
        new="keepdim=True) + 1e-8)",
        file="grpo_rlhf.py",
    ),
    Bug(
        "rloo keeps its own score in the mean",
        "the baseline then depends on the action",
        tests=[
            "test_advantages_are_their_definition[rloo]",
            "test_rloo_is_the_difference_to_the_mean_times_g_over_g_minus_1",
        ],
        old="centred = centred * num_generations / (num_generations - 1)",
        new="pass",
        file="grpo_rlhf.py",
    ),
    Bug(
        "flat groups by rounding",
        "the rest of a mean divided by 1e-4 is a gradient",
        tests=["test_equal_scores_have_advantages_of_exactly_0"],
        old="centred = torch.where(is_flat[:, None], 0.0, centred)",
        new="pass",
        file="grpo_rlhf.py",
        matters=True,
    ),
    Bug(
        "a group with two equal scores is flat",
        "most groups teach nothing",
        tests=["test_equal_scores_have_advantages_of_exactly_0"],
        old="(groups == groups[:, :1]).all(1)",
        new="(groups == groups[:, :1]).any(1)",
        file="grpo_rlhf.py",
    ),
    Bug(
        "k3 with its arguments swapped",
        "it estimates nothing under samples of the policy",
        tests=["test_k3_is_never_negative_and_its_mean_is_the_kl"],
        old="log_ratio = ref_logprobs - logprobs",
        new="log_ratio = logprobs - ref_logprobs",
        file="grpo_rlhf.py",
        matters=True,
    ),
    Bug(
        "k3 without its log",
        "the gradient is that of another divergence",
        tests=["test_k3_is_never_negative_and_its_mean_is_the_kl"],
        old="return torch.exp(log_ratio) - 1 - log_ratio",
        new="return torch.exp(log_ratio) - 1",
        file="grpo_rlhf.py",
    ),
    Bug(
        "a bonus for the KL",
        "the policy runs away from the reference",
        tests=["test_the_loss_is_its_definition"],
        old="loss = loss + args.kl_coef * kl",
        new="loss = loss - args.kl_coef * kl",
        file="grpo_rlhf.py",
        matters=True,
    ),
    Bug(
        "KL without gradient",
        "a price that nobody pays",
        tests=["test_the_gradient_is_that_of_finite_differences"],
        old="kl = k3(new_logprobs, ",
        new="kl = k3(new_logprobs.detach(), ",
        file="grpo_rlhf.py",
        matters=True,
    ),
    Bug(
        "KL of the reward per token",
        "the price falls with the length",
        tests=["test_targets_subtract_the_kl_of_a_response_before_groups_are_compared"],
        old='(batch["logprobs"] - batch["ref_logprobs"]).sum(1)',
        new='(batch["logprobs"] - batch["ref_logprobs"]).mean(1)',
        file="grpo_rlhf.py",
        matters=True,
    ),
    Bug(
        "prompts repeated in turn",
        "responses to different prompts are compared",
        tests=["test_the_rows_of_a_group_are_consecutive_and_on_one_rank"],
        old="order = [i for i in order for _ in range(args.num_generations)]",
        new="order = order * args.num_generations",
        file="grpo_rlhf.py",
        matters=True,
    ),
    Bug(
        "prompts counted as responses",
        "7 of 8 prompts of a pass are never used",
        tests=["test_the_rows_of_a_group_are_consecutive_and_on_one_rank"],
        old="first = (update - 1) * num_prompts",
        new="first = (update - 1) * args.batch_size",
        file="grpo_rlhf.py",
        matters=True,
    ),
    Bug(
        "length norm over the padding",
        "the weight of a response depends on its neighbours",
        tests=["test_the_loss_is_its_definition"],
        old="loss = loss / mask.sum(1, keepdim=True).clamp(min=1)",
        new="loss = loss / mask.shape[1]",
        file="grpo_rlhf.py",
        matters=True,
    ),
    Bug(
        "constant norm over the longest response",
        "Dr. GRPO's constant must not depend on the batch",
        tests=["test_the_loss_is_its_definition", "test_parts_of_a_minibatch_add_up"],
        old="loss = loss / args.response_length",
        new="loss = loss / mask.shape[1]",
        file="grpo_rlhf.py",
    ),
    Bug(
        "token norm over responses",
        "the learning rate grows with the length",
        tests=["test_the_loss_is_its_definition"],
        old="return mask.sum().clamp(min=1)",
        new="return torch.tensor(len(mask))",
        file="grpo_rlhf.py",
    ),
    Bug(
        "every micro-batch normalised by itself",
        "gradient accumulation changes the objective",
        tests=["test_parts_of_a_minibatch_add_up"],
        old="    if normaliser is None:\n",
        new="    if True:\n",
        file="grpo_rlhf.py",
        matters=True,
    ),
    Bug(
        "advantages along tokens",
        "with as many tokens as rows nothing crashes",
        tests=["test_the_loss_is_its_definition"],
        old="advantages[:, None], args.cliprange",
        new="advantages[None, :], args.cliprange",
        file="grpo_rlhf.py",
    ),
    Bug(
        "the upper clip is the lower one",
        "DAPO's clip-higher without effect",
        tests=["test_the_loss_is_its_definition"],
        old="args.cliprange, args.cliprange_high\n",
        new="args.cliprange, None\n",
        file="grpo_rlhf.py",
    ),
    Bug(
        "NaN through the mask",
        "a masked loss does not mask a gradient",
        tests=["test_the_loss_is_its_definition"],
        old="    new_logprobs = torch.where(mask, new_logprobs, 0.0)\n",
        new="",
        file="grpo_rlhf.py",
    ),
    Bug(
        "overlong responses in the loss",
        "the flag does nothing",
        tests=["test_targets_subtract_the_kl_of_a_response_before_groups_are_compared"],
        old='loss_mask = loss_mask & batch["has_eos"][:, None]',
        new="pass",
        file="grpo_rlhf.py",
    ),
    Bug(
        "flat groups refilled with flat ones",
        "a try is lost",
        tests=["test_flat_groups_are_replaced_by_those_of_other_batches"],
        old='takes_new = is_flat & ~flat_groups(new["scores"], G)',
        new="takes_new = is_flat",
        file="grpo_rlhf.py",
    ),
    Bug(
        "parts of groups refilled",
        "responses to different prompts are compared",
        tests=["test_flat_groups_are_replaced_by_those_of_other_batches"],
        old="takes_new.repeat_interleave(G)",
        new="takes_new.repeat(G)",
        file="grpo_rlhf.py",
        matters=True,
    ),
    Bug(
        "refilled groups keep their texts",
        "a reward function's monitor sees others than those that are trained on",
        tests=["test_flat_groups_are_replaced_by_those_of_other_batches"],
        old="            texts[i] = new_texts[i]\n",
        new="",
        file="grpo_rlhf.py",
    ),
    Bug(
        "every try with the same prompts",
        "a flat group stays flat",
        tests=["test_flat_groups_are_replaced_by_those_of_other_batches"],
        old="sample(update + attempt * num_updates)",
        new="sample(update + num_updates)",
        file="grpo_rlhf.py",
    ),
    # ---- DPO
    Bug(
        "log-probabilities of the token before",
        "a logit predicts the next token",
        tests=["test_sequence_logprobs_are_the_definition"],
        old="    logits = logits[:, :-1]\n",
        new="    logits = logits[:, 1:]\n",
        file="dpo.py",
        matters=True,
    ),
    Bug(
        "the prompt counts",
        "long prompts decide the loss of ipo and simpo",
        tests=["test_logps_are_those_of_the_response_alone"],
        old="labels = [[-100] * len(prompt_ids) + response_ids for",
        new="labels = [prompt_ids + response_ids for",
        file="dpo.py",
        matters=True,
    ),
    Bug(
        "the first logit is cut off",
        "the first token of the response is never trained on",
        tests=["test_logps_are_those_of_the_response_alone"],
        old="for prompt_ids, _ in sides) - 1, 0)",
        new="for prompt_ids, _ in sides), 0)",
        file="dpo.py",
        matters=True,
    ),
    Bug(
        "padding in the mean",
        "short responses count less",
        tests=["test_sequence_logprobs_are_the_definition"],
        old="logprobs, 0.0).sum(1), mask.sum(1)",
        new="logprobs, 0.0).sum(1), (mask | True).sum(1)",
        file="dpo.py",
    ),
    Bug(
        "means where sums belong",
        "the loss of dpo is that of another policy",
        tests=["test_the_gradient_is_that_of_the_mean_over_pairs_of_sides[dpo-False]"],
        old='TAKES_SUMS = ("dpo", "hinge")',
        new="TAKES_SUMS = ()",
        file="dpo.py",
        matters=True,
    ),
    Bug(
        "sums where means belong",
        "ipo's target is reached by length alone",
        tests=["test_the_gradient_is_that_of_the_mean_over_pairs_of_sides[ipo-False]"],
        old='TAKES_SUMS = ("dpo", "hinge")',
        new='TAKES_SUMS = ("dpo", "hinge", "ipo")',
        file="dpo.py",
    ),
    Bug(
        "sides swapped",
        "the rejected responses are learned",
        tests=["test_losses_are_their_definitions"],
        old="    margins = chosen_rewards - rejected_rewards\n\n    if kind",
        new="    margins = rejected_rewards - chosen_rewards\n\n    if kind",
        file="dpo.py",
        matters=True,
    ),
    Bug(
        "smoothing the right side",
        "smoothing without effect",
        tests=["test_losses_are_their_definitions"],
        old="swapped_losses = -F.logsigmoid(-margins)",
        new="swapped_losses = -F.logsigmoid(margins)",
        file="dpo.py",
    ),
    Bug(
        "no reference",
        "a policy that may go anywhere",
        tests=[
            "test_losses_are_their_definitions",
            "test_at_the_reference_the_loss_is_ln_2_and_the_rewards_are_0",
        ],
        old="    if kind in NEEDS_REFERENCE:\n        chosen",
        new="    if False:\n        chosen",
        file="dpo.py",
        matters=True,
    ),
    Bug(
        "one reference for both sides",
        "it cancels",
        tests=["test_losses_are_their_definitions"],
        old="rejected_rewards - beta * ref_rejected_logps",
        new="rejected_rewards - beta * ref_chosen_logps",
        file="dpo.py",
        matters=True,
    ),
    Bug(
        "ipo's target is 1 / beta",
        "twice the margin",
        tests=["test_losses_are_their_definitions"],
        old="1 / (2 * beta)) ** 2",
        new="1 / beta) ** 2",
        file="dpo.py",
    ),
    Bug(
        "simpo's margin the other way",
        "pairs count as learned before they are",
        tests=["test_losses_are_their_definitions"],
        old="-F.logsigmoid(margins - simpo_gamma)",
        new="-F.logsigmoid(margins + simpo_gamma)",
        file="dpo.py",
    ),
    Bug(
        "orpo without its likelihood",
        "nothing holds the policy",
        tests=["test_losses_are_their_definitions"],
        old="losses = -chosen_logps - beta *",
        new="losses = -beta *",
        file="dpo.py",
    ),
    Bug(
        "probabilities for odds",
        "orpo is simpo with another scale",
        tests=["test_losses_are_their_definitions"],
        old="return logps - torch.log(-torch.expm1(logps))",
        new="return logps",
        file="dpo.py",
    ),
    Bug(
        "the SFT term of the rejected side",
        "it teaches what should be unlearned",
        tests=["test_the_gradient_is_that_of_the_mean_over_pairs_of_sides"],
        old="args.sft_coef * chosen_per_token",
        new="args.sft_coef * per_token.chunk(2)[1]",
        file="dpo.py",
    ),
    Bug(
        "the live reference is the policy",
        "the rewards stay 0 and the loss ln 2",
        tests=["test_the_gradient_is_that_of_the_mean_over_pairs_of_sides[dpo-True]"],
        old="reference = copy.deepcopy(model).requires_grad_(False)",
        new="reference = model",
        file="dpo.py",
        matters=True,
    ),
    Bug(
        "references of other pairs",
        "micro-batches are sorted by length",
        tests=["test_the_gradient_is_that_of_the_mean_over_pairs_of_sides[dpo-False]"],
        old="found += zip(group, chosen",
        new="found += zip(sorted(group), chosen",
        file="dpo.py",
        matters=True,
    ),
]


# --------------------------------------------------------------------------------------------------
# How a bug is planted, and how it is seen


def plant(old, new, source):
    """The source with one text replaced, which it must hold exactly once."""
    count = source.count(old)
    assert count == 1, f"occurs {count} times, not once: {old!r}"
    return source.replace(old, new)


def without_parameters(test):
    return test.partition("[")[0]


def nodes(tests):
    """path::name of each test, found in the one file that defines it."""
    texts = {path: path.read_text() for path in FILES}
    found = []
    for test in tests:
        start = f"\ndef {without_parameters(test)}("
        paths = [path for path, text in texts.items() if start in text]
        assert len(paths) == 1, f"{test} is in {len(paths)} files"
        found.append(f"{paths[0]}::{test}")
    return found


class Recorder:
    """A plugin that keeps how each test ended: "passed", by an "assertion", or by what else."""

    def __init__(self):
        self.outcomes = {}

    def pytest_runtest_makereport(self, item, call):
        if call.excinfo is None:
            if call.when == "call":
                self.outcomes.setdefault(item.name, "passed")
            return
        files = {Path(entry.path).name for entry in call.excinfo.traceback}
        is_assertion = call.when == "call" and call.excinfo.errisinstance(AssertionError)
        if is_assertion and not files & SOURCES.keys():
            self.outcomes[item.name] = "assertion"
        else:
            self.outcomes[item.name] = f"{call.when}: {call.excinfo.exconly()}"


def run_pytest(folder, arguments):
    """Run tests on the copy in `folder`, and leave their output and outcomes there.

    This runs in a process of its own, in which nothing but libraries is loaded at first.
    """
    os.setsid()  # A process group of its own, so that its two ranks can be ended with it.
    # The two ranks are forked from here: at once, and with this copy loaded.
    fork = torch.multiprocessing.get_context("fork")
    torch.multiprocessing.get_context = lambda method: fork
    # Whatever is loaded is imported again, and the copy stands first on the path.
    for name in ("conftest", *SCRIPTS):
        sys.modules.pop(name, None)
    sys.path.insert(0, str(folder))
    recorder = Recorder()
    with (
        open(folder / "output.txt", "w") as output,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        pytest.main(arguments, plugins=[recorder])
    modules = [sys.modules[name] for name in SCRIPTS if name in sys.modules]
    answer = {"files": [module.__file__ for module in modules], "outcomes": recorder.outcomes}
    (folder / "outcomes.json").write_text(json.dumps(answer))


@pytest.fixture
def outcomes(tmp_path):
    """`outcomes(tests, {file: source})`: {name with parameters: how the test ended}.

    The tests are run on a copy of the scripts in which these files are changed.
    """

    def run(tests, changed=None):
        for name, source in (SOURCES | (changed or {})).items():
            (tmp_path / name).write_text(source)
        (tmp_path / "pytest.ini").write_text("[pytest]\n")
        arguments = ["-q", "--assert=plain", f"--rootdir={tmp_path}", f"--basetemp={tmp_path}/tmp"]
        arguments += ["-c", str(tmp_path / "pytest.ini"), "-p", "no:cacheprovider"]
        # This plugin would collect garbage for half a second at the end.
        arguments += ["-p", "no:unraisableexception"]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        process = context.Process(target=run_pytest, args=(tmp_path, arguments + nodes(tests)))
        process.start()
        process.join(600)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail("no end after 600 s")
        output = (tmp_path / "output.txt").read_text()
        assert (tmp_path / "outcomes.json").exists(), output
        answer = json.loads((tmp_path / "outcomes.json").read_text())
        print(output)  # It is shown if the test fails.
        assert {Path(file).parent for file in answer["files"]} <= {tmp_path}
        return answer["outcomes"]

    return run


def is_seen(tests, outcomes):
    """Whether each test failed, or one of its parameters did, and nothing but by assertions."""
    failed = {test for test, outcome in outcomes.items() if outcome == "assertion"}
    failed |= {without_parameters(test) for test in failed}
    return set(tests) <= failed and set(outcomes.values()) <= {"assertion", "passed"}


@pytest.mark.fast
def test_every_bug_fits_and_names_tests():
    """So that a change of the scripts or of the tests shows here, and not at the next --slow."""
    assert [bug.name for bug in BUGS if SOURCES[bug.file].count(bug.old) != 1] == []
    assert [bug.name for bug in BUGS if bug.old == bug.new or not bug.tests] == []
    assert len(nodes({test for bug in BUGS for test in bug.tests})) >= 40
    assert len({bug.name for bug in BUGS}) == len(BUGS)


def marked(bug):
    marks = [] if bug.matters else [pytest.mark.slow]
    return pytest.param(bug, id=bug.name, marks=marks)


@pytest.mark.parametrize("bug", [marked(bug) for bug in BUGS])
def test_planted_bug_is_seen(outcomes, bug):
    ended = outcomes(bug.tests, {bug.file: plant(bug.old, bug.new, SOURCES[bug.file])})
    assert is_seen(bug.tests, ended), f"{bug.name} ({bug.reason}): {ended}"


@pytest.mark.parametrize(
    "bugs",
    [
        pytest.param([bug for bug in BUGS if bug.matters], id="those that matter most"),
        pytest.param(BUGS, id="all", marks=pytest.mark.slow),
    ],
)
def test_without_a_bug_all_is_green(outcomes, bugs):
    tests = {test for bug in bugs for test in bug.tests}
    whole = {test for test in tests if "[" not in test}
    # A test that is named both with a parameter and without is run once, with all of them.
    others = {test for test in tests - whole if without_parameters(test) not in whole}
    ended = outcomes(sorted(whole | others))
    assert set(ended.values()) == {"passed"}
    assert tests <= ended.keys() | {without_parameters(test) for test in ended}


@pytest.mark.parametrize(
    "crash",
    [
        None,
        "raise TypeError",
        pytest.param("assert False", marks=pytest.mark.slow),
        pytest.param("return None", marks=pytest.mark.slow),
        pytest.param("break", marks=pytest.mark.slow),  # This is no Python outside of a loop.
    ],
)
def test_neither_a_harmless_change_nor_a_crash_is_seen_as_a_bug(outcomes, crash):
    tests = ["test_rewards_add_up_to_score_minus_kl", "test_first_loss_of_a_zero_critic"]
    old = "    is_last = mask &"
    new = f"    {crash or 'pass'}\n{old}"
    ended = outcomes(tests, {"ppo_rlhf.py": plant(old, new, SOURCES["ppo_rlhf.py"])})
    assert not is_seen(tests, ended)
    if crash is None:
        assert set(ended.values()) == {"passed"}


@pytest.mark.fast
@pytest.mark.parametrize("source", ["a = 2", "a = 1; a = 1"])
def test_a_bug_that_fits_nowhere_or_twice_is_refused(source):
    with pytest.raises(AssertionError, match="not once"):
        plant("a = 1", "a = 0", source)


@pytest.mark.fast
def test_a_bug_replaces_one_text():
    assert plant("a = 1", "a = 0", "a = 1; b = 1") == "a = 0; b = 1"
