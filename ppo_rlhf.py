"""PPO for RLHF: the third stage (Ziegler et al. 2019; Stiennon et al. 2020; Ouyang et al. 2022; Huang et al. 2024).

For each update:
    1. rollout      sample a response to each query from the policy
    2. score        the response's score; log-probabilities under policy and frozen reference; values from the critic;
                    reward of token t = -kl_coef * (logprob - ref_logprob), plus the score at the last token
    3. advantages   GAE(gamma, lam) from rewards and values; whitened over the whole batch of all ranks
    4. update       num_epochs passes in num_minibatches steps: clipped policy loss + vf_coef * clipped value loss, per real token

One process:     python ppo_rlhf.py
Eight GPUs:      torchrun --nproc_per_node=8 ppo_rlhf.py --model runs/my_sft/model --reward_model runs/my_rm/model

Shapes: B rows on this rank, P query length (left padded), R response length (right padded), T = P + R, V vocabulary.
Index t of a (B,R) tensor is response token t: logprobs[:, t] is that token's, values[:, t] belongs to the state just
before it, rewards[:, t] is paid for it. mask (B,R) is True for real response tokens, the EOS included.

Deviations from the papers' code: the score is paid at EOS itself, behind which the value is 0 (Huang et al.: one slot
later); old log-probabilities come from the training forward; advantages are whitened over all ranks.
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers import DynamicCache, StaticCache, masking_utils, modeling_layers

from utils import Means, Run, UserError, all_gather, check_divides, check_path, clock, init_ranks, launch, load_function
from utils import load_pretrained, load_rows, masked_mean, newest_run, prepare, progress, save_pretrained
from utils import seeded, whiten, wrap


@dataclass
class Args:
    model: str | None = None
    """what is trained, and the frozen reference: a Hub name or a folder; none: the newest finished run of sft.py"""
    reward_model: str | None = None
    """scores responses, and starts a separate critic; none, and no --reward_fn: the newest run of reward_model.py"""
    value_trunk: Literal["separate", "shared"] = "separate"
    """the critic: a network of its own, from the reward model (else --model, zero head), or a zero head on the policy"""
    reward_fn: str | None = None
    """path/to/file.py:function(prompts, responses, **columns) -> one number for each response of this rank, some empty"""
    monitor_fn: str | None = None
    """a function like --reward_fn that is logged as monitor/<name> and never trained on: shows over-optimisation"""
    dataset: str = "data/randomwalks/prompts.jsonl"
    """rows with prompt; every other column, but not prompts or responses, reaches the reward function"""
    output_dir: str | None = None
    """the run folder, which must not exist yet; none: runs/ppo_rlhf__<seed>__<time>"""
    seed: int = 1
    """seeds the order of prompts, the sampling and the minibatches"""
    total_episodes: int = 3840
    """responses sampled in all; a multiple of batch_size"""
    batch_size: int = 128
    """responses per update, over all ranks"""
    num_epochs: int = 4
    """passes over the batch in each update"""
    num_minibatches: int = 1
    """optimizer steps in each pass"""
    micro_batch_size: int = 128
    """rows per scoring or training forward on one rank (sampling takes all at once): memory, and how much is padding"""
    query_length: int = 64
    """tokens; longer prompts are left out and counted"""
    response_length: int = 10
    """tokens sampled at most, the stop token included"""
    stop_token: str | None = None
    """a text, such as ".", whose every token ends a response as EOS does; none: EOS alone"""
    min_length: int = 0
    """tokens of a response before a stop token may end it"""
    temperature: float = 1.0
    """divides the logits wherever a log-probability is taken: in sampling, in the policy, in the reference"""
    lr: float = 3e-4
    """learning rate of the first update; decays linearly to 0"""
    max_grad_norm: float = 1.0
    """gradients of a larger global norm are scaled down to it; 0: never"""
    kl_coef: float = 0.05
    """price of one nat of KL to the reference; with --target_kl_nats, where the price starts"""
    target_kl_nats: float | None = None
    """adapt kl_coef until the KL of a response is this; none: kl_coef stays"""
    kl_horizon: int = 10000
    """with --target_kl_nats: how slowly kl_coef adapts, in episodes"""
    gamma: float = 1.0
    """discount per token"""
    lam: float = 0.95
    """GAE's lambda: 0 trusts the critic alone, 1 the sampled rewards alone"""
    cliprange: float = 0.2
    """the policy's probability ratio is clipped to 1 - cliprange .. 1 + cliprange"""
    cliprange_high: float | None = None
    """the upper side alone: 1 - cliprange .. 1 + cliprange_high; none: as the lower"""
    cliprange_value: float = 0.2
    """a new value counts at most this far from the old one, in the units of the rewards that are paid"""
    vf_coef: float = 0.1
    """weight of the value loss"""
    entropy_coef: float = 0.0
    """reward, in the loss, of one nat of a token's entropy"""
    early_stop_kl: float | None = None
    """an update ends before a step (never its first) whose minibatch has policy/approxkl_avg above this; none: never"""
    normalize_scores: bool = False
    """subtract the running mean of all scores so far, --missing_eos_score apart, and divide by their standard deviation"""
    cliprange_score: float | None = None
    """scores are clipped to -cliprange_score .. cliprange_score, after normalisation; none: never"""
    whiten_rewards: bool = False
    """scale the rewards of a batch to standard deviation 1 about their mean, which makes kl_coef a relative price"""
    missing_eos_score: float | Literal["none"] = -1.0
    """score of a response without stop token in place of its own: sensible where 0 is average; none: it keeps its own"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """what forwards, backwards and sampling compute in; weights and optimizer, softmax and scalar head stay fp32"""
    compile: bool = torch.cuda.is_available()
    """torch.compile every layer, the log-probabilities and the decoding step"""
    save_every: int = 0
    """updates between two checkpoints to resume from; 0: none"""
    resume: str | None = None
    """a run folder: go on from its newest checkpoint, with its own arguments"""
    track: Literal["none", "wandb", "tensorboard"] = "none"
    """where metrics go besides metrics.jsonl"""


# ---- Models ----------------------------------------------------------------------------------------------------------
def predicting(response_length, device):
    """Indices (R,) of what predicts the response, P - 1 .. T - 2, from the end; a slice would cost B copies of the head."""
    return torch.arange(-response_length - 1, -1, device=device)


def response_logits(policy, input_ids, attention_mask, response_length):
    """Logits (B,R,V) that predict the response's tokens, to which `logit_bias` belongs, and the head's inputs (B,R,d)."""
    hidden, mask, keep = [], attention_mask.long(), predicting(response_length, input_ids.device)
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0), "use_cache": False}
    with policy.get_output_embeddings().register_forward_pre_hook(lambda _, states: hidden.extend(states)):
        logits = policy(input_ids * mask, logits_to_keep=keep, **inputs).logits
    return logits, hidden[0]


def score_head(model, hidden):
    """Scores (...) of hidden states (..., d): the linear head in full precision, minus the centre in the config."""
    with torch.autocast(hidden.device.type, enabled=False):
        return model.score(hidden.to(model.score.weight.dtype)).squeeze(-1) - getattr(model.config, "score_mean", 0.0)


def last_hidden(model, input_ids, attention_mask):
    """Hidden states (B,T,d) below the head. Positions count real tokens only, and no id behind the mask is read."""
    inputs = {"attention_mask": attention_mask.long(), "use_cache": False}
    inputs["position_ids"] = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    return model.base_model(input_ids.masked_fill(attention_mask == 0, 0), **inputs).last_hidden_state


def last_token_scores(model, input_ids, attention_mask):
    """Score of each row (B,), fp32, at its last real token: by the mask, wherever the padding is and whatever ids it
    holds. model: a plain AutoModelForSequenceClassification with one label. input_ids, attention_mask (B,T)."""
    last = (attention_mask.long() * torch.arange(input_ids.shape[1], device=input_ids.device)).argmax(1)
    hidden = last_hidden(model, input_ids, attention_mask)
    return score_head(model, hidden[torch.arange(len(last), device=last.device), last])


class ActorCritic(torch.nn.Module):
    """Policy and critic, of one trunk or of two, as one module that can be wrapped; without a critic, log-probabilities alone."""

    def __init__(self, policy, critic, entropy_coef=1.0):
        super().__init__()
        self.policy, self.critic, self.has_bonus, self.logprobs = policy, critic, entropy_coef != 0, token_logprobs

    def forward(self, input_ids, attention_mask, response_length, temperature, bias):
        """logprobs, entropy, values of the response's tokens, each (B,R); without a critic logprobs, the tensor, alone."""
        logits, hidden = response_logits(self.policy, input_ids, attention_mask, response_length)
        logprobs, entropy = self.logprobs(logits, input_ids[:, -response_length:], temperature, bias, self.has_bonus)
        if self.critic is None:
            return logprobs
        if self.critic.base_model is not self.policy.base_model:
            hidden = last_hidden(self.critic, input_ids, attention_mask)[:, predicting(response_length, logits.device)]
        return logprobs, entropy, score_head(self.critic, hidden)


