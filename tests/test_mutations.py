"""Bugs that real implementations had, planted one at a time in a copy of ppo_rlhf.py or utils.py: tests must see each.

A bug counts as seen only if every test named with it fails by an assertion of the test's own, not by an exception that
any change might raise; and the same tests pass, run in the same way, on a copy without a bug. Each copy runs in a
process of its own, forked from one in which torch and transformers are loaded already; a test's two ranks are forked
from that process in turn, so that they run the same copy.
"""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import PRELOAD

TESTS = Path(__file__).resolve().parent
SOURCES = {name: (TESTS.parent / name).read_text() for name in ("ppo_rlhf.py", "utils.py")}
FILES = [TESTS / f"test_{part}.py" for part in ("ppo_rlhf", "ppo_runs", "ppo_options", "utils")]


class Bug(NamedTuple):
    name: str
    reason: str
    tests: str  # names of tests, of which each must fail (without [...]: with at least one of its parameters)
    edits: dict  # text that the file holds once: what stands there instead
    file: str = "ppo_rlhf.py"


BUGS = [
    # ---- Models and log-probabilities
    Bug(
        "dropout alive in old log-probs",
        "DeepSpeed-Chat takes them in train mode, so the first ratio is not 1 and the clip answers to noise",
        "test_learning_rate_zero_changes_nothing[gpt2-fp32] test_no_dropout_in_train_mode",
        {"{name: 0.0 for name,": "{name: value for name,",
         "return model.eval(), sorted": "return model.train(), sorted"},
        "utils.py",
    ),
    Bug(
        "attention dropout alive",
        "switching off nn.Dropout modules (TRL) misses the float that Llama hands to its attention kernel",
        "test_no_dropout_in_train_mode[llama]",
        {'if "drop" in name and': 'if "drop" in name and name != "attention_dropout" and'},
        "utils.py",
    ),
    Bug(
        "cached keys cut in half",
        "behind a prompt, the first half of the new tokens still sees all of it",
        "test_causal_attention_reads_a_cache_whole",
        {"or query.shape[2] != key.shape[2] or": "or"},
        "utils.py",
    ),
    Bug(
        "no mask where nothing is padded",
        "the library then asks a GPU, which waits, and every layer has two graphs, one for each answer",
        "test_layers_share_a_graph_for_all_lengths[gpt2]",
        {"masking_utils._ignore_causal_mask_sdpa = lambda": "_ = lambda"},
    ),
    Bug(
        "the temperature is an input of the graphs",
        "the compiler makes a tensor of it, sees that it needs none, and starts again: twice the time of compiling",
        "test_layers_share_a_graph_for_all_lengths[gpt2]",
        {"dynamo.specialize_float = 256, True": "dynamo.specialize_float = 256, False"},
    ),
    Bug(
        "attention by cuDNN",
        "the default of torch 2.13 on H100 and H200, whose gradients are NaN at some lengths",
        "test_attention_is_not_cudnns",
        {", torch.backends.cuda.enable_cudnn_sdp(False)": ""},
        "utils.py",
    ),
    Bug(
        "grouped keys repeated in every step",
        "the library packs queries of a group only where it is not compiled: a step copies the cache, once per head",
        "test_a_compiled_step_repeats_no_key_of_grouped_queries",
        {"sdpa_attention.is_torchdynamo_compiling = lambda: False": "sdpa_attention.is_torchdynamo_compiling = lambda: True"},
        "utils.py",
    ),
    Bug(
        "halves where all see all",
        "attention that is not causal has no half that can be left out",
        "test_causal_attention_is_attention test_attention_that_is_not_causal_is_left_whole",
        {"if not causal or": "if"},
        "utils.py",
    ),
    Bug(
        "all queries where one is read",
        "a reward model reads one token behind its last layer, whose softmax is over all pairs of tokens then",
        "test_attention_for_the_one_token_of_a_row_that_is_read",
        {'(reads := getattr(module, "reads", None)) is not None': "(reads := None)"},
        "utils.py",
    ),
    Bug(
        "the first row's token in every row",
        "rows are padded differently, so that the token that is read stands elsewhere in each",
        "test_attention_for_the_one_token_of_a_row_that_is_read",
        {"x.transpose(1, 2)[reads][:, :, None] for x": "x[:, :, reads[1][:1]] for x"},
        "utils.py",
    ),
    Bug(
        "gradients added in no fixed order",
        "the compiler's own gradient of an embedding: a run that is resumed ends elsewhere",
        "test_compiled_gradients_of_an_embedding_are_the_same_every_time",
        {"torch._inductor.decomposition.select_decomp_table().pop(op.default, None)": "pass"},
        "utils.py",
    ),
    Bug(
        "every softmax twice",
        "the compiler would rather compute it anew in the backward than store it",
        "test_compiled_on_cpu_no_softmax_is_computed_twice",
        {"aot.recompute_views = not cuda": "aot.aggressive_recomputation = not cuda"},
        "utils.py",
    ),
    Bug(
        "the causal mask in every softmax",
        "chains of operations are computed anew wherever they are read unless they are long enough to be stored",
        "test_compiled_on_cpu_the_causal_mask_is_computed_once",
        {'{"realize_opcount_threshold": 12}': "None"},
        "utils.py",
    ),
    Bug(
        "a mask of booleans in every softmax",
        "chains a little shorter: the reward model's mask was stored before numbers are chosen by it, which is slow to read",
        "test_compiled_on_cpu_the_causal_mask_is_computed_once[reward_model]",
        {'{"realize_opcount_threshold": 12}': '{"realize_opcount_threshold": 10}'},
        "utils.py",
    ),
    Bug(
        "the causal mask in every layer of a decoding step",
        "the same chains, in the graph whose time is the rollout's",
        "test_compiled_on_cpu_a_step_computes_the_causal_mask_once",
        {', "realize_opcount_threshold": 12}': "}"},
    ),
    Bug(
        "old log-probs in another precision",
        "old and new log-probs under bf16 come of the same forward: else the first ratio is not 1",
        "test_learning_rate_zero_changes_nothing[gpt2-bf16]",
        {"with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, args.precision == \"bf16\"):":
         "with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, False):"},
    ),
    Bug(
        "the adaptive coefficient is logged, not charged",
        "the controller moves a number that no reward sees",
        "test_the_coefficient_that_adapts_is_the_one_that_is_charged",
        {"compute_rewards(scores, logprobs, ref_logprobs, mask, controller.kl_coef)":
         "compute_rewards(scores, logprobs, ref_logprobs, mask, args.kl_coef)"},
    ),
    Bug(
        "objective of the raw scores",
        "what is logged as the objective is not what is trained on",
        "test_the_coefficient_that_adapts_is_the_one_that_is_charged",
        {"\"objective/rlhf_reward\": scores + penalty": "\"objective/rlhf_reward\": raw_scores + penalty"},
    ),
    Bug(
        "minibatches of one seed",
        "runs of another seed would share the order of their minibatches",
        "test_everything_random_depends_on_the_seed",
        {"seeded(args.seed, \"minibatches\"": "seeded(1, \"minibatches\""},
    ),
    Bug(
        "temperature missing in the policy",
        "sampling at T and scoring at 1 makes the loss that of another policy",
        "test_actor_critic_against_rows_without_padding test_first_step_is_the_policy_gradient[gpt2-False]",
        {"self.logprobs(logits, input_ids[:, -response_length:], temperature,":
         "self.logprobs(logits, input_ids[:, -response_length:], 1.0,"},
    ),
    Bug(
        "temperature missing in the training forward",
        "old log-probs at T, new ones at 1: ratios start away from 1",
        "test_first_step_is_the_policy_gradient[gpt2-False]",
        {"new = train_model(ids, attention, longest, args.temperature,": "new = train_model(ids, attention, longest, 1.0,"},
    ),
    Bug(
        "temperature missing in the reference",
        "a KL that is not 0 between equal models",
        "test_first_step_is_the_policy_gradient[gpt2-False] test_logged_statistics_are_those_of_the_real_tokens",
        {"frozen(ids, attention, longest, args.temperature,": "frozen(ids, attention, longest, 1.0,"},
    ),
    Bug(
        "temperature missing in the sampler",
        "tokens come from another distribution than the one that the loss believes in",
        "test_sampled_entropy_estimates_the_entropy",
        {"generate(sampler, queries, query_mask, uniforms, args.temperature,":
         "generate(sampler, queries, query_mask, uniforms, 1.0,"},
    ),
    Bug(
        "slice off by one",
        "logits at a token instead of before it score the token that follows",
        "test_actor_critic_against_rows_without_padding test_first_step_is_the_policy_gradient[gpt2-False]",
        {"torch.arange(-response_length - 1, -1, device": "torch.arange(-response_length, 0, device"},
    ),
    Bug(
        "no position ids in the forward",
        "transformers then counts the left padding as positions: wrong for GPT-2 (the TL;DR reproduction, TRL)",
        "test_actor_critic_does_not_see_padding[gpt2] test_first_step_is_the_policy_gradient[gpt2-False]",
        {'"position_ids": (mask.cumsum(1) - 1).clamp(min=0), ': ""},
    ),
    Bug(
        "positions of the padding in sampling",
        "the same bug in the sampler alone: it is off the policy by the length of the padding",
        "test_generate_is_the_slow_loop[gpt2-1.0] test_generate_does_not_see_padding_or_neighbours[gpt2]",
        {"(key_mask.cumsum(1) - 1).clamp(min=0)[": "(torch.ones_like(key_mask).cumsum(1) - 1)["},
    ),
    Bug(
        "positions of the query behind the prefill",
        "a step's token is the last that the mask counts, where the prefill begins with the first",
        "test_generate_is_the_slow_loop[gpt2-0.7]",
        {"[:, -tokens.shape[1] :]": "[:, : tokens.shape[1]]"},
    ),
    Bug(
        "unused ids kept by the scorer",
        "the sampler masks ids that policy and reference give probability: two supports, a biased ratio and KL",
        "test_the_reference_starts_at_no_distance test_actor_critic_against_rows_without_padding",
        {"(logits + bias).to(": "logits.to("},
    ),
    Bug(
        "log-softmax in bf16",
        "rounding alone then moves the ratio by percents",
        "test_token_logprobs_are_fp32_from_bf16",
        {"logits = (logits + bias).to(torch.promote_types(logits.dtype, torch.float32))": "logits = logits + bias"},
    ),
    Bug(
        "reference not frozen",
        "a reference that is the policy itself: KL stays 0 whatever is learned",
        "test_identities_between_metrics test_logged_statistics_are_those_of_the_real_tokens",
        {"reference = copy.deepcopy(policy).requires_grad_(False)": "reference = policy"},
    ),
    Bug(
        "score read before the first pad id",
        "transformers finds the last token by id, and a prompt or an EOS that holds the pad id moves it",
        "test_last_token_scores_wherever_the_padding_is",
        {"last = (attention_mask.long() *": "last = ((input_ids != model.config.pad_token_id).long() *"},
    ),
    Bug(
        "centre of the reward model ignored",
        "a fixed score for missing EOS means something only where 0 is average",
        "test_reward_model_scores_and_starts_the_critic",
        {'.squeeze(-1) - getattr(model.config, "score_mean", 0.0)': ".squeeze(-1)"},
    ),
    Bug(
        "value head not zero at first",
        "random values are noise in the first advantages",
        "test_first_loss_of_a_zero_critic",
        {"torch.nn.init.zeros_(critic.score.weight)": "torch.nn.init.normal_(critic.score.weight)"},
    ),
    # ---- Sampling
    Bug(
        "top-k left on in sampling",
        "transformers' generate cuts at 50 ids unless told otherwise: a negative KL and a biased ratio (TRL)",
        "test_sample_is_the_inverse_cdf test_generate_is_the_slow_loop",
        {"logits = (logits - logits.amax(-1, keepdim=True)) / temperature":
         "logits = logits.masked_fill(logits < logits.topk(6).values[:, -1:], -math.inf)\n"
         "    logits = (logits - logits.amax(-1, keepdim=True)) / temperature"},
    ),
    Bug(
        "a block's offset forgotten",
        "a cumulative sum in two levels must take off what the blocks before have used up",
        "test_sample_is_the_inverse_cdf[1.0-200]",
        {".exp(), target - before)": ".exp(), target)"},
    ),
    Bug(
        "tokens behind the stop",
        "a row that has ended is sampled on until it leaves the batch, and what it says then is no response",
        "test_stopping_early_changes_nothing test_generate_is_the_slow_loop[gpt2-1.0]",
        {"torch.where(response_mask(responses, stop_ids, min_length), responses, pad_id)": "responses"},
    ),
    Bug(
        "rows that leave before min_length",
        "a stop that does not count ends nothing",
        "test_stopping_early_changes_nothing[gpt2-6]",
        {"responses[rows, min_length:t]": "responses[rows, :t]"},
    ),
    Bug(
        "another row's cache",
        "when ended rows are dropped, keys and values of the others must move with them",
        "test_dropping_ended_rows_changes_nothing",
        {"cache.reorder_cache(alive)": "cache.reorder_cache(torch.arange(len(alive)))"},
    ),
    Bug(
        "rows numbered anew",
        "the second time rows are dropped, an index into those that were left is not an index into the batch",
        "test_dropping_ended_rows_changes_nothing",
        {"rows, key_mask = rows[alive],": "rows, key_mask = alive,"},
    ),
    Bug(
        "another row's noise",
        "when ended rows are dropped, each row keeps its own uniforms",
        "test_dropping_ended_rows_changes_nothing",
        {"uniforms[rows, t]": "uniforms[: len(rows), t]"},
    ),
    Bug(
        "the same noise in every update",
        "a generator made anew from the seed alone repeats its numbers",
        "test_every_update_samples_anew",
        {'seeded(args.seed, "uniforms", update)': 'seeded(args.seed, "uniforms")'},
    ),
    Bug(
        "the same noise on every rank",
        "ranks that share a seed sample the same noise for different prompts",
        "test_metrics_on_one_and_two_ranks",
        {'torch.rand(args.batch_size, R, generator=seeded(args.seed, "uniforms", update))[mine]':
         'torch.rand(B, R, generator=seeded(args.seed, "uniforms", update))'},
    ),
    Bug(
        "sampling from a stale copy",
        "RL4LMs rebinds its lagged model and the sampler keeps the old object",
        "test_the_sampler_is_the_policy_of_the_moment[bf16]",
        {'if args.precision == "bf16":': 'if args.precision == "bf16" and update == 1:'},
    ),
    Bug(
        "sampling from a copy that is never renewed",
        "what shares the policy's storage needs no copying, and what does not share it stays at the start",
        "test_the_sampler_is_the_policy_of_the_moment[fp32]",
        {'own.data = parameter.data if args.precision == "fp32" else own.data.bfloat16()':
         'own.data = own.data if args.precision == "fp32" else own.data.bfloat16()'},
    ),
    Bug(
        "queries cut at the response length",
        "the reimplementation of OpenAI's code in PyTorch passes one length for both",
        "test_long_prompts_are_counted_and_left_out",
        {"tokenizer, args.query_length, args.dataset)": "tokenizer, args.response_length, args.dataset)"},
    ),
    # ---- Scores and rewards
    Bug(
        "pad is eos, and the mask goes by the id",
        "with the common pad_token = eos_token the EOS itself is masked, and with it the score",
        "test_samples_add_up_to_the_metrics test_first_loss_of_a_zero_critic",
        {"(policy, tokenizer), tokenizer.pad_token_id": "(policy, tokenizer), tokenizer.eos_token_id",
         "mask = response_mask(responses, stop_ids, args.min_length)": "mask = responses != pad_id"},
    ),
    Bug(
        "score one slot late",
        "the TL;DR reproduction and TRL pay it behind the EOS, trlX often two slots behind",
        "test_score_is_paid_at_the_last_real_token_only test_rewards_add_up_to_score_minus_kl",
        {"is_last = mask & ~F.pad(mask[:, 1:], (0, 1))": "is_last = ~mask & F.pad(mask[:, :-1], (1, 0))"},
    ),
    Bug(
        "sign of the KL penalty",
        "pays for leaving the reference",
        "test_rewards_add_up_to_score_minus_kl",
        {"penalties = -kl_coef *": "penalties = kl_coef *"},
    ),
    Bug(
        "KL penalty clamped at 0",
        "the usual mend of a negative KL hides its cause and biases the estimate",
        "test_rewards_add_up_to_score_minus_kl",
        {"torch.where(mask, logprobs - ref_logprobs, 0.0)\n    is_last":
         "torch.where(mask, logprobs - ref_logprobs, 0.0).clamp(min=0)\n    is_last"},
    ),
    Bug(
        "k3 of the inverse ratio",
        "trlX's logged KL: its mean under the policy's own samples is chi-square minus KL",
        "test_logged_statistics_are_those_of_the_real_tokens test_logged_kl_and_entropy_are_their_definitions",
        {"torch.exp(-log_ratio) - 1 + log_ratio": "torch.exp(log_ratio) - 1 - log_ratio"},
    ),
    Bug(
        "post-EOS tokens in the entropy",
        "a sentinel of 1 for padding's log-probs takes 1 nat off for each pad (the TL;DR reproduction, TRL)",
        "test_logged_statistics_are_those_of_the_real_tokens test_logged_kl_and_entropy_are_their_definitions",
        {"-torch.where(mask, logprobs, 0.0).sum(1)": "-torch.where(mask, logprobs, 1.0).sum(1)"},
    ),
    Bug(
        "padding in the means of the update",
        "approxkl, clip fraction and entropy diluted by real tokens over all tokens (the TL;DR reproduction, TRL)",
        "test_logged_statistics_are_those_of_the_real_tokens",
        {"checks.add(stats, old[-1])": "checks.add({k: torch.where(old[-1], x, 0) for k, x in stats.items()})"},
    ),
    Bug(
        "missing-EOS score subtracted",
        "TRL takes it off the score of a text that was cut, which may still be the best of all",
        "test_missing_eos_score[-7.0]",
        {'0.0 if missing == "none" else missing': "raw_scores + missing"},
    ),
    Bug(
        "replaced scores in the moments",
        "the running mean of scores then follows the share of rows without EOS",
        "test_scores_are_normalised_then_clipped_then_replaced",
        {"normalise(raw_scores, judged, moments)": "normalise(raw_scores, torch.ones_like(has_eos), moments)"},
    ),
    Bug(
        "adaptive KL from the local KL",
        "the PyTorch reimplementation of OpenAI's code: every rank gets a coefficient of its own",
        "test_kl_coefficient_on_two_ranks_follows_the_kl_of_both",
        {'controller.update(metrics["objective/kl"], args.batch_size)':
         "controller.update(kl.mean().item(), args.batch_size)"},
    ),
    # ---- Advantages
    Bug(
        "unmasked whitening",
        "trlX's moments count the padding",
        "test_first_loss_of_a_zero_critic test_first_step_is_the_policy_gradient[gpt2-False]",
        {"advantages = whiten(advantages, mask)": "advantages = whiten(advantages, torch.ones_like(mask))"},
    ),
    Bug(
        "per-rank whitening",
        "OpenAI's code, its reproductions and TRL: an advantage's sign depends on the rank that it fell to",
        "test_micro_batches_and_ranks_do_not_change_the_update",
        {"pair = all_gather(": "pair = torch.clone("},
        "utils.py",
    ),
    Bug(
        "returns from whitened advantages",
        "whitened before the values are added, so the critic learns returns of another scale",
        "test_first_loss_of_a_zero_critic test_first_value_loss_of_a_reward_model",
        {"advantages = whiten(advantages, mask)":
         "advantages = whiten(advantages, mask)\n        returns = advantages + values"},
    ),
    Bug(
        "bootstrap from behind the EOS",
        "the critic's value at a pad enters the last real token's advantage",
        "test_gae_is_the_weighted_mean_of_k_step_estimates test_first_value_loss_of_a_reward_model",
        {"torch.where(mask, values, 0.0)\n    deltas": "values\n    deltas"},
    ),
    Bug(
        "GAE runs on across the padding",
        "what stands behind the EOS leaks backwards through the recursion",
        "test_gae_is_the_weighted_mean_of_k_step_estimates test_gae_ignores_what_is_behind_the_mask",
        {"torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)": "rewards, values"},
    ),
    Bug(
        "GAE looks back",
        "a sum over all steps instead of those to come credits a token with what came before it",
        "test_gae_is_the_weighted_mean_of_k_step_estimates",
        {"torch.tril((gamma * lam)": "((gamma * lam)"},
    ),
    Bug(
        "critic and reward model are one",
        "the value loss then trains what gives the scores, which drift towards what the critic predicts",
        "test_reward_model_scores_and_starts_the_critic",
        {"[0], copy.deepcopy(reward_model)": "[0], reward_model"},
    ),
    Bug(
        "schedule that no optimizer follows",
        "the logged learning rate falls, the real one does not",
        "test_metrics_are_the_documented_ones",
        {'optimizer.param_groups[0]["lr"] = lr = ': "lr = "},
    ),
    Bug(
        "ids beyond the tokenizer sampled",
        "embedding rows that pad the vocabulary have logits too, and a random one is as good as any",
        "test_ids_that_no_token_has_are_never_sampled_nor_scored",
        {"0.0 if i in said else -math.inf": "-math.inf if i == tokenizer.pad_token_id else 0.0"},
    ),
    Bug(
        "one EOS of several",
        "a model that ends its turns with another id runs on to the limit and is fined",
        "test_each_eos_of_a_model_ends_a_response_and_stays_in_its_config",
        {"args.stop_token, policy.config.eos_token_id)": "args.stop_token, None)"},
    ),
    Bug(
        "k3 without its linear term",
        "not an estimate of the KL at all, and nobody looks at it until k1 goes wrong",
        "test_logged_statistics_are_those_of_the_real_tokens",
        {"torch.exp(-log_ratio) - 1 + log_ratio": "torch.exp(-log_ratio) - 1"},
    ),
    Bug(
        "gamma and lam swapped",
        "two floats side by side, of which one is 1 by default",
        "test_first_value_loss_of_a_reward_model",
        {"mask, args.gamma, args.lam)": "mask, args.lam, args.gamma)"},
    ),
    Bug(
        "scores stay in the order of the rows' lengths",
        "every score is paid to another row: training goes on, and learns nothing",
        "test_reward_model_scores_and_starts_the_critic",
        {"torch.cat(x)[by_length.argsort()]": "(torch.cat(x)[by_length.argsort()] if x[0].dim() == 2 else torch.cat(x))"},
    ),
    Bug(
        "log-probabilities and values of scored rows padded in front",
        "those of a cut micro-batch stand at later tokens than their own",
        "test_micro_batches_and_ranks_do_not_change_the_update",
        {"F.pad(x, (0, R - longest))": "F.pad(x, (R - longest, 0))"},
    ),
    Bug(
        "log-probabilities and values stay in the order of the rows' lengths",
        "they belong to other rows than the tokens",
        "test_micro_batches_and_ranks_do_not_change_the_update",
        {"torch.cat(x)[by_length.argsort()]": "(torch.cat(x)[by_length.argsort()] if x[0].dim() == 1 else torch.cat(x))"},
    ),
    Bug(
        "the reward model reads whole rows",
        "right, and up to twice the work",
        "test_scoring_and_update_compute_little_padding",
        {"last_token_scores(reward_model, ids, attention)": "last_token_scores(reward_model, input_ids[part], attention_mask[part])"},
    ),
    Bug(
        "scored rows cut behind their shortest",
        "the last tokens of all longer rows have no log-probability, no value, and perhaps no EOS to be scored at",
        "test_scoring_and_update_compute_little_padding",
        {"tokens[part].max()": "tokens[part].min()"},
    ),
    Bug(
        "scoring in batches of any lengths",
        "every one of them is as wide as its longest row: right, and up to twice the work",
        "test_scoring_and_update_compute_little_padding",
        {"by_length := tokens.argsort(stable=True)": "by_length := torch.arange(len(tokens))"},
    ),
    # ---- Update
    Bug(
        "mean of means over micro-batches",
        "TRL and the TL;DR reproduction average micro-batches of unequal length: 40% off the minibatch's gradient",
        "test_micro_batches_and_ranks_do_not_change_the_update",
        {"(loss_sum * ranks.world_size / num_tokens)": "(loss_sum / old[-1].sum() / len(parts))"},
    ),
    Bug(
        "gradient over the local token count",
        "DDP's mean of per-rank means: right on one rank, wrong on two of unequal length",
        "test_micro_batches_and_ranks_do_not_change_the_update",
        {"lengths[minibatch].sum()": "lengths[minibatch[ranks.rank :: ranks.world_size]].sum() * ranks.world_size"},
    ),
    Bug(
        "micro-batches cut behind their shortest row",
        "the tokens of all longer rows leave the loss, which is still divided by their number",
        "test_scoring_and_update_compute_little_padding",
        {"lengths[index].max()": "lengths[index].min()"},
    ),
    Bug(
        "micro-batches of any lengths",
        "every one of them is as wide as its longest row: right, and up to twice the work",
        "test_scoring_and_update_compute_little_padding",
        {"minibatch[lengths[minibatch].argsort(stable=True)]": "minibatch"},
    ),
    Bug(
        "a forward beside the wrapper",
        "the ILQL authors' loop calls the unwrapped model, so DDP never averages a gradient",
        "test_micro_batches_and_ranks_do_not_change_the_update",
        {"new = train_model(ids,": "new = actor_critic(ids,"},
    ),
    Bug(
        "an order of its own on every rank",
        "shuffled by a rank's own seed, then sharded: some rows are never seen (the TL;DR reproduction's reward model)",
        "test_micro_batches_and_ranks_do_not_change_the_update",
        {'"minibatches", update, epoch)': '"minibatches", update, epoch, ranks.rank)'},
    ),
    Bug(
        "the same minibatches in every epoch",
        "a generator seeded inside the loop of epochs",
        "test_every_epoch_is_the_whole_batch_in_another_order",
        {'"minibatches", update, epoch)': '"minibatches", update)'},
    ),
    Bug(
        "minibatches in an unseeded order",
        "TRL permutes with a generator that no seed reaches, so no run can be repeated",
        "test_same_seed_same_run test_resumed_run_ends_as_if_never_interrupted[1]",
        {"torch.randperm(args.batch_size, generator=generator)":
         "torch.randperm(args.batch_size, generator=(generator.seed(), generator)[1])"},
    ),
    Bug(
        "a step for every micro-batch",
        "accumulation that does not accumulate: the memory knob changes the number of steps",
        "test_micro_batches_and_ranks_do_not_change_the_update",
        {"checks.add(stats, old[-1])":
         "checks.add(stats, old[-1])\n                k < len(parts) and optimizer.step()"},
    ),
    Bug(
        "lower side of the clip missing",
        "a bad token's probability may then fall without bound in one update",
        "test_policy_loss_is_the_definition",
        {"ratio.clamp(1 - cliprange,": "ratio.clamp(0.0,"},
    ),
    Bug(
        "value clip against the wrong tensor",
        "clipped around the return, the bounded loss is never the larger one: no clip at all",
        "test_clip_ranges_reach_the_losses",
        {"value_loss(new_values, values, returns, args": "value_loss(new_values, returns, returns, args"},
    ),
    Bug(
        "max_grad_norm without effect",
        "TRL accepts the flag and leaves the gradient as it is",
        "test_gradients_are_clipped_to_max_grad_norm",
        {"args.max_grad_norm or math.inf": "math.inf"},
    ),
    Bug(
        "weight decay by default",
        "torch's AdamW decays by 0.01 unless told otherwise (the TL;DR reproduction)",
        "test_the_optimizer_is_adamw_without_decay",
        {"weight_decay=0.0, ": ""},
    ),
    Bug(
        "learning rate 0 in the last update",
        "the schedule counts from 1: a whole rollout for a step of length 0",
        "test_metrics_are_the_documented_ones",
        {"(1 - (update - 1) / num_updates)": "(1 - update / num_updates)"},
    ),
    Bug(
        "ratio guard by each rank",
        "ranks that look at their own ratio disagree on whether to step, and part for good",
        "test_a_ratio_that_explodes_on_one_rank_stops_both",
        {"dict(checks), checks.reduce()": "dict(checks), {name: (x[0] / x[1]).item() for name, x in checks.items()}"},
    ),
    Bug(
        "ratio guard from above alone",
        "a policy to which its own samples have become impossible takes another step",
        "test_the_guard_is_at_a_mean_ratio_of_ten_and_a_tenth[0.09-1]",
        {'0.1 <= check["val/ratio"] <= 10': 'check["val/ratio"] <= 10'},
    ),
    # ---- Resuming
    Bug(
        "KL coefficient lost on resume",
        "an adaptive coefficient starts again where the flag says",
        "test_resumed_run_ends_as_if_never_interrupted[2]",
        {'controller.kl_coef, moments = state["step"]': '_, moments = state["step"]'},
    ),
    Bug(
        "reference taken from the resumed policy",
        "open-r1: the KL is 0 again, and the policy may drift a second time",
        "test_resumed_run_ends_as_if_never_interrupted[2]",
        {'actor_critic.load_state_dict(state["model"])':
         'actor_critic.load_state_dict(state["model"])\n        reference.load_state_dict(policy.state_dict())'},
    ),
    Bug(
        "optimizer state lost on resume",
        "Adam's moments begin again, and its first step has the full length for every weight",
        "test_resumed_run_ends_as_if_never_interrupted[2]",
        {'optimizer.load_state_dict(state["optimizer"])': "None"},
    ),
    Bug(
        "score moments lost on resume",
        "scores jump to another scale in the middle of a run",
        "test_resuming_keeps_the_moments",
        {'state["moments"].to(device)': "moments"},
    ),
]  # fmt: skip


