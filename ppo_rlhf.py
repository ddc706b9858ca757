r"""PPO for RLHF, the third stage: raise a policy's score without moving it far from its start.

Ziegler et al. 2019, "Fine-tuning language models from human preferences"; Stiennon et al. 2020,
"Learning to summarize from human feedback"; Ouyang et al. 2022, "Training language models to follow
instructions with human feedback"; Schulman et al. 2017, "Proximal policy optimization algorithms";
Huang et al. 2024, "The N+ implementation details of RLHF with PPO".

Each update:
    1. rollout      sample responses to the prompts from the policy
    2. score        the reward model gives each response a score; each response token gets a
                    log-probability under the policy and under the frozen reference
    3. advantages   token t is rewarded with -kl_coef * (logprob - ref_logprob), and the last token
                    with the score as well; GAE(gamma, lam) turns these rewards, and the critic's
                    value of each state, into advantages and returns; then the advantages are
                    whitened
    4. update       clipped policy loss + vf_coef * clipped value loss - entropy_coef * entropy, in
                    num_epochs passes over the batch, of num_minibatches optimizer steps each

One process:    python ppo_rlhf.py
Eight GPUs:     torchrun --nproc_per_node=8 ppo_rlhf.py --model runs/my_sft/model \
                    --reward_model runs/my_rm/model --dataset my_prompts.jsonl --lr 1e-5

Shapes. B rows on this rank; P tokens in the longest prompt of the data set; R response_length;
T = P + R; V vocabulary; d hidden width. A micro-batch is cut: its R is its longest response, and
its T its longest row.

Time. Index t of a (B,R) tensor is response token t. logprobs[:, t] is that token's log-probability,
and rewards[:, t] is paid for it.

Layout. Prompts are padded on the left for `generate` alone. After that, each row is packed to the
left: prompt, response, padding. Causal attention never looks ahead, so no real token sees the
padding, and outside `generate` no model needs an attention mask or position ids.

After the end of a response, `responses` and `input_ids` hold EOS, `mask` and `is_real` are False,
and every other (B,R) tensor is 0. The end token itself belongs to the response: its mask is True.

Responses
    - The end tokens are EOS, any further EOS ids in the model's configs, and those of --stop_token.
      Within the first --min_length tokens an end token does not end the response: it goes on, and
      its mask stays True.
    - There is no top-k or top-p. The pad token, and ids of the model's vocabulary to which the
      tokenizer gives no token, have probability 0, in the sampler, the policy and the reference
      alike.
    - Responses are sampled from a copy of the policy, refreshed before each rollout. The old
      log-probabilities are computed by the policy itself, so the probability ratios of an update's
      first step are 1, up to rounding.
Scores
    - A score is the sum of what the reward model and the functions of --reward_fn say, weighted by
      --reward_weights.
    - Scores are normalised, then clipped, then replaced. The first two are off by default. What is
      replaced, by --missing_eos_score, is the score of a response that reaches --response_length
      without an end token.
Rewards and advantages
    - The KL to the reference is paid in the reward, never in the loss. Its estimate is the
      log-ratio of the sampled token (k1). The k3 estimate is logged and never trained on.
    - The score is paid at the last token itself; Huang et al. pay it one position later.
    - The state after the last token is worth 0, also where --response_length cut the response off:
      nothing is bootstrapped.
    - Advantages are whitened over the real tokens of the whole batch, on all ranks.
Critic
    - values[:, t] is the value of the state just before response token t.
    - The critic is a network of its own. It starts as a copy of the reward model, or, with
      --reward_fn, as a copy of the policy with a head of zeros.
    - With --value_trunk shared it is a head of zeros on the policy's own network, which is then
      trained by the value loss too. That saves the memory of a network and no time: the network is
      run once for the log-probabilities and once for the values.
Loss and steps
    - A minibatch's loss is a sum over its real tokens on all ranks, divided by their number.
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
    masked_mean(x, mask)    the mean of x where mask is True, over all ranks
    whiten(x, mask)         x scaled to mean 0 and variance 1 where mask is True, over all ranks;
                            0 elsewhere
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
    """the model to train, a Hub name or a folder; the frozen reference is a copy of it. If not
    given: the newest finished run of sft.py"""
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
    """the run folder, which must not exist yet. If not given: runs/ppo_rlhf__<seed>__<time>"""
    seed: int = 1
    """determines the order of the prompts, the sampling and the minibatches"""
    total_episodes: int = 3840
    """responses sampled in the whole run; a multiple of batch_size"""
    batch_size: int = 128
    """responses per update, over all ranks"""
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
    The default suits the random walks; a pretrained model needs about 1e-5"""
    max_grad_norm: float = 1.0
    """the norm of the gradient, over all parameters, is clipped to this; 0 switches clipping off"""
    kl_coef: float = 0.05
    """the price of one nat of KL to the reference; with --target_kl_nats, the initial price"""
    target_kl_nats: float | None = None
    """keep adapting kl_coef so that the mean KL of a response is this many nats. If not given:
    kl_coef is constant"""
    kl_horizon: int = 10000
    """with --target_kl_nats: kl_coef changes by at most about a fifth in this many episodes"""
    cliprange: float = 0.2
    """the probability ratio is clipped to 1 - cliprange .. 1 + cliprange"""
    cliprange_high: float | None = None
    """makes the upper bound 1 + cliprange_high instead. If not given: 1 + cliprange"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus in the loss"""
    ratio_guard: float = 10.0
    """skip an optimizer step whose mean probability ratio is above this or below 1 / this"""
    early_stop_kl: float | None = None
    """end an update, after at least one step, at a minibatch whose policy/approxkl_avg, the
    distance from the policy before the update, is above this. If not given: never"""
    whiten_rewards: bool = False
    """replace the rewards r of a batch by (r - mean) / standard deviation + mean"""
    gamma: float = 1.0
    """discount per token"""
    lam: float = 0.95
    """lambda of GAE. At 0 an advantage is the one-step temporal difference, which has little
    variance and the critic's bias; at 1 it is the sum of the rewards to come minus the value, which
    has no bias and much variance"""
    value_trunk: Literal["separate", "shared"] = "separate"
    """separate: the critic is a network of its own, a copy of the reward model, or, without one, a
    copy of the policy with a head of zeros. shared: the critic is a head of zeros on the policy's
    own network"""
    vf_coef: float = 0.1
    """weight of the value loss"""
    cliprange_value: float = 0.2
    """the value loss is clipped where a value moves further than this from the old one, in units
    of the reward"""
    normalize_scores: bool = False
    """standardise scores by the running mean and standard deviation of all scores so far; scores
    that are going to be replaced are not counted"""
    cliprange_score: float | None = None
    """clip scores to -cliprange_score .. cliprange_score, after normalisation. If not given: do
    not clip"""
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