def logit_bias(policy, tokenizer):
    """(V,) to add to logits: -inf for pad and ids that no token has, which neither policy nor reference can say; else 0."""
    said, ids = {*tokenizer.get_vocab().values()} - {tokenizer.pad_token_id}, range(policy.config.vocab_size)
    return torch.tensor([0.0 if i in said else -math.inf for i in ids], device=policy.device)


def first_above(weights, target):
    """First index (B,1) with weight at which the cumulative sum of weights (B,n) exceeds target (B,1), and the sum before."""
    cumulative = weights.cumsum(-1)
    found = ((cumulative > target) | (cumulative == cumulative[:, -1:])) & (weights > 0)
    index = torch.where(found, math.inf, weights).argmax(-1, keepdim=True)  # if rounding left none, the heaviest
    return index, (cumulative - weights).gather(1, index)


def sample_tokens(logits, uniforms, temperature, bias=0.0):
    """One token id per row (B,) by inverse CDF: the first id whose cumulative probability exceeds u times the total.
    logits (B,V); uniforms (B,) in [0,1) are all the randomness there is. temperature 0 takes the most likely token."""
    logits = logits.float() + bias
    if temperature == 0:
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    blocks = F.pad(logits, (0, -logits.shape[-1] % 64), value=-math.inf).unflatten(-1, (-1, 64))
    weights = blocks.exp().sum(-1)  # of each block of 64 ids: one cumulative sum over V is slow
    block, before = first_above(weights, target := uniforms[:, None] * weights.sum(-1, keepdim=True))
    index, _ = first_above(blocks.gather(1, block[..., None].expand(-1, 1, 64)).squeeze(1).exp(), target - before)
    return (64 * block + index).squeeze(1)


