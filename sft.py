"""Supervised fine-tuning on demonstrations: the first stage of RLHF (Stiennon et al. 2020, Ouyang et al. 2022).

    1. batch    rows of (prompt, completion); their token ids are joined, with one EOS after the completion
    2. loss     cross-entropy of the completion's tokens (EOS included) given all tokens before them
    3. update   AdamW, learning rate decaying linearly to 0

One process:     python sft.py
Eight GPUs:      torchrun --nproc_per_node=8 sft.py --model HuggingFaceTB/SmolLM2-135M --dataset my_rows.jsonl

Shapes: B rows on this rank, T tokens (right padded), V vocabulary.

Deviations: prompt tokens carry no loss (Stiennon et al. train on them too); a row that is longer than `max_length` is
left out and counted, never cut, because a cut row would teach the model not to end.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from utils import Means, Run, UserError, check_divides, check_path, init_ranks, launch, load_pretrained, load_rows
from utils import prepare, progress, save_pretrained, seeded, wrap


@dataclass
class Args:
    model: str = "data/randomwalks/model"
    """what is trained: a Hub name or a folder; a folder with a config and no weights starts from random weights"""
    dataset: str = "data/randomwalks/demonstrations.jsonl"
    """rows with prompt+completion, text, or messages: a .json, .jsonl or .parquet file, a folder of them, a Hub name"""
    eval_dataset: str | None = None
    """held-out rows of the same kind; none: one in twenty rows of --dataset, drawn with the seed, and not trained on"""
    output_dir: str | None = None
    """the run folder, which must not exist yet; none: runs/sft__<seed>__<time>"""
    seed: int = 1
    """seeds the initial weights, the held-out rows and the order of the rows"""
    num_epochs: int = 10
    """passes over the rows"""
    batch_size: int = 50
    """rows per optimizer step, over all ranks"""
    micro_batch_size: int = 50
    """rows per forward and backward on one rank: a memory knob, without effect on the objective"""
    max_length: int = 512
    """tokens of prompt and completion together; longer rows are left out and counted"""
    lr: float = 1e-3
    """learning rate of the first step; decays linearly to 0"""
    max_grad_norm: float = 1.0
    """gradients of a larger global norm are scaled down to it; 0: never"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """what the forward and backward compute in; weights and optimizer state are fp32 always"""
    compile: bool = torch.cuda.is_available()
    """torch.compile the training forward and its loss"""
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


# ---- The model -------------------------------------------------------------------------------------------------------
class LabelledLogits(torch.nn.Module):
    """Logits (B,L,V) of the last L = num_logits positions of T, as a module that can be compiled and distributed. The last
    layer's MLP, which mixes no tokens, computes those L alone (its output is 0 before them). Positions are explicit."""

    kept = None  # (T,L) while a forward runs: outside of it the model is whole

    def __init__(self, model):
        super().__init__()
        self.model, layers = model, getattr(model.base_model, "layers", getattr(model.base_model, "h", [None]))
        if (mlp := getattr(layers[-1], "mlp", None)) is not None:
            mlp.register_forward_pre_hook(self.take_kept), mlp.register_forward_hook(self.put_kept)

    def take_kept(self, mlp, inputs):
        if self.kept is not None and len(inputs) == 1 and inputs[0].ndim == 3:  # (B,T,d), no residual beside it
            return inputs[0][:, self.kept[0] - self.kept[1] :].contiguous()

    def put_kept(self, mlp, inputs, output):
        rows, *others = output if isinstance(output, tuple) else (output,)  # some families add their router's scores
        if self.kept is not None and rows.shape[1] == self.kept[1]:
            rows = F.pad(rows, (0, 0, self.kept[0] - self.kept[1], 0))
            return (rows, *others) if others else rows

    def forward(self, input_ids, attention_mask, num_logits):
        T, inputs = input_ids.shape[1], {"attention_mask": attention_mask, "use_cache": False}
        inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
        self.kept, keep = (T, num_logits), torch.arange(T - num_logits, T, device=input_ids.device)
        logits, self.kept = self.model(input_ids, logits_to_keep=keep, **inputs).logits, None
        return logits


