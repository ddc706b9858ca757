r"""ILQL, implicit language Q-learning: offline RL from rated text, without sampling new text.

Snell et al. 2022, "Offline RL for natural language generation with implicit language Q-learning";
Kostrikov et al. 2021, "Offline reinforcement learning with implicit Q-learning" (IQL).

Each step:
    1. batch    rows of (prompt, completion, reward) or rated dialogues; each token that the agent
                says is an action
    2. loss     one language model is the behaviour policy pi_beta; small networks on its last
                hidden state are the value function, two Q functions, and a target for each Q, which
                is a slow copy of it. For each action:
                q       (reward + gamma * value of the next state - Q)^2
                v       expectile regression of the value on the smaller target Q: with tau near 1,
                        the value is nearly the best target Q among the actions in the data
                cql     cross-entropy of softmax(Q) at the action, which keeps Q low elsewhere
                awac    cross-entropy of pi_beta at the action, times exp(beta * (target Q - value))
                total   q + v + cql_weight * cql + awac_weight * awac
                All are sums over actions, divided by the number of actions on all ranks.
    3. update   Adam; the learning rate falls linearly from lr in the first step to lr / num_steps
                in the last. Then target = alpha * online + (1 - alpha) * target
    evaluate    sample token by token from softmax(log pi_beta + steering * (target Q - value)),
                once for each steering strength of --eval_betas. At strength 0 this is pi_beta
                itself

One process:    python ilql_rlhf.py
Eight GPUs:     torchrun --nproc_per_node=8 ilql_rlhf.py --model runs/my_sft/model \
                    --dataset my_rated.jsonl --batch_size 64 --lr 1e-4

Shapes: B rows in a micro-batch, T tokens, A actions, V vocabulary, d width.

Names: `policy` is the language model pi_beta. `vs` are values; in shapes, V is the vocabulary. The
flag --beta is the exponent of AWAC's weight; the `beta` of `steer` is the steering strength of
--eval_betas. The two have nothing to do with each other.

How a row becomes states and actions. State i is the text up to and including token i, and its
action is token i + 1. Eight tokens of a dialogue, where "|" is EOS and the agent says "x|" and then
"y|":

    token index     0     1     2     3     4     5     6     7
    token           u     :     x     |     v     :     y     |
    said by         user  user  agent agent user  user  agent agent

    states          1     2     5     6
    actions         x     |     y     |
    rewards         0     r1    0     r2
    next states     2     5     6     none
    terminal        False False False True

State 1 is "u:" and state 5 is "u:x|v:". A turn's reward is paid for its last token; if there is
only one reward for the dialogue, r1 is 0. After a turn, the next state is the one in which the
agent acts next; what the user says is skipped. After the last action there is none, and its value
counts as 0. Column j of a (B,A) tensor is a row's action j; input_ids end before the last action.

Rules that you might not expect:
    - What the user says, what the chat template writes around turns, and assistant turns inside a
      `prompt` are not actions. The EOS that ends a turn is one.
    - Both Qs are trained, and their q and cql losses are added. Wherever one Q is needed (in the
      value's loss, in AWAC's weight, in decoding), it is the smaller of the two targets.
    - No gradient flows into targets, into the next state's value, or into AWAC's weight, which is
      not clipped. The gradients of q, v and cql reach the language model, as AWAC's does, unless
      --policy_lr_scale is 0: then value and Qs alone are trained.
    - The last layers of value and Qs start at 0, so nothing random is bootstrapped or steers at
      first.
    - The paper trains three language models and divides AWAC by all tokens. Here there is one, and
      AWAC is divided by the number of actions.
    - Rows are padded on the right with more EOS. Causal attention never looks ahead, so there is no
      attention mask, and positions count from 0. Padded actions have mask False and no loss.
    - A row longer than --max_length is dropped, never cut, and how many were is printed. A
      completion that holds an EOS ends at its first one.
    - Models are loaded in fp32 and without dropout. Under --precision bf16 only the language model
      computes in bf16: values, Qs and losses are in fp32.
    - Samples are drawn before the first step, every --eval_every steps, and at the end, if there is
      a reward function or a reward model to score them. They come from a copy of the model, made in
      bf16 (its language model) under --precision bf16. The pad and ids without a token are never
      sampled.
    - With --compile, which is the default on CUDA, each transformer layer, `ilql_loss` and the
      decoding step after the prompt are compiled, and nothing else is.

What the helpers from utils.py do, as far as the algorithm needs them:
    encode_prompt                    token ids of a prompt, of text or messages
    head_logits(model, hidden)       the language-model head
    global_batches                   row numbers of each step, in a new order each epoch
    split_by_length(lengths, size,   this rank's share, every world_size-th row in order of length,
      ranks)                         in groups of at most `size`; one empty group if it has none
    Means                            exact means by name, over micro-batches and ranks
"""

