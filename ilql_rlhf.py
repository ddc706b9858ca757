r"""ILQL, implicit language Q-learning: offline RL from rated text, without sampling new text.

Snell et al. 2022, "Offline RL for natural language generation with implicit language Q-learning";
Kostrikov et al. 2021, "Offline reinforcement learning with implicit Q-learning" (IQL).

One language model is the behaviour policy pi_beta: it imitates the data. Small networks on its last
hidden state are the value function V, two Q functions, and for each Q a target, which is a slow
copy of it. A state is a text so far, and an action is the next token that the agent says.

The idea: Q-learning wants the best action in the next state, but offline nobody knows what an
action is worth that the data does not hold. So V learns, by expectile regression, nearly the best
target Q among the actions that the data does hold, and Q learns from V. While decoding, Q is asked
about all actions after all, so CQL lowers the other actions relative to that of the data.

Each step:
    1. batch    rows of (prompt, completion, reward), or rated dialogues
    2. loss     for each action of the batch:
                q       (reward + gamma * V of the next state - Q)^2
                v       expectile regression of V on the smaller target Q: with tau near 1, V is
                        nearly the best target Q among the actions in the data
                cql     cross-entropy of softmax(Q) at the action
                awac    cross-entropy of pi_beta at the action, times exp(beta * (target Q - V))
                total   q + v + cql_weight * cql + awac_weight * awac
                Each is summed over the actions and divided by their number on all ranks
    3. update   the gradient is clipped to the norm --max_grad_norm, and Adam takes a step. The
                learning rate falls linearly from lr in the first step to lr / num_steps in the
                last. Then target = alpha * Q + (1 - alpha) * target
To evaluate: sample token by token from softmax(log pi_beta + strength * (target Q - V)), once for
each steering strength of --eval_betas. At strength 0 this is pi_beta itself.

One process:    python ilql_rlhf.py
Eight GPUs:     torchrun --nproc_per_node=8 ilql_rlhf.py --model runs/my_sft/model \
                    --dataset my_rated.jsonl --batch_size 64 --lr 1e-4

Shapes. B rows in a micro-batch; T tokens in the longest of them, without its last token, which is
no state; A actions in the row that has the most; V vocabulary; d hidden width.

Names. `policy` is the language model pi_beta, and `vs` are values. Two factors of the advantage are
called beta, and each is set by itself: in training, the flag --beta is the exponent in AWAC's
weight; in decoding, the argument `beta` of `steer` is the steering strength, one of --eval_betas.

How a row becomes states and actions. State i is the text up to and including token i, and its
action is token i + 1. Here are eight tokens of a dialogue, in which "|" is EOS and the agent says
"x|" and then "y|":

    token index     0     1     2     3     4     5     6     7
    token           u     :     x     |     v     :     y     |
    said by         user  user  agent agent user  user  agent agent

    states          1     2     5     6
    actions         x     |     y     |
    rewards         0     r1    0     r2
    next states     2     5     6     none
    terminal        False False False True

State 1 is "u:" and state 5 is "u:x|v:". A turn's reward is paid for its last token. If there is
only one reward for the dialogue, it is r2, and r1 is 0. After a turn, the next state is the one in
which the agent acts next; what the user says is skipped. After the last action there is no next
state, and its value counts as 0. Column j of a (B,A) tensor is action j of each row.

Data
    - What the user says, what the chat template writes around turns, and assistant turns inside a
      `prompt` are not actions. The EOS that ends a turn is one.
    - A row with more than --max_length tokens is left out, never cut. The number of such rows is
      printed.
    - A completion of plain text ends at its first EOS, and the rest is dropped. A turn of a
      conversation ends at its first EOS too, or where the chat template ends it, and then EOS is
      added; what the template writes after that EOS is context of the next turn.
    - Rows are padded on the right with more EOS. Causal attention never looks ahead, so no real
      token sees the padding, and the model needs neither an attention mask nor position ids. Padded
      actions have mask False and no loss.
Loss
    - Both Qs are trained, and their q and cql losses are added. Wherever a single Q is needed (in
      the loss of V, in AWAC's weight, in decoding) it is the smaller of the two targets, or the
      only one with --num_qs 1.
    - No gradient flows into the target Qs, into V of the next state, or into AWAC's weight, which
      is not clipped. The gradients of q, v, cql and awac all reach the language model. With
      --policy_lr_scale 0 it is frozen.
    - V and the Qs are 0 at the start: the last layer that is trained starts at 0. So no random
      value is learned from, and none steers.
    - The paper trains three language models and divides AWAC by all tokens. Here there is one
      language model, and AWAC is divided by the number of actions.
    - All ranks draw the same batch. It is sorted by length, and with n ranks, rank r takes the rows
      r, r + n, r + 2n and so on. The ranks add up their gradients before the norm is clipped; a
      rank that gets no row of a small last batch adds zeros.
Sampling
    - Samples are drawn before the first step, every --eval_every steps, and after the last, if
      there is a reward function or a reward model to score them. They are drawn from a copy of the
      model. The pad token and ids that have no token are never sampled.
Precision
    - Models are loaded in fp32 and without dropout. With --precision bf16 only the language model
      computes in bf16, and the language model of the copy to sample from is stored in bf16. V, Qs,
      losses, trained weights and optimizer state are fp32.
    - --compile compiles each transformer layer, `ilql_loss`, and the decoding step after the
      prompt. It is the default on CUDA.
"""