def decode_step(model, cache, tokens, key_mask, uniforms, temperature, bias=0.0):
    """Feed tokens (B,n) to the model and sample the next one (B,) of each row. key_mask (B,S): slots that may be read."""
    position_ids = (key_mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]  # nothing may be read behind the tokens
    inputs = {"attention_mask": key_mask, "position_ids": position_ids, "past_key_values": cache, "use_cache": True}
    logits = model(tokens, **inputs, logits_to_keep=tokens.new_full((1,), -1)).logits  # no slice: see `predicting`
    return sample_tokens(logits[:, -1], uniforms, temperature, bias)


@torch.no_grad()
def generate(model, queries, query_mask, uniforms, temperature, stop_ids, pad_id, bias=0.0, min_length=0,
             step=decode_step, cache=None):  # fmt: skip
    """Sample a response (B,R) to each left padded query (B,P), one `step`, perhaps compiled, per token; with a cache, of P + R
    slots and kept whole, plain `decode_step` reads the query; without, ended rows leave. query_mask (B,P): real tokens. uniforms
    (B,R) in [0,1): all randomness. bias (V,): `logit_bias`. A row is pad_id behind its first stop id at an index >= min_length."""
    (B, P), R, device, drops = queries.shape, uniforms.shape[1], queries.device, cache is None
    cache = StaticCache(config=model.config, max_cache_len=P + R) if cache is None else cache
    responses, rows = torch.full((B, R), pad_id, device=device), torch.arange(B, device=device)  # rows: still decoded
    prompt, prefill = DynamicCache(), step if drops else decode_step  # its keys are new: no CUDA graph may own them
    queries, query_mask = queries.masked_fill(query_mask == 0, 0), query_mask.long()
    responses[:, 0] = prefill(model, prompt, queries, query_mask, uniforms[:, 0], temperature, bias)
    cache.reset(), [cache.update(x.keys, x.values, i) for i, x in enumerate(prompt.layers)], prompt.layers.clear()
    key_mask, stop_ids = F.pad(query_mask, (0, R)), torch.as_tensor(stop_ids, device=device)
    for t in range(1, R):
        key_mask[:, P + t - 1] = 1
        if t % (2 if device.type == "cpu" else 8) == 0:  # asking makes a GPU wait
            alive = (~torch.isin(responses[rows, min_length:t], stop_ids).any(1)).nonzero().squeeze(1)
            if len(alive) == 0:
                break
            if drops and 1 < len(alive) <= len(rows) * 3 / 4:  # copies cost; one row would compile anew
                rows, key_mask = rows[alive], key_mask[alive]
                cache.reorder_cache(alive)
        tokens = responses[rows, t - 1, None]
        responses[rows, t] = step(model, cache, tokens, key_mask, uniforms[rows, t], temperature, bias)
    return torch.where(response_mask(responses, stop_ids, min_length), responses, pad_id)


# ---- The algorithm ---------------------------------------------------------------------------------------------------
def response_mask(responses, stop_ids, min_length=0):
    """(B,R) bool: True up to and including each row's first stop id at an index >= min_length."""
    is_stop = torch.isin(responses, torch.as_tensor(stop_ids, device=responses.device))
    is_stop[:, :min_length] = False
    return is_stop.long().cumsum(1) - is_stop.long() == 0  # no stop before this token


def token_logprobs(logits, tokens, temperature, bias=0.0, entropy_grad=True):
    """Log-probability of each token and entropy of each distribution softmax((logits + bias) / T), both (B,R), in nats and
    fp32; logits (B,R,V), some perhaps -inf, predict the tokens (B,R); bias (V,). Without entropy_grad the entropy is detached."""
    logits = (logits + bias).to(torch.promote_types(logits.dtype, torch.float32))
    logits = (logits - logits.detach().amax(-1, keepdim=True)) / temperature
    said = torch.arange(logits.shape[-1], device=logits.device) == tokens[..., None]  # a gather whose backward fuses
    total = (weights := logits.exp()).sum(-1)
    entropy = total.log() - (weights * logits.clamp(min=-1e30)).sum(-1) / total  # 0 times infinity is NaN
    return torch.where(said, logits, 0.0).sum(-1) - total.log(), entropy if entropy_grad else entropy.detach()