import copy
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

from utils import Means, Run, UserError, allowed_ids, autocast, call_reward_fn, check_above_zero
from utils import check_at_least, check_decoding, check_divides, check_positions
from utils import check_same_tokenizer, check_shared_flags, compile_layers, copy_weights
from utils import clear_gradients, encode_prompt, fit_to_tokenizer, global_batches, head_logits
from utils import init_ranks, launch, left_pad, load_function, load_pretrained, load_prompts
from utils import load_rows, load_tokenizer, pack_rows, pad_right, progress, resolve_args
from utils import save_pretrained, seeded, split_by_length, static_cache, to_bf16, to_device, wrap


@dataclass
class Args:
    model: str = "data/randomwalks/model"
    """the model to train: a Hub name or a folder, preferably of an sft.py run; of a folder that
    holds only a config, the weights are random"""
    dataset: str = "data/randomwalks/rated.jsonl"
    """rows with prompt+completion+reward, or messages+reward; for messages the reward may also be a
    list, one for each assistant turn"""
    eval_dataset: str | None = None
    """rows with prompt to sample from; their other columns reach --reward_fn; none: prompts.jsonl
    beside --dataset"""
    reward_fn: str | None = None
    """path/to/file.py:function(prompts, responses, **columns) that scores the samples; if neither
    this nor --reward_model is given, the default dataset has its own, and others are not sampled
    from"""
    reward_model: str | None = None
    """a reward model that scores the samples instead; like --reward_fn it is never trained on"""
    max_rows: int | None = None
    """use only this many rows, the first ones, of --dataset; none: all rows"""
    output_dir: str | None = None
    """the run folder, which must not exist yet; none: runs/ilql_rlhf__<seed>__<time>"""
    seed: int = 1
    """seeds the new weights, the order of the rows and the sampling"""
    num_epochs: int = 20
    """passes over the rows"""
    num_steps: int | None = None
    """optimizer steps in all; none: as many as num_epochs passes take"""
    batch_size: int = 100
    """rows per optimizer step, over all ranks"""
    micro_batch_size: int = 100
    """rows per forward and backward on one rank: saves memory and does not change the objective"""
    max_length: int = 512
    """tokens of a row; longer rows are dropped, and how many is printed"""
    normalize_rewards: bool = False
    """subtract the mean of the data set's rewards and divide by their standard deviation"""
    num_qs: Literal[1, 2] = 2
    """Q functions; of two, the smaller target counts"""
    q_rows: Literal["ids", "embeddings"] = "ids"
    """ids: Q's last layer has weights of its own for each id; embeddings: it is a frozen copy of
    the language-model head, so that similar ids share what is learned, for large vocabularies, with
    --lr 2e-4"""
    tau: float = 0.8
    """expectile, above 0 and at most 1: at 0.5 the value is the mean of target Q over the data"""
    gamma: float = 0.99
    """discount per action, above 0 and at most 1"""
    beta: float = 0.0
    """exponent of AWAC's weight, per unit of reward; 0: every action weighs 1 in the AWAC loss"""
    cql_weight: float = 0.03
    """weight of the CQL loss"""
    awac_weight: float = 1.0
    """weight of the AWAC loss"""
    alpha: float = 0.03
    """the online Q's share in its target's next value, after every step; above 0 and at most 1"""
    lr: float = 1e-3
    """learning rate of the first step (for the small task; about 1e-4 for a pretrained model)"""
    policy_lr_scale: float = 1.0
    """learning rate of the language model, as a multiple of lr; 0: it stays as it is"""
    max_grad_norm: float = 1.0
    """clip the norm of the gradient, over all parameters, to this; 0: do not clip"""
    precision: Literal["fp32", "bf16"] = "bf16" if torch.cuda.is_available() else "fp32"
    """what the transformer computes in; weights, optimizer state, losses, Q and V stay fp32"""
    compile: bool = torch.cuda.is_available()
    """compile each transformer layer, the loss and the decoding step"""
    eval_betas: tuple[float, ...] = (0.0, 1.0, 100.0)
    """steering strengths to sample with, per unit of reward; 0 is pi_beta"""
    eval_every: int = 100
    """steps between two evaluations; there is one before the first step and one at the end"""
    eval_samples: int = 200
    """responses at each beta, over all ranks, spread evenly over the prompts"""
    response_length: int = 10
    """tokens of a sample at most, EOS included; prompts longer than max_length - response_length
    are left out, and how many is printed"""
    log_every: int = 20
    """steps between two lines of metrics"""
    save_every: int = 0
    """steps between two checkpoints to resume from; 0: none"""
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
    over real actions are divided by num_tokens (None: their number here). cql and awac are
    unweighted.
    """
    if num_tokens is None:
        num_tokens = mask.sum().clamp(min=1)
    # Where there is no action, put 0: a NaN there would reach the gradient through the sums below.
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

    # Conservatism (Kumar et al. 2020): push down every Q, and pull up that of the data's action.
    cql_loss = sum(q.logsumexp(-1) - taken for q, taken in zip(qs, taken_qs, strict=True))

    # Behaviour cloning, weighted by the advantage (Nair et al. 2020; IQL, equation 7).
    advantage_weight = torch.exp(args.beta * (target_q - vs)).detach()
    logprobs = torch.log_softmax(logits, dim=-1).gather(-1, index).squeeze(-1)
    awac_loss = -advantage_weight * logprobs

    token_losses = {"q": q_loss, "v": v_loss, "cql": cql_loss, "awac": awac_loss}
    losses = {}
    for name, loss in token_losses.items():
        losses[name] = loss.masked_fill(~mask, 0.0).sum() / num_tokens
    total = losses["q"] + losses["v"]
    total = total + args.cql_weight * losses["cql"] + args.awac_weight * losses["awac"]
    return {"total": total, **losses}


def steer(logits, target_qs, vs, beta):
    """Logits (B,V) of the steered policy: log_softmax(logits) + beta * (smaller target Q - value).

    logits (B,V) of pi_beta; target_qs: a list of (B,V); vs (B,) (Snell et al. 2022, section 4). The
    value does not change the distribution, only the scale on which one may clip or compare.
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
        return {**self.values(hidden), "logits": head_logits(self.policy, hidden)}

    def steered_logits(self, hidden, beta, allowed=None, temperature=1.0):
        """The steered policy's logits (B,V) at hidden states (B,d).

        The temperature divides the logits of pi_beta before they are steered.
        """
        logits = head_logits(self.policy, hidden).float() / temperature
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -math.inf)
        values = self.values(hidden)
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
    policy, _ = load_pretrained(AutoModelForCausalLM, path)
    config = json.loads(Path(path, "ilql_config.json").read_text())
    ilql = ILQL(policy, **config)
    heads = load_file(Path(path, "ilql_heads.safetensors"))
    ilql.load_state_dict(heads, strict=False)  # The policy has its weights already.
    return ilql.eval()