import copy
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import utils
from utils import UserError


@dataclass
class Args:
    model: str = "data/randomwalks/model"
    """the model to train, a Hub name or a folder, preferably of a run of sft.py; if the folder
    holds only a config, the weights are random"""
    dataset: str = "data/randomwalks/rated.jsonl"
    """rows with prompt+completion+reward, or messages+reward; the reward is a number, or a list
    with a number for each turn of the agent"""
    eval_dataset: str | None = None
    """rows with a column `prompt` to sample from; their other columns are passed to --reward_fn. If
    not given: prompts.jsonl beside --dataset"""
    reward_fn: str | None = None
    """a function that scores the samples: path/to/file.py:function(prompts, responses, **columns).
    If neither this nor --reward_model is given: that of the default dataset, and no samples are
    drawn for other datasets"""
    reward_model: str | None = None
    """a reward model that scores the samples instead; like --reward_fn it is never trained on"""
    max_rows: int | None = None
    """use only the first max_rows rows of --dataset. If not given: all rows"""
    output_dir: str | None = None
    """the run folder, which must not exist yet. If not given: runs/ilql_rlhf__<seed>__<time>"""
    seed: int = 1
    """determines the new weights, the order of the rows and the sampling"""
    num_epochs: int = 20
    """passes over the rows"""
    num_steps: int | None = None
    """optimizer steps in total. If not given: as many as num_epochs
    passes take; if given, num_epochs is ignored"""
    batch_size: int = 100
    """rows per optimizer step, over all ranks"""
    micro_batch_size: int = 100
    """rows per forward and backward on one rank. Fewer rows need less memory, contain less padding,
    and do not change the result"""
    max_length: int = 512
    """the most tokens that a row may have; longer rows are left out and counted on the screen"""
    normalize_rewards: bool = False
    """subtract the mean of the rewards of all rows that are kept, and divide by their standard
    deviation"""
    num_qs: Literal[1, 2] = 2
    """Q functions; of two, the smaller target counts"""
    q_rows: Literal["ids", "embeddings"] = "ids"
    """ids: Q has a row of weights for each id, learned independently. embeddings: the rows are a
    frozen, normalised copy of those of the language-model head, so that similar ids share what is
    learned, and the input of V and the Qs is standardised; for large vocabularies, with
    --lr 2e-4"""
    tau: float = 0.8
    """expectile, above 0 and at most 1: at 0.5, V is the mean of target Q over the data"""
    gamma: float = 0.99
    """discount per action, above 0 and at most 1"""
    beta: float = 0.0
    """exponent of AWAC's weight, per unit of reward; at 0 every action weighs 1 in the AWAC loss"""
    cql_weight: float = 0.03
    """weight of the CQL loss"""
    awac_weight: float = 1.0
    """weight of the AWAC loss"""
    alpha: float = 0.03
    """the share of Q in its target's next value, after every step; above 0 and at most 1"""
    lr: float = 1e-3
    """learning rate of the first step. The default suits the random walks; a pretrained model needs
    about 1e-4"""
    policy_lr_scale: float = 1.0
    """learning rate of the language model as a multiple of lr; at 0 it is frozen"""
    max_grad_norm: float = 1.0
    """the norm of the gradient, over all parameters, is clipped to this; 0 switches clipping off"""
    precision: Literal["fp32", "bf16"] = "bf16" if torch.cuda.is_available() else "fp32"
    """what the language model computes in; weights, optimizer state, losses, Qs and V stay fp32"""
    compile: bool = torch.cuda.is_available()
    """compile each transformer layer, the loss and the decoding step"""
    eval_betas: tuple[float, ...] = (0.0, 1.0, 100.0)
    """steering strengths to sample with, per unit of reward; 0 is pi_beta"""
    eval_every: int = 100
    """steps between two evaluations; there is one before the first step and one after the last"""
    eval_samples: int = 200
    """responses at each steering strength, over all ranks, spread evenly over the prompts"""
    response_length: int = 10
    """the most tokens that a sample may have, EOS included; prompts longer than
    max_length - response_length are left out and counted on the screen"""
    log_every: int = 20
    """steps between two lines of metrics; an evaluation or a checkpoint ends a line early"""
    save_every: int = 0
    """steps between two checkpoints to resume from; 0: no checkpoints"""
    resume: str | None = None
    """continue the run in this folder from its newest checkpoint, with the arguments it had"""
    timeout_minutes: float = 60
    """how long a rank waits for the others before the job fails"""
    track: Literal["none", "wandb", "tensorboard"] = "none"
    """where metrics go besides metrics.jsonl"""


