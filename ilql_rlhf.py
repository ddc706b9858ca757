"""ILQL, implicit language Q-learning: offline RL from rated text alone (Snell et al. 2022; IQL: Kostrikov et al. 2021).

    1. batch    rows of (prompt, completion, reward) or dialogues; each token that the agent says is an action
    2. loss     one trunk; the LM head is the behaviour policy pi_beta; heads V, twin Q, target Q. Of each action:
                q      (r + gamma * V(next state) - Q)^2; behind the last action there is no next V
                v      expectile tau of the smaller target Q: near its maximum over the actions that the data holds
                cql    cross-entropy of softmax(Q) at the action, which keeps Q low where there is no data
                awac   cross-entropy of pi_beta at the action, times exp(beta * (target Q - V))
    3. update   AdamW, learning rate decaying linearly; then target = alpha * online + (1 - alpha) * target
    evaluate    sample from softmax(log pi_beta + beta * (target Q - V)) at each beta of --eval_betas

One process:     python ilql_rlhf.py
Eight GPUs:      torchrun --nproc_per_node=8 ilql_rlhf.py --model runs/my_sft/model --dataset my_rated.jsonl

Shapes: B rows on this rank, T tokens, A actions (both right padded), V vocabulary, d hidden width. State i is the prefix
up to token i, its action is token i + 1; column j of (B,A) is a row's action j. What the environment says is no action:
behind a turn comes the next turn's first state. A turn's last token is paid; terminal marks a row's last action.
Deviations from the paper's code: one trunk (there: three); heads start at 0; AWAC is a mean over action tokens.
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
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig
from transformers import DynamicCache, StaticCache, TopKLogitsWarper, TopPLogitsWarper

from utils import Means, Run, UserError, check_divides, check_path, init_ranks, launch, load_function, load_pretrained
from utils import load_rows, prepare, progress, save_pretrained, seeded, wrap


@dataclass
class Args:
    model: str = "data/randomwalks/model"
    """what is trained: a Hub name or a folder, preferably of an sft.py run; a config alone: from random weights"""
    dataset: str = "data/randomwalks/rated.jsonl"
    """rows with prompt+completion+reward, or messages+reward; for messages also a list, one per assistant turn"""
    eval_dataset: str | None = None
    """rows with prompt to sample from, their other columns for --reward_fn; none: prompts.jsonl beside --dataset"""
    reward_fn: str | None = None
    """path/to/file.py:function that scores samples; none, and no --reward_model: on the embedded task, its own"""
    reward_model: str | None = None
    """a folder or Hub name of a reward model that scores samples; like --reward_fn it only evaluates"""
    output_dir: str | None = None
    """the run folder, which must not exist yet; none: runs/ilql_rlhf__<seed>__<time>"""
    seed: int = 1
    """seeds the new weights, the order of the rows and the sampling"""
    num_epochs: int = 20
    """passes over the rows"""
    batch_size: int = 100
    """rows per optimizer step, over all ranks"""
    micro_batch_size: int = 100
    """rows per forward on one rank: a memory knob, without effect on the objective (--q_rows embeddings: 128 at first)"""
    max_length: int = 512
    """tokens; longer rows lose the start of their prompt; longer dialogues, and rows of too short a prompt, are left out"""
    normalize_rewards: bool = False
    """subtract the mean of the data set's rewards and divide by their standard deviation"""
    num_qs: Literal[1, 2] = 2
    """Q heads; of two, the smaller target counts"""
    q_rows: Literal["ids", "embeddings"] = "ids"
    """last layer of Q: a row for each id; or the LM head's rows, frozen, so that ids share what is learned (--lr 2e-4)"""
    tau: float = 0.8
    """expectile, above 0 and at most 1: V is the mean over the data's actions at 0.5, their maximum towards 1"""
    gamma: float = 0.99
    """discount per action"""
    beta: float = 0.0
    """exponent of AWAC's weight, per unit of reward; 0: plain behaviour cloning"""
    cql_weight: float = 0.03
    """weight of the CQL loss"""
    awac_weight: float = 1.0
    """weight of the AWAC loss"""
    alpha: float = 0.03
    """Polyak: the share of the online Q heads in the targets' next value, after every optimizer step"""
    lr: float = 1e-3
    """learning rate of the first step; decays linearly to min_lr"""
    policy_lr_scale: float = 1.0
    """times the learning rate: that of trunk and LM head; 0 leaves pi_beta as it is and trains the heads alone, without AWAC"""
    min_lr: float = 0.0
    """learning rate at the end of decay_epochs and from there on"""
    decay_epochs: int = 0
    """passes over the rows in which the learning rate decays; 0: all of num_epochs"""
    max_grad_norm: float = 1.0
    """gradients of a larger global norm are scaled down to it; 0: never"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """what training computes in (samples: fp32); weights, optimizer state, losses, Q and V are fp32 always"""
    compile: bool = torch.cuda.is_available()
    """torch.compile the training forward, the loss and the decoding step"""
    eval_betas: tuple[float, ...] = (0.0, 1.0, 100.0)
    """steering strengths to sample with, per unit of reward; 0 is pi_beta"""
    eval_every: int = 100
    """steps between two evaluations; the last step is always evaluated"""
    eval_samples: int = 200
    """responses at each beta, over all ranks, spread evenly over the prompts"""
    response_length: int = 10
    """tokens sampled at most, the EOS included; a prompt keeps its last max_length - response_length tokens"""
    log_every: int = 20
    """steps between two lines of metrics"""
    save_every: int = 0
    """steps between two checkpoints to resume from; 0: none"""
    resume: str | None = None
    """a run folder: go on from its newest checkpoint, with its own arguments"""
    track: Literal["none", "wandb", "tensorboard"] = "none"
    """where metrics go besides metrics.jsonl"""


# ---- The algorithm ---------------------------------------------------------------------------------------------------
def last_hidden(model, input_ids, attention_mask):
    """Hidden states (B,T,d) below the head. Positions count real tokens only, and no id behind the mask is read."""
    inputs = {"attention_mask": attention_mask.long(), "use_cache": False}
    inputs["position_ids"] = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    return model.base_model(input_ids.masked_fill(attention_mask == 0, 0), **inputs).last_hidden_state


class ILQL(torch.nn.Module):
    """The policy (trunk and pi_beta), and fp32 heads on its last hidden state: V, Q and target Q."""

    def __init__(self, policy, num_qs, q_rows="ids", **config):
        super().__init__()
        (V, d), nn = (embeddings := policy.get_output_embeddings().weight.detach()).shape, torch.nn
        sizes = [1, *[V if q_rows == "ids" else d + 1] * num_qs]
        v, *q = [nn.Sequential(nn.Linear(d, 2 * d), nn.ReLU(), nn.Linear(2 * d, n)) for n in sizes]
        self.policy, self.config = policy, {"num_qs": num_qs, "q_rows": q_rows, **config}
        [nn.init.zeros_(x) for head in (v, *q) for x in head[2].parameters()]  # nothing random bootstraps or steers
        for head in q if q_rows == "embeddings" else ():  # state . embedding (He et al. 2016) + the state's own worth
            head.append(nn.Linear(d + 1, V, bias=False).requires_grad_(False))
            head[3].weight.data = F.pad(F.layer_norm(embeddings.float(), (d,)) / d**0.5, (0, 1), value=1.0)
        self.heads = nn.ModuleDict({"v": nn.ModuleList([v]), "q": nn.ModuleList(q)})
        self.heads["target_q"] = copy.deepcopy(self.heads["q"]).requires_grad_(False)
        self.heads.register_buffer("moments", torch.tensor([[0.0], [1.0]]).repeat(1, d))  # mean, deviation of hidden

    def values(self, name, hidden, actions=None):
        """What the heads of a name say at hidden (...,d): "v" one (...,1), each Q (...,V), or (...,1) of actions (...)."""
        heads, (mean, deviation) = self.heads[name], self.heads.moments
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = (hidden.to(mean.dtype) - mean) / deviation
            if actions is None:
                return [head(hidden) for head in heads]
            parts = [(head[:-1](hidden), F.embedding(actions, head[-1].weight), head[-1].bias) for head in heads]
            return [(x * w).sum(-1, keepdim=True) + (0 if b is None else b[actions][..., None]) for x, w, b in parts]

    def forward(self, input_ids, attention_mask, states, actions=None, all_qs=True):
        """(logits, qs, target_qs, vs) at states (B,A), indices of tokens; of actions (B,A) target Q and, without all_qs, Q alone."""
        hidden = last_hidden(self.policy, input_ids, attention_mask).take_along_dim(states[..., None], 1)  # (B,A,d)
        head, (vs,) = self.policy.get_output_embeddings(), self.values("v", hidden)
        logits = head(hidden) if head.weight.requires_grad else hidden[..., :1] * 0  # frozen: no AWAC
        qs = self.values("q", hidden, None if all_qs else actions)
        return logits, qs, self.values("target_q", hidden.detach(), actions), vs.squeeze(-1)

    def steered_logits(self, hidden, beta, bias, temperature=1.0, top_k=None, top_p=1.0):
        """`steer` at hidden (B,d); bias (V,): -inf, or 0. Temperature (0: none) and cuts precede the shift (trlX: follow)."""
        logits = self.policy.get_output_embeddings()(hidden).float() / (temperature or 1.0) + bias
        logits = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
        logits = TopPLogitsWarper(top_p)(None, logits) if top_p < 1 else logits
        return steer(logits, self.values("target_q", hidden), self.values("v", hidden)[0].squeeze(-1), beta)

    @torch.no_grad()
    def update_targets(self, alpha):
        """Polyak averaging: target = alpha * online + (1 - alpha) * target."""
        torch._foreach_lerp_(*(list(self.heads[name].parameters()) for name in ("target_q", "q")), alpha)

    def save_pretrained(self, folder):
        """A plain causal LM, and beside it two files that only `load_ilql` reads."""
        self.policy.save_pretrained(folder)
        save_file(self.heads.state_dict(), f"{folder}/ilql_heads.safetensors")
        Path(folder, "ilql_config.json").write_text(json.dumps(self.config) + "\n")


def load_ilql(path):
    """The module that a run left in its folder `model` (a local one), ready for `generate_steered`."""
    (policy, _), config = load_pretrained(AutoModelForCausalLM, path), Path(path, "ilql_config.json").read_text()
    ilql = ILQL(policy, **json.loads(config))
    ilql.heads.load_state_dict(load_file(Path(path, "ilql_heads.safetensors")))
    return ilql.eval()


def ilql_loss(qs, target_qs, vs, next_vs, logits, actions, rewards, terminal, mask, tau, gamma, beta, cql_weight,
              awac_weight, num_tokens=None):  # fmt: skip
    """{total, q, v, cql, awac}, 0-d: sums over real actions / num_tokens (their number on all ranks; none: in here).
    total = q + v + cql_weight * cql + awac_weight * awac (code of Snell et al. 2022); q, cql: sums over heads. Shapes (B,A);
    lists qs, target_qs and logits (B,A,V), or (B,A,1) of the actions alone: then cql, awac are 0. The mask hides all behind it."""
    num_tokens = mask.sum().clamp(min=1) if num_tokens is None else num_tokens
    qs, target_qs, (logits,) = ([x.masked_fill(~mask[..., None], 0.0) for x in xs] for xs in (qs, target_qs, [logits]))
    vs, next_vs, rewards = (x.masked_fill(~mask, 0.0) for x in (vs, next_vs, rewards))
    index = actions.masked_fill(~mask, 0)[..., None]  # modulo 1 it is the only one
    taken_qs = [q.gather(-1, index % q.shape[-1]).squeeze(-1) for q in qs]
    target_q = torch.stack([q.gather(-1, index % q.shape[-1]).squeeze(-1) for q in target_qs]).amin(0).detach()
    # Temporal difference (IQL, eq. 6): V is the next state's value, so no action that the data lacks is ever asked for.
    backup = rewards + gamma * next_vs.detach().masked_fill(terminal, 0.0)
    q_loss = sum((backup - q) ** 2 for q in taken_qs)
    # Expectile regression (IQL, eq. 5): where the target is above V the error weighs tau, elsewhere 1 - tau.
    v_loss = (tau - (target_q < vs).to(vs.dtype)).abs() * (target_q - vs) ** 2
    cql_loss = sum(q.logsumexp(-1) - taken_q for q, taken_q in zip(qs, taken_qs))  # conservatism: Kumar et al. 2020
    weight = torch.exp(beta * (target_q - vs)).detach()  # behaviour cloning by advantage (Nair et al. 2020; IQL, eq. 7)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    awac_loss = -weight * torch.log_softmax(logits, dim=-1).gather(-1, index % logits.shape[-1]).squeeze(-1)
    losses = {"q": q_loss, "v": v_loss, "cql": cql_loss, "awac": awac_loss}
    losses = {name: loss.masked_fill(~mask, 0.0).sum() / num_tokens for name, loss in losses.items()}
    more = sum(x * losses[name] for name, x in (("cql", cql_weight), ("awac", awac_weight)) if x)  # 0 * infinity is NaN
    return {"total": losses["q"] + losses["v"] + more, **losses}


def steer(logits, target_qs, vs, beta):
    """log_softmax(logits) + beta * (min target Q - V) (Snell et al. 2022, section 4). logits, each target Q: (B,V); vs (B,)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(logits, dim=-1) + beta * (torch.stack(target_qs).amin(0) - vs[..., None])