def score_head(model, hidden):
    """Scores (...) in fp32 of hidden states (...,d): the linear head, minus config.score_mean."""
    # A product and a sum, because autocast would run a matrix product in bf16.
    weight = model.score.weight[0].float()
    scores = (hidden.float() * weight).sum(-1)
    return scores - getattr(model.config, "score_mean", 0.0)


def last_token_scores(model, input_ids, attention_mask):
    """The score (N,), in fp32, of each sequence at its last real token.

    model: a plain AutoModelForSequenceClassification with one label. input_ids (N,T);
    attention_mask (N,T): which tokens are real, whatever side the padding is on and whatever ids it
    holds, because the sequences are packed to the left first.
    """
    input_ids, lengths = pack_rows(input_ids, attention_mask)
    hidden = model.base_model(input_ids, use_cache=False).last_hidden_state
    rows = torch.arange(len(lengths), device=lengths.device)
    return score_head(model, hidden[rows, lengths - 1])


# --------------------------------------------------------------------------------------------------
# Sampling


def sample_tokens(logits, uniforms, temperature, allowed=None):
    """One token id per row, (B,), by inverting the cumulative distribution.

    logits (B,V); uniforms (B,) in [0,1). The token is the first whose cumulative probability
    exceeds u times the total. Temperature 0 takes the most likely one.
    """
    logits = logits.float()
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -math.inf)
    likeliest = logits.argmax(-1, keepdim=True)
    if temperature == 0:
        return likeliest.squeeze(1)
    probabilities = torch.softmax(logits / temperature, dim=-1)
    cumulative = probabilities.cumsum(-1)
    target = uniforms[:, None] * cumulative[:, -1:]
    # Rounding can put the target at the total, or let a parallel sum step up where the probability
    # is 0. Then the index is no token, or an impossible one: take the most likely token instead.
    tokens = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)
    is_possible = probabilities.gather(1, tokens) > 0
    return torch.where(is_possible, tokens, likeliest).squeeze(1)