# --------------------------------------------------------------------------------------------------
# The algorithm


def ilql_loss(
    qs, target_qs, vs, next_vs, logits, actions, rewards, terminal, mask, args, num_tokens=None
):
    """The losses by name, 0-d: total, q, v, cql, awac (the code of Snell et al. 2022).

    qs, target_qs: lists of (B,A,V); logits (B,A,V); vs, next_vs, rewards (B,A); actions (B,A) ids;
    terminal, mask (B,A) bool. args: anything with tau, gamma, beta, cql_weight, awac_weight. Sums
    over real actions are divided by num_tokens, a number of actions (None: that of this batch). cql
    and awac are unweighted.
    """
    if num_tokens is None:
        num_tokens = mask.sum().clamp(min=1)
    # Blank what stands in padded columns: masking the losses alone would leave 0 * NaN in the
    # backward pass, if a caller's padding held NaN.
    qs = [q.masked_fill(~mask[..., None], 0.0) for q in qs]
    target_qs = [q.masked_fill(~mask[..., None], 0.0) for q in target_qs]
    logits = logits.masked_fill(~mask[..., None], 0.0)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    vs = vs.masked_fill(~mask, 0.0)
    next_vs = next_vs.masked_fill(~mask | terminal, 0.0)
    rewards = rewards.masked_fill(~mask, 0.0)
    index = actions.masked_fill(~mask, 0)[..., None]

    taken_qs = [q.gather(-1, index).squeeze(-1) for q in qs]
    taken_target_qs = [q.gather(-1, index).squeeze(-1) for q in target_qs]
    target_q = torch.stack(taken_target_qs).amin(0).detach()

    # Temporal difference (IQL, equation 6). The next state is worth what the value function says,
    # so Q is never asked about an action that the data does not hold.
    backup = rewards + args.gamma * next_vs.detach()
    q_loss = sum((backup - q) ** 2 for q in taken_qs)

    # Expectile regression (IQL, equation 5): the weight is tau where the value is too low.
    v_weight = torch.where(target_q >= vs, args.tau, 1 - args.tau)
    v_loss = v_weight * (target_q - vs) ** 2

    # Conservatism (Kumar et al. 2020): push down every action's Q, and pull up that of the data's.
    # The two cancel in the sum, so only the differences move.
    cql_loss = sum(q.logsumexp(-1) - taken for q, taken in zip(qs, taken_qs, strict=True))

    # Behaviour cloning, weighted by the advantage (Nair et al. 2020; IQL, equation 7).
    advantage_weight = torch.exp(args.beta * (target_q - vs)).detach()
    logprobs = torch.log_softmax(logits, dim=-1).gather(-1, index).squeeze(-1)
    awac_loss = -advantage_weight * logprobs

    action_losses = {"q": q_loss, "v": v_loss, "cql": cql_loss, "awac": awac_loss}
    losses = {}
    for name, loss in action_losses.items():
        losses[name] = loss.masked_fill(~mask, 0.0).sum() / num_tokens
    total = losses["q"] + losses["v"]
    total = total + args.cql_weight * losses["cql"] + args.awac_weight * losses["awac"]
    return {"total": total, **losses}


def steer(logits, target_qs, vs, beta):
    """Logits (B,V) of the steered policy: log_softmax(logits) + beta * (smaller target Q - value).

    logits (B,V) of pi_beta; target_qs: a list of (B,V); vs (B,) (Snell et al. 2022, section 4). The
    value shifts all logits of a state alike, so it does not change the distribution; with it, the
    term is the advantage.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    advantages = torch.stack(target_qs).amin(0) - vs[..., None]
    return torch.log_softmax(logits, dim=-1) + beta * advantages


def response_mask(responses, stop_ids, min_length=0):
    """(B,R) bool: True up to and including each row's first stop id at an index >= min_length."""
    is_stop = torch.isin(responses, torch.as_tensor(stop_ids, device=responses.device))
    is_stop[:, :min_length] = False
    stops_before = is_stop.long().cumsum(1) - is_stop.long()
    return stops_before == 0


# --------------------------------------------------------------------------------------------------
# The models


def small_network(width, num_outputs):
    """A network with one hidden layer of 2 * width, whose last layer starts at 0."""
    last = torch.nn.Linear(2 * width, num_outputs)
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
    return torch.nn.Sequential(torch.nn.Linear(width, 2 * width), torch.nn.ReLU(), last)


class EmbeddingQ(torch.nn.Module):
    """Q(state, action) = f(state) . row(action) + g(state), where f and g are learned.

    The rows are a normalised, frozen copy of those that the LM head has at the start. Ids with
    similar rows have similar Qs, even if the data holds only one of them.
    """

    def __init__(self, embeddings):
        super().__init__()
        width = embeddings.shape[1]
        self.network = small_network(width, width + 1)
        rows = F.layer_norm(embeddings.float(), (width,)) / width**0.5
        self.register_buffer("rows", rows)

    def forward(self, hidden):
        output = self.network(hidden)
        return output[..., :-1] @ self.rows.T + output[..., -1:]