def plant(edits, source):
    """The source with each text replaced, of which it must hold exactly one: who moves it must move it here as well."""
    for old, new in edits.items():
        assert source.count(old) == 1, f"occurs {source.count(old)} times, not once: {old!r}"
        source = source.replace(old, new)
    return source


def nodes(tests):
    """path::name of the tests, found in whichever file defines them."""
    texts = {path: path.read_text() for path in FILES}
    for name in tests:
        [path] = [path for path, text in texts.items() if f"\ndef {name.partition('[')[0]}(" in text]
        yield f"{path}::{name}"


class Recorder:
    """A plugin that keeps how each test ended: passed, by an assertion of its own, or by something else."""

    def __init__(self):
        self.outcomes = {}

    def pytest_runtest_makereport(self, item, call):
        if call.excinfo is not None:
            raised_by_script = SOURCES.keys() & {Path(entry.path).name for entry in call.excinfo.traceback}
            is_assertion = call.when == "call" and call.excinfo.errisinstance(AssertionError) and not raised_by_script
            self.outcomes[item.name] = "assertion" if is_assertion else f"{call.when}: {call.excinfo.exconly()}"
        elif call.when == "call":
            self.outcomes[item.name] = "passed"


def work(folder, arguments):
    """Run pytest on the copy in `folder`, and leave there what it prints and how the tests end. For another process."""
    os.setsid()  # so that whoever waits for this process can end its two ranks too
    fork = torch.multiprocessing.get_context("fork")
    torch.multiprocessing.get_context = lambda method: fork  # ranks with this copy loaded, and at once
    for name in ("conftest", "utils", "ppo_rlhf"):  # pytest imports them again, the copy first on the path
        sys.modules.pop(name, None)
    sys.path.insert(0, str(folder))
    recorder = Recorder()
    with (
        open(folder / "output.txt", "w") as output,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        pytest.main(arguments, plugins=[recorder])
    loaded = {name: sys.modules[name].__file__ for name in ("utils", "ppo_rlhf") if name in sys.modules}
    (folder / "outcomes.json").write_text(json.dumps({"loaded": loaded, "outcomes": recorder.outcomes}))


@pytest.fixture
def outcomes(tmp_path):
    """`outcomes(tests, changed={})`: {test with parameters: how it ended} on a copy with some files changed."""

    def run(tests, changed=()):
        for name, source in (SOURCES | dict(changed)).items():
            (tmp_path / name).write_text(source)
        (tmp_path / "pytest.ini").write_text("[pytest]\n")
        options = f"-q --assert plain -c {tmp_path}/pytest.ini --rootdir {tmp_path} --basetemp {tmp_path}/tmp"
        options += " -p no:cacheprovider -p no:unraisableexception"  # the latter collects garbage for half a second
        context = multiprocessing.get_context("forkserver")  # the one of conftest.py, if a test has started it before
        context.set_forkserver_preload(PRELOAD)
        process = context.Process(target=work, args=(tmp_path, [*options.split(), *nodes(tests)]))
        process.start()
        process.join(300)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail("no end after 300 s")
        output = (tmp_path / "output.txt").read_text()
        assert (tmp_path / "outcomes.json").exists(), output
        answer = json.loads((tmp_path / "outcomes.json").read_text())
        print(output)  # pytest shows it if the test fails
        assert set(answer["loaded"].values()) <= {str(tmp_path / name) for name in SOURCES}  # the copy, and no other
        return answer["outcomes"]

    return run


def is_seen(tests, outcomes):
    """Whether every test failed, with one of its parameters or more, and none but by an assertion of a test."""
    failed = {name for name, outcome in outcomes.items() if outcome == "assertion"}
    failed |= {re.sub(r"\[.*", "", name) for name in failed}
    return set(tests) <= failed and set(outcomes.values()) <= {"assertion", "passed"}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted_bug_is_seen(outcomes, bug):
    tests = bug.tests.split()
    ended = outcomes(tests, {bug.file: plant(bug.edits, SOURCES[bug.file])})
    assert is_seen(tests, ended), f"{bug.name} ({bug.reason}): {ended}"


def test_without_a_bug_all_is_green(outcomes):
    tests = {test for bug in BUGS for test in bug.tests.split()}
    ended = outcomes(sorted(test for test in tests if "[" not in test or test.partition("[")[0] not in tests))
    assert set(ended.values()) == {"passed"}
    assert tests <= ended.keys() | {re.sub(r"\[.*", "", name) for name in ended}


HARMLESS = {"# 3. advantages\n": "# 3. ADVANTAGES\n", "penalties = -kl_coef *": "penalties = kl_coef * -1.0 *"}
CRASHES = ["raise TypeError", "assert False", "return None", "break"]  # the last is no Python outside of a loop


@pytest.mark.parametrize("crash", [None, *CRASHES])
def test_neither_a_harmless_change_nor_a_crash_is_seen_as_a_bug(outcomes, crash):
    tests = ["test_rewards_add_up_to_score_minus_kl", "test_first_loss_of_a_zero_critic"]
    edits = {"is_last = mask &": f"{crash}\n    is_last = mask &"} if crash else HARMLESS
    ended = outcomes(tests, {"ppo_rlhf.py": plant(edits, SOURCES["ppo_rlhf.py"])})
    assert not is_seen(tests, ended)
    assert crash or set(ended.values()) == {"passed"}


def test_a_bug_that_fits_nowhere_or_twice_is_refused():
    for source in ("a = 2", "a = 1; a = 1"):
        with pytest.raises(AssertionError, match="not once"):
            plant({"a = 1": "a = 0"}, source)
    assert plant({"a = 1": "a = 0"}, "a = 1") == "a = 0"