def steered_decode_step(ilql, tokens, uniforms, beta, temperature, allowed, **inputs):
    """Feed tokens (B,n) and sample the next one, (B,); inputs: cache, mask and positions."""
    output = ilql.policy.base_model(tokens, use_cache=True, **inputs)
    hidden = output.last_hidden_state[:, -1]
    if temperature == 0:
        return ilql.steered_logits(hidden, beta, allowed).argmax(-1)
    logits = ilql.steered_logits(hidden, beta, allowed, temperature)
    return sample_tokens(logits, uniforms, temperature=1.0)  # It has been applied already.


@torch.no_grad()
def generate_steered(
    ilql, queries, query_mask, uniforms, beta, stop_ids, pad_id, allowed=None, temperature=1.0,
    step=steered_decode_step, cache=None,
):  # fmt: skip
    """Sample a response (B,R) to each prompt; a row is pad_id after its first stop id.

    queries (B,P), left padded; query_mask (B,P): their real tokens. uniforms (B,R) in [0,1) are all
    the randomness there is. allowed (V,) bool: ids that may be sampled. step: `steered_decode_step`
    or its compiled version. cache: of P + R slots, to be reused.
    """
    B, P = queries.shape
    R = uniforms.shape[1]
    if cache is None:
        cache = static_cache(ilql.policy.config, P + R)
    cache.reset()
    stop_ids = torch.as_tensor(stop_ids, device=queries.device)
    prompt_lengths = query_mask.long().sum(1, keepdim=True)
    positions = (query_mask.long().cumsum(1) - 1).clamp(min=0)
    # The slots of the cache that may be read. Rows that have ended go on with pads, which nobody
    # looks at, until all have ended.
    key_mask = F.pad(query_mask.long(), (0, R))
    beta = torch.as_tensor(beta, device=queries.device)  # A number would be compiled as a constant.
    options = {"beta": beta, "temperature": temperature, "allowed": allowed}
    options["past_key_values"] = cache

    responses = torch.full((B, R), pad_id, device=queries.device)
    ended = torch.zeros(B, dtype=torch.bool, device=queries.device)
    # The whole prompt at once, uncompiled, and then one token after another.
    next_tokens = steered_decode_step(
        ilql,
        queries,
        uniforms[:, 0],
        attention_mask=key_mask,
        position_ids=positions,
        **options,
    )
    for t in range(R):
        responses[:, t] = torch.where(ended, pad_id, next_tokens)
        ended = ended | torch.isin(next_tokens, stop_ids)
        if t == R - 1 or ended.all():
            break
        key_mask[:, P + t] = 1
        next_tokens = step(
            ilql,
            responses[:, t, None],
            uniforms[:, t + 1],
            attention_mask=key_mask,
            position_ids=prompt_lengths + t,
            **options,
        )
    return responses