class ILQL(torch.nn.Module):
    """The policy pi_beta, a language model, and on its last hidden state V, Qs and target Qs."""

    def __init__(self, policy, num_qs=2, q_rows="ids", **statistics):
        super().__init__()
        embeddings = policy.get_output_embeddings().weight.detach()
        vocab_size, width = embeddings.shape
        self.policy = policy
        self.config = {"num_qs": num_qs, "q_rows": q_rows, **statistics}
        self.v = small_network(width, 1)
        self.qs = torch.nn.ModuleList()
        for _ in range(num_qs):
            if q_rows == "embeddings":
                self.qs.append(EmbeddingQ(embeddings))
            else:
                self.qs.append(small_network(width, vocab_size))
        self.target_qs = copy.deepcopy(self.qs).requires_grad_(False)
        # With q_rows "embeddings", `standardise_inputs` sets these; else they change nothing.
        self.register_buffer("hidden_mean", torch.zeros(width))
        self.register_buffer("hidden_std", torch.ones(width))

    def values(self, hidden):
        """qs and target_qs, lists of (...,V), and vs (...) of hidden states (...,d), in fp32."""
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = (hidden.float() - self.hidden_mean) / self.hidden_std
            return {
                "qs": [q(hidden) for q in self.qs],
                "target_qs": [q(hidden.detach()) for q in self.target_qs],
                "vs": self.v(hidden).squeeze(-1),
            }

    def forward(self, input_ids, states):
        """qs, target_qs, vs and logits at the states (B,A), which are token indices."""
        hidden = self.policy.base_model(input_ids, use_cache=False).last_hidden_state
        hidden = hidden.gather(1, states[..., None].expand(-1, -1, hidden.shape[-1]))
        return {**self.values(hidden), "logits": utils.head_logits(self.policy, hidden)}

    def steered_logits(self, hidden, beta):
        """The steered policy's logits (B,V) at hidden states (B,d)."""
        values = self.values(hidden)
        logits = utils.head_logits(self.policy, hidden)
        return steer(logits, values["target_qs"], values["vs"], beta)

    @torch.no_grad()
    def update_targets(self, alpha):
        """Polyak averaging: target = alpha * online + (1 - alpha) * target."""
        online = self.qs.parameters()
        for target, parameter in zip(self.target_qs.parameters(), online, strict=True):
            target.lerp_(parameter, alpha)

    def save_pretrained(self, folder):
        """A plain causal LM, and beside it two files that only `load_ilql` reads."""
        self.policy.save_pretrained(folder)
        state = self.state_dict()
        heads = {name: x for name, x in state.items() if not name.startswith("policy.")}
        save_file(heads, f"{folder}/ilql_heads.safetensors")
        Path(folder, "ilql_config.json").write_text(json.dumps(self.config) + "\n")


def load_ilql(path):
    """The module that a run left in its folder `model`, ready for `generate_steered`."""
    policy, _ = utils.load_pretrained(AutoModelForCausalLM, path)
    config = json.loads(Path(path, "ilql_config.json").read_text())
    ilql = ILQL(policy, **config)
    heads = load_file(Path(path, "ilql_heads.safetensors"))
    ilql.load_state_dict(heads, strict=False)  # The policy has its weights already.
    return ilql.eval()


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


def steered_decode_step(ilql, tokens, uniforms, beta, temperature, allowed, **inputs):
    """Feed tokens (B,n) and sample the next one, (B,). inputs: positions, mask and cache."""
    hidden = ilql.policy.base_model(tokens, use_cache=True, **inputs).last_hidden_state[:, -1]
    return sample_tokens(ilql.steered_logits(hidden, beta), uniforms, temperature, allowed)


@torch.no_grad()
def generate_steered(
    ilql, queries, query_mask, uniforms, beta, stop_ids, pad_id, allowed=None, temperature=1.0,
    decode_fn=steered_decode_step, cache=None,
):  # fmt: skip
    """Sample a response (B,R) to each prompt; a row is pad_id after its first stop id.

    queries (B,P), left padded; query_mask (B,P): their real tokens. uniforms (B,R) in [0,1) are all
    the randomness there is. beta: the steering strength. allowed (V,) bool: ids that may be
    sampled. The temperature divides the steered logits. decode_fn: `steered_decode_step` or its
    compiled version. cache: one with a slot for each of the P + R tokens, to be used again.
    """
    B, P = queries.shape
    R = uniforms.shape[1]
    if cache is None:
        cache = utils.static_cache(ilql.policy.config, P + R)
    cache.reset()
    stop_ids = torch.as_tensor(stop_ids, device=queries.device)
    beta = torch.as_tensor(beta, device=queries.device)  # A number would be compiled as a constant.
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
        feed = steered_decode_step if t == 0 else decode_fn
        next_tokens = feed(
            ilql,
            tokens,
            uniforms[:, t],
            beta,
            temperature,
            allowed,
            position_ids=positions[:, start:end],
            attention_mask=slot_mask,
            past_key_values=cache,
        )
        # A row that has ended goes on with pads until all have ended.
        responses[:, t] = torch.where(ended, pad_id, next_tokens)
        ended = ended | torch.isin(next_tokens, stop_ids)
        if ended.all():
            break
        tokens = responses[:, t, None]
        start = end
    return responses