# ---- The algorithm ---------------------------------------------------------------------------------------------------
def token_loss(logits, labels):
    """Summed cross-entropy of the next token, and how many tokens were counted.

    logits (B,T,V); labels (B,T): the input ids, -100 where no loss is wanted. The function shifts by one: logits at t
    are held against the label at t + 1. Returns (loss_sum, token_count), both 0-d; the sum is in fp32 or better, nats.
    """
    logits = logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels[:, 1:]
    loss_sum = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    return loss_sum, (labels != -100).sum()


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


def encode_demonstrations(rows, tokenizer, max_length, path):
    """[(input_ids, labels)] of the rows that fit, as lists. Labels are the ids themselves, -100 on prompt tokens."""
    encoded = []
    for number, row in enumerate(rows, start=1):
        if "messages" in row:  # every assistant turn is a response to the turns before it
            turns = [i for i, message in enumerate(row["messages"]) if message["role"] == "assistant"]
            pairs = [(row["messages"][:i], row["messages"][i : i + 1]) for i in turns]
        else:
            pairs = [(row["prompt"], row["completion"]) if {"prompt", "completion"} <= {*row} else ("", row["text"])]
        try:
            for prompt, completion in pairs:
                query, response = encode_prompt(tokenizer, prompt), encode_response(tokenizer, prompt, completion)
                encoded.append((query + response, [-100] * len(query) + response))
        except Exception as error:  # chat templates refuse in many ways
            raise UserError(f"{path}: row {number}: {error}") from error
    kept = [pair for pair in encoded if len(pair[0]) <= max_length]
    if len(kept) < len(encoded):
        print(f"{path}: left out {len(encoded) - len(kept)} of {len(encoded)} rows longer than {max_length} tokens")
    if not kept:
        raise UserError(f"{path}: no row is left: all over --max_length {max_length}, or no assistant says anything")
    return kept