def compute_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """Reward of each token (B,R): -kl_coef * log-ratio at every real token, plus the score (B,) at the last real one.
    The log-ratio (k1) estimates the KL to the reference without bias (Ziegler et al. 2019, eq. 2)."""
    penalties = -kl_coef * torch.where(mask, logprobs - ref_logprobs, 0.0)
    is_last = mask & ~F.pad(mask[:, 1:], (0, 1))
    return penalties + torch.where(is_last, scores[:, None], 0.0)


def compute_gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimates and returns (B,R) (Schulman et al. 2016, eq. 16): A_t = sum over k >= t of (gamma *
    lam)^(k - t) * (r_k + gamma * V_{k+1} - V_k); return_t = A_t + V_t. V behind the last real token, a terminal state, is 0;
    nothing else behind the mask has an influence. All inputs (B,R)."""
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    deltas = rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values
    steps = torch.arange(deltas.shape[1], device=deltas.device)
    powers = torch.tril((gamma * lam) ** (steps[:, None] - steps).clamp(min=0).to(deltas))  # at (k,t): of k - t
    advantages = deltas @ powers
    return advantages, advantages + values


def policy_loss(new_logprobs, logprobs, advantages, cliprange, cliprange_high=None):
    """Clipped surrogate per token (Schulman et al. 2017, eq. 7, negated): (loss, ratio, clipped), each (B,R). The ratio is
    clipped to 1 - cliprange .. 1 + cliprange_high (None: cliprange); clipped: that branch is strictly the larger loss."""
    ratio = torch.exp(new_logprobs - logprobs)
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - cliprange, 1 + (cliprange if cliprange_high is None else cliprange_high))
    return torch.maximum(plain, bounded), ratio, bounded > plain


def value_loss(new_values, values, returns, cliprange_value):
    """Clipped squared error per token, the 1/2 included: (loss, clipped), each (B,R); clipped as in `policy_loss`. A new
    value counts at most cliprange_value away from the old one (OpenAI's code for Ziegler et al. 2019)."""
    plain = 0.5 * (new_values - returns) ** 2
    bounded = 0.5 * (values + (new_values - values).clamp(-cliprange_value, cliprange_value) - returns) ** 2
    return torch.maximum(plain, bounded), bounded > plain


def ppo_loss(new_logprobs, entropy, new_values, logprobs, values, advantages, returns, mask, args):
    """(sum over real tokens of policy loss + vf_coef * value loss - entropy_coef * entropy, its parts (B,R) by name)."""
    new_logprobs, logprobs = (torch.where(mask, x, 0.0) for x in (new_logprobs, logprobs))  # at -inf: gradient NaN
    pg_loss, ratio, pg_clipped = policy_loss(new_logprobs, logprobs, advantages, args.cliprange, args.cliprange_high)
    vf_loss, vf_clipped = value_loss(new_values, values, returns, args.cliprange_value)
    losses = pg_loss + args.vf_coef * vf_loss - args.entropy_coef * entropy
    stats = {"loss/policy_avg": pg_loss, "loss/value_avg": vf_loss, "policy/entropy_avg": entropy, "val/ratio": ratio}
    stats |= {"policy/approxkl_avg": 0.5 * (new_logprobs - logprobs) ** 2, "policy/clipfrac_avg": pg_clipped}
    return torch.where(mask, losses, 0.0).sum(), {**stats, "val/clipfrac_avg": vf_clipped}


def normalise(scores, mask, moments):
    """(scores minus their running mean over their running standard deviation, new moments); moments (3,) fp64: count, sum and
    sum of squares of the scores so far, on all ranks. The rows (B,) where mask is False do not enter them."""
    x = torch.where(mask, scores, 0.0).double()
    moments = moments + all_gather(torch.stack([mask.sum(), x.sum(), (x**2).sum()])[None]).sum(0)
    mean, square = moments[1:] / moments[0].clamp(min=1)
    return ((scores - mean) * torch.rsqrt((square - mean**2).clamp(min=0) + 1e-8)).to(scores.dtype), moments


class AdaptiveKLController:
    """Moves kl_coef until the KL of a response meets a target (Ziegler et al. 2019, section 2.2)."""

    def __init__(self, kl_coef, target, horizon):
        self.kl_coef, self.target, self.horizon = kl_coef, target, horizon

    def update(self, kl, num_episodes):
        """The new coefficient. kl: mean KL of a response in nats; num_episodes: responses behind it; both global."""
        self.kl_coef *= 1 + min(max(kl / self.target - 1, -0.2), 0.2) * min(num_episodes / self.horizon, 1.0)
        return self.kl_coef


# ---- Data ------------------------------------------------------------------------------------------------------------
def load_tokenizer(path):
    """A model folder's tokenizer, with an EOS and a pad token apart from it: masking the padding must not mask the EOS."""
    check_path(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # of many kinds, with long texts
        raise UserError(f"{path}: no tokenizer can be loaded from there ({type(error).__name__})") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: its tokenizer has no EOS token, so a response could never end; set eos_token")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        names = [name for name in sorted(tokenizer.get_added_vocab()) if "pad" in name.lower() or "reserved" in name]
        tokenizer.add_special_tokens({"pad_token": next((x for x in names if x != tokenizer.eos_token), "[PAD]")})
    return tokenizer


def stop_token_ids(tokenizer, stop_token, eos):
    """Ids that end a response: EOS (an id or a list), and those of a text as it stands behind a letter, not at a start."""
    eos = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else ())}
    if stop_token is None:
        return sorted(eos)
    x, ids = (tokenizer("x" + text, add_special_tokens=False).input_ids for text in ("", stop_token))
    if ids[: len(x)] != x or ids == x or {tokenizer.unk_token_id, tokenizer.pad_token_id} & {*ids[len(x) :]}:
        raise UserError(f"--stop_token {stop_token!r}: the tokenizer has no tokens for it alone behind a letter")
    return sorted(eos.union(ids[len(x) :]))