# --------------------------------------------------------------------------------------------------
# Data


def turns_of_text(tokenizer, row):
    """The one turn of a text: (token ids of the prompt, token ids that the agent says)."""
    completion = row["completion"].partition(tokenizer.eos_token)[0]
    said = tokenizer(completion, add_special_tokens=False).input_ids
    return [(utils.encode_prompt(tokenizer, row["prompt"]), [*said, tokenizer.eos_token_id])]


def turns_of_messages(tokenizer, messages, num_given):
    """A pair of token ids, (what stands before, what the agent says), for each assistant turn.

    The first num_given messages are a prompt, whose assistant turns are not actions. For the
    dialogue in the manual: ("u:", "x|") and ("v:", "y|"). Of a turn, the agent says what the chat
    template writes up to the first EOS; the rest stands before the next turn. If the template
    writes no EOS, one is added.
    """
    turns = []
    rendered = ""  # All text up to and including the EOS of the last turn.
    for i, message in enumerate(messages):
        check_role(message)
        if message["role"] != "assistant" or i < num_given:
            continue
        prompt_ids = utils.encode_prompt(tokenizer, messages[:i])
        before = tokenizer.apply_chat_template(
            messages[:i], tokenize=False, add_generation_prompt=True
        )
        whole = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        if not before.startswith(rendered) or not whole.startswith(before):
            reason = "does not render a turn as the continuation of those before it"
            raise UserError(f"the chat template {reason}")
        if turns:
            # Not the whole prompt again, only what is new since the last turn.
            new_text = before[len(rendered) :]
            prompt_ids = tokenizer(new_text, add_special_tokens=False).input_ids
        said, eos, _ = whole[len(before) :].partition(tokenizer.eos_token)
        said_ids = tokenizer(said, add_special_tokens=False).input_ids
        turns.append((prompt_ids, [*said_ids, tokenizer.eos_token_id]))
        rendered = before + said + eos
    return turns


def check_role(message):
    """Refuse a message whose role is not one of the four that chat templates share."""
    role = message.get("role")
    if role not in ("system", "user", "assistant", "tool"):
        known = "known are system, user, assistant and tool"
        raise UserError(f"unknown role {role!r}; {known}")


def encode_row(tokenizer, row):
    """{"input_ids", "states", "actions", "rewards"} of a row, as lists.

    See the example at the top of this file. An action without a reward of its own has None.
    """
    if "messages" in row:
        turns = turns_of_messages(tokenizer, row["messages"], num_given=0)
    elif isinstance(row["completion"], str):
        turns = turns_of_text(tokenizer, row)
    elif isinstance(row["prompt"], str):
        raise UserError("a prompt of text needs a completion of text")
    else:
        messages = row["prompt"] + row["completion"]
        turns = turns_of_messages(tokenizer, messages, num_given=len(row["prompt"]))
    if not turns or not turns[0][0]:
        needs = "needs two texts, or messages of which an assistant says one"
        raise UserError(f"no action token or no prompt: {needs}")

    turn_rewards = row["reward"]
    if not isinstance(turn_rewards, list):
        turn_rewards = [None] * (len(turns) - 1) + [turn_rewards]
    elif len(turn_rewards) != len(turns):
        raise UserError(f"assistant turns: {len(turns)}, but rewards: {len(turn_rewards)}")

    ids = []
    states = []
    rewards = []
    for (before, said), reward in zip(turns, turn_rewards, strict=True):
        ids += before
        states += range(len(ids) - 1, len(ids) - 1 + len(said))
        rewards += [None] * (len(said) - 1) + [reward]
        ids += said
    actions = [ids[i + 1] for i in states]
    return {"input_ids": ids, "states": states, "actions": actions, "rewards": rewards}


def check_reward(row):
    """Refuse a row whose reward is not a number that is finite in fp32, or a list of them."""
    rewards = row["reward"] if isinstance(row["reward"], list) else [row["reward"]]
    for reward in rewards:
        if not isinstance(reward, int | float) or not abs(reward) < 3e38:
            raise UserError(f"reward is {row['reward']!r}, which is not a finite number")


