r"""GRPO: raise a policy's score by comparing several responses to one prompt; there is no critic.

Shao et al. 2024, "DeepSeekMath: pushing the limits of mathematical reasoning in open language
models"; Ahmadian et al. 2024, "Back to basics: revisiting REINFORCE style optimization" (RLOO);
Yu et al. 2025, "DAPO: an open-source LLM reinforcement learning system at scale"; Liu et al. 2025,
"Understanding R1-Zero-like training: a critical perspective" (Dr. GRPO); Schulman et al. 2017,
"Proximal policy optimization algorithms".

Each update:
    1. rollout      sample num_generations responses, a group, to each prompt from the policy;
                    reward functions or a reward model give each response a score
    2. evaluate     each response token gets a log-probability under the policy, and under the
                    frozen reference, if kl_coef > 0
    3. advantages   the advantage of a response, for each of its tokens alike, is how far its score
                    is above the mean of its group, divided by the standard deviation of the group
    4. update       clipped policy loss + kl_coef * KL to the reference, in num_epochs passes over
                    the batch, of num_minibatches optimizer steps each

The objectives of four papers, as flags. The clipped loss, --num_epochs and --missing_eos_score stay
those of this file; RLOO, for instance, was published with one epoch and without clipping:
    GRPO        --advantage grpo --loss_norm sequence --kl_in loss --kl_coef 0.04
    DAPO        --advantage grpo --loss_norm token --cliprange_high 0.28 --mask_overlong
                    --missing_eos_score none --refill_flat_groups 5
    Dr. GRPO    --advantage dr_grpo --loss_norm constant
    RLOO        --advantage rloo --loss_norm constant --kl_in reward --kl_coef 0.05

One process:    python grpo_rlhf.py
Eight GPUs:     torchrun --nproc_per_node=8 grpo_rlhf.py --model runs/my_sft/model \
                    --reward_fn my_reward.py:reward --dataset my_prompts.jsonl --lr 1e-6

Shapes. B rows on this rank; P tokens in the longest prompt of the data set; R response_length;
T = P + R; V vocabulary; d hidden width. A micro-batch is cut: its R is its longest response, and
its T its longest row.

Time. Index t of a (B,R) tensor is response token t; logprobs[:, t] is that token's log-probability.

Groups. The responses to one prompt are consecutive rows of the batch, sampled on one rank. The
update deals out rows without regard to groups.

Layout. Prompts are padded on the left for `generate` alone. After that, each row is packed to the
left: prompt, response, padding. Causal attention never looks ahead, so no real token sees the
padding, and outside `generate` no model needs an attention mask or position ids.

After the end of a response, `responses` and `input_ids` hold EOS, `mask` and `is_real` are False,
and every other (B,R) tensor is 0. The end token itself belongs to the response: its mask is True.

Responses
    - The end tokens are EOS, any further EOS ids in the model's configs, and those of --stop_token.
      Within the first --min_length tokens an end token does not end the response: it goes on, and
      its mask stays True.
    - There is no top-k or top-p. The pad token, and ids of the model's vocabulary without a token
      in the tokenizer, have probability 0, in the sampler, the policy and the reference alike.
    - Responses are sampled from a copy of the policy, refreshed before each rollout. The old
      log-probabilities are computed by the policy itself, so the probability ratios of an update's
      first step are 1, up to rounding.
Scores
    - A score is the sum of what the reward model and the functions of --reward_fn say, weighted by
      --reward_weights.
    - The score of a response that reaches --response_length without an end token is replaced by
      --missing_eos_score.
Advantages
    - --advantage grpo divides by the standard deviation of the group, the biased one, plus 1e-4;
      dr_grpo does not divide; rloo compares each response with the mean of the others, which is
      dr_grpo times G / (G - 1) for groups of G.
    - Advantages of a group sum to 0. So with --loss_norm sequence, and without --mask_overlong, the
      policy term of a whole batch is 0 before its first step. Its gradient is not: watch the score,
      not the loss.
    - A group whose scores are all equal is flat. Its advantages are 0, unless --kl_in reward tells
      its responses apart, and the policy term learns nothing from it. With --refill_flat_groups
      such groups are replaced by others.
KL
    - With --kl_in loss the k3 estimate of each token's KL to the reference is added to its loss.
      With --kl_in reward the k1 estimate, summed over the response, is subtracted from its score
      before the group is compared. The gradient of the first, on samples of the policy, is that of
      KL(reference, policy), and of the second that of KL(policy, reference). After the first step
      of an update the samples are those of an older policy, and the first holds only nearly.
    - A kl_coef does not carry over from one to the other: in the loss it multiplies what
      --loss_norm makes of the tokens, and in the reward a sum, which is then divided by the
      standard deviation of the group, or not.
    - kl_coef is 0 by default. Then no reference is loaded.
Loss and steps
    - --loss_norm says how the tokens of a minibatch are averaged, always over all ranks. sequence:
      the mean over each response, and then over the responses. token: the mean over all tokens.
      constant: the sum, divided by the number of responses and by --response_length.
    - With --mask_overlong responses without an end token are compared with their group, but do not
      contribute to the loss and its metrics. They still count in the number of responses, and not
      in the number of tokens. Give them --missing_eos_score none as well: a penalty for them lowers
      the mean of their group, and so raises the others, wrong answers too.
    - A minibatch is drawn from the rows of all ranks. Each rank takes an equal share of it, in
      micro-batches of rows of similar length. So neither the number of ranks nor
      --micro_batch_size changes the result, up to rounding.
    - A step is skipped if its gradient is not finite, or if the mean probability ratio of its
      tokens is above --ratio_guard or below 1 / --ratio_guard. --early_stop_kl ends an update
      before a step, but never before the first. Minibatches that are skipped, and the one that
      ends an update early, are left out of the metrics. An update without a single step ends the
      run with an error.
Precision
    - With --precision bf16 the weights of the models that are not trained are rounded to bf16, so
      the first KL is only nearly 0. The trained weights stay fp32 and compute in bf16 through
      autocast. Score heads, log-softmax, and all that is computed from their results are fp32.
      Dropout is off.
    - --compile, the default on CUDA, compiles three things: each layer of every model but the
      sampler; `token_logprobs`; and, as a whole, the sampler's decoding step. The sampler's pass
      over the prompt is not compiled.

What the algorithm needs from utils.py:
    all_gather(x)           the rows of all ranks
    sum_gradients(model)    adds up the gradients of all ranks
    Means                   averages metrics over micro-batches and ranks
    pack_rows               moves the real tokens of each row to the left
    micro_batch_rows        sorts rows by length, takes rank r's share (of n ranks r, r + n, r + 2n
                            and so on), and cuts it into micro-batches
"""

