"""A reward model from comparisons: the second stage of RLHF (Ziegler et al. 2019; Stiennon et al. 2020, section 3.4).

    1. batch    rows of (prompt, chosen, rejected); each response ends with one EOS
    2. loss     -log sigmoid(score of chosen - score of rejected - margin), Bradley and Terry's model; the score is a
                linear head on the hidden state of the last real token
    3. update   AdamW, learning rate decaying linearly to 0
    centre      the mean score of the demonstrations is written into the config as `score_mean`, and
                `last_token_scores` subtracts it: 0 then means "as good as a demonstration"

One process:     python reward_model.py
Eight GPUs:      torchrun --nproc_per_node=8 reward_model.py --model runs/my_sft/model --dataset my_pairs.jsonl

Shapes: B pairs on this rank, 2B rows (chosen above rejected), T tokens (right padded), d hidden width.

Deviations: the head, which starts at N(0, 1/(d + 1)), has no bias, because the plain sequence-classification class has
none; a pair that is longer than `max_length` is left out and counted, never cut.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from utils import Means, Run, UserError, check_divides, check_path, init_ranks, launch, load_pretrained, load_rows
from utils import newest_run, prepare, progress, save_pretrained, seeded, wrap


@dataclass
class Args:
    model: str | None = None
    """what is trained: a Hub name or a folder; none: the newest finished run of sft.py"""
    dataset: str = "data/randomwalks/preferences.jsonl"
    """rows with prompt+chosen+rejected, or chosen+rejected with the prompt inside both; optional margin (score units)"""
    eval_dataset: str | None = None
    """held-out rows of the same kind; none: one in twenty rows of --dataset, drawn with the seed, and not trained on"""
    demonstrations: str | None = None
    """rows with prompt+completion whose mean score becomes 0; none: demonstrations.jsonl beside --dataset if it is
    there, else the scores are not centred"""
    output_dir: str | None = None
    """the run folder, which must not exist yet; none: runs/reward_model__<seed>__<time>"""
    seed: int = 1
    """seeds the head, the held-out rows and the order of the rows"""
    num_epochs: int = 1
    """passes over the rows"""
    batch_size: int = 64
    """pairs per optimizer step, over all ranks"""
    micro_batch_size: int = 64
    """pairs per forward and backward on one rank: a memory knob, without effect on the objective"""
    max_length: int = 512
    """tokens of prompt and response together; pairs with a longer side are left out and counted"""
    lr: float = 1e-3
    """learning rate of the first step; decays linearly to 0"""
    max_grad_norm: float = 1.0
    """gradients of a larger global norm are scaled down to it; 0: never"""
    use_margin: bool = True
    """subtract the column margin inside the loss, where the rows have one"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """what the forward and backward compute in; weights, optimizer state and scores are fp32 always"""
    compile: bool = torch.cuda.is_available()
    """torch.compile the training forward"""
    log_every: int = 20
    """steps between two lines of metrics"""
    eval_every: int = 200
    """steps between two evaluations on the held-out rows; the last step is always evaluated"""
    save_every: int = 0
    """steps between two checkpoints to resume from; 0: none"""
    resume: str | None = None
    """a run folder: go on from its newest checkpoint, with its own arguments"""
    track: Literal["none", "wandb", "tensorboard"] = "none"
    """where metrics go besides metrics.jsonl"""


# ---- Model -----------------------------------------------------------------------------------------------------------
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


class Scorer(torch.nn.Module):
    """`last_token_scores` as a module, so that the loss goes through the compiled and distributed wrapper's forward. Of the last
    layer one token is read: where they can, attention (`reads`, in utils), its projection and MLP compute that one alone."""

    is_last = None  # (B,T) while a forward runs: outside of it the model is whole

    def __init__(self, model):
        super().__init__()
        self.model, nothing = model, torch.nn.Identity()
        last = getattr(model.base_model, "layers", getattr(model.base_model, "h", [nothing]))[-1]
        self.attention = getattr(last, "self_attn", getattr(last, "attn", nothing))
        for name, part in last.named_modules():
            if name in ("mlp", "self_attn.o_proj", "attn.c_proj"):
                part.register_forward_pre_hook(self.take_last), part.register_forward_hook(self.put_last)

    def take_last(self, part, inputs):
        if self.is_last is not None and len(inputs) == 1 and inputs[0].ndim == 3:  # (B,T,d), no residual beside it
            return inputs[0][self.attention.reads][:, None]

    def put_last(self, part, inputs, output):
        if self.is_last is not None and isinstance(output, torch.Tensor) and output.shape[1] == 1:
            return torch.where(self.is_last[:, :, None], output, 0.0)

    def forward(self, input_ids, attention_mask):
        position = attention_mask.long() * torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
        self.is_last = position == position.amax(1, keepdim=True)
        self.attention.reads = torch.arange(len(position), device=position.device), position.argmax(1)
        scores = last_token_scores(self.model, input_ids, attention_mask)
        self.is_last = self.attention.reads = None
        return scores


# ---- The algorithm ---------------------------------------------------------------------------------------------------
def preference_loss(chosen_scores, rejected_scores, margin=None):
    """-log sigmoid(chosen - rejected - margin), all (B,): Ouyang et al. 2022, eq. 1; Touvron et al. 2023, eq. 2 (margin)."""
    difference = chosen_scores - rejected_scores
    return -F.logsigmoid(difference if margin is None else difference - margin)


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


def encode_response(tokenizer, prompt, response):
    """Token ids of a response, tokenised apart from its prompt so that no token straddles the two, with one EOS."""
    if not isinstance(response, str):  # messages: what the chat template adds to the prompt's own text
        start = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(prompt + response, tokenize=False)
        if not whole.startswith(start):
            raise UserError("the chat template does not render a prompt as the beginning of its conversation")
        response = whole[len(start) :]
    ids = tokenizer(response, add_special_tokens=False).input_ids
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return ids + [tokenizer.eos_token_id]


def encode_pair(tokenizer, prompt, response):
    """Token ids of prompt and response joined. No prompt, or a text beside messages: the response is the whole conversation."""
    if not isinstance(response, str) and (not prompt or isinstance(prompt, str)):
        prompt, response = response[:-1], response[-1:]
    return encode_prompt(tokenizer, prompt) + encode_response(tokenizer, prompt, response)


def encode_comparisons(rows, tokenizer, args, path):
    """[(chosen_ids, rejected_ids, margin)] of the rows that fit; margin is 0 where there is none."""
    has_margin, encoded = args.use_margin and "margin" in rows.column_names, []
    for number, row in enumerate(rows, start=1):
        margin = row["margin"] if has_margin else 0.0
        if not isinstance(margin, int | float) or not abs(margin) < 1e30:
            raise UserError(f"{path}: row {number}: margin is {margin!r}, not a finite number")
        try:
            sides = [encode_pair(tokenizer, row.get("prompt", ""), row[side]) for side in ("chosen", "rejected")]
        except Exception as error:  # chat templates refuse in many ways
            raise UserError(f"{path}: row {number}: {error}") from error
        encoded.append((*sides, float(margin)))
    kept = [pair for pair in encoded if max(len(pair[0]), len(pair[1])) <= args.max_length]
    if len(kept) < len(encoded):
        print(f"{path}: left out {len(encoded) - len(kept)} of {len(encoded)} pairs of over {args.max_length} tokens")
    if not kept:
        raise UserError(f"{path}: no pair is left; every one is longer than --max_length {args.max_length}")
    return kept


def collate(sequences, pad_id, num_rows, device):
    """(input_ids, attention_mask), each (num_rows,T), right padded to a multiple of 8 tokens. Rows that only fill up the shape
    hold one token: compiled code meets few shapes, and a rank that has no row of an epoch's last batch still takes part."""
    sequences = sequences + [[0]] * (num_rows - len(sequences))
    T = -(-max(map(len, sequences)) // 8) * 8
    input_ids = torch.tensor([ids + [pad_id] * (T - len(ids)) for ids in sequences])
    attention_mask = torch.tensor([[1] * len(ids) + [0] * (T - len(ids)) for ids in sequences])
    return input_ids.to(device), attention_mask.to(device)


def micro_batches(rows, length, ranks, size):
    """This rank's share of a global batch, as lists of at most `size` rows of similar length (at least one list)."""
    mine = sorted(rows, key=length)[ranks.rank :: ranks.world_size]
    return [mine[i : i + size] for i in range(0, max(len(mine), 1), size)]


# ----------------------------------------------------------------------------------------------------------------------
def pair_scores(model, pairs, pad_id, size, device):
    """(chosen_scores, rejected_scores, margin, mask), each (size,), in one forward; mask is True for real pairs."""
    sequences = [[0]] * (size - len(pairs))
    sequences = [pair[0] for pair in pairs] + sequences + [pair[1] for pair in pairs]
    chosen_scores, rejected_scores = model(*collate(sequences, pad_id, 2 * size, device)).chunk(2)
    margin = torch.tensor([pair[2] for pair in pairs] + [0.0] * (size - len(pairs)), device=device)
    return chosen_scores, rejected_scores, margin, torch.arange(size, device=device) < len(pairs)


@torch.no_grad()
def held_out_accuracy(scorer, pairs, args, pad_id, ranks):
    """Held-out {loss, accuracy}: the loss without margin; accuracy counts a tie as half."""
    means, size = Means(), args.micro_batch_size
    for part in micro_batches(pairs, lambda pair: max(len(pair[0]), len(pair[1])), ranks, size):
        with torch.autocast(ranks.device.type, torch.bfloat16, args.precision == "bf16"):
            chosen_scores, rejected_scores, _, mask = pair_scores(scorer, part, pad_id, size, ranks.device)
        accuracy = 0.5 + 0.5 * torch.sign(chosen_scores - rejected_scores)
        means.add({"eval/rm/loss": preference_loss(chosen_scores, rejected_scores), "eval/rm/accuracy": accuracy}, mask)
    return means.reduce()


@torch.no_grad()
def mean_score(scorer, sequences, args, pad_id, ranks):
    """Mean score over rows of token ids and all ranks."""
    means, size = Means(), 2 * args.micro_batch_size
    for part in micro_batches(sequences, len, ranks, size):
        with torch.autocast(ranks.device.type, torch.bfloat16, args.precision == "bf16"):
            scores = scorer(*collate(part, pad_id, size, ranks.device))
        means.add({"score": scores}, torch.arange(size, device=ranks.device) < len(part))
    return means.reduce()["score"]


def main(args):
    args = prepare(args)  # what is refused is refused before a file is written, most of it before a model is loaded
    args.model = args.model or newest_run("sft")
    tokenizer = load_tokenizer(args.model)
    rows = encode_comparisons(load_rows(args.dataset, [("chosen", "rejected")]), tokenizer, args, args.dataset)
    if args.eval_dataset:
        eval_rows = load_rows(args.eval_dataset, [("chosen", "rejected")])
        eval_rows = encode_comparisons(eval_rows, tokenizer, args, args.eval_dataset)
    else:
        order = torch.randperm(len(rows), generator=seeded(args.seed, "held out")).tolist()
        eval_rows = [rows[i] for i in order[: len(rows) // 20]]
        held_out = set(map(repr, eval_rows))
        rows = [row for row in rows if repr(row) not in held_out]  # no copy of a held-out row either
    beside = Path(args.dataset).with_name("demonstrations.jsonl")
    args.demonstrations = args.demonstrations or (str(beside) if beside.is_file() else None)
    demonstrations = load_rows(args.demonstrations, [("prompt", "completion")]) if args.demonstrations else []
    demonstrations = [encode_pair(tokenizer, row["prompt"], row["completion"]) for row in demonstrations]
    demonstrations = [ids for ids in demonstrations if len(ids) <= args.max_length]
    ranks = init_ranks()
    check_divides(ranks.world_size, args.batch_size, "--batch_size by the number of ranks")
    torch.manual_seed(args.seed)
    model, missing = load_pretrained(AutoModelForSequenceClassification, args.model, ["score.weight"], num_labels=1)
    longest = max(max(len(pair[0]), len(pair[1])) for pair in rows + eval_rows)
    if longest > getattr(model.config, "max_position_embeddings", longest):
        raise UserError(f"--max_length: sides of {longest} tokens are longer than the positions of {args.model}")
    if missing:  # a language model: its new head starts small; a reward model keeps the head it has
        torch.nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id, model.config.score_mean = tokenizer.pad_token_id, 0.0
    model.to(ranks.device)
    train_model = wrap(scorer := Scorer(model), ranks, args.compile)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, eps=1e-5, weight_decay=0.0, fused=True)

    steps_per_epoch = -(-len(rows) // args.batch_size)
    num_steps = args.num_epochs * steps_per_epoch
    run, means, metrics, done = Run(args, ranks, "reward_model"), Means(), {}, 0
    size = min(args.micro_batch_size, args.batch_size // ranks.world_size)
    if args.resume:
        state = run.load_checkpoint()
        model.load_state_dict(state["model"]), optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    for step in progress(done, num_steps, ranks, "reward_model"):
        # 1. batch
        epoch, i = divmod(step - 1, steps_per_epoch)
        order = torch.randperm(len(rows), generator=seeded(args.seed, "order", epoch)).tolist()
        batch = [rows[j] for j in order[i * args.batch_size : (i + 1) * args.batch_size]]

        # 2. loss
        parts = micro_batches(batch, lambda pair: max(len(pair[0]), len(pair[1])), ranks, size)
        for k, part in enumerate(parts, start=1):
            train_model.require_backward_grad_sync = k == len(parts)
            with torch.autocast(ranks.device.type, torch.bfloat16, args.precision == "bf16"):
                scores = pair_scores(train_model, part, tokenizer.pad_token_id, size, ranks.device)
                chosen_scores, rejected_scores, margin, mask = scores
                losses = preference_loss(chosen_scores, rejected_scores, margin)
                loss_sum = torch.where(mask, losses, 0).sum()
            (loss_sum * ranks.world_size / len(batch)).backward()  # ranks average: times their number is the sum
            difference = chosen_scores - rejected_scores
            stats = {"train/rm/accuracy": 0.5 + 0.5 * torch.sign(difference), "train/rm/margin": difference}
            means.add({"train/rm/loss": losses, **stats}, mask)

        # 3. update
        optimizer.param_groups[0]["lr"] = lr = args.lr * (1 - (step - 1) / num_steps)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()

        evaluates = bool(eval_rows) and (step % args.eval_every == 0 or step == num_steps)
        saves = args.save_every and step % args.save_every == 0
        if step % args.log_every == 0 or evaluates or saves or step == num_steps:
            metrics = {**means.reduce(), "train/rm/lr": lr, "optim/grad_norm": grad_norm.item(), "epoch": epoch + 1}
            if not grad_norm.isfinite():
                raise UserError(f"step {step}: the gradient is not finite; lower --lr")
            if evaluates:
                metrics |= held_out_accuracy(scorer, eval_rows, args, tokenizer.pad_token_id, ranks)
            shown = ["train/rm/loss", "train/rm/accuracy", "train/rm/margin", "eval/rm/loss", "eval/rm/accuracy"]
            run.log(step, metrics, show=["epoch", *shown, "train/rm/lr"])
        if saves:
            run.save_checkpoint(step, model=model.state_dict(), optimizer=optimizer.state_dict())
    if demonstrations:  # centre
        model.config.score_mean = mean_score(scorer, demonstrations, args, tokenizer.pad_token_id, ranks)
    if ranks.rank == 0:
        save_pretrained(run.folder / "model", model, tokenizer)
        accuracy = f"{metrics['eval/rm/accuracy']:.4f}" if "eval/rm/accuracy" in metrics else "not measured"
        print(f"\nheld-out accuracy {accuracy}")
        print(f"score_mean        {model.config.score_mean:.4f}{'' if demonstrations else ' (not centred)'}")
        print(f"model folder      {run.folder / 'model'}")
        print(f"next              python ppo_rlhf.py --model {args.model} --reward_model {run.folder / 'model'}")


if __name__ == "__main__":
    launch(main, tyro.cli(Args, use_underscores=True))