def compute_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """The reward of each token, (B,R): a KL penalty at every token, and the score (B,) at the last.

    The penalty -kl_coef * (logprob - ref_logprob) is the k1 estimate of the KL to the reference,
    which is unbiased (Ziegler et al. 2019, equation 2). Rewards are 0 outside the mask, so the sum
    of a row is its score minus kl_coef times its KL.
    """
    log_ratio = torch.where(mask, logprobs - ref_logprobs, 0.0)
    is_last = mask & ~F.pad(mask[:, 1:], (0, 1))
    return -kl_coef * log_ratio + torch.where(is_last, scores[:, None], 0.0)


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


def compute_gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimates and returns, both (B,R) (Schulman et al. 2016, equation 16).

    delta[t] = rewards[t] + gamma * values[t + 1] - values[t], and the advantage of token t is the
    sum of (gamma * lam)^(k - t) * delta[k] over k >= t, computed backwards from the last token. The
    state after a row's last token is terminal: its value is 0. Nothing outside the mask has an
    influence.
    """
    rewards = torch.where(mask, rewards, 0.0)
    values = torch.where(mask, values, 0.0)
    next_values = F.pad(values[:, 1:], (0, 1))
    deltas = rewards + gamma * next_values - values

    advantages = torch.zeros_like(deltas)
    advantage = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        advantage = deltas[:, t] + gamma * lam * advantage
        advantages[:, t] = advantage
    returns = advantages + values
    return advantages, returns


def value_loss(new_values, values, returns, cliprange_value):
    """Half the squared error of the value, clipped: (loss, clipped), each (B,R).

    The larger of two errors counts: that of the new value, and that of the clipped value, which is
    at most cliprange_value away from the old one (as in the code of Ziegler et al. 2019). So a
    value that has moved towards its return by more than cliprange_value gets no further gradient,
    and one that has moved away from it gets the full one. clipped: where the clipped error is
    strictly the larger.
    """
    clipped_values = new_values.clamp(values - cliprange_value, values + cliprange_value)
    unclipped_loss = 0.5 * (new_values - returns) ** 2
    clipped_loss = 0.5 * (clipped_values - returns) ** 2
    loss = torch.maximum(unclipped_loss, clipped_loss)
    return loss, clipped_loss > unclipped_loss


def explained_variance(batch):
    """1 - Var(returns - values) / Var(returns) over all real tokens; 0 if returns are equal."""
    mask = batch["mask"]
    returns = batch["returns"]
    errors = returns - batch["values"]
    error_variance = utils.masked_mean((errors - utils.masked_mean(errors, mask)) ** 2, mask)
    variance = utils.masked_mean((returns - utils.masked_mean(returns, mask)) ** 2, mask)
    if variance < 1e-8:
        return 0.0
    return (1 - error_variance / variance).item()


def ppo_targets(batch, kl_coef, args):
    """advantages and returns, each (B,R), of this rank's rows.

    batch has scores (B,), and logprobs, ref_logprobs, values and mask (B,R). The returns, which the
    value loss aims at, are those of the rewards before whitening of the advantages.
    """
    mask = batch["mask"]
    rewards = compute_rewards(
        batch["scores"], batch["logprobs"], batch["ref_logprobs"], mask, kl_coef
    )
    if args.whiten_rewards:
        rewards = utils.whiten(rewards, mask, shift_mean=False)
    advantages, returns = compute_gae(rewards, batch["values"], mask, args.gamma, args.lam)
    return {"advantages": utils.whiten(advantages, mask), "returns": returns}


def ppo_loss(new, batch, args):
    """The loss summed over real tokens, 0-d, and its parts (B,R) by the names that are logged.

    new: what the model says of these rows with its current parameters. batch: the rows themselves,
    with what it said before the update, and the targets.
    """
    mask = batch["mask"]
    pg_loss, ratio, pg_clipped = policy_loss(
        new["logprobs"], batch["logprobs"], batch["advantages"], args.cliprange, args.cliprange_high
    )
    loss = pg_loss - args.entropy_coef * new["entropy"]
    stats = {
        "loss/policy_avg": pg_loss,
        "policy/clipfrac_avg": pg_clipped,
        "policy/entropy_avg": new["entropy"],
        # The distance from the policy before the update, not from the reference.
        "policy/approxkl_avg": 0.5 * (new["logprobs"] - batch["logprobs"]) ** 2,
        "val/ratio": ratio,
    }
    # The critic's part.
    vf_loss, vf_clipped = value_loss(
        new["values"], batch["values"], batch["returns"], args.cliprange_value
    )
    loss = loss + args.vf_coef * vf_loss
    stats |= {"loss/value_avg": vf_loss, "val/clipfrac_avg": vf_clipped}
    return torch.where(mask, loss, 0.0).sum(), stats


class AdaptiveKLController:
    """Moves kl_coef until the KL of a response meets a target (Ziegler et al. 2019, 2.2)."""

    def __init__(self, kl_coef, target, horizon):
        self.kl_coef = kl_coef
        self.target = target
        self.horizon = horizon

    def update(self, kl, num_episodes):
        """The new coefficient, after num_episodes responses on all ranks with a mean KL of `kl`."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.kl_coef *= 1 + error * min(num_episodes / self.horizon, 1.0)
        return self.kl_coef

    def state_dict(self):
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state):
        self.kl_coef = state["kl_coef"]