def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt, a text or a list of messages: at most one BOS, and no EOS that the tokenizer would add."""
    is_text = isinstance(prompt, str)
    if not is_text and tokenizer.chat_template is None:
        raise UserError("the data holds messages, but the model's tokenizer has no chat template")
    text = prompt if is_text else tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    plain, ids = (tokenizer(text, add_special_tokens=special).input_ids for special in (False, is_text))
    if ids[-len(plain) - 1 :] == [*plain, tokenizer.eos_token_id] and (plain or ids != [tokenizer.bos_token_id]):
        ids = ids[:-1]
    while len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids = ids[1:]
    return ids


def encode_prompts(rows, tokenizer, query_length, path):
    """[(token ids, row)] of the prompts that fit."""
    encoded = []
    for number, row in enumerate(rows, start=1):
        try:
            encoded.append((encode_prompt(tokenizer, row["prompt"]), row))
        except Exception as error:  # chat templates refuse in many ways
            raise UserError(f"{path}: row {number}: {error}") from error
        if not encoded[-1][0]:
            raise UserError(f"{path}: row {number} has an empty prompt")
    kept = [pair for pair in encoded if len(pair[0]) <= query_length]
    if len(kept) < len(encoded):
        print(f"{path}: left out {len(encoded) - len(kept)} of {len(encoded)} prompts longer than --query_length")
    if not kept:
        raise UserError(f"{path}: no prompt is left; every one is longer than --query_length {query_length}")
    return kept


def prompt_order(num_prompts, first, count, seed):
    """Indices of the prompts of episodes first .. first + count - 1: pass after pass, each in an order of its own."""
    passes = range(first // num_prompts, (first + count - 1) // num_prompts + 1)
    order = [i for p in passes for i in torch.randperm(num_prompts, generator=seeded(seed, "prompts", p)).tolist()]
    return order[first % num_prompts :][:count]


def left_pad(sequences, length, pad_id, device):
    """(queries, query_mask), each (B,P)."""
    queries = torch.tensor([[pad_id] * (length - len(ids)) + ids for ids in sequences])
    query_mask = torch.tensor([[False] * (length - len(ids)) + [True] * len(ids) for ids in sequences])
    return queries.to(device), query_mask.to(device)


def call_reward_fn(function, rows, responses, device):
    """The function's scores (B,) fp32 for rows of the data set and the texts of their responses."""
    columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", "prompts", "responses")}
    try:
        scores = [float(score) for score in function([row["prompt"] for row in rows], responses, **columns)]
    except Exception as error:  # the user's code, or an answer that is no sequence of numbers
        raise UserError(f"{function.__name__} gives no number for each response: {error!r}") from error
    if len(scores) != len(rows) or not all(map(math.isfinite, scores)):
        raise UserError(f"{function.__name__} returned {scores} for {len(rows)} responses, not a finite number each")
    return torch.tensor(scores, device=device)


def check_flags(args):
    """Refuse what cannot work together; `prepare` has refused what is below 0."""
    check_divides(args.batch_size, args.total_episodes, "--total_episodes by --batch_size")
    for name in ("temperature", "target_kl_nats", "early_stop_kl", *(x for x in vars(args) if x.startswith("clip"))):
        if getattr(args, name) == 0:
            raise UserError(f"--{name} 0: must be above 0")
    if max(args.gamma, args.lam) > 1:
        raise UserError("--gamma and --lam: must be at most 1")
    if args.min_length >= args.response_length and args.missing_eos_score != "none":
        raise UserError("--min_length: must be below --response_length, else no response could end")
    if args.target_kl_nats and args.kl_coef == 0:
        raise UserError("--target_kl_nats: scales --kl_coef, which must start above 0")
    if args.reward_model and args.reward_fn:
        raise UserError("--reward_model and --reward_fn: give one of them; to watch a function, use --monitor_fn")