def response_mask(responses, stop_ids, min_length=0):
    """(B,R) bool: True up to and including each row's first stop id at an index >= min_length."""
    is_stop = torch.isin(responses, torch.as_tensor(stop_ids, device=responses.device))
    is_stop[:, :min_length] = False
    return is_stop.long().cumsum(1) - is_stop.long() == 0  # no stop before this token


def steered_decode_step(ilql, cache, tokens, key_mask, uniforms, beta, temperature=1.0, **options):
    """Feed tokens (B,n) to the trunk and sample the next one (B,) of each row by inverse CDF; temperature 0: the likeliest."""
    position_ids = (key_mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]  # nothing may be read behind the tokens
    inputs = {"attention_mask": key_mask, "position_ids": position_ids, "past_key_values": cache, "use_cache": True}
    hidden = ilql.policy.base_model(tokens, **inputs).last_hidden_state[:, -1]
    probabilities = torch.softmax(ilql.steered_logits(hidden, beta, temperature=temperature, **options), dim=-1)
    likeliest, cumulative = probabilities.argmax(-1, keepdim=True), probabilities.cumsum(-1)
    tokens = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    possible = probabilities.gather(1, tokens) > 0  # a parallel cumsum may step down by a rounding error
    return torch.where(possible & (temperature > 0), tokens, likeliest).squeeze(1)