class RunningMoments:
    """Mean and standard deviation of all scores so far, over all ranks, for --normalize_scores."""

    def __init__(self):
        self.count = 0.0
        self.total = 0.0
        self.total_of_squares = 0.0

    def update(self, scores, mask):
        """Take in the scores (B,) where mask (B,) is True."""
        scores = torch.where(mask, scores, 0.0).double()
        sums = torch.stack([mask.double().sum(), scores.sum(), (scores**2).sum()])
        count, total, total_of_squares = utils.sum_over_ranks(sums).tolist()
        self.count += count
        self.total += total
        self.total_of_squares += total_of_squares

    def normalise(self, scores):
        """(scores - mean) / standard deviation."""
        mean = self.total / max(self.count, 1)
        variance = self.total_of_squares / max(self.count, 1) - mean**2
        return (scores - mean) / math.sqrt(max(variance, 0.0) + 1e-8)

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, state):
        vars(self).update(state)


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


class ActorCritic(torch.nn.Module):
    """The two models that are trained: the policy, which acts, and its critic."""

    def __init__(self, actor, critic):
        super().__init__()
        self.actor = actor
        self.critic = critic

    def forward(self, batch):
        """logprobs, entropy and values of the response tokens, each (B,R)."""
        output = self.actor(batch)
        output["values"] = score_head(self.critic, response_hidden(self.critic, batch))
        return output