def load_models(args, tokenizer, num_positions, device):
    """(policy, reference, critic, reward_model). The critic starts as the reward model, else with a zero head."""
    classifier, scorer = AutoModelForSequenceClassification, args.reward_model
    reward_model = load_pretrained(classifier, scorer, num_labels=1)[0] if scorer else None
    policy, critic = load_pretrained(AutoModelForCausalLM, args.model)[0], copy.deepcopy(reward_model)
    if "Linear" in str(StaticCache(policy.config, 1).layers) or hasattr(policy.config, "text_config"):
        raise UserError(f"--model {args.model}: its linear attention confuses a static cache, or it is not text alone")
    if critic is None or args.value_trunk == "shared":
        critic, _ = load_pretrained(classifier, args.model, ["score.weight"], num_labels=1)
        torch.nn.init.zeros_(critic.score.weight), critic.base_model.load_state_dict(policy.base_model.state_dict())
    lists = [x.eos_token_id for x in (policy.config, policy.generation_config) if isinstance(x.eos_token_id, list)]
    eos = sorted({*sum(lists, [tokenizer.eos_token_id])}) if lists else tokenizer.eos_token_id
    for model in filter(None, (policy, critic, reward_model)):
        limits = [getattr(model.config, name, None) for name in ("max_position_embeddings", "window_size")]
        if (rope := getattr(model.config, "rope_parameters", None) or {}).get("rope_type") == "longrope":
            limits.append(rope["original_max_position_embeddings"])  # behind it, it turns otherwise
        if num_positions > min(filter(None, limits), default=num_positions):  # a static cache confuses GPT-Neo's window
            raise UserError(f"--response_length: {num_positions} positions with the prompt, more than a model has")
        model.to(device).config.update({"pad_token_id": tokenizer.pad_token_id, "eos_token_id": eos})
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    policy.generation_config = type(policy.generation_config).from_model_config(policy.config)
    reference = copy.deepcopy(policy).requires_grad_(False)
    if args.value_trunk == "shared":
        setattr(critic, critic.base_model_prefix, policy.base_model)
    return policy, reference, critic, reward_model