@torch.no_grad()
def generate_steered(ilql, queries, query_mask, uniforms, beta, stop_ids, pad_id, step=None, cache=None, **options):
    """Sample a response (B,R) to each left padded query (B,P); query_mask (B,P): real tokens; uniforms (B,R) in [0,1): all the
    randomness. A row is pad_id behind its first stop id. options: bias (V,), and more of `ILQL.steered_logits`."""
    (B, P), R, device, prompt = queries.shape, uniforms.shape[1], queries.device, DynamicCache()
    cache = StaticCache(config=ilql.policy.config, max_cache_len=P + R) if cache is None else cache
    beta, stop_ids = torch.as_tensor(beta, device=device), torch.as_tensor(stop_ids, device=device)  # no constants
    responses, step = torch.full((B, R), pad_id, device=device), step or steered_decode_step
    queries, query_mask = queries.masked_fill(query_mask == 0, 0), query_mask.long()  # eager: no graph owns the keys
    responses[:, 0] = steered_decode_step(ilql, prompt, queries, query_mask, uniforms[:, 0], beta, **options)
    cache.reset(), [cache.update(x.keys, x.values, i) for i, x in enumerate(prompt.layers)], prompt.layers.clear()
    key_mask = F.pad(query_mask, (0, max(R, *(x.get_max_length() - P for x in cache.layers))))  # slots to be read
    for t in range(1, R):
        if t % 8 == 0 and torch.isin(responses[:, :t], stop_ids).any(1).all():  # asking makes a GPU wait
            break
        key_mask[:, P + t - 1] = 1
        responses[:, t] = step(ilql, cache, responses[:, t - 1, None], key_mask, uniforms[:, t], beta, **options)
    return torch.where(response_mask(responses, stop_ids), responses, pad_id)


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