def load_critic(args, tokenizer, policy):
    """The critic: a copy of the reward model, or without one of the policy with a head of zeros.

    With --value_trunk shared it is a head of zeros on the policy's own network.
    """
    kind = AutoModelForSequenceClassification
    starts_as_reward_model = args.reward_model and args.value_trunk == "separate"
    path = args.reward_model if starts_as_reward_model else args.model
    # A language model has no score.weight: that may be missing, and is set here.
    critic, _ = utils.load_pretrained(kind, path, ["score.weight"], num_labels=1)
    utils.fit_to_tokenizer(critic, tokenizer, policy.config.eos_token_id)
    if not starts_as_reward_model:
        torch.nn.init.zeros_(critic.score.weight)
        # If --model is only a config, each load draws random weights of its own: take the policy's.
        critic.base_model.load_state_dict(policy.base_model.state_dict())
    if args.value_trunk == "shared":
        # The critic's own network goes; the policy's is put in its place.
        setattr(critic, critic.base_model_prefix, policy.base_model)
    return critic.to(policy.device)


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
    """The prompts of this rank's rows: token ids, rows, and the uniforms (B,R) to sample with.

    They are cut out of those of all ranks, which depend on the seed and the update alone.
    """
    B = args.batch_size // ranks.world_size
    mine = slice(ranks.rank * B, (ranks.rank + 1) * B)
    num_prompts = args.batch_size
    first = (update - 1) * num_prompts
    order = utils.prompt_order(len(prompts), first, num_prompts, args.seed)
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
    # Padding goes through the loss as well, before it is masked. The log-probability of a pad would
    # be -inf there and its gradient NaN, which no mask stops. So the padding is EOS, an allowed id.
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


def final_scores(raw_scores, has_eos, moments, args):
    """The scores (B,) to be paid: normalised, clipped, and replaced where no end token was sampled.

    Scores that are going to be replaced do not enter the running moments.
    """
    keeps_score = has_eos
    if args.missing_eos_score == "none":
        keeps_score = torch.ones_like(has_eos)
    scores = raw_scores
    if args.normalize_scores:
        moments.update(scores, keeps_score)
        scores = moments.normalise(scores)
    if args.cliprange_score is not None:
        scores = scores.clamp(-args.cliprange_score, args.cliprange_score)
    if args.missing_eos_score != "none":
        scores = torch.where(keeps_score, scores, args.missing_eos_score)
    return scores