def collate_labelled(rows, pad_id, num_rows, device):
    """(input_ids (B,T), labels (B,L), attention_mask (B,T)), right padded to a multiple of 8 tokens and to `num_rows` rows.
    Labels are those of the last L positions, which begin in front of the first label of any row: logits before them
    are not needed. Rows that only fill up the shape hold one token and no label: compiled code meets few shapes, and a
    rank that has no row of an epoch's last batch still takes part in the gradient exchange."""
    rows = rows + [([0], [-100])] * (num_rows - len(rows))
    T = -(-max(len(ids) for ids, _ in rows) // 8) * 8
    first = min([i for _, labels in rows for i, label in enumerate(labels) if label != -100], default=T - 1)
    input_ids = torch.tensor([ids + [pad_id] * (T - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [-100] * (T - len(labels)) for _, labels in rows])[:, max(first - 1, 0) :]
    attention_mask = torch.tensor([[1] * len(ids) + [0] * (T - len(ids)) for ids, _ in rows])
    return input_ids.to(device), labels.to(device), attention_mask.to(device)


def micro_batches(rows, length, ranks, size):
    """This rank's share of a global batch, as lists of at most `size` rows of similar length (at least one list)."""
    mine = sorted(rows, key=length)[ranks.rank :: ranks.world_size]
    return [mine[i : i + size] for i in range(0, max(len(mine), 1), size)]


# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def held_out_loss(model, rows, args, pad_id, ranks):
    """Mean loss per completion token, in nats, over all rows and ranks."""
    means = Means()
    for part in micro_batches(rows, lambda row: len(row[0]), ranks, args.micro_batch_size):
        input_ids, labels, attention_mask = collate_labelled(part, pad_id, args.micro_batch_size, ranks.device)
        with torch.autocast(ranks.device.type, torch.bfloat16, args.precision == "bf16"):
            loss_sum, token_count = token_loss(model(input_ids, attention_mask, labels.shape[1]), labels)
        means.add({"loss": loss_sum / token_count}, token_count)
    return means.reduce()["loss"]


def main(args):
    args = prepare(args)  # what is refused is refused before a file is written, most of it before a model is loaded
    tokenizer = load_tokenizer(args.model)
    columns = [("prompt", "completion"), ("text",), ("messages",)]
    rows = encode_demonstrations(load_rows(args.dataset, columns), tokenizer, args.max_length, args.dataset)
    if args.eval_dataset:
        eval_rows = encode_demonstrations(
            load_rows(args.eval_dataset, columns), tokenizer, args.max_length, args.eval_dataset
        )
    else:
        order = torch.randperm(len(rows), generator=seeded(args.seed, "held out")).tolist()
        eval_rows = [rows[i] for i in order[: len(rows) // 20]]
        held_out = set(map(repr, eval_rows))
        rows = [row for row in rows if repr(row) not in held_out]  # no copy of a held-out row either

    ranks = init_ranks()
    check_divides(ranks.world_size, args.batch_size, "--batch_size by the number of ranks")
    torch.manual_seed(args.seed)
    model, _ = load_pretrained(AutoModelForCausalLM, args.model)
    longest = max(len(ids) for ids, _ in rows + eval_rows)
    if longest > getattr(model.config, "max_position_embeddings", longest):
        raise UserError(f"--max_length: rows of {longest} tokens are longer than the positions of {args.model}")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id, model.config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.to(ranks.device)
    labelled, loss_fn = LabelledLogits(model), torch.compile(token_loss) if args.compile else token_loss
    train_model = wrap(labelled, ranks, args.compile)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, eps=1e-5, weight_decay=0.0, fused=True)

    steps_per_epoch = -(-len(rows) // args.batch_size)
    num_steps = args.num_epochs * steps_per_epoch
    run, means, metrics, done = Run(args, ranks, "sft"), Means(), {}, 0
    size = min(args.micro_batch_size, args.batch_size // ranks.world_size)
    if args.resume:
        state = run.load_checkpoint()
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    for step in progress(done, num_steps, ranks, "sft"):
        # 1. batch
        epoch, i = divmod(step - 1, steps_per_epoch)
        order = torch.randperm(len(rows), generator=seeded(args.seed, "order", epoch)).tolist()
        batch = [rows[j] for j in order[i * args.batch_size : (i + 1) * args.batch_size]]
        num_tokens = max(sum(label != -100 for _, labels in batch for label in labels[1:]), 1)  # of all ranks

        # 2. loss
        parts = micro_batches(batch, lambda row: len(row[0]), ranks, size)
        for k, part in enumerate(parts, start=1):
            input_ids, labels, attention_mask = collate_labelled(part, tokenizer.pad_token_id, size, ranks.device)
            train_model.require_backward_grad_sync = k == len(parts)
            with torch.autocast(ranks.device.type, torch.bfloat16, args.precision == "bf16"):
                logits = train_model(input_ids, attention_mask, labels.shape[1])
                loss_sum, token_count = loss_fn(logits, labels)
            (loss_sum * ranks.world_size / num_tokens).backward()  # ranks average: times their number is the sum
            means.add({"train/sft/loss": loss_sum / token_count}, token_count)

        # 3. update
        lr = args.lr * (1 - (step - 1) / num_steps)
        optimizer.param_groups[0]["lr"] = lr
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()

        evaluates = bool(eval_rows) and (step % args.eval_every == 0 or step == num_steps)
        saves = args.save_every and step % args.save_every == 0
        if step % args.log_every == 0 or evaluates or saves or step == num_steps:
            metrics = {**means.reduce(), "train/sft/lr": lr, "optim/grad_norm": grad_norm.item(), "epoch": epoch + 1}
            if not grad_norm.isfinite():
                raise UserError(f"step {step}: the gradient is not finite; lower --lr")
            if evaluates:
                metrics["eval/sft/loss"] = held_out_loss(labelled, eval_rows, args, tokenizer.pad_token_id, ranks)
            run.log(step, metrics, show=["epoch", "train/sft/loss", "eval/sft/loss", "train/sft/lr", "optim/grad_norm"])
        if saves:
            run.save_checkpoint(step, model=model.state_dict(), optimizer=optimizer.state_dict())
    if ranks.rank == 0:
        save_pretrained(run.folder / "model", model, tokenizer)
        loss = metrics.get("eval/sft/loss")
        print(f"\nheld-out loss {'not measured' if loss is None else f'{loss:.4f} nats per completion token'}")
        print(f"model folder  {run.folder / 'model'}")
        print(f"next          python reward_model.py --model {run.folder / 'model'}")


if __name__ == "__main__":
    launch(main, tyro.cli(Args, use_underscores=True))
