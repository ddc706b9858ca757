r"""Supervised fine-tuning on demonstrations, the first stage of RLHF.

Stiennon et al. 2020, "Learning to summarize from human feedback"; Ouyang et al. 2022, "Training
language models to follow instructions with human feedback".

Each step:
    1. batch    rows of (prompt, completion): the token ids of both joined, one EOS at the end
    2. loss     cross-entropy of each completion token, EOS included, given all tokens before it;
                the sum over the batch is divided by the number of these tokens on all ranks
    3. update   gradients clipped to --max_grad_norm, then Adam; the learning rate falls linearly
                from lr in the first step to lr / num_steps in the last

One process:    python sft.py
Eight GPUs:     torchrun --nproc_per_node=8 sft.py --model HuggingFaceTB/SmolLM2-135M \
                    --dataset my_rows.jsonl --batch_size 64 --lr 2e-5

Shapes: B rows in a micro-batch, T tokens, V vocabulary; L the last positions, the only ones that
logits are computed for.

Rows are padded on the right with more EOS tokens. Causal attention never looks ahead, so the real
tokens cannot see the padding: there is no attention mask, positions count from 0, and the padding
has no label.

Rules that you might not expect:
    - Prompt tokens carry no loss (Stiennon et al. train on them too). A row of plain `text` has no
      prompt; its first token has no loss, because nothing stands before it.
    - Each assistant turn of a conversation becomes a row of its own, whose prompt is all that was
      said before.
    - Prompt and completion are tokenised separately, and EOS is added to the completion. If it
      contains an EOS already, everything after the first one is dropped.
    - A row longer than --max_length is dropped, never cut, because a cut row would teach the model
      not to end. How many were dropped is printed.
    - Within a step a completion token counts the same whatever row, micro-batch or rank it is in.
    - Without --eval_dataset one row in twenty is held out, drawn by the seed, and exact copies of
      these rows are not trained on either.
    - Held-out rows are evaluated before the first step, every --eval_every steps, and at the end.
    - Models are loaded in fp32 and without dropout. Under --precision bf16 the logits are in bf16;
      the loss is computed in fp32, and weights and optimizer state stay fp32.
    - With --compile, which is the default on CUDA, each transformer layer and `token_loss` are
      compiled, and nothing else is.

What the helpers from utils.py do, as far as the algorithm needs them:
    encode_prompt, encode_response   token ids of the two; the response ends with EOS
    global_batches                   row numbers of each step, in a new order each epoch
    split_by_length(lengths, size,   this rank's share, every world_size-th row in order of length,
      ranks)                         in groups of at most `size`; one empty group if it has none
    wrap(model, ranks)               DDP around it, if there are several ranks
    Means                            exact means by name, over micro-batches and ranks
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from transformers import AutoModelForCausalLM

from utils import Means, Run, UserError, autocast, check_at_least, check_divides, check_positions
from utils import (
    check_shared_flags,
    compile_layers,
    encode_prompt,
    encode_response,
    fit_to_tokenizer,
)
from utils import clear_gradients, global_batches, hold_out, init_ranks, launch, load_pretrained
from utils import load_rows, load_tokenizer, pad_right, progress, resolve_args, save_pretrained
from utils import split_by_length, to_device, wrap


@dataclass
class Args:
    model: str = "data/randomwalks/model"
    """the model to train: a Hub name or a folder; if the folder holds only a config, the weights
    are random"""
    dataset: str = "data/randomwalks/demonstrations.jsonl"
    """rows with prompt+completion, text, or messages: a .json, .jsonl or .parquet file, a folder of
    them, or a Hub name"""
    eval_dataset: str | None = None
    """held-out rows of the same kind; none: one in twenty rows of --dataset, not trained on"""
    max_rows: int | None = None
    """use only this many rows, the first ones, of --dataset; none: all rows"""
    output_dir: str | None = None
    """the run folder, which must not exist yet; none: runs/sft__<seed>__<time>"""
    seed: int = 1
    """seeds random initial weights, the held-out rows and the order of the rows"""
    num_epochs: int = 10
    """passes over the rows"""
    num_steps: int | None = None
    """optimizer steps in all; none: as many as num_epochs passes take"""
    batch_size: int = 50
    """rows per optimizer step, over all ranks"""
    micro_batch_size: int = 50
    """rows per forward and backward on one rank: saves memory and does not change the objective"""
    max_length: int = 512
    """tokens of prompt and completion together; longer rows are left out and counted"""
    lr: float = 1e-3
    """learning rate of the first step (for the small task; about 2e-5 for a pretrained model)"""
    max_grad_norm: float = 1.0
    """clip the norm of the gradient, over all parameters, to this; 0: do not clip"""
    precision: Literal["fp32", "bf16"] = "bf16" if torch.cuda.is_available() else "fp32"
    """what forward and backward compute in; weights, optimizer state and the loss stay fp32"""
    compile: bool = torch.cuda.is_available()
    """compile each transformer layer and the loss"""
    log_every: int = 20
    """steps between two lines of metrics"""
    eval_every: int = 200
    """steps between two evaluations on the held-out rows"""
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


def token_loss(logits, labels):
    """Summed cross-entropy of the next token, in nats, and the number of tokens in the sum.

    logits (B,L,V). labels (B,L): the input ids at the same positions, or -100 where no loss is
    wanted. This function does the shift: the logits at position t predict the label at t + 1. Both
    results are 0-d, the sum in fp32.
    """
    logits = logits[:, :-1].float().flatten(0, 1)
    labels = labels[:, 1:].flatten()
    loss_sum = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    token_count = (labels != -100).sum()
    return loss_sum, token_count


# --------------------------------------------------------------------------------------------------
# Data


def prompts_and_completions(row):
    """The (prompt, completion) pairs of a row: one, or one for each assistant turn of messages."""
    if "messages" in row:
        messages = row["messages"]
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        return [(messages[:i], messages[i : i + 1]) for i in turns]
    if "prompt" in row and "completion" in row:
        return [(row["prompt"], row["completion"])]
    return [("", row["text"])]


def load_demonstrations(path, tokenizer, args, max_rows=None):
    """[{"input_ids", "labels"}] of the rows that fit, as lists; labels are -100 on the prompt."""
    columns = [("prompt", "completion"), ("text",), ("messages",)]
    rows = []
    for number, row in enumerate(load_rows(path, columns, max_rows), start=1):
        try:
            for prompt, completion in prompts_and_completions(row):
                prompt_ids = encode_prompt(tokenizer, prompt)
                # Ends with EOS. The prompt is needed only to render a conversation.
                completion_ids = encode_response(tokenizer, prompt, completion)
                labels = [-100] * len(prompt_ids) + completion_ids
                labels[0] = -100  # Nothing stands before the first token that could predict it.
                rows.append({"input_ids": prompt_ids + completion_ids, "labels": labels})
        except Exception as error:  # Chat templates refuse conversations in many ways.
            raise UserError(f"{path}: row {number}: {error}") from error
    kept = [row for row in rows if len(row["input_ids"]) <= args.max_length]
    if len(kept) < len(rows):
        left_out = len(rows) - len(kept)
        print(
            f"{path}: left out {left_out} of {len(rows)} rows longer than {args.max_length} tokens"
        )
    if not kept:
        reason = (
            f"all are longer than --max_length {args.max_length}, or no assistant says anything"
        )
        raise UserError(f"{path}: no row is left: {reason}")
    return kept


def load_data(args, tokenizer):
    """(training rows, held-out rows)."""
    rows = load_demonstrations(args.dataset, tokenizer, args, args.max_rows)
    if args.eval_dataset:
        return rows, load_demonstrations(args.eval_dataset, tokenizer, args)
    return hold_out(rows, args.seed)


def collate(rows, fill_id):
    """Rows as tensors on the CPU: input_ids (B,T), and labels (B,L) of the last L positions.

    The logits at position t predict the token at t + 1, so the earliest logits that are needed are
    those just before the earliest label of all rows.
    """
    input_ids = pad_right([row["input_ids"] for row in rows], fill_id)
    labels = pad_right([row["labels"] for row in rows], -100)
    has_label = (labels != -100).any(dim=0)
    earliest = has_label.int().argmax().item()  # 0 where there is no label at all.
    return {"input_ids": input_ids, "labels": labels[:, max(earliest - 1, 0) :]}


# --------------------------------------------------------------------------------------------------
# Training


def micro_batch_loss(model, rows, means, loss_fn, fill_id, device):
    """The summed loss of a micro-batch of rows, 0-d; adds what is logged to `means`."""
    if not rows:
        # A rank without rows still takes part, with one token and no label: the others wait for it.
        rows = [{"input_ids": [fill_id], "labels": [-100]}]
    batch = to_device(collate(rows, fill_id), device)
    num_logits = batch["labels"].shape[1]
    output = model(batch["input_ids"], use_cache=False, logits_to_keep=num_logits)
    loss_sum, token_count = loss_fn(output.logits, batch["labels"])
    means.add_sum("sft/loss", loss_sum, token_count)
    return loss_sum


@torch.no_grad()
def evaluate(model, rows, loss_fn, fill_id, args, ranks):
    """The held-out metrics by name, over all ranks."""
    means = Means()
    lengths = [len(row["input_ids"]) for row in rows]
    for group in split_by_length(lengths, args.micro_batch_size, ranks):
        part = [rows[i] for i in group]
        with autocast(args, ranks.device):
            micro_batch_loss(model, part, means, loss_fn, fill_id, ranks.device)
    return {f"eval/{name}": value for name, value in means.over_ranks().items()}


def check_flags(args):
    """Refuse what is out of bounds, before anything is loaded."""
    check_shared_flags(args)
    check_at_least(args, 1, "num_epochs", "num_steps", "max_rows", "max_length")
    check_at_least(args, 1, "log_every", "eval_every")


def load_model(args, tokenizer, rows):
    """The language model, refused if a row is longer than it has positions."""
    model, _ = load_pretrained(AutoModelForCausalLM, args.model)
    longest = max(len(row["input_ids"]) for row in rows)
    check_positions(model.config, longest, "--max_length", args.model)
    fit_to_tokenizer(model, tokenizer)
    if args.compile:
        compile_layers(model)
    return model


def main(args):
    args = resolve_args(args)
    check_flags(args)
    tokenizer = load_tokenizer(args.model)
    rows, eval_rows = load_data(args, tokenizer)

    ranks = init_ranks(args.timeout_minutes)
    check_divides(ranks.world_size, args.batch_size, "--batch_size by the number of ranks")
    torch.manual_seed(args.seed)
    model = load_model(args, tokenizer, rows + eval_rows).to(ranks.device)
    train_model = wrap(model, ranks)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, eps=1e-5, weight_decay=0.0, fused=True
    )
    loss_fn = torch.compile(token_loss, dynamic=True) if args.compile else token_loss
    fill_id = tokenizer.eos_token_id  # Stands after a row, where no token sees it.

    run = Run(args, ranks, "sft")
    state = {"model": model, "optimizer": optimizer}
    done = run.load_checkpoint(state) if args.resume else 0
    num_steps = args.num_steps or args.num_epochs * math.ceil(len(rows) / args.batch_size)
    batches = global_batches(len(rows), args.batch_size, num_steps, args.seed, done)
    shown = ["epoch", "train/sft/loss", "eval/sft/loss", "train/sft/lr", "optim/grad_norm"]
    means = Means()
    metrics = {}
    if done == 0 and eval_rows:
        metrics = evaluate(model, eval_rows, loss_fn, fill_id, args, ranks)
        run.log(0, metrics, shown)

    for step in progress(done, num_steps, ranks, run.script):
        # 1. Batch: the rows of all ranks, and this rank's share of them in micro-batches.
        epoch, numbers = next(batches)
        batch = [rows[i] for i in numbers]
        lengths = [len(row["input_ids"]) for row in batch]
        groups = split_by_length(lengths, args.micro_batch_size, ranks)

        # 2. Loss: the sum over all ranks divided by their number of completion tokens.
        num_tokens = max(sum(label != -100 for row in batch for label in row["labels"]), 1)
        for i, group in enumerate(groups):
            # With several ranks, DDP exchanges gradients in the last backward only.
            train_model.require_backward_grad_sync = i + 1 == len(groups)
            part = [batch[j] for j in group]
            with autocast(args, ranks.device):
                loss_sum = micro_batch_loss(
                    train_model, part, means, loss_fn, fill_id, ranks.device
                )
            # DDP averages gradients over ranks; the factor turns that average into a sum.
            (loss_sum * ranks.world_size / num_tokens).backward()

        # 3. Update: clip the gradient's norm over all parameters, step, and start from zero again.
        lr = args.lr * (1 - (step - 1) / num_steps)
        optimizer.param_groups[0]["lr"] = lr
        max_norm = args.max_grad_norm or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        clear_gradients(optimizer)

        # Log, evaluate, save. A saved step is logged too, so that resuming has whole means.
        evaluates = bool(eval_rows) and (step % args.eval_every == 0 or step == num_steps)
        saves = args.save_every > 0 and step % args.save_every == 0
        if step % args.log_every == 0 or evaluates or saves or step == num_steps:
            # Asked only here, because asking waits for the device. NaN weights stay NaN.
            if not grad_norm.isfinite():
                raise UserError(f"step {step}: the gradient is not finite; lower --lr")
            metrics = {f"train/{name}": value for name, value in means.over_ranks().items()}
            metrics |= {"train/sft/lr": lr, "optim/grad_norm": grad_norm.item(), "epoch": epoch}
            means = Means()
            if evaluates:
                metrics |= evaluate(model, eval_rows, loss_fn, fill_id, args, ranks)
            run.log(step, metrics, shown)
        if saves:
            run.save_checkpoint(step, state)

    if ranks.is_main:
        save_pretrained(run.folder / "model", model, tokenizer)
        loss = metrics.get("eval/sft/loss")
        print(f"\nheld-out loss {'not measured' if loss is None else f'{loss:.4f} nats a token'}")
        print(f"model folder  {run.folder / 'model'}")
        print(f"next          python reward_model.py --model {run.folder / 'model'}")


if __name__ == "__main__":
    launch(main, tyro.cli(Args, use_underscores=True))