def accumulate_gradients(model, full_batch, minibatch, loss_fn, args, ranks):
    """Forward and backward of a minibatch; every rank ends with the gradient of all of it.

    full_batch: the rows of all ranks. minibatch: row numbers, the same on all ranks. Returns the
    `Means` of this rank's share.
    """
    means = utils.Means()
    num_tokens = full_batch["mask"][minibatch.to(ranks.device)].sum()
    for _, part in micro_batches(full_batch, minibatch.tolist(), args, ranks):
        with utils.autocast(args, ranks.device):
            new = model(part)
        loss_sum, stats = loss_fn(new, part, args)
        (loss_sum / num_tokens).backward()
        means.add(stats, part["mask"])
    # A sum and not a mean, because each share was divided by the number of tokens of all of them.
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


def rollout_metrics(batch, kl_coef, extra):
    """Means over responses and response tokens of all ranks; extra: other tensors (B,) by name."""
    mask = batch["mask"]
    log_ratio = batch["logprobs"] - batch["ref_logprobs"]
    k3 = torch.exp(-log_ratio) - 1 + log_ratio
    kl = log_ratio.sum(1)
    means = utils.Means()
    means.add(
        {
            "objective/kl": kl,
            "objective/kl_k3": k3.sum(1),
            "objective/entropy": -batch["logprobs"].sum(1),
            "objective/scores": batch["scores"],
            "objective/raw_scores": batch["raw_scores"],
            "objective/non_score_reward": -kl_coef * kl,
            "objective/rlhf_reward": batch["scores"] - kl_coef * kl,
            "val/sequence_lengths": mask.sum(1),
            "val/has_eos": batch["has_eos"],
            **extra,
        }
    )
    means.add({"objective/kl_per_token": log_ratio, "objective/kl_k3_per_token": k3}, mask)
    return means.over_ranks()