import copy
import functools
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import utils
from utils import UserError


@dataclass
class Args:
    model: str | None = None
    """the model to train, a Hub name or a folder; the frozen reference, if kl_coef > 0, is a copy
    of it. If not given: the newest finished run of sft.py"""
    reward_model: str | None = None
    """the model that scores responses, a Hub name or a folder. If neither this nor --reward_fn is
    given: the newest finished run of reward_model.py"""
    reward_fn: tuple[str, ...] = ()
    """functions that score responses, instead of a reward model or beside it:
    path/to/file.py:function(prompts, responses, **columns), which returns a number for each
    response"""
    reward_weights: tuple[float, ...] = ()
    """a score is the weighted sum of what all of them say: a weight for each --reward_fn, and then
    one for --reward_model. If not given: all are 1"""
    monitor_fn: tuple[str, ...] = ()
    """functions like --reward_fn whose means are logged as monitor/<name> and never trained on"""
    dataset: str = "data/randomwalks/prompts.jsonl"
    """rows with a column `prompt`; all other columns are passed to the reward functions"""
    eval_dataset: str | None = None
    """held-out rows of the same kind, to which the policy responds before the first update, every
    --eval_every updates, and after the last. If not given: no evaluation"""
    output_dir: str | None = None
    """the run folder, which must not exist yet. If not given: runs/grpo_rlhf__<seed>__<time>"""
    seed: int = 1
    """determines the order of the prompts, the sampling and the minibatches"""
    total_episodes: int = 3840
    """responses sampled in the whole run; a multiple of batch_size"""
    batch_size: int = 128
    """responses per update, over all ranks"""
    num_generations: int = 8
    """responses to each prompt, a group; batch_size is a multiple of it"""
    num_epochs: int = 4
    """passes over the batch in each update"""
    num_minibatches: int = 1
    """optimizer steps in each pass"""
    micro_batch_size: int = 128
    """rows per forward and backward on one rank. Fewer rows need less memory, contain less padding,
    and do not change the result. Sampling always takes all rows at once"""
    query_length: int = 64
    """the most tokens a prompt may have; longer prompts are left out and counted on the screen"""
    response_length: int = 10
    """the most tokens a response may have, including the end token"""
    stop_token: str | None = None
    """a text, such as "."; it is tokenised, and each of its tokens ends a response, as EOS does"""
    min_length: int = 0
    """an end token among the first min_length tokens of a response does not end it"""
    temperature: float = 1.0
    """divides the logits wherever a probability is computed"""
    lr: float = 3e-4
    """learning rate of the first update; it falls linearly to lr / number of updates in the last.
    The default suits the random walks; a pretrained model needs about 1e-6"""
    max_grad_norm: float = 1.0
    """the norm of the gradient, over all parameters, is clipped to this; 0 switches clipping off"""
    kl_coef: float = 0.0
    """weight of the KL to the reference; 0: there is no reference"""
    kl_in: Literal["reward", "loss"] = "loss"
    """reward: subtract the KL (k1) of a response from its score. loss: add the KL (k3) of each
    token to its loss"""
    advantage: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """grpo: (score - mean of the group) / standard deviation of the group. dr_grpo: score - mean.
    rloo: score - mean of the others in the group"""
    loss_norm: Literal["sequence", "token", "constant"] = "sequence"
    """how the loss is averaged over tokens. sequence: within each response, then over responses.
    token: over all tokens. constant: divide by responses * response_length"""
    mask_overlong: bool = False
    """leave responses that do not end by themselves out of the loss"""
    refill_flat_groups: int = 0
    """replace groups whose scores are all equal, by sampling up to this many further batches in an
    update, which total_episodes does not count"""
    cliprange: float = 0.2
    """the probability ratio is clipped to 1 - cliprange .. 1 + cliprange"""
    cliprange_high: float | None = None
    """makes the upper bound 1 + cliprange_high instead. If not given: 1 + cliprange"""
    ratio_guard: float = 10.0
    """skip an optimizer step whose mean probability ratio is above this or below 1 / this"""
    early_stop_kl: float | None = None
    """end an update, after at least one step, at a minibatch whose policy/approxkl_avg, the
    distance from the policy before the update, is above this. If not given: never"""
    missing_eos_score: float | Literal["none"] = -1.0
    """the score of a response that does not end by itself; none: it keeps its own score"""
    precision: Literal["fp32", "bf16"] = "bf16" if torch.cuda.is_available() else "fp32"
    """what forward, backward and sampling compute in; weights and optimizer state stay fp32"""
    compile: bool = torch.cuda.is_available()
    """compile each transformer layer, the log-probabilities and the decoding step"""
    eval_every: int = 10
    """updates between two evaluations"""
    eval_samples: int = 4
    """responses to each held-out prompt"""
    save_best: bool = False
    """keep the model with the highest eval/score in best_model/"""
    save_every: int = 0
    """updates between two checkpoints to resume from; 0: no checkpoints"""
    resume: str | None = None
    """continue the run in this folder from its newest checkpoint, with the arguments it had"""
    timeout_minutes: float = 60
    """how long a rank waits for the others before the job fails"""
    track: Literal["none", "wandb", "tensorboard"] = "none"
    """where metrics go besides metrics.jsonl"""


# --------------------------------------------------------------------------------------------------
# The algorithm


def response_mask(responses, stop_ids, min_length=0):
    """(B,R) bool: True up to and including each row's first stop id at an index >= min_length."""
    is_stop = torch.isin(responses, torch.as_tensor(stop_ids, device=responses.device))
    is_stop[:, :min_length] = False
    stops_before = is_stop.long().cumsum(1) - is_stop.long()
    return stops_before == 0