def encode_row(tokenizer, row):
    """(ids, states, paid): token ids, indices of those before an action, and {such an index: a reward}. What the chat
    template writes between two turns of the agent, and behind the EOS of one, is the environment's."""
    eos, plain = tokenizer.eos_token, {"add_special_tokens": False}
    ids, states, ends, parts, shown = [], [], [], [], ""
    given, later = ([], row["messages"]) if "messages" in row else (row["prompt"], row["completion"])
    messages = [x for part in (given, later) if isinstance(part, list) for x in part]
    if "messages" not in row and isinstance(later, str):  # it ends at its first EOS, if it holds one
        parts = [(encode_prompt(tokenizer, given), later.partition(eos)[0])]
    for i, role in enumerate(message.get("role") for message in messages):
        if role not in ("system", "user", "assistant", "tool"):
            raise UserError(f"unknown role {role!r}; known are system, user, assistant and tool")
        if role != "assistant" or isinstance(given, str) or i < len(given):  # given is no action
            continue
        query = encode_prompt(tokenizer, messages[:i])
        start = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        if not (start.startswith(shown) and whole.startswith(start)):
            raise UserError("the chat template does not render a turn as the continuation of those before it")
        said, end, _ = whole[len(start) :].partition(eos)
        parts.append((tokenizer(start[len(shown) :], **plain).input_ids if parts else query, said))
        shown = start + said + end
    for environment, said in parts:
        response = tokenizer(said, **plain).input_ids + [tokenizer.eos_token_id]
        ids += environment + response
        states += range(len(ids) - len(response) - 1, len(ids) - 1)
        ends += states[-1:]  # the state whose action is the turn's last token
    if not ends or states[0] < 0:
        raise UserError("no action token or no prompt: needs two texts, or messages of which an assistant says one")
    rewards = row["reward"] if isinstance(row["reward"], list) else [row["reward"]]
    if isinstance(row["reward"], list) and len(rewards) != len(ends):
        raise UserError(f"assistant turns: {len(ends)}, but rewards: {len(rewards)}")
    if not all(isinstance(x, (int, float)) and abs(x) < 3e38 for x in rewards):  # finite in fp32, too
        raise UserError(f"reward is {row['reward']!r}, which is not a finite number")
    return ids, states, dict(zip(ends[-len(rewards) :], rewards))