def load_rated(args, tokenizer):
    """(rows as of `encode_row`, {"reward_mean", "reward_std"}) of the rows that fit."""
    path = args.dataset
    data = utils.load_rows(path, [("prompt", "completion"), ("messages",)], args.max_rows)
    if "reward" not in data.column_names:
        has = ", ".join(data.column_names)
        raise UserError(f"{path}: needs the column reward; it has {has}")

    def encode(row):
        check_reward(row)
        return [encode_row(tokenizer, row)]

    rows = utils.encode_rows(path, data, encode)
    rows = utils.leave_out_long(path, rows, row_length, args.max_length)

    mean = 0.0
    std = 1.0
    if args.normalize_rewards:
        given = [x for row in rows for x in row["rewards"] if x is not None]
        given = torch.tensor(given, dtype=torch.float64)
        mean = given.mean().item()
        std = given.std(correction=0).item()
        if given.min() == given.max():
            raise UserError(f"{path}: all rewards are equal")
    for row in rows:
        # An action without a reward of its own is paid 0, normalised or not.
        row["rewards"] = [0.0 if x is None else (x - mean) / std for x in row["rewards"]]
    return rows, {"reward_mean": mean, "reward_std": std}


def row_length(row):
    """The tokens of a row."""
    return len(row["input_ids"])


def collate(rows, fill_id):
    """A batch of rows as tensors on the CPU, padded on the right.

    input_ids (B,T), without the last token of each row, which is no state. By action, (B,A) each:
    states, which are indices into input_ids, actions, rewards, mask (whether there is such an
    action) and terminal (whether it is the row's last).
    """
    num_actions = torch.tensor([[len(row["actions"])] for row in rows])
    column = torch.arange(num_actions.max().item())
    return {
        "input_ids": utils.pad_right([row["input_ids"][:-1] for row in rows], fill_id),
        "states": utils.pad_right([row["states"] for row in rows], 0),
        "actions": utils.pad_right([row["actions"] for row in rows], fill_id),
        "rewards": utils.pad_right([row["rewards"] for row in rows], 0.0),
        "mask": column < num_actions,
        "terminal": column == num_actions - 1,
    }


# --------------------------------------------------------------------------------------------------
# Training and evaluation


def micro_batch_loss(model, rows, num_actions, means, loss_fn, fill_id, args, device):
    """The loss of a micro-batch, 0-d: sums over its actions, divided by num_actions of the batch.

    Adds what is logged to `means`.
    """
    batch = utils.to_device(collate(rows, fill_id), device)
    mask = batch["mask"]
    with utils.autocast(args, device):
        output = model(batch["input_ids"], batch["states"])
    # The next state in which the agent acts is the next column. After a row's last action there is
    # none: `terminal` is True there, and the loss puts 0.
    next_vs = F.pad(output["vs"][:, 1:], (0, 1))
    losses = loss_fn(
        qs=output["qs"],
        target_qs=output["target_qs"],
        vs=output["vs"],
        next_vs=next_vs,
        logits=output["logits"],
        actions=batch["actions"],
        rewards=batch["rewards"],
        terminal=batch["terminal"],
        mask=mask,
        args=args,
        num_tokens=num_actions,
    )
    for name in ("q", "v", "cql", "awac"):
        means.add_sum(f"loss/{name}", losses[name] * num_actions, mask.sum())
    means.add(value_stats(output, batch["actions"], args.beta), mask)
    return losses["total"]


@torch.no_grad()
def value_stats(output, actions, beta):
    """The smaller target Q of each action, the value, and what follows from them, to be logged."""
    target_qs = torch.stack(output["target_qs"]).amin(0)
    target_q = target_qs.gather(-1, actions[..., None]).squeeze(-1)
    advantage = target_q - output["vs"]
    return {
        "val/q": target_q,
        "val/v": output["vs"],
        "val/advantage": advantage,
        "val/awac_weight": torch.exp(beta * advantage),
    }


@torch.no_grad()
def standardise_inputs(ilql, rows, fill_id):
    """Set the mean and deviation by which the heads' inputs are standardised, from some rows."""
    sample = rows[:: math.ceil(len(rows) / 128)]
    device = ilql.hidden_mean.device
    batch = utils.to_device(collate(sample, fill_id), device)
    hidden = ilql.policy.base_model(batch["input_ids"], use_cache=False).last_hidden_state
    states = batch["states"][..., None].expand(-1, -1, hidden.shape[-1])
    hidden = hidden.gather(1, states)[batch["mask"]]
    ilql.hidden_mean.copy_(hidden.mean(0))
    ilql.hidden_std.copy_(hidden.std(0, correction=0) + 1e-6)


def score_samples(scorer, dataset_rows, texts, input_ids, is_real, args):
    """Scores (B,) of responses, from the reward function or the reward model."""
    if args.reward_model is None:
        return utils.call_reward_fn(scorer, dataset_rows, texts, input_ids.device)
    scores = last_token_scores(scorer, input_ids, is_real)
    if not scores.isfinite().all():
        raise UserError(f"{args.reward_model}: not a finite score for each response")
    return scores