# --------------------------------------------------------------------------------------------------
# Data


def turns_of_text(tokenizer, row):
    """The one turn of a text: (token ids of the prompt, token ids that the agent says)."""
    completion = row["completion"].partition(tokenizer.eos_token)[0]
    said = tokenizer(completion, add_special_tokens=False).input_ids
    return [(encode_prompt(tokenizer, row["prompt"]), [*said, tokenizer.eos_token_id])]


def turns_of_messages(tokenizer, messages, num_given):
    """A pair of token ids, (what stands before, what the agent says), for each assistant turn.

    The first num_given messages are a prompt, whose assistant turns are not actions. A turn ends at
    its first EOS. What the chat template writes after that, up to the next turn, stands before the
    next turn.
    """
    turns = []
    rendered = ""  # All text up to and including the EOS of the last turn.
    for i, message in enumerate(messages):
        check_role(message)
        if message["role"] != "assistant" or i < num_given:
            continue
        prompt_ids = encode_prompt(tokenizer, messages[:i])
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
    """{"input_ids", "states", "actions", "rewards"} of a row, as lists; see the example in this
    file's docstring.

    input_ids lack the last token, because no action follows it.
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
    return {"input_ids": ids[:-1], "states": states, "actions": actions, "rewards": rewards}


def check_reward(row):
    """Refuse a row whose reward is not a number that is finite in fp32, or a list of them."""
    rewards = row["reward"] if isinstance(row["reward"], list) else [row["reward"]]
    for reward in rewards:
        if not isinstance(reward, int | float) or not abs(reward) < 3e38:
            raise UserError(f"reward is {row['reward']!r}, which is not a finite number")


def load_rated(args, tokenizer):
    """(rows as of `encode_row`, {"reward_mean", "reward_std"}) of the rows that fit."""
    columns = [("prompt", "completion"), ("messages",)]
    data = load_rows(args.dataset, columns, args.max_rows)
    if "reward" not in data.column_names:
        has = ", ".join(data.column_names)
        raise UserError(f"{args.dataset}: needs the column reward; it has {has}")
    rows = []
    for number, row in enumerate(data, start=1):
        try:
            check_reward(row)
            rows.append(encode_row(tokenizer, row))
        except Exception as error:  # Chat templates refuse conversations in many ways.
            raise UserError(f"{args.dataset}: row {number}: {error}") from error
    kept = [row for row in rows if len(row["input_ids"]) + 1 <= args.max_length]
    if len(kept) < len(rows):
        left_out = f"left out {len(rows) - len(kept)} of {len(rows)} rows"
        print(f"{args.dataset}: {left_out} longer than --max_length {args.max_length}")
    if not kept:
        reason = f"every one is longer than --max_length {args.max_length}"
        raise UserError(f"{args.dataset}: no row is left; {reason}")

    mean = 0.0
    std = 1.0
    if args.normalize_rewards:
        given = [x for row in kept for x in row["rewards"] if x is not None]
        given = torch.tensor(given, dtype=torch.float64)
        mean = given.mean().item()
        std = given.std(correction=0).item()
        if given.min() == given.max():
            raise UserError(f"{args.dataset}: all rewards are equal")
    for row in kept:
        # An action that the data gives no reward of its own has reward 0, normalised or not.
        row["rewards"] = [0.0 if x is None else (x - mean) / std for x in row["rewards"]]
    return kept, {"reward_mean": mean, "reward_std": std}


def collate(rows, fill_id):
    """A batch of rows, on the CPU: input_ids (B,T), and by action, (B,A) each, the states (indices
    into input_ids), actions, rewards, mask and terminal."""
    has_rows = len(rows) > 0
    if not has_rows:
        # A rank without rows still takes part, with an action that counts 0: the others wait for
        # it.
        rows = [{"input_ids": [fill_id], "states": [0], "actions": [fill_id], "rewards": [0.0]}]
    num_actions = torch.tensor([[len(row["actions"])] for row in rows])
    columns = torch.arange(num_actions.max().item())
    mask = columns < num_actions
    return {
        "input_ids": pad_right([row["input_ids"] for row in rows], fill_id),
        "states": pad_right([row["states"] for row in rows], 0),
        "actions": pad_right([row["actions"] for row in rows], fill_id),
        "rewards": pad_right([row["rewards"] for row in rows], 0.0),
        "terminal": columns == num_actions - 1,
        "mask": mask & has_rows,
    }


# --------------------------------------------------------------------------------------------------
# Training and evaluation


def micro_batch_loss(model, rows, num_actions, means, loss_fn, fill_id, args, device):
    """The loss of a micro-batch, 0-d: sums over its actions, divided by num_actions of the batch.

    Adds what is logged to `means`.
    """
    batch = to_device(collate(rows, fill_id), device)
    mask = batch["mask"]
    with autocast(args, device):
        output = model(batch["input_ids"], batch["states"])
    # The next column is the next state in which the agent acts. At a row's last action it means
    # nothing: there `terminal` is True, and the loss puts 0.
    next_vs = F.pad(output["vs"][:, 1:], (0, 1))
    losses = loss_fn(
        output["qs"],
        output["target_qs"],
        output["vs"],
        next_vs,
        output["logits"],
        batch["actions"],
        batch["rewards"],
        batch["terminal"],
        mask,
        args,
        num_actions,
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
    batch = to_device(collate(sample, fill_id), device)
    hidden = ilql.policy.base_model(batch["input_ids"], use_cache=False).last_hidden_state
    states = batch["states"][..., None].expand(-1, -1, hidden.shape[-1])
    hidden = hidden.gather(1, states)[batch["mask"]]
    ilql.hidden_mean.copy_(hidden.mean(0))
    ilql.hidden_std.copy_(hidden.std(0, correction=0) + 1e-6)


def score_samples(scorer, rows, texts, input_ids, is_real, args):
    """Scores (B,) of responses, from the reward function or the reward model."""
    if args.reward_model is None:
        return call_reward_fn(scorer, rows, texts, input_ids.device)
    scores = last_token_scores(scorer, input_ids, is_real)
    if not scores.isfinite().all():
        raise UserError(f"{args.reward_model}: not a finite score for each response")
    return scores


@torch.no_grad()
def evaluate(sampler, prompts, scorer, steps_done, run, sampling, args, tokenizer, ranks):
    """{"eval/score@beta=...": mean score} over the samples of all ranks, and some of them as a
    file.

    Every beta gets the same prompts and uniforms. Ten samples of each go into samples.jsonl.
    """
    mine = slice(ranks.rank, None, ranks.world_size)
    order = torch.randperm(len(prompts), generator=seeded(args.seed, "prompts")).tolist()
    chosen = [prompts[order[i % len(order)]] for i in range(args.eval_samples)][mine]
    rows = [row for _, row in chosen]
    P = max(len(ids) for ids, _ in prompts)
    queries, query_mask = left_pad([ids for ids, _ in chosen], P, sampling["pad_id"], ranks.device)
    generator = seeded(args.seed, "samples", steps_done)
    uniforms = torch.rand(args.eval_samples, args.response_length, generator=generator)[mine]
    uniforms = uniforms.to(ranks.device)

    means = Means()
    for beta in args.eval_betas:
        responses = generate_steered(sampler, queries, query_mask, uniforms, beta, **sampling)
        mask = response_mask(responses, sampling["stop_ids"])
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        input_ids = torch.cat([queries, responses], dim=1)
        is_real = torch.cat([query_mask, mask], dim=1)
        scores = score_samples(scorer, rows, texts, input_ids, is_real, args)
        means.add({f"eval/score@beta={beta:g}": scores})
        if run.is_main:
            columns = (rows[:10], texts[:10], scores[:10].tolist())
            for row, text, score in zip(*columns, strict=True):
                sample = {"query": row["prompt"], "response": text, "score": score}
                run.append("samples.jsonl", [{"step": steps_done, "beta": beta, **sample}])
    return means.over_ranks()


# --------------------------------------------------------------------------------------------------
# Setting up


def check_flags(args):
    """Refuse what is out of bounds or cannot work together, before anything is loaded."""
    check_shared_flags(args)
    check_at_least(args, 1, "num_epochs", "num_steps", "max_rows", "max_length")
    check_at_least(args, 1, "log_every", "eval_every", "eval_samples", "response_length")
    check_at_least(args, 0, "beta", "cql_weight", "awac_weight", "policy_lr_scale")
    check_above_zero(args, "tau", "gamma", "alpha")
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
    prompts = load_prompts(args.eval_dataset, tokenizer, longest, "--max_length")
    if args.reward_fn:
        return prompts, load_function(args.reward_fn, "--reward_fn")
    check_same_tokenizer(args.reward_model, tokenizer, args.model)
    kind = AutoModelForSequenceClassification
    scorer, _ = load_pretrained(kind, args.reward_model, num_labels=1)
    return prompts, scorer


def load_model(args, tokenizer, rows, prompts, statistics):
    """The ILQL module, refused if a row or a sample is longer than it has positions."""
    policy, _ = load_pretrained(AutoModelForCausalLM, args.model)
    num_positions = max(len(row["input_ids"]) for row in rows)
    if prompts:
        longest_sample = max(len(ids) for ids, _ in prompts) + args.response_length
        num_positions = max(num_positions, longest_sample)
    check_positions(policy.config, num_positions, "--max_length", args.model)
    fit_to_tokenizer(policy, tokenizer)
    check_decoding(policy, num_positions, args.model)
    policy.requires_grad_(args.policy_lr_scale > 0)
    return ILQL(policy, args.num_qs, args.q_rows, **statistics)


def main(args):
    args = resolve_args(args)
    check_flags(args)
    tokenizer = load_tokenizer(args.model)
    rows, statistics = load_rated(args, tokenizer)
    prompts, scorer = load_evaluation(args, tokenizer)

    ranks = init_ranks(args.timeout_minutes)
    device = ranks.device
    check_divides(ranks.world_size, args.batch_size, "--batch_size by the number of ranks")
    check_divides(ranks.world_size, args.eval_samples, "--eval_samples by the number of ranks")
    torch.manual_seed(args.seed)
    ilql = load_model(args, tokenizer, rows, prompts, statistics).to(device)
    fill_id = tokenizer.eos_token_id  # Stands after a row, where no token sees it.
    if args.q_rows == "embeddings":
        standardise_inputs(ilql, rows, fill_id)
    if args.reward_model:
        scorer.to(device)

    # Samples are drawn from a copy, whose weights are refreshed before each later evaluation.
    sampler = copy.deepcopy(ilql).requires_grad_(False)
    if args.precision == "bf16":
        to_bf16(sampler.policy)
    sampling = {
        "stop_ids": torch.tensor([tokenizer.eos_token_id], device=device),
        "pad_id": tokenizer.pad_token_id,
        "allowed": allowed_ids(tokenizer, ilql.policy.config.vocab_size, device),
        "step": steered_decode_step,
    }
    loss_fn = ilql_loss
    if args.compile:
        compile_layers(ilql.policy)
        loss_fn = torch.compile(ilql_loss, dynamic=True)
        sampling["step"] = torch.compile(
            steered_decode_step, mode="reduce-overhead", fullgraph=True
        )
    train_model = wrap(ilql, ranks)
    heads = [*ilql.v.parameters(), *ilql.qs.parameters()]
    groups = [{"params": list(ilql.policy.parameters())}, {"params": heads}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=0.0, fused=True)

    run = Run(args, ranks, "ilql_rlhf")
    state = {"model": ilql, "optimizer": optimizer}
    done = run.load_checkpoint(state) if args.resume else 0
    num_steps = args.num_steps or args.num_epochs * math.ceil(len(rows) / args.batch_size)
    batches = global_batches(len(rows), args.batch_size, num_steps, args.seed, done)
    shown = ["loss/q", "loss/v", "loss/cql", "loss/awac"]
    shown += [f"eval/score@beta={beta:g}" for beta in args.eval_betas]
    evaluation = {"run": run, "sampling": sampling, "args": args}
    evaluation |= {"tokenizer": tokenizer, "ranks": ranks}
    means = Means()
    if done == 0 and prompts:
        run.log(0, evaluate(sampler, prompts, scorer, 0, **evaluation), shown)

    for step in progress(done, num_steps, ranks, run.script):
        # 1. Batch: the rows of all ranks, and this rank's share of them in micro-batches.
        epoch, numbers = next(batches)
        batch = [rows[i] for i in numbers]
        lengths = [len(row["input_ids"]) for row in batch]
        groups = split_by_length(lengths, args.micro_batch_size, ranks)

        # 2. Loss: the sum over all ranks divided by their number of actions.
        num_actions = torch.tensor(sum(len(row["actions"]) for row in batch), device=device)
        for i, group in enumerate(groups):
            # With several ranks, DDP exchanges gradients in the last backward only.
            train_model.require_backward_grad_sync = i + 1 == len(groups)
            part = [batch[j] for j in group]
            loss = micro_batch_loss(
                train_model, part, num_actions, means, loss_fn, fill_id, args, device
            )
            # DDP averages gradients over ranks; the factor turns that average into a sum.
            (loss * ranks.world_size).backward()

        # 3. Update, first the parameters, then the targets.
        lr = args.lr * (1 - (step - 1) / num_steps)
        optimizer.param_groups[0]["lr"] = args.policy_lr_scale * lr
        optimizer.param_groups[1]["lr"] = lr
        max_norm = args.max_grad_norm or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(ilql.parameters(), max_norm)
        optimizer.step()
        clear_gradients(optimizer)
        ilql.update_targets(args.alpha)

        # Log, evaluate, save. A saved step is logged too, so that resuming has whole means.
        evaluates = bool(prompts) and (step % args.eval_every == 0 or step == num_steps)
        saves = args.save_every > 0 and step % args.save_every == 0
        if step % args.log_every == 0 or evaluates or saves or step == num_steps:
            # Asked only here, because asking waits for the device. NaN weights stay NaN.
            if not grad_norm.isfinite():
                raise UserError(f"step {step}: the gradient is not finite; lower --lr or --beta")
            metrics = means.over_ranks()
            metrics |= {"lr": lr, "optim/grad_norm": grad_norm.item(), "epoch": epoch}
            means = Means()
            if evaluates:
                copy_weights(ilql, sampler)
                metrics |= evaluate(sampler, prompts, scorer, step, **evaluation)
            run.log(step, metrics, shown)
        if saves:
            run.save_checkpoint(step, state)

    if ranks.is_main:
        save_pretrained(run.folder / "model", ilql, tokenizer)
        flags = f"--run {run.folder} --beta {args.eval_betas[-1]:g}"
        if not prompts:
            flags += " --dataset my_prompts.jsonl"
        print(f"\nmodel folder  {run.folder}/model")
        print(f"next          python tools/evaluate.py {flags}")


if __name__ == "__main__":
    launch(main, tyro.cli(Args, use_underscores=True))