def encode_rated(rows, tokenizer, args):
    """([(ids, states, actions, rewards)], statistics) of the rows that fit: all ids but the last, indices before an action."""
    if "reward" not in rows.column_names:
        raise UserError(f"{args.dataset}: needs the column reward; it has {', '.join(rows.column_names)}")
    kept = []
    for number, row in enumerate(rows, start=1):
        try:
            ids, states, paid = encode_row(tokenizer, row)
        except Exception as error:  # chat templates refuse in many ways
            raise UserError(f"{args.dataset}: row {number}: {error}") from error
        cut = max(len(ids) - args.max_length, 0)
        if cut == 0 or ("messages" not in row and cut <= states[0]):  # the prompt's start, never a row's end
            actions, paid = [ids[i + 1] for i in states], [paid.get(i) for i in states]
            kept.append((ids[cut:-1], [i - cut for i in states], actions, paid))
    if len(kept) < len(rows):
        print(f"{args.dataset}: left out {len(rows) - len(kept)} of {len(rows)} rows, longer than --max_length")
    given = torch.tensor([x for *_, paid in kept for x in paid if x is not None], dtype=torch.float64)
    mean, std = (given.mean().item(), given.std(correction=0).item()) if args.normalize_rewards else (0.0, 1.0)
    if not kept or (args.normalize_rewards and given.min() == given.max()):
        raise UserError(f"{args.dataset}: " + ("all rewards are equal" if kept else "no row is left; see --max_length"))
    kept = [(*row, [0.0 if x is None else (x - mean) / std for x in paid]) for *row, paid in kept]
    return kept, {"reward_mean": mean, "reward_std": std}