def sample_columns(batch, rows, texts, count=16):
    """Score, KL, query and response of the first rows, as lists by name."""
    kl = (batch["logprobs"] - batch["ref_logprobs"]).sum(1)
    return {
        "score": batch["scores"][:count].tolist(),
        "kl": kl[:count].tolist(),
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
    utils.check_at_least(args, 0, "min_length", "kl_coef")
    utils.check_finite(args, "entropy_coef")
    utils.check_above_zero(args, "temperature", "cliprange", "cliprange_high", "cliprange_score")
    utils.check_above_zero(args, "target_kl_nats", "kl_horizon", "early_stop_kl")
    utils.check_divides(args.batch_size, args.total_episodes, "--total_episodes by --batch_size")
    if args.missing_eos_score != "none":
        utils.check_finite(args, "missing_eos_score")
    utils.check_at_least(args, 0, "gamma", "lam", "vf_coef")
    utils.check_above_zero(args, "cliprange_value")
    if args.gamma > 1 or args.lam > 1:
        raise UserError("--gamma and --lam: must be at most 1")
    if not 1 < args.ratio_guard < math.inf:
        raise UserError(f"--ratio_guard {args.ratio_guard}: must be above 1 and finite")
    if args.min_length >= args.response_length and args.missing_eos_score != "none":
        raise UserError("--min_length: must be below --response_length, else no response could end")
    if args.target_kl_nats and args.kl_coef == 0:
        raise UserError("--target_kl_nats: scales --kl_coef, which must start above 0")
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
    """(policy, reference, reward_model), the last one None without --reward_model."""
    if args.reward_model:
        utils.check_same_tokenizer(args.reward_model, tokenizer, args.model)
    policy, _ = utils.load_pretrained(AutoModelForCausalLM, args.model)
    utils.check_positions(policy.config, num_positions, "--response_length", args.model)
    utils.fit_to_tokenizer(policy, tokenizer, utils.all_eos_ids(policy, tokenizer))
    policy.to(device)
    utils.check_decoding(policy, num_positions, args.model)
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
    torch.manual_seed(args.seed)
    num_positions = P + args.response_length
    policy, reference_policy, reward_model = load_models(args, tokenizer, num_positions, device)
    allowed = utils.allowed_ids(tokenizer, policy.config.vocab_size, device)
    sampler, sampling = make_sampler(args, tokenizer, policy, P, allowed)

    logprobs_fn = make_logprobs_fn(args, allowed)
    reference = Actor(reference_policy, logprobs_fn)
    actor = Actor(policy, logprobs_fn)
    model = ActorCritic(actor, load_critic(args, tokenizer, policy))
    if args.compile:
        utils.compile_layers(model, reference, reward_model)
    utils.broadcast_weights(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, eps=1e-5, weight_decay=0.0, fused=True
    )
    controller = AdaptiveKLController(args.kl_coef, args.target_kl_nats, args.kl_horizon)
    moments = RunningMoments()

    run = utils.Run(args, ranks, Path(__file__).stem)
    best = utils.BestModel(run, args.save_best)
    state = {
        "model": model,
        "optimizer": optimizer,
        "controller": controller,
        "moments": moments,
        "best": best,
    }
    done = run.load_checkpoint(state) if args.resume else 0
    num_updates = args.total_episodes // args.batch_size
    shown = ["objective/scores", "objective/kl", "val/sequence_lengths", "val/has_eos"]
    shown += ["policy/clipfrac_avg", "optim/skipped", "eval/score"]
    shown += [f"monitor/{name}" for name in monitor_fns]
    scorers = reward_fns, reward_model
    if done == 0 and eval_prompts:
        metrics = evaluate_policy(sampler, sampling, eval_prompts, scorers, args, ranks)
        best.offer(metrics["eval/score"], policy, tokenizer)
        run.log(0, metrics, shown)

    for update in utils.progress(done, num_updates, ranks, run.script):
        # 1. Rollout: sample responses to the prompts.
        watch = utils.Stopwatch(device)
        utils.copy_weights(policy, sampler)
        prompt_ids, rows, uniforms = next_prompts(prompts, update, args, ranks)
        batch, texts = rollout(sampler, prompt_ids, uniforms, **sampling)
        watch.lap("time/rollout")

        # 2. Score the responses, and evaluate their tokens.
        batch["raw_scores"], parts = score_responses(batch, rows, texts, *scorers, args)
        batch["scores"] = final_scores(batch["raw_scores"], batch["has_eos"], moments, args)
        batch |= evaluate_tokens(batch, model, args)
        batch["ref_logprobs"] = evaluate_tokens(batch, reference, args)["logprobs"]
        watch.lap("time/score")

        # 3. Advantages.
        kl_coef = controller.kl_coef
        batch |= ppo_targets(batch, kl_coef, args)

        # 4. Update.
        lr = args.lr * (1 - (update - 1) / num_updates)
        optimizer.param_groups[0]["lr"] = lr
        metrics = optimize(model, optimizer, batch, ppo_loss, update, args, ranks)
        metrics["val/explained_var"] = explained_variance(batch)
        watch.lap("time/update")

        # Log, evaluate, adapt the price of the KL, save.
        monitored = utils.call_reward_fns(monitor_fns, rows, texts, device)
        extra = {f"score/{name}": x for name, x in parts.items()}
        extra |= {f"monitor/{name}": x for name, x in monitored.items()}
        metrics |= rollout_metrics(batch, kl_coef, extra)
        metrics |= watch.laps
        metrics["time/episodes_per_second"] = args.batch_size / sum(watch.laps.values())
        metrics |= {"kl_coef": kl_coef, "lr": lr, "episode": update * args.batch_size}
        if eval_prompts and (update % args.eval_every == 0 or update == num_updates):
            utils.copy_weights(policy, sampler)
            metrics |= evaluate_policy(sampler, sampling, eval_prompts, scorers, args, ranks)
            best.offer(metrics["eval/score"], policy, tokenizer)
        run.log(update, metrics, shown)
        if update % 10 == 0 or update in (1, num_updates):
            run.show_samples(update, sample_columns(batch, rows, texts))
        if args.target_kl_nats:
            controller.update(metrics["objective/kl"], args.batch_size)
        if args.save_every and update % args.save_every == 0:
            run.save_checkpoint(update, state)

    run.save_model("critic", model.critic, tokenizer)
    run.save_model("model", policy, tokenizer)
    if ranks.is_main:
        print(f"\nmodel folder  {run.folder}/model")
        print(f"next          python tools/evaluate.py --run {run.folder}")


if __name__ == "__main__":
    utils.launch(main, tyro.cli(Args, use_underscores=True))