def main(args):
    args = prepare(args)  # everything that can be refused is refused before a model is loaded or a file written
    check_flags(args)
    args.model = args.model or newest_run("sft")
    args.reward_model = args.reward_model or (None if args.reward_fn else newest_run("reward_model"))
    tokenizer = load_tokenizer(args.model)
    if args.reward_model and load_tokenizer(args.reward_model).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"--reward_model {args.reward_model}: its tokenizer differs from that of {args.model}")
    prompts = encode_prompts(load_rows(args.dataset, [("prompt",)]), tokenizer, args.query_length, args.dataset)
    reward_fn = load_function(args.reward_fn, "--reward_fn") if args.reward_fn else None
    monitor_fn = load_function(args.monitor_fn, "--monitor_fn") if args.monitor_fn else None
    for function in filter(None, (reward_fn, monitor_fn)):  # asked once, so that mistakes show before anything runs
        call_reward_fn(function, [row for _, row in (prompts * 2)[:2]], ["", ""], "cpu")
    P, R = max(len(ids) for ids, _ in prompts), args.response_length
    cuda = (device := (ranks := init_ranks()).device).type == "cuda"
    check_divides(ranks.world_size * args.num_minibatches, args.batch_size, "--batch_size by ranks * --num_minibatches")
    torch.manual_seed(args.seed)
    policy, reference, critic, reward_model = load_models(args, tokenizer, P + R, device)
    actor_critic, frozen = (ActorCritic(*x, args.entropy_coef) for x in ((policy, critic), (reference, None)))
    train_model = wrap(actor_critic, ranks)
    optimizer = torch.optim.AdamW(actor_critic.parameters(), lr=args.lr, eps=1e-5, weight_decay=0.0, fused=True)
    sampler = copy.deepcopy(policy).requires_grad_(False)  # of the policy's own weights, or of a bf16 copy of them,
    for own, parameter in zip(sampler.parameters(), policy.parameters()):  # whose storage never moves
        own.data = parameter.data if args.precision == "fp32" else own.data.bfloat16()  # rotary buffers stay fp32
    step, models = decode_step, torch.nn.ModuleList(filter(None, (actor_critic, reference, reward_model)))
    if args.compile:  # of the models each layer, for any length: those of one kind share a graph, however many
        stays = torch.compiler.skip_guard_on_all_nn_modules_unsafe, torch.compiler.skip_guard_on_globals_unsafe
        tuning = {"triton.cudagraphs": True} if cuda else {"cpp_wrapper": True, "realize_opcount_threshold": 12}
        tuning |= {"guard_filter_fn": lambda x: [*map(min, *(f(x) for f in stays))], "cpp_wrapper_build_separate": True}
        step = torch.compile(step, fullgraph=True, dynamic=not cuda or None, options=tuning)
        masking_utils._ignore_causal_mask_sdpa = lambda *_, **__: False  # asking makes a GPU wait, and two graphs
        (dynamo := torch._dynamo.config).recompile_limit, dynamo.specialize_float = 256, True  # layers; temperature
        [x.compile(dynamic=True) for x in models.modules() if isinstance(x, modeling_layers.GradientCheckpointingLayer)]
        actor_critic.logprobs = frozen.logprobs = torch.compile(token_logprobs, dynamic=True)
    num_updates, B = args.total_episodes // args.batch_size, args.batch_size // ranks.world_size
    mine, size = slice(ranks.rank * B, (ranks.rank + 1) * B), args.micro_batch_size
    stop_ids = torch.tensor(stop_token_ids(tokenizer, args.stop_token, policy.config.eos_token_id), device=device)
    bias, pad_id = logit_bias(policy, tokenizer), tokenizer.pad_token_id
    sampling = {"bias": bias, "min_length": args.min_length, "step": step}
    sampling["cache"] = StaticCache(config=policy.config, max_cache_len=P + R) if cuda else None
    controller = AdaptiveKLController(args.kl_coef, args.target_kl_nats, args.kl_horizon)
    moments, cap = torch.zeros(3, dtype=torch.float64, device=device), args.cliprange_score or math.inf
    run, means, done = Run(args, ranks, "ppo_rlhf"), Means(), 0
    shown = ["objective/scores", "objective/kl", "val/sequence_lengths", "val/has_eos", "policy/clipfrac_avg"]
    shown += ["val/explained_var", "optim/skipped"]
    if args.resume and (state := run.load_checkpoint()):
        actor_critic.load_state_dict(state["model"]), optimizer.load_state_dict(state["optimizer"])
        done, controller.kl_coef, moments = state["step"], state["kl_coef"], state["moments"].to(device)
    for update in progress(done, num_updates, ranks, "ppo_rlhf"):
        # 1. rollout: prompts and uniforms of the global batch do not depend on the number of ranks
        started = clock(device)
        order = prompt_order(len(prompts), (update - 1) * args.batch_size, args.batch_size, args.seed)[mine]
        queries, query_mask = left_pad([prompts[i][0] for i in order], P, pad_id, device)
        uniforms = torch.rand(args.batch_size, R, generator=seeded(args.seed, "uniforms", update))[mine].to(device)
        if args.precision == "bf16":
            torch._foreach_copy_(list(sampler.parameters()), [p.detach() for p in policy.parameters()])
        responses = generate(sampler, queries, query_mask, uniforms, args.temperature, stop_ids, pad_id, **sampling)
        mask = response_mask(responses, stop_ids, args.min_length)
        input_ids, attention_mask = torch.cat([queries, responses], 1), torch.cat([query_mask, mask], 1)
        # 2. score: rows of similar length together, cut behind their longest at a multiple of 8
        sampled, parts, tokens = clock(device), [], mask.sum(1).cpu()
        for part in (by_length := tokens.argsort(stable=True)).split(size):
            longest, part = min(-(-tokens[part].max().item() // 8) * 8, R), part.to(device)
            ids, attention = input_ids[part, : P + longest], attention_mask[part, : P + longest]
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, args.precision == "bf16"):
                logprobs, _, values = train_model(ids, attention, longest, args.temperature, bias)
                ref_logprobs = frozen(ids, attention, longest, args.temperature, bias)
                scores = last_token_scores(reward_model, ids, attention) if reward_model else values[:, 0]  # unused
            parts.append((*(F.pad(x, (0, R - longest)) for x in (logprobs, values, ref_logprobs)), scores))
        logprobs, values, ref_logprobs, scores = (torch.cat(x)[by_length.argsort()] for x in zip(*parts))
        rows = [prompts[i][1] for i in order]
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        raw_scores = call_reward_fn(reward_fn, rows, texts, device) if reward_fn else scores
        missing, has_eos = args.missing_eos_score, (torch.isin(responses, stop_ids) & mask)[:, args.min_length :].any(1)
        judged = has_eos | (missing == "none")  # the rows that keep their own score
        scores, moments = normalise(raw_scores, judged, moments) if args.normalize_scores else (raw_scores, moments)
        scores = scores.clamp(-cap, cap).where(judged, 0.0 if missing == "none" else missing)
        rewards = compute_rewards(scores, logprobs, ref_logprobs, mask, controller.kl_coef)
        scored, steps = clock(device), 0
        # 3. advantages
        rewards = whiten(rewards, mask, shift_mean=False) if args.whiten_rewards else rewards
        advantages, returns = compute_gae(rewards, values, mask, args.gamma, args.lam)
        advantages = whiten(advantages, mask)
        # 4. update: every rank holds the global batch and takes its share of each minibatch
        batch = [all_gather(x) for x in (input_ids, attention_mask, logprobs, values, advantages, returns, mask)]
        optimizer.param_groups[0]["lr"] = lr = args.lr * (1 - (update - 1) / num_updates)
        orders = [seeded(args.seed, "minibatches", update, epoch) for epoch in range(args.num_epochs)]
        orders = torch.stack([torch.randperm(args.batch_size, generator=generator) for generator in orders])
        lengths = batch[-1].sum(1).cpu()  # of responses: micro-batches are cut behind their longest, at a multiple of 8
        for tried, minibatch in enumerate(orders.view(-1, args.batch_size // args.num_minibatches), start=1):
            optimizer.zero_grad()
            num_tokens, checks = lengths[minibatch].sum(), Means()  # over all ranks
            parts = minibatch[lengths[minibatch].argsort(stable=True)][ranks.rank :: ranks.world_size].split(size)
            for k, index in enumerate(parts, start=1):
                longest, index = min(-(-lengths[index].max().item() // 8) * 8, R), index.to(device)
                ids, attention, *old = (x[index, : x.shape[1] - R + longest] for x in batch)
                train_model.require_backward_grad_sync = k == len(parts)
                with torch.autocast(device.type, torch.bfloat16, args.precision == "bf16"):
                    new = train_model(ids, attention, longest, args.temperature, bias)
                    loss_sum, stats = ppo_loss(*new, *old, args)
                (loss_sum * ranks.world_size / num_tokens).backward()  # ranks average: times their number
                checks.add(stats, old[-1])
            grad_norm = torch.nn.utils.clip_grad_norm_(actor_critic.parameters(), args.max_grad_norm or math.inf)
            checks.add({"optim/grad_norm": grad_norm})
            own, check = dict(checks), checks.reduce()  # sums of this rank; means of all, so all go on, skip or stop
            if args.early_stop_kl and steps and check["policy/approxkl_avg"] > args.early_stop_kl:
                break
            if 0.1 <= check["val/ratio"] <= 10 and math.isfinite(check["optim/grad_norm"]):
                optimizer.step()
                means.update({name: means.get(name, 0) + x for name, x in own.items()})
                steps += 1
        updated = clock(device)
        if steps == 0:
            raise UserError(f"update {update}: no finite gradient, or no ratio in 0.1 .. 10: lower --lr or see scores")
        # log
        log_ratio = torch.where(mask, logprobs - ref_logprobs, 0.0)
        kl, k3 = log_ratio.sum(1), torch.exp(-log_ratio) - 1 + log_ratio
        penalty, entropy = -controller.kl_coef * kl, -torch.where(mask, logprobs, 0.0).sum(1)
        stats = {"objective/kl": kl, "objective/kl_k3": k3.sum(1), "objective/entropy": entropy, "val/has_eos": has_eos}
        stats |= {"objective/scores": scores, "objective/raw_scores": raw_scores, "val/sequence_lengths": mask.sum(1)}
        if monitor_fn:
            stats[f"monitor/{monitor_fn.__name__}"] = call_reward_fn(monitor_fn, rows, texts, device)
        means.add(stats | {"objective/non_score_reward": penalty, "objective/rlhf_reward": scores + penalty})
        means.add({"objective/kl_per_token": log_ratio, "objective/kl_k3_per_token": k3}, mask)
        spread = [masked_mean((x - masked_mean(x, mask)) ** 2, mask) for x in (returns - values, returns)]
        means.add({"val/explained_var": (1 - spread[0] / spread[1].clamp(min=1e-8)) * (spread[1] > 1e-8)})
        metrics = means.reduce() | {"kl_coef": controller.kl_coef, "optim/steps": steps, "optim/skipped": tried - steps}
        metrics |= {"lr": lr, "episode": update * args.batch_size, "eps": args.batch_size / (updated - started)}
        metrics |= {"time/rollout": sampled - started, "time/score": scored - sampled, "time/update": updated - scored}
        if args.target_kl_nats:
            controller.update(metrics["objective/kl"], args.batch_size)
        run.log(update, metrics, show=[*shown, *(name for name in metrics if name.startswith("monitor/"))])
        if ranks.rank == 0 and (update % 10 == 0 or update in (1, num_updates)):
            samples = {"query": [row["prompt"] for row in rows], "response": texts}
            run.show_samples(update, {"score": scores.tolist(), "kl": kl.tolist(), **samples})
        if args.save_every and update % args.save_every == 0:
            state = {"model": actor_critic.state_dict(), "optimizer": optimizer.state_dict(), "moments": moments}
            run.save_checkpoint(update, **state, kl_coef=controller.kl_coef)
    if ranks.rank == 0:
        [save_pretrained(run.folder / name, x, tokenizer) for name, x in (("critic", critic), ("model", policy))]
        print(f"\nmodel folder  {run.folder}/model\nnext          python benchmarks/evaluate.py --run {run.folder}")


if __name__ == "__main__":
    launch(main, tyro.cli(Args, use_underscores=True))