@torch.no_grad()
def evaluate(sampler, prompts, scorer, step, run, sampling, args, tokenizer, ranks):
    """{"eval/score@beta=...": mean score}, over the samples of all ranks.

    Every steering strength gets the same prompts and uniforms. Ten samples of rank 0 for each go
    into samples.jsonl.
    """
    mine = slice(ranks.rank, None, ranks.world_size)
    order = torch.randperm(len(prompts), generator=utils.seeded(args.seed, "prompts")).tolist()
    my_prompts = [prompts[order[i % len(order)]] for i in range(args.eval_samples)][mine]
    dataset_rows = [row for _, row in my_prompts]
    P = max(len(ids) for ids, _ in prompts)
    sequences = [ids for ids, _ in my_prompts]
    queries, query_mask = utils.left_pad(sequences, P, sampling["pad_id"], ranks.device)
    generator = utils.seeded(args.seed, "samples", step)
    uniforms = torch.rand(args.eval_samples, args.response_length, generator=generator)[mine]
    uniforms = uniforms.to(ranks.device)

    means = utils.Means()
    for beta in args.eval_betas:
        responses = generate_steered(sampler, queries, query_mask, uniforms, beta, **sampling)
        mask = response_mask(responses, sampling["stop_ids"])
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        input_ids = torch.cat([queries, responses], dim=1)
        is_real = torch.cat([query_mask, mask], dim=1)
        scores = score_samples(scorer, dataset_rows, texts, input_ids, is_real, args)
        means.add({f"eval/score@beta={beta:g}": scores})
        if run.is_main:
            columns = (dataset_rows[:10], texts[:10], scores[:10].tolist())
            for row, text, score in zip(*columns, strict=True):
                sample = {"query": row["prompt"], "response": text, "score": score}
                run.append("samples.jsonl", [{"step": step, "beta": beta, **sample}])
    return means.over_ranks()


# --------------------------------------------------------------------------------------------------
# Setting up


def check_flags(args):
    """Refuse what is out of bounds or cannot work together, before anything is loaded."""
    utils.check_shared_flags(args)
    utils.check_at_least(args, 1, "num_epochs", "num_steps", "max_rows", "max_length")
    utils.check_at_least(args, 1, "log_every", "eval_every", "eval_samples", "response_length")
    utils.check_at_least(args, 0, "beta", "cql_weight", "awac_weight", "policy_lr_scale")
    utils.check_above_zero(args, "tau", "gamma", "alpha")
    for name in ("tau", "gamma", "alpha"):
        if getattr(args, name) > 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at most 1")
    if not args.eval_betas or any(not abs(beta) < 1e9 for beta in args.eval_betas):
        raise UserError("--eval_betas: needs numbers below 1e9")
    if args.reward_fn and args.reward_model:
        raise UserError("--reward_fn and --reward_model: give one of them")
    has_scorer = args.reward_fn or args.reward_model or args.dataset == Args.dataset
    if args.eval_dataset and not has_scorer:
        reason = "its samples are scored by --reward_fn or --reward_model; none is given"
        raise UserError(f"--eval_dataset: {reason}")


def load_evaluation(args, tokenizer):
    """(prompts, scorer) of the samples: none where nothing is there to score them."""
    if args.dataset == Args.dataset and not args.reward_fn and not args.reward_model:
        args.reward_fn = "tasks/randomwalks.py:reward"
    if not args.reward_fn and not args.reward_model:
        return [], None
    if args.eval_dataset is None:
        args.eval_dataset = str(Path(args.dataset).with_name("prompts.jsonl"))
    longest = max(args.max_length - args.response_length, 1)
    prompts = utils.load_prompts(args.eval_dataset, tokenizer, longest, "--max_length")
    if args.reward_fn:
        return prompts, utils.load_function(args.reward_fn, "--reward_fn")
    utils.check_same_tokenizer(args.reward_model, tokenizer, args.model)
    kind = AutoModelForSequenceClassification
    scorer, _ = utils.load_pretrained(kind, args.reward_model, num_labels=1)
    return prompts, scorer


def load_model(args, tokenizer, rows, prompts, statistics):
    """The ILQL module, refused if a row or a sample is longer than it has positions."""
    policy, _ = utils.load_pretrained(AutoModelForCausalLM, args.model)
    num_positions = max(row_length(row) for row in rows)
    if prompts:
        longest_sample = max(len(ids) for ids, _ in prompts) + args.response_length
        num_positions = max(num_positions, longest_sample)
    utils.check_positions(policy.config, num_positions, "--max_length", args.model)
    utils.fit_to_tokenizer(policy, tokenizer)
    utils.check_decoding(policy, num_positions, args.model)
    policy.requires_grad_(args.policy_lr_scale > 0)
    return ILQL(policy, args.num_qs, args.q_rows, **statistics)


def steered_sampler(args, tokenizer, ilql):
    """(a copy of the model to sample from, the options of `generate_steered`).

    Its weights are refreshed before every evaluation but the one before the first step.

    The copy must be made before the model's layers are compiled: under --compile its decoding step
    is compiled as a whole.
    """
    sampler = copy.deepcopy(ilql).requires_grad_(False)
    if args.precision == "bf16":
        utils.to_bf16(sampler.policy)
    decode_fn = steered_decode_step
    if args.compile:
        decode_fn = torch.compile(steered_decode_step, mode="reduce-overhead", fullgraph=True)
    device = ilql.hidden_mean.device
    sampling = {
        "stop_ids": torch.tensor([tokenizer.eos_token_id], device=device),
        "pad_id": tokenizer.pad_token_id,
        "allowed": utils.allowed_ids(tokenizer, ilql.policy.config.vocab_size, device),
        "decode_fn": decode_fn,
    }
    return sampler, sampling