def token_logprobs(logits, tokens, temperature, allowed=None):
    """Log-probability of each token and entropy of its distribution, both (B,R), in nats and fp32.

    logits (B,R,V) predict tokens (B,R); they are divided by the temperature. allowed (V,) bool: ids
    where it is False get probability 0. The logits may hold -inf already.

    Peak memory beyond that of the logits, for fp32 logits, measured on a CPU: 16 bytes per
    logit, and 21 with the backward pass; compiled 4 and 8.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -math.inf)
    log_normaliser = torch.logsumexp(logits, dim=-1)
    logprobs = logits.gather(-1, tokens[..., None]).squeeze(-1) - log_normaliser

    # The entropy is log Z - sum of p * logit, in which 0 * -inf counts as 0.
    probabilities = torch.softmax(logits, dim=-1)
    finite_logits = logits.masked_fill(logits == -math.inf, 0.0)
    entropy = log_normaliser - (probabilities * finite_logits).sum(-1)
    return logprobs, entropy


def policy_loss(new_logprobs, logprobs, advantages, cliprange, cliprange_high=None):
    """PPO's clipped loss per token: (loss, ratio, clipped), each (B,R).

    Schulman et al. 2017, equation 7, negated. The ratio new / old is clipped to 1 - cliprange ..
    1 + cliprange_high (None: cliprange). clipped: where the clipped loss is strictly the larger.
    """
    ratio = torch.exp(new_logprobs - logprobs)
    high = cliprange if cliprange_high is None else cliprange_high
    unclipped_loss = -advantages * ratio
    clipped_loss = -advantages * ratio.clamp(1 - cliprange, 1 + high)
    loss = torch.maximum(unclipped_loss, clipped_loss)
    return loss, ratio, clipped_loss > unclipped_loss


def group_advantages(scores, num_generations, kind):
    """The advantage of each response, (B,): how far its score is above those of its group.

    scores (B,), in which groups of num_generations rows are consecutive. kind: "grpo" divides
    score - mean by the standard deviation (Shao et al. 2024, section 4.1.2; here the biased one,
    plus 1e-4), "dr_grpo" does not divide (Liu et al. 2025, section 3), and "rloo" subtracts the
    mean of the other scores of the group (Ahmadian et al. 2024, equation 9). The advantages of a
    group sum to 0, and are exactly 0 where its scores are equal.
    """
    groups = scores.view(-1, num_generations)
    # A mean of equal numbers may differ from them by rounding.
    is_flat = flat_groups(scores, num_generations)
    centred = groups - groups.mean(1, keepdim=True)
    centred = torch.where(is_flat[:, None], 0.0, centred)
    if kind == "grpo":
        centred = centred / (groups.std(1, correction=0, keepdim=True) + 1e-4)
    elif kind == "rloo":
        centred = centred * num_generations / (num_generations - 1)
    elif kind != "dr_grpo":
        raise ValueError(f"no such advantage: {kind}")
    return centred.flatten()


def flat_groups(scores, num_generations):
    """Which groups have equal scores in all their rows, (B / num_generations,) bool."""
    groups = scores.view(-1, num_generations)
    return (groups == groups[:, :1]).all(1)


def k3(logprobs, ref_logprobs):
    """ref / p - 1 - log(ref / p) of each token: an estimate of the KL to the reference, >= 0.

    Schulman 2020, "Approximating KL divergence". Its mean over samples of p is KL(p, ref). Its
    gradient on samples of p is not: that is the gradient of KL(ref, p), the other way round.
    """
    log_ratio = ref_logprobs - logprobs
    return torch.exp(log_ratio) - 1 - log_ratio


def grpo_targets(batch, args):
    """advantages (B,) and loss_mask (B,R) of this rank's rows.

    batch has scores and has_eos (B,), mask (B,R), and with --kl_in reward logprobs and ref_logprobs
    (B,R).
    """
    scores = batch["scores"]
    if args.kl_coef > 0 and args.kl_in == "reward":
        scores = scores - args.kl_coef * (batch["logprobs"] - batch["ref_logprobs"]).sum(1)
    loss_mask = batch["mask"]
    if args.mask_overlong:
        loss_mask = loss_mask & batch["has_eos"][:, None]
    advantages = group_advantages(scores, args.num_generations, args.advantage)
    return {"advantages": advantages, "loss_mask": loss_mask}


def loss_normaliser(mask, loss_norm):
    """What `grpo_loss` divides its sum by: the tokens of mask (B,R) for "token", else B."""
    if loss_norm == "token":
        return mask.sum().clamp(min=1)
    return torch.tensor(len(mask), device=mask.device)


def grpo_loss(new_logprobs, logprobs, ref_logprobs, advantages, mask, args, normaliser=None):
    """The loss, 0-d, and its parts (B,R) by the names that are logged.

    new_logprobs, logprobs (before the update) and ref_logprobs (B,R); the last is only read if
    there is a KL in the loss, and may be None otherwise. advantages (B,); mask (B,R): the tokens
    that are trained on. args: cliprange, cliprange_high, kl_coef, kl_in, loss_norm and
    response_length. normaliser: `loss_normaliser` of the whole minibatch, if these rows are a part
    of one. With n_i tokens in row i, the loss l of a token has the weight

    sequence    1 / (B * n_i)                   Shao et al. 2024, equation 3
    token       1 / (n_1 + ... + n_B)           Yu et al. 2025, equation 8
    constant    1 / (B * response_length)       Liu et al. 2025
    """
    new_logprobs = torch.where(mask, new_logprobs, 0.0)
    logprobs = torch.where(mask, logprobs, 0.0)
    loss, ratio, clipped = policy_loss(
        new_logprobs, logprobs, advantages[:, None], args.cliprange, args.cliprange_high
    )
    stats = {
        "loss/policy_avg": loss,
        "policy/clipfrac_avg": clipped,
        # The distance from the policy before the update, not from the reference.
        "policy/approxkl_avg": 0.5 * (new_logprobs - logprobs) ** 2,
        "val/ratio": ratio,
    }
    if args.kl_coef > 0 and args.kl_in == "loss":
        kl = k3(new_logprobs, torch.where(mask, ref_logprobs, 0.0))
        loss = loss + args.kl_coef * kl
        stats["loss/kl_avg"] = kl

    if args.loss_norm == "sequence":
        loss = loss / mask.sum(1, keepdim=True).clamp(min=1)
    elif args.loss_norm == "constant":
        loss = loss / args.response_length
    if normaliser is None:
        normaliser = loss_normaliser(mask, args.loss_norm)
    return torch.where(mask, loss, 0.0).sum() / normaliser, stats


# --------------------------------------------------------------------------------------------------
# The models


def response_hidden(model, batch):
    """Hidden states (B,R,d) of the states in which the response tokens are chosen.

    Response token t of a row is predicted at index prompt_length - 1 + t of input_ids.
    """
    hidden = model.base_model(batch["input_ids"], use_cache=False).last_hidden_state
    _, T, d = hidden.shape
    t = torch.arange(batch["mask"].shape[1], device=hidden.device)
    index = batch["prompt_lengths"][:, None] - 1 + t
    # In a row with a long prompt and a short response, the last t, which are masked, would be
    # beyond T.
    index = index.clamp(max=T - 1)
    return hidden.gather(1, index[..., None].expand(-1, -1, d))


def score_head(model, hidden):
    """Scores (...) in fp32 of hidden states (...,d): the linear head, minus config.score_mean."""
    # Written as a product and a sum because autocast would run a matrix product in bf16.
    weight = model.score.weight[0].float()
    scores = (hidden.float() * weight).sum(-1)
    return scores - getattr(model.config, "score_mean", 0.0)


def last_token_scores(model, input_ids, attention_mask):
    """The score (N,), in fp32, of each sequence at its last real token.

    model: a plain AutoModelForSequenceClassification with one label. input_ids (N,T);
    attention_mask (N,T): which tokens are real, whatever side the padding is on and whatever ids it
    holds, because the sequences are packed to the left first.
    """
    input_ids, lengths = utils.pack_rows(input_ids, attention_mask)
    hidden = model.base_model(input_ids, use_cache=False).last_hidden_state
    rows = torch.arange(len(lengths), device=lengths.device)
    return score_head(model, hidden[rows, lengths - 1])


class Actor(torch.nn.Module):
    """A language model, the policy or the reference, that gives log-probabilities of responses.

    logprobs_fn(logits, tokens) is `token_logprobs` with its temperature and allowed ids.
    """

    def __init__(self, model, logprobs_fn):
        super().__init__()
        self.model = model
        self.logprobs_fn = logprobs_fn

    def forward(self, batch):
        """logprobs and entropy of the response tokens, each (B,R)."""
        hidden = response_hidden(self.model, batch)
        logits = utils.head_logits(self.model, hidden)
        logprobs, entropy = self.logprobs_fn(logits, batch["responses"])
        return {"logprobs": logprobs, "entropy": entropy}


# --------------------------------------------------------------------------------------------------
# Sampling


def sample_tokens(logits, uniforms, temperature, allowed=None):
    """One token id per row, (B,), by inverting the cumulative distribution.

    logits (B,V); uniforms (B,) in [0,1). The token is the first whose cumulative probability
    exceeds the threshold, u times the total. Temperature 0 takes the most likely one. The
    randomness is an argument, so that the samples do not depend on the number of ranks.
    """
    logits = logits.float()
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -math.inf)
    likeliest = logits.argmax(-1, keepdim=True)
    if temperature == 0:
        return likeliest.squeeze(1)
    probabilities = torch.softmax(logits / temperature, dim=-1)
    cumulative = probabilities.cumsum(-1)
    threshold = uniforms[:, None] * cumulative[:, -1:]
    # Rounding can put the threshold at the total, or let a parallel sum step up where the
    # probability is 0. Then the index is no token, or an impossible one: take the most likely token
    # instead.
    tokens = torch.searchsorted(cumulative, threshold, right=True).clamp(max=logits.shape[-1] - 1)
    is_possible = probabilities.gather(1, tokens) > 0
    return torch.where(is_possible, tokens, likeliest).squeeze(1)


def decode_step(model, tokens, uniforms, temperature, allowed, **inputs):
    """Feed tokens (B,n) and sample the next one, (B,). inputs: positions, mask and cache."""
    hidden = model.base_model(tokens, use_cache=True, **inputs).last_hidden_state[:, -1]
    return sample_tokens(utils.head_logits(model, hidden), uniforms, temperature, allowed)


@torch.no_grad()
def generate(
    model, queries, query_mask, uniforms, temperature, stop_ids, pad_id, allowed=None, min_length=0,
    decode_fn=decode_step, cache=None,
):  # fmt: skip
    """Sample a response (B,R) to each prompt; a row is pad_id after its end.

    queries (B,P), left padded; query_mask (B,P): their real tokens. uniforms (B,R) in [0,1) are all
    the randomness there is. stop_ids end a row at an index >= min_length. allowed (V,) bool: ids
    that may be sampled. decode_fn: `decode_step` or its compiled version. cache: one with a slot
    for each of the P + R tokens, to be used again.
    """
    B, P = queries.shape
    R = uniforms.shape[1]
    if cache is None:
        cache = utils.static_cache(model.config, P + R)
    cache.reset()
    stop_ids = torch.as_tensor(stop_ids, device=queries.device)
    # By slot of the cache: all but the padding of the prompt may be read, and the first real token
    # of a row has position 0. Causal attention hides the slots that are not filled yet.
    slot_mask = F.pad(query_mask.long(), (0, R), value=1)
    positions = (slot_mask.cumsum(1) - 1).clamp(min=0)

    responses = torch.full((B, R), pad_id, device=queries.device)
    ended = torch.zeros(B, dtype=torch.bool, device=queries.device)
    # First the whole prompt is fed, uncompiled, and then one token after another.
    tokens = queries
    start = 0
    for t in range(R):
        end = P + t
        feed = decode_step if t == 0 else decode_fn
        next_tokens = feed(
            model,
            tokens,
            uniforms[:, t],
            temperature,
            allowed,
            position_ids=positions[:, start:end],
            attention_mask=slot_mask,
            past_key_values=cache,
        )
        # A row that has ended goes on with pads until all have ended.
        responses[:, t] = torch.where(ended, pad_id, next_tokens)
        if t >= min_length:
            ended = ended | torch.isin(next_tokens, stop_ids)
        if ended.all():
            break
        tokens = responses[:, t, None]
        start = end
    return responses


# --------------------------------------------------------------------------------------------------
# The phases of an update


def next_prompts(prompts, update, args, ranks):
    """This rank's prompts of an update: token ids, rows, and the uniforms (B,R) to sample with.

    Each prompt is repeated num_generations times. The list for all ranks depends on the seed and
    the update alone, and each rank takes its slice of it.
    """
    B = args.batch_size // ranks.world_size
    mine = slice(ranks.rank * B, (ranks.rank + 1) * B)
    num_prompts = args.batch_size // args.num_generations
    first = (update - 1) * num_prompts
    order = utils.prompt_order(len(prompts), first, num_prompts, args.seed)
    order = [i for i in order for _ in range(args.num_generations)]
    generator = utils.seeded(args.seed, "uniforms", update)
    uniforms = torch.rand(args.batch_size, args.response_length, generator=generator)
    chosen = [prompts[i] for i in order[mine]]
    prompt_ids = [ids for ids, _ in chosen]
    rows = [row for _, row in chosen]
    return prompt_ids, rows, uniforms[mine].to(ranks.device)


def rollout(sampler, prompt_ids, uniforms, longest_prompt, tokenizer, **sampling):
    """Sample a response to each prompt: (the batch of `pack_responses`, the responses as texts).

    sampling: the options of `generate`.
    """
    pad_id = sampling["pad_id"]
    queries, query_mask = utils.left_pad(prompt_ids, longest_prompt, pad_id, uniforms.device)
    responses = generate(sampler, queries, query_mask, uniforms, **sampling)
    stop_ids = sampling["stop_ids"]
    eos_id = tokenizer.eos_token_id
    batch = pack_responses(queries, query_mask, responses, stop_ids, sampling["min_length"], eos_id)
    return batch, tokenizer.batch_decode(batch["responses"], skip_special_tokens=True)


def pack_responses(queries, query_mask, responses, stop_ids, min_length, eos_id):
    """Join prompts (B,P) and responses (B,R), and pack each row to the left.

    Returns input_ids and is_real (B,T), prompt_lengths (B,), responses and mask (B,R), and has_eos
    (B,): whether an end token ended the response.
    """
    mask = response_mask(responses, stop_ids, min_length)
    is_end = torch.isin(responses, stop_ids) & mask
    has_eos = is_end[:, min_length:].any(1)

    is_real = torch.cat([query_mask, mask], dim=1)
    input_ids, lengths = utils.pack_rows(torch.cat([queries, responses], dim=1), is_real)
    is_real = torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None]
    # Padding goes through the model as well, before it is masked. It is EOS, because the
    # log-probability of a pad would be -inf, and 0 times infinity is NaN in the backward pass.
    return {
        "input_ids": input_ids.masked_fill(~is_real, eos_id),
        "is_real": is_real,
        "prompt_lengths": query_mask.sum(1),
        "responses": responses.masked_fill(~mask, eos_id),
        "mask": mask,
        "has_eos": has_eos,
    }


# The tensors of a batch that cover prompt and response, (B,T). All others are (B,R) or (B,).
WHOLE_ROWS = ("input_ids", "is_real")


def select(batch, rows):
    """Some rows of every tensor, cut after their longest row and their longest response."""
    index = torch.tensor(rows, device=batch["mask"].device)
    part = {name: x[index] for name, x in batch.items()}
    T = part["is_real"].sum(1).max().item()
    R = part["mask"].sum(1).max().item()
    for name, x in part.items():
        if x.ndim == 2:
            length = T if name in WHOLE_ROWS else R
            part[name] = x[:, :length]
    return part


def micro_batches(batch, rows, args, ranks=None):
    """Yield (row numbers, those rows of the batch) in micro-batches of rows of similar length.

    With ranks: only this rank's share of the rows.
    """
    lengths = batch["is_real"].sum(1).tolist()
    for numbers in utils.micro_batch_rows(rows, lengths, args.micro_batch_size, ranks):
        yield numbers, select(batch, numbers)


@torch.no_grad()
def evaluate_tokens(batch, model, args):
    """What a model says of each response token: its tensors, (B,R), 0 outside the mask."""
    mask = batch["mask"]
    evaluated = {}
    for rows, part in micro_batches(batch, range(len(mask)), args):
        with utils.autocast(args, mask.device):
            output = model(part)
        R = part["mask"].shape[1]
        for name, x in output.items():
            if name not in evaluated:
                evaluated[name] = torch.zeros(mask.shape, device=mask.device)
            evaluated[name][rows, :R] = torch.where(part["mask"], x, 0.0)
    return evaluated


@torch.no_grad()
def reward_model_scores(batch, reward_model, args):
    """What the reward model says of each response, (B,)."""
    mask = batch["mask"]
    scores = torch.zeros(len(mask), device=mask.device)
    for rows, part in micro_batches(batch, range(len(mask)), args):
        with utils.autocast(args, mask.device):
            scores[rows] = last_token_scores(reward_model, part["input_ids"], part["is_real"])
    return scores


def score_responses(batch, rows, texts, reward_fns, reward_model, args):
    """(scores (B,), {name: scores (B,)}): the weighted sum, and what each scorer says.

    rows: those of the data set that the prompts are from. texts: the responses.
    """
    parts = utils.call_reward_fns(reward_fns, rows, texts, batch["mask"].device)
    if reward_model is not None:
        parts["reward_model"] = reward_model_scores(batch, reward_model, args)
    weights = args.reward_weights or [1.0] * len(parts)
    scores = sum(weight * part for weight, part in zip(weights, parts.values(), strict=True))
    return scores, parts


def sample_and_score(update, prompts, sampler, sampling, scorers, args, ranks):
    """The batch of `rollout` with its scores (B,), the rows of the data set, and the texts.

    The batch gets `raw_scores`, `scores`, in which --missing_eos_score is set, and under
    "score/<name>" what each scorer says.
    """
    prompt_ids, rows, uniforms = next_prompts(prompts, update, args, ranks)
    batch, texts = rollout(sampler, prompt_ids, uniforms, **sampling)
    scores, parts = score_responses(batch, rows, texts, *scorers, args)
    batch["raw_scores"] = scores
    if args.missing_eos_score != "none":
        scores = torch.where(batch["has_eos"], scores, args.missing_eos_score)
    batch["scores"] = scores
    batch |= {f"score/{name}": part for name, part in parts.items()}
    return batch, rows, texts


def refill(batch, rows, texts, sample, update, num_updates, args):
    """The batch, rows and texts, in which groups with equal scores are replaced by new ones.

    Yu et al. 2025, section 3.2. sample(u) is the batch of update u. Attempt a samples a whole
    batch, that of update + a * num_updates, which no update of the run uses. Flat group j is
    replaced by the new group j, if that is not flat, so that the number of ranks makes no
    difference; the other new groups are thrown away. After --refill_flat_groups attempts, what is
    flat stays.
    """
    G = args.num_generations
    refilled = torch.zeros_like(batch["has_eos"])
    for attempt in range(1, args.refill_flat_groups + 1):
        is_flat = flat_groups(batch["scores"], G)
        if not is_flat.any():
            break
        new, new_rows, new_texts = sample(update + attempt * num_updates)
        takes_new = is_flat & ~flat_groups(new["scores"], G)
        takes_new = takes_new.repeat_interleave(G)
        for name, x in new.items():
            wanted = takes_new if x.ndim == 1 else takes_new[:, None]
            batch[name] = torch.where(wanted, x, batch[name])
        for i in takes_new.nonzero().flatten().tolist():
            rows[i] = new_rows[i]
            texts[i] = new_texts[i]
        refilled = refilled | takes_new
    batch["refilled"] = refilled
    return batch, rows, texts


def accumulate_gradients(model, full_batch, minibatch, loss_fn, args, ranks):
    """Forward and backward of a minibatch; every rank ends with the gradient of all of it.

    full_batch: the rows of all ranks. minibatch: row numbers, the same on all ranks. Returns the
    `Means` of this rank's share.
    """
    means = utils.Means()
    mask = full_batch["loss_mask"][minibatch.to(ranks.device)]
    normaliser = loss_normaliser(mask, args.loss_norm)
    for _, part in micro_batches(full_batch, minibatch.tolist(), args, ranks):
        with utils.autocast(args, ranks.device):
            new = model(part)
        loss, stats = loss_fn(
            new["logprobs"],
            part["logprobs"],
            part.get("ref_logprobs"),
            part["advantages"],
            part["loss_mask"],
            args,
            normaliser,
        )
        loss.backward()
        means.add({**stats, "policy/entropy_avg": new["entropy"]}, part["loss_mask"])
    # A sum and not a mean, because each share was divided by the normaliser of all of them.
    utils.sum_gradients(model)
    return means


def optimize(model, optimizer, batch, loss_fn, update, args, ranks):
    """num_epochs passes over the batch of all ranks, in num_minibatches optimizer steps each.

    batch: this rank's rows. Among the parts that loss_fn returns are val/ratio and
    policy/approxkl_avg. Returns the metrics of the steps taken, and how many were taken and
    skipped. Raises UserError if all were skipped.
    """
    full_batch = {name: utils.all_gather(x) for name, x in batch.items()}
    means = utils.Means()
    counts = {"optim/steps": 0, "optim/skipped": 0, "optim/early_stops": 0}
    minibatches = []  # Of all epochs, so that one break ends the update.
    for epoch in range(args.num_epochs):
        generator = utils.seeded(args.seed, "minibatches", update, epoch)
        order = torch.randperm(args.batch_size, generator=generator)
        minibatches += order.split(args.batch_size // args.num_minibatches)

    for minibatch in minibatches:
        optimizer.zero_grad()
        step_means = accumulate_gradients(model, full_batch, minibatch, loss_fn, args, ranks)
        max_norm = args.max_grad_norm or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        step_means.add({"optim/grad_norm": grad_norm})

        # Means over all ranks, so that all ranks decide alike.
        stats = step_means.over_ranks()
        kl_limit = args.early_stop_kl or math.inf
        if stats["policy/approxkl_avg"] > kl_limit and counts["optim/steps"] > 0:
            counts["optim/early_stops"] = 1
            break
        ratio_is_fine = 1 / args.ratio_guard <= stats["val/ratio"] <= args.ratio_guard
        if ratio_is_fine and math.isfinite(stats["optim/grad_norm"]):
            optimizer.step()
            means.merge(step_means)
            counts["optim/steps"] += 1
        else:
            counts["optim/skipped"] += 1
    optimizer.zero_grad()  # Frees the memory of the gradients.

    if counts["optim/steps"] == 0:
        reason = "no step had a finite gradient and a ratio within --ratio_guard"
        raise UserError(f"update {update}: {reason}; lower --lr, or look at the scores")
    return means.over_ranks() | counts


# --------------------------------------------------------------------------------------------------
# Metrics


def evaluate_policy(sampler, sampling, prompts, scorers, args, ranks):
    """The metrics of --eval_samples responses to each held-out prompt, over all ranks.

    The randomness is the same in every evaluation. A score is what the scorers say, without
    --missing_eos_score. scorers: reward_fns and reward_model.
    """
    k = args.eval_samples
    total = len(prompts) * k
    generator = utils.seeded(args.seed, "evaluation")
    uniforms = torch.rand(total, args.response_length, generator=generator)
    size = args.batch_size // ranks.world_size
    results = []
    for start in range(ranks.rank * size, total, args.batch_size):
        # The cache holds a fixed number of rows: the last batch is filled up with the first ones.
        numbers = [number % total for number in range(start, start + size)]
        prompt_ids = [prompts[number // k][0] for number in numbers]
        rows = [prompts[number // k][1] for number in numbers]
        batch, texts = rollout(sampler, prompt_ids, uniforms[numbers].to(ranks.device), **sampling)
        scores, _ = score_responses(batch, rows, texts, *scorers, args)
        lengths = batch["mask"].sum(1)
        count = min(size, total - start)
        results += list(zip(numbers, scores.tolist(), lengths.tolist(), strict=True))[:count]
    results = sorted(itertools.chain.from_iterable(utils.gather_objects(results)))
    _, scores, lengths = torch.tensor(results, dtype=torch.float64).T
    return evaluation_metrics(scores.view(-1, k), lengths.view(-1, k))


def evaluation_metrics(scores, lengths):
    """Means by name, and the half width of the 95% interval of each; scores and lengths (N,k).

    N prompts with k responses each. If all scores are 0 or 1, pass@1 is the share of responses with
    1, and pass@k that of prompts of which at least one response has it. The intervals come from the
    spread between prompts.
    """
    k = scores.shape[1]
    by_prompt = {"score": scores.mean(1), "length": lengths.mean(1)}
    if ((scores == 0) | (scores == 1)).all():
        by_prompt["pass@1"] = scores.mean(1)
        by_prompt[f"pass@{k}"] = scores.amax(1)
    metrics = {}
    for name, x in by_prompt.items():
        standard_error = (x.var(correction=0) / max(len(x) - 1, 1)).sqrt()
        metrics[f"eval/{name}"] = x.mean().item()
        metrics[f"eval/{name}_ci95"] = 1.96 * standard_error.item()
    return metrics


def rollout_metrics(batch, extra, args):
    """Means over responses, groups and tokens of all ranks; extra: other tensors (B,) by name."""
    means = utils.Means()
    means.add(
        {
            "objective/scores": batch["scores"],
            "objective/raw_scores": batch["raw_scores"],
            "objective/entropy": -batch["logprobs"].sum(1),
            "val/sequence_lengths": batch["mask"].sum(1),
            "val/has_eos": batch["has_eos"],
            "train/flat_groups": flat_groups(batch["scores"], args.num_generations),
            **{name: x for name, x in batch.items() if name.startswith("score/")},
            **extra,
        }
    )
    if args.refill_flat_groups:
        means.add({"train/refilled_groups": batch["refilled"]})
    if "ref_logprobs" in batch:
        kl = batch["logprobs"] - batch["ref_logprobs"]
        kl_k3 = k3(batch["logprobs"], batch["ref_logprobs"])
        means.add({"objective/kl": kl.sum(1), "objective/kl_k3": kl_k3.sum(1)})
    return means.over_ranks()


def sample_columns(batch, rows, texts, count=16):
    """Score, advantage, query and response of the first rows, as lists by name."""
    return {
        "score": batch["scores"][:count].tolist(),
        "advantage": batch["advantages"][:count].tolist(),
        "query": [row["prompt"] for row in rows[:count]],
        "response": texts[:count],
    }


# --------------------------------------------------------------------------------------------------
# Setting up


def check_flags(args):
    """Refuse what is out of bounds or cannot work together, before anything is loaded."""
    utils.check_shared_flags(args)
    utils.check_at_least(
        args, 1, "num_epochs", "num_minibatches", "query_length", "response_length"
    )
    utils.check_at_least(args, 0, "min_length", "kl_coef", "refill_flat_groups")
    utils.check_at_least(args, 2, "num_generations")
    utils.check_above_zero(args, "temperature", "cliprange", "cliprange_high", "early_stop_kl")
    utils.check_divides(args.batch_size, args.total_episodes, "--total_episodes by --batch_size")
    if args.missing_eos_score != "none":
        utils.check_finite(args, "missing_eos_score")
    if not 1 < args.ratio_guard < math.inf:
        raise UserError(f"--ratio_guard {args.ratio_guard}: must be above 1 and finite")
    if args.min_length >= args.response_length and args.missing_eos_score != "none":
        raise UserError("--min_length: must be below --response_length, else no response could end")
    utils.check_at_least(args, 1, "eval_every", "eval_samples")
    if args.save_best and not args.eval_dataset:
        raise UserError("--save_best: needs --eval_dataset, by which the best is chosen")
    num_scorers = len(args.reward_fn) + (args.reward_model is not None or not args.reward_fn)
    if args.reward_weights and len(args.reward_weights) != num_scorers:
        weights = f"{len(args.reward_weights)} for {num_scorers} that score"
        raise UserError(
            f"--reward_weights: {weights}; one for each --reward_fn, then --reward_model"
        )
    if not all(math.isfinite(weight) for weight in args.reward_weights):
        raise UserError(f"--reward_weights {args.reward_weights}: must be finite")


def choose_models(args):
    """Fill in the newest finished runs of the earlier stages where no model is named."""
    if args.model is None:
        args.model = utils.newest_run("sft", args.dataset)
    if args.reward_model is None and not args.reward_fn:
        args.reward_model = utils.newest_run("reward_model", args.dataset)


def load_data(args, tokenizer):
    """(training prompts, held-out prompts), each [(token ids, row)]."""
    prompts = utils.load_prompts(args.dataset, tokenizer, args.query_length, "--query_length")
    if not args.eval_dataset:
        return prompts, []
    flag = "--query_length"
    return prompts, utils.load_prompts(args.eval_dataset, tokenizer, args.query_length, flag)


def load_reward_functions(specs, flag, prompts):
    """{name: function} of the functions that a flag names, each called once to show mistakes."""
    functions = {}
    rows = [row for _, row in prompts[:2]]
    for spec in specs:
        function = utils.load_function(spec, flag)
        name = function.__name__
        if name == "reward_model":
            raise UserError(f"{flag} {spec}: that is the name of --reward_model in the metrics")
        if name in functions:
            raise UserError(f"{flag} {spec}: another function is called {name} too")
        functions[name] = function
    utils.call_reward_fns(functions, rows, [""] * len(rows), "cpu")
    return functions


def load_models(args, tokenizer, num_positions, device):
    """(policy, reference, reward_model); no reference if kl_coef is 0, no reward model without
    --reward_model.
    """
    if args.reward_model:
        utils.check_same_tokenizer(args.reward_model, tokenizer, args.model)
    policy, _ = utils.load_pretrained(AutoModelForCausalLM, args.model)
    utils.check_positions(policy.config, num_positions, "--response_length", args.model)
    utils.fit_to_tokenizer(policy, tokenizer, utils.all_eos_ids(policy, tokenizer))
    policy.to(device)
    utils.check_decoding(policy, num_positions, args.model)
    reference = None
    if args.kl_coef > 0:
        reference = copy.deepcopy(policy).requires_grad_(False)
        if args.precision == "bf16":
            utils.to_bf16(reference)
    if not args.reward_model:
        return policy, reference, None

    kind = AutoModelForSequenceClassification
    reward_model, _ = utils.load_pretrained(kind, args.reward_model, num_labels=1)
    utils.check_positions(
        reward_model.config, num_positions, "--response_length", args.reward_model
    )
    utils.fit_to_tokenizer(reward_model, tokenizer, policy.config.eos_token_id)
    if args.precision == "bf16":
        utils.to_bf16(reward_model.base_model)  # Its score head stays in fp32.
    return policy, reference, reward_model.requires_grad_(False).to(device)


def make_logprobs_fn(args, allowed):
    """`token_logprobs` with the temperature and the allowed ids, compiled under --compile."""
    logprobs_fn = token_logprobs
    if args.compile:
        logprobs_fn = torch.compile(token_logprobs, dynamic=True)
    return functools.partial(logprobs_fn, temperature=args.temperature, allowed=allowed)


def make_sampler(args, tokenizer, policy, longest_prompt, allowed):
    """(a copy of the policy to sample from, the options of `rollout`).

    The copy must be made before the policy's layers are compiled: under --compile its decoding step
    is compiled as a whole.
    """
    sampler = copy.deepcopy(policy).requires_grad_(False)
    if args.precision == "bf16":
        utils.to_bf16(sampler)
    decode_fn = decode_step
    if args.compile:
        decode_fn = torch.compile(decode_step, mode="reduce-overhead", fullgraph=True)
    stop_ids = utils.stop_token_ids(tokenizer, args.stop_token, policy.config.eos_token_id)
    sampling = {
        "longest_prompt": longest_prompt,
        "tokenizer": tokenizer,
        "temperature": args.temperature,
        "stop_ids": torch.tensor(stop_ids, device=allowed.device),
        "pad_id": tokenizer.pad_token_id,
        "allowed": allowed,
        "min_length": args.min_length,
        "decode_fn": decode_fn,
        "cache": utils.static_cache(policy.config, longest_prompt + args.response_length),
    }
    return sampler, sampling


def main(args):
    args = utils.resolve_args(args)
    check_flags(args)
    choose_models(args)
    tokenizer = utils.load_tokenizer(args.model)
    prompts, eval_prompts = load_data(args, tokenizer)
    P = max(len(ids) for ids, _ in prompts + eval_prompts)
    reward_fns = load_reward_functions(args.reward_fn, "--reward_fn", prompts)
    monitor_fns = load_reward_functions(args.monitor_fn, "--monitor_fn", prompts)

    ranks = utils.init_ranks(args.timeout_minutes)
    device = ranks.device
    num_shares = ranks.world_size * args.num_minibatches
    utils.check_divides(num_shares, args.batch_size, "--batch_size by ranks * --num_minibatches")
    group_rows = ranks.world_size * args.num_generations
    utils.check_divides(group_rows, args.batch_size, "--batch_size by ranks * --num_generations")
    torch.manual_seed(args.seed)
    num_positions = P + args.response_length
    policy, reference_policy, reward_model = load_models(args, tokenizer, num_positions, device)
    allowed = utils.allowed_ids(tokenizer, policy.config.vocab_size, device)
    sampler, sampling = make_sampler(args, tokenizer, policy, P, allowed)

    logprobs_fn = make_logprobs_fn(args, allowed)
    model = Actor(policy, logprobs_fn)
    reference = None
    if reference_policy is not None:
        reference = Actor(reference_policy, logprobs_fn)
    if args.compile:
        utils.compile_layers(model, reference, reward_model)
    utils.broadcast_weights(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, eps=1e-5, weight_decay=0.0, fused=True
    )

    run = utils.Run(args, ranks, Path(__file__).stem)
    best = utils.BestModel(run, args.save_best)
    state = {"model": model, "optimizer": optimizer, "best": best}
    done = run.load_checkpoint(state) if args.resume else 0
    num_updates = args.total_episodes // args.batch_size
    shown = ["objective/scores", "objective/kl", "val/sequence_lengths", "val/has_eos"]
    shown += ["policy/clipfrac_avg", "train/flat_groups", "optim/skipped", "eval/score"]
    shown += [f"monitor/{name}" for name in monitor_fns]
    scorers = reward_fns, reward_model
    if done == 0 and eval_prompts:
        metrics = evaluate_policy(sampler, sampling, eval_prompts, scorers, args, ranks)
        best.offer(metrics["eval/score"], policy, tokenizer)
        run.log(0, metrics, shown)
    sample = functools.partial(
        sample_and_score,
        prompts=prompts,
        sampler=sampler,
        sampling=sampling,
        scorers=scorers,
        args=args,
        ranks=ranks,
    )

    for update in utils.progress(done, num_updates, ranks, run.script):
        # 1. Rollout: a group of responses to each prompt, and a score for each.
        watch = utils.Stopwatch(device)
        utils.copy_weights(policy, sampler)
        batch, rows, texts = sample(update)
        batch, rows, texts = refill(batch, rows, texts, sample, update, num_updates, args)
        watch.lap("time/rollout")

        # 2. Evaluate: the log-probability of each token before the update.
        batch |= evaluate_tokens(batch, model, args)
        if reference is not None:
            batch["ref_logprobs"] = evaluate_tokens(batch, reference, args)["logprobs"]
        watch.lap("time/evaluate")

        # 3. Advantages.
        batch |= grpo_targets(batch, args)

        # 4. Update.
        lr = args.lr * (1 - (update - 1) / num_updates)
        optimizer.param_groups[0]["lr"] = lr
        metrics = optimize(model, optimizer, batch, grpo_loss, update, args, ranks)
        watch.lap("time/update")

        # Log, evaluate, save.
        monitored = utils.call_reward_fns(monitor_fns, rows, texts, device)
        extra = {f"monitor/{name}": x for name, x in monitored.items()}
        metrics |= rollout_metrics(batch, extra, args)
        metrics |= watch.laps
        metrics["time/episodes_per_second"] = args.batch_size / sum(watch.laps.values())
        metrics |= {"lr": lr, "episode": update * args.batch_size}
        if eval_prompts and (update % args.eval_every == 0 or update == num_updates):
            utils.copy_weights(policy, sampler)
            metrics |= evaluate_policy(sampler, sampling, eval_prompts, scorers, args, ranks)
            best.offer(metrics["eval/score"], policy, tokenizer)
        run.log(update, metrics, shown)
        if update % 10 == 0 or update in (1, num_updates):
            run.show_samples(update, sample_columns(batch, rows, texts))
        if args.save_every and update % args.save_every == 0:
            run.save_checkpoint(update, state)

    run.save_model("model", policy, tokenizer)
    if ranks.is_main:
        print(f"\nmodel folder  {run.folder}/model")
        print(f"next          python tools/evaluate.py --run {run.folder}")


if __name__ == "__main__":
    utils.launch(main, tyro.cli(Args, use_underscores=True))