def collate_actions(rows, limits, num_rows, device):
    """input_ids, attention_mask (B,T), states, actions, rewards, terminal, mask (B,A): right padded to multiples of 8
    or to the largest T and A of all rows, and filled up with empty rows: compiled code meets few shapes."""
    rows = rows + [([0], [], [], [])] * (num_rows - len(rows))
    T, A = (min(-(-max(len(row[k]) for row in rows) // 8) * 8, limit) for k, limit in enumerate(limits))
    padded = [torch.tensor([row[k] + [0] * (n - len(row[k])) for row in rows]) for k, n in enumerate((T, A, A, A))]
    attention_mask = torch.arange(T) < torch.tensor([[len(row[0])] for row in rows])
    left = torch.tensor([[len(row[1])] for row in rows]) - torch.arange(A)  # actions to come, this one included
    return [x.to(device) for x in (padded[0], attention_mask, *padded[1:], left == 1, left > 0)]


@torch.no_grad()
def evaluate(ilql, prompts, scorer, args, tokenizer, ranks, run, step, sampling):
    """{eval/score@beta=..} over the samples of all ranks; every beta gets the same prompts and uniforms."""
    means, mine = Means(), range(args.eval_samples)[ranks.rank :: ranks.world_size]
    uniforms = torch.rand(args.eval_samples, args.response_length, generator=seeded(args.seed, "samples", step))[mine]
    order = torch.randperm(len(prompts), generator=seeded(args.seed, "prompts")).tolist()
    sequences, rows = zip(*[prompts[order[i % len(order)]] for i in mine])
    queries = tokenizer.pad({"input_ids": list(sequences)}, padding_side="left", return_tensors="pt").to(ranks.device)
    columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", "prompts", "responses")}
    for beta in args.eval_betas:
        inputs = queries.input_ids, queries.attention_mask.bool(), uniforms.to(ranks.device), beta
        responses = generate_steered(ilql, *inputs, **sampling)
        mask = response_mask(responses, sampling["stop_ids"])
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if not args.reward_model:
            answers = scorer([row["prompt"] for row in rows], texts, **columns)
            answers = answers if hasattr(answers, "__iter__") else []  # nothing, or one number for all
            scores = torch.tensor([math.nan if isinstance(x, str | None) else float(x) for x in answers])
        else:  # at the last real token
            whole = [torch.cat(pair, 1) for pair in zip(inputs[:2], (responses, mask))]
            hidden = last_hidden(scorer.to(ranks.device), *whole)[range(len(rows)), mask.sum(1) - mask.shape[1] - 1]
            scores = scorer.score(hidden).squeeze(-1) - getattr(scorer.config, "score_mean", 0.0)
        if len(scores) != len(rows) or not scores.isfinite().all():
            raise UserError(f"{args.reward_fn or args.reward_model}: not a finite number for each response")
        means.add({f"eval/score@beta={beta:g}": scores.to(ranks.device)})
        for x in zip([row["prompt"] for row in rows[: 10 * run.is_main]], texts, scores.tolist()):
            run.append("samples.jsonl", [{"step": step, "beta": beta, **dict(zip(("query", "response", "score"), x))}])
    return means.reduce()


def main(args):
    args = prepare(args)  # what is refused is refused before a file is written, most of it before a model is loaded
    if wrong := [flag for flag in ("tau", "gamma", "alpha") if not 0 < getattr(args, flag) <= 1]:
        raise UserError(f"--{wrong[0]} {getattr(args, wrong[0])}: must be above 0 and at most 1")
    if not (args.eval_betas and all(abs(x) < 1e9 for x in args.eval_betas)) or (args.reward_fn and args.reward_model):
        raise UserError("--eval_betas needs numbers below 1e9; of --reward_fn and --reward_model only one can be given")
    tokenizer = load_tokenizer(args.model)
    rows, statistics = encode_rated(load_rows(args.dataset, [("prompt", "completion"), ("messages",)]), tokenizer, args)
    if args.dataset == Args.dataset and not (args.reward_fn or args.reward_model):
        args.reward_fn = "tasks/randomwalks.py:reward"
    if args.eval_dataset and not (args.reward_fn or args.reward_model):
        raise UserError("--eval_dataset: its samples are scored by --reward_fn or --reward_model; none is given")
    prompts, R = [], args.response_length
    if args.reward_fn or args.reward_model:
        args.eval_dataset = args.eval_dataset or str(Path(args.dataset).with_name("prompts.jsonl"))
        for number, row in enumerate(load_rows(args.eval_dataset, [("prompt",)]), start=1):
            try:
                if not (ids := encode_prompt(tokenizer, row["prompt"])[-max(args.max_length - R, 1) :]):
                    raise UserError("the prompt is empty")
            except Exception as error:  # chat templates refuse in many ways
                raise UserError(f"{args.eval_dataset}: row {number}: {error}") from error
            prompts.append((ids, row))
    if args.reward_model and load_tokenizer(args.reward_model).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"--reward_model {args.reward_model}: its tokenizer differs from that of {args.model}")
    kind, scorer = AutoModelForSequenceClassification, args.reward_fn and load_function(args.reward_fn, "--reward_fn")
    scorer = load_pretrained(kind, args.reward_model, num_labels=1)[0] if args.reward_model else scorer
    limits, P = [max(len(row[k]) for row in rows) for k in (0, 1)], max([len(ids) for ids, _ in prompts], default=1)
    device, mode = (ranks := init_ranks()).device, "reduce-overhead" if torch.cuda.is_available() else None
    check_divides(ranks.world_size, args.batch_size, "--batch_size by the number of ranks")
    check_divides(ranks.world_size, args.eval_samples, "--eval_samples by the number of ranks")
    torch.manual_seed(args.seed)
    policy, _ = load_pretrained(AutoModelForCausalLM, args.model)
    rope = getattr(policy.config, "rope_parameters", None) or {}
    first = [rope.get("original_max_position_embeddings")] * (rope.get("rope_type") == "longrope")  # its angles change
    if max(limits[0], P + R) > min([getattr(policy.config, "max_position_embeddings", math.inf), *first]):
        raise UserError(f"--max_length: {limits[0]} or {P} + {R} tokens are more than the positions of {args.model}")
    if len(tokenizer) > policy.get_input_embeddings().num_embeddings:
        policy.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    pad_id, eos, num_ids = tokenizer.pad_token_id, tokenizer.eos_token_id, policy.config.vocab_size
    policy.config.update({"pad_token_id": pad_id, "eos_token_id": eos})
    policy.generation_config = GenerationConfig.from_model_config(policy.config)
    cache, x = StaticCache(config=policy.config, max_cache_len=P + R), torch.zeros(1, 1).long()  # x: one id
    plain = not getattr(policy.config, "final_logit_softcapping", None)
    plain &= torch.allclose(policy.get_output_embeddings()(policy.base_model(x)[0]), policy(x).logits, atol=1e-3)
    if not plain or policy.config.model_type == "gpt_neo" or any(x in str(cache.layers) for x in ("Linear", "Indexed")):
        raise UserError(f"--model {args.model}: it scales or caps its logits, or attends locally, linearly or by index")
    ilql = ILQL(policy.requires_grad_(args.policy_lr_scale > 0), args.num_qs, args.q_rows, **statistics).to(device)
    if args.q_rows == "embeddings":  # what enters the heads is standardised, over the states of some rows
        ids, real, states, *_, mask = collate_actions(rows[:: -(-len(rows) // 128)], limits, 128, device)
        hidden = torch.no_grad()(last_hidden)(policy, ids, real).take_along_dim(states[..., None], 1)[mask]
        ilql.heads.moments = torch.stack([hidden.mean(0), hidden.std(0, correction=0) + 1e-6])
    train_model, loss_fn, decode_step = wrap(ilql, ranks, args.compile), ilql_loss, steered_decode_step
    if args.compile:
        loss_fn, decode_step = torch.compile(loss_fn), torch.compile(decode_step, fullgraph=True, mode=mode)
    groups = [{"params": list(part.parameters())} for part in (ilql.policy, ilql.heads)]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=0.0, fused=True)
    bias = torch.tensor([-math.inf if i >= len(tokenizer) or i == pad_id else 0.0 for i in range(num_ids)]).to(device)
    sampling = {"stop_ids": [eos], "pad_id": pad_id, "bias": bias, "cache": cache, "step": decode_step}
    weights = (args.tau, args.gamma, args.beta, args.cql_weight, args.awac_weight * (args.policy_lr_scale > 0))
    steps_per_epoch = -(-len(rows) // args.batch_size)
    num_steps, decay_steps = (n * steps_per_epoch for n in (args.num_epochs, args.decay_epochs or args.num_epochs))
    run, means, done = Run(args, ranks, "ilql_rlhf"), Means(), 0
    size = min(args.micro_batch_size, args.batch_size // ranks.world_size)
    off = {k for k, x in (("cql", args.cql_weight), ("awac", args.policy_lr_scale)) if not x}  # losses not computed
    shown = ["loss/q", "loss/v", "loss/cql", "loss/awac", *(f"eval/score@beta={beta:g}" for beta in args.eval_betas)]
    if args.resume:
        done = (state := run.load_checkpoint())["step"]
        ilql.load_state_dict(state["model"]), optimizer.load_state_dict(state["optimizer"])
    for step in progress(done, num_steps, ranks, "ilql_rlhf"):
        # 1. batch
        epoch, i = divmod(step - 1, steps_per_epoch)
        order = torch.randperm(len(rows), generator=seeded(args.seed, "order", epoch)).tolist()
        batch = [rows[j] for j in order[i * args.batch_size : (i + 1) * args.batch_size]]
        num_tokens = torch.tensor(sum(len(row[1]) for row in batch), device=device)  # of all ranks
        mine = sorted(batch, key=lambda row: len(row[0]))[ranks.rank :: ranks.world_size]
        # 2. loss
        for k in range(0, max(len(mine), 1), size):
            *inputs, actions, rewards, terminal, mask = collate_actions(mine[k : k + size], limits, size, device)
            train_model.require_backward_grad_sync = k + size >= len(mine)
            with torch.autocast(device.type, torch.bfloat16, args.precision == "bf16"):
                logits, qs, target_qs, vs = train_model(*inputs, actions, all_qs=args.cql_weight > 0)
            next_vs = F.pad(vs[:, 1:], (0, 1))  # the next column is the next state in which the agent acts
            losses = loss_fn(qs, target_qs, vs, next_vs, logits, actions, rewards, terminal, mask, *weights, num_tokens)
            total = losses["total"] + (0.0 if args.awac_weight else 0.0 * logits.sum())  # DDP wants each weight in it
            (total * ranks.world_size).backward()  # ranks average: times their number is the sum
            means.add({f"loss/{k}": x * num_tokens / mask.sum() for k, x in losses.items() if k not in off}, mask.sum())
            target_q = torch.stack(target_qs).amin(0).squeeze(-1)
            stats = {"val/awac_weight": torch.exp(args.beta * (target_q - vs)), "val/advantage": target_q - vs}
            means.add({"val/q": target_q, "val/v": vs, **stats}, mask)
        # 3. update
        lr = args.min_lr + (args.lr - args.min_lr) * max(1 - (step - 1) / decay_steps, 0)
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = args.policy_lr_scale * lr, lr
        grad_norm = torch.nn.utils.clip_grad_norm_(ilql.parameters(), args.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        ilql.update_targets(args.alpha)
        evaluates = scorer is not None and (step % args.eval_every == 0 or step == num_steps)
        saves = args.save_every and step % args.save_every == 0
        if step % args.log_every == 0 or evaluates or saves or step == num_steps:
            metrics = {**means.reduce(), "lr": lr, "optim/grad_norm": grad_norm.item(), "epoch": epoch + 1}
            if not math.isfinite(metrics["optim/grad_norm"]):
                raise UserError(f"step {step}: the gradient is not finite; lower --lr or --beta")
            if evaluates:
                metrics |= evaluate(ilql, prompts, scorer, args, tokenizer, ranks, run, step, sampling)
            run.log(step, metrics, show=shown)
        if saves:
            run.save_checkpoint(step, model=ilql.state_dict(), optimizer=optimizer.state_dict())
    if ranks.rank == 0:
        save_pretrained(run.folder / "model", ilql, tokenizer)
        print(f"\nmodel folder  {run.folder}/model\nnext          ", end="python benchmarks/evaluate.py ")
        print(f"--run {run.folder} --beta {args.eval_betas[-1]:g}{'' if prompts else ' --dataset my_prompts.jsonl'}")


if __name__ == "__main__":
    launch(main, tyro.cli(Args, use_underscores=True))