def main(args):
    args = utils.resolve_args(args)
    check_flags(args)
    tokenizer = utils.load_tokenizer(args.model)
    rows, statistics = load_rated(args, tokenizer)
    prompts, scorer = load_evaluation(args, tokenizer)
    lengths = [row_length(row) for row in rows]

    ranks = utils.init_ranks(args.timeout_minutes)
    device = ranks.device
    utils.check_divides(ranks.world_size, args.batch_size, "--batch_size by the number of ranks")
    utils.check_divides(
        ranks.world_size, args.eval_samples, "--eval_samples by the number of ranks"
    )
    torch.manual_seed(args.seed)
    ilql = load_model(args, tokenizer, rows, prompts, statistics).to(device)
    fill_id = tokenizer.eos_token_id  # Fills the padding, which no real token sees.
    if args.q_rows == "embeddings":
        standardise_inputs(ilql, rows, fill_id)
    if args.reward_model:
        scorer.to(device)

    sampler, sampling = steered_sampler(args, tokenizer, ilql)
    loss_fn = ilql_loss
    if args.compile:
        utils.compile_layers(ilql.policy)
        loss_fn = torch.compile(ilql_loss, dynamic=True)
    utils.broadcast_weights(ilql)
    heads = [*ilql.v.parameters(), *ilql.qs.parameters()]
    groups = [{"params": list(ilql.policy.parameters())}, {"params": heads}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=0.0, fused=True)

    run = utils.Run(args, ranks, Path(__file__).stem)
    state = {"model": ilql, "optimizer": optimizer}
    done = run.load_checkpoint(state) if args.resume else 0
    num_steps = args.num_steps or args.num_epochs * math.ceil(len(rows) / args.batch_size)
    batches = utils.global_batches(len(rows), args.batch_size, num_steps, args.seed, done)
    shown = ["loss/q", "loss/v", "loss/cql", "loss/awac"]
    shown += [f"eval/score@beta={beta:g}" for beta in args.eval_betas]
    evaluate_at = functools.partial(
        evaluate,
        sampler,
        prompts,
        scorer,
        run=run,
        sampling=sampling,
        args=args,
        tokenizer=tokenizer,
        ranks=ranks,
    )
    means = utils.Means()
    if done == 0 and prompts:
        run.log(0, evaluate_at(step=0), shown)

    for step in utils.progress(done, num_steps, ranks, run.script):
        # 1. Batch: indices of rows, the same on all ranks.
        epoch, indices = next(batches)

        # 2. Loss of this rank's share of the batch, in micro-batches of rows of similar length.
        num_actions = torch.tensor(sum(len(rows[i]["actions"]) for i in indices), device=device)
        for group in utils.micro_batch_rows(indices, lengths, args.micro_batch_size, ranks):
            part = [rows[i] for i in group]
            loss = micro_batch_loss(ilql, part, num_actions, means, loss_fn, fill_id, args, device)
            loss.backward()
        # A sum and not a mean, because the loss was divided by the size of the whole batch.
        utils.sum_gradients(ilql)

        # 3. Update, first the parameters, then the targets.
        lr = args.lr * (1 - (step - 1) / num_steps)
        optimizer.param_groups[0]["lr"] = args.policy_lr_scale * lr
        optimizer.param_groups[1]["lr"] = lr
        max_norm = args.max_grad_norm or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(ilql.parameters(), max_norm)
        if not grad_norm.isfinite():
            raise UserError(f"step {step}: the gradient is not finite; lower --lr or --beta")
        optimizer.step()
        optimizer.zero_grad()
        ilql.update_targets(args.alpha)

        # Log, evaluate, save. A saved step is logged too, so that resuming has whole means.
        is_last = step == num_steps
        evaluates = bool(prompts) and (is_last or step % args.eval_every == 0)
        saves = args.save_every > 0 and step % args.save_every == 0
        if is_last or evaluates or saves or step % args.log_every == 0:
            metrics = means.over_ranks()
            metrics |= {"lr": lr, "optim/grad_norm": grad_norm.item(), "epoch": epoch}
            means = utils.Means()
            if evaluates:
                utils.copy_weights(ilql, sampler)
                metrics |= evaluate_at(step=step)
            run.log(step, metrics, shown)
        if saves:
            run.save_checkpoint(step, state)

    run.save_model("model", ilql, tokenizer)
    if ranks.is_main:
        flags = f"--run {run.folder} --beta {args.eval_betas[-1]:g}"
        if not prompts:
            flags += " --dataset my_prompts.jsonl"
        print(f"\nmodel folder  {run.folder}/model")
        print(f"next          python tools/evaluate.py {flags}")


if __name__ == "__main__":
    utils.launch(main, tyro.cli(Args, use_underscores=True))
