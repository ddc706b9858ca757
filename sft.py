r"""Supervised fine-tuning on demonstrations, the first stage of RLHF.

Stiennon et al. 2020, "Learning to summarize from human feedback"; Ouyang et al. 2022, "Training
language models to follow instructions with human feedback".

Each step:
    1. batch    rows of (prompt, completion): the token ids of both joined, EOS at the end
    2. loss     cross-entropy of each completion token, EOS included, given all tokens before it;
                summed over the batch and divided by the number of these tokens on all ranks
    3. update   the gradient is clipped to the norm --max_grad_norm, and Adam takes a step. The
                learning rate falls linearly from lr in the first step to lr / num_steps in the last

One process:    python sft.py
Eight GPUs:     torchrun --nproc_per_node=8 sft.py --model HuggingFaceTB/SmolLM2-135M \
                    --dataset my_rows.jsonl --batch_size 64 --lr 2e-5

Shapes. B rows in a micro-batch, T tokens in the longest of them, L the last positions of the rows,
where logits are computed, V vocabulary.

Layout. Rows are padded on the right with more EOS tokens, which have no label. Causal attention
never looks ahead, so no real token sees the padding, and the model needs neither an attention mask
nor position ids.

Rows
    - Prompt tokens carry no loss. (Stiennon et al. train on them too.)
    - A row of plain `text` has no prompt; its first token has no loss, because nothing stands
      before it.
    - Each assistant turn of a conversation becomes a row of its own, whose prompt is everything
      that was said before it.
    - Prompt and completion are tokenised separately, and EOS is added to the completion. If the
      completion contains EOS already, it ends at the first one.
    - A row with more than --max_length tokens is left out, never cut, because a cut row would teach
      the model not to end. The number of such rows is printed.
    - The held-out rows are those of --eval_dataset, whatever --dataset holds. Without it they are
      one row in twenty of --dataset, chosen by the seed, and exact copies of them are not trained
      on; other turns of the same conversation may be. Held-out rows are evaluated before the first
      step, every --eval_every steps, and after the last.
Steps
    - Every completion token of a step counts the same, whatever row, micro-batch or rank it is in.
    - All ranks draw the same batch. It is sorted by length, and with n ranks, rank r takes the rows
      r, r + n, r + 2n and so on. The ranks add up their gradients before the norm is clipped; a
      rank that gets no row of a small last batch adds zeros.
Precision
    - Models are loaded in fp32 and without dropout. With --precision bf16 forward and backward
      compute in bf16 through autocast; the loss, the weights and the optimizer state are fp32.
    - --compile compiles each transformer layer and `token_loss`. It is the default on CUDA.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from transformers import AutoModelForCausalLM

import utils
from utils import UserError


@dataclass
class Args:
    model: str = "data/randomwalks/model"
    """the model to train, a Hub name or a folder; if the folder holds only a config, the weights
    are random"""
    dataset: str = "data/randomwalks/demonstrations.jsonl"
    """rows with prompt+completion, text, or messages: a .json, .jsonl or .parquet file, a folder of
    them, or a Hub name"""
    eval_dataset: str | None = None
    """held-out rows of the same kind. If not given: one row in twenty of --dataset"""
    max_rows: int | None = None
    """use only the first max_rows rows of --dataset. If not given: all rows"""
    output_dir: str | None = None
    """the run folder, which must not exist yet. If not given: runs/sft__<seed>__<time>"""
    seed: int = 1
    """determines random initial weights, the held-out rows and the order of the rows"""
    num_epochs: int = 10
    """passes over the rows"""
    num_steps: int | None = None
    """optimizer steps in total. If not given: as many as num_epochs
    passes take; if given, num_epochs is ignored"""
    batch_size: int = 50
    """rows per optimizer step, over all ranks"""
    micro_batch_size: int = 50
    """rows per forward and backward on one rank. Fewer rows need less memory, contain less padding,
    and do not change the result"""
    max_length: int = 512
    """the most tokens that prompt and completion may have together; longer rows are left out and
    counted on the screen"""
    lr: float = 1e-3
    """learning rate of the first step. The default suits the random walks; a pretrained model needs
    about 2e-5"""
    max_grad_norm: float = 1.0
    """the norm of the gradient, over all parameters, is clipped to this; 0 switches clipping off"""
    precision: Literal["fp32", "bf16"] = "bf16" if torch.cuda.is_available() else "fp32"
    """what forward and backward compute in; weights, optimizer state and the loss stay fp32"""
    compile: bool = torch.cuda.is_available()
    """compile each transformer layer and the loss"""
    log_every: int = 20
    """steps between two lines of metrics; an evaluation or a checkpoint ends a line early"""
    eval_every: int = 200
    """steps between two evaluations on the held-out rows"""
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


def token_loss(logits, labels):
    """Summed cross-entropy of the next token, in nats, and the number of tokens in the sum.

    logits (B,L,V) at L positions. labels (B,L): the input ids at the same positions, or -100 where
    no loss is wanted. The shift is made here and nowhere else: the logits at one position predict
    the label at the next. Both results are 0-d, the sum in fp32.
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
    """[{"input_ids", "num_unlabelled"}] of the rows that fit.

    input_ids: the prompt and the completion. num_unlabelled: how many tokens at the start carry no
    loss, which is the length of the prompt and at least 1.
    """

    def encode(row):
        encoded = []
        for prompt, completion in prompts_and_completions(row):
            # The ids of a prompt, without EOS, and of a completion with EOS at its end.
            prompt_ids, completion_ids = utils.encode_pair(tokenizer, prompt, completion)
            ids = prompt_ids + completion_ids
            encoded.append({"input_ids": ids, "num_unlabelled": max(len(prompt_ids), 1)})
        return encoded

    columns = [("prompt", "completion"), ("text",), ("messages",)]
    rows = utils.encode_rows(path, utils.load_rows(path, columns, max_rows), encode)
    if not rows:
        raise UserError(f"{path}: no message of an assistant in any row")
    return utils.leave_out_long(path, rows, row_length, args.max_length)


def row_length(row):
    """The tokens of a row."""
    return len(row["input_ids"])


def load_data(args, tokenizer):
    """(training rows, held-out rows)."""
    rows = load_demonstrations(args.dataset, tokenizer, args, args.max_rows)
    if args.eval_dataset:
        return rows, load_demonstrations(args.eval_dataset, tokenizer, args)
    return utils.hold_out(rows, args.seed)


def collate(rows, fill_id):
    """input_ids and labels of rows as tensors (B,T) on the CPU, padded on the right."""
    labels = []
    for row in rows:
        n = row["num_unlabelled"]
        labels.append([-100] * n + row["input_ids"][n:])
    input_ids = utils.pad_right([row["input_ids"] for row in rows], fill_id)
    return {"input_ids": input_ids, "labels": utils.pad_right(labels, -100)}


# --------------------------------------------------------------------------------------------------
# Training


def micro_batch_loss(model, rows, means, loss_fn, fill_id, device):
    """The summed loss of a micro-batch of rows, 0-d; adds what is logged to `means`."""
    batch = utils.to_device(collate(rows, fill_id), device)
    # Logits before the last token of a prompt are never used. We skip those that no row needs: the
    # first useful position is the last token of the shortest prompt. The labels are cut at the same
    # position, and not shifted. With prompts of 5 and 2 tokens:
    #
    #     position          0  1  2  3  4  5  6  7
    #     longer prompt     p  p  p  p  p  c  c  |
    #     shorter prompt    p  p  c  c  c  |           logits from position 1 on
    start = min(row["num_unlabelled"] for row in rows) - 1
    labels = batch["labels"][:, start:]
    num_logits = labels.shape[1]
    output = model(batch["input_ids"], use_cache=False, logits_to_keep=num_logits)
    loss_sum, token_count = loss_fn(output.logits, labels)
    means.add_sum("sft/loss", loss_sum, token_count)
    return loss_sum


@torch.no_grad()
def evaluate(model, rows, loss_fn, fill_id, args, ranks):
    """The held-out metrics by name, over all ranks."""
    means = utils.Means()
    lengths = [row_length(row) for row in rows]
    for group in utils.micro_batch_rows(range(len(rows)), lengths, args.micro_batch_size, ranks):
        part = [rows[i] for i in group]
        with utils.autocast(args, ranks.device):
            micro_batch_loss(model, part, means, loss_fn, fill_id, ranks.device)
    return {f"eval/{name}": value for name, value in means.over_ranks().items()}


def check_flags(args):
    """Refuse what is out of bounds, before anything is loaded."""
    utils.check_shared_flags(args)
    utils.check_at_least(args, 1, "num_epochs", "num_steps", "max_rows", "max_length")
    utils.check_at_least(args, 1, "log_every", "eval_every")


def load_model(args, tokenizer, longest):
    """The language model; a UserError if it has fewer than `longest` positions."""
    model, _ = utils.load_pretrained(AutoModelForCausalLM, args.model)
    utils.check_positions(model.config, longest, "--max_length", args.model)
    utils.fit_to_tokenizer(model, tokenizer)
    if args.compile:
        utils.compile_layers(model)
    return model


def main(args):
    args = utils.resolve_args(args)
    check_flags(args)
    tokenizer = utils.load_tokenizer(args.model)
    rows, eval_rows = load_data(args, tokenizer)
    lengths = [row_length(row) for row in rows]

    ranks = utils.init_ranks(args.timeout_minutes)
    utils.check_divides(ranks.world_size, args.batch_size, "--batch_size by the number of ranks")
    torch.manual_seed(args.seed)
    longest = max(row_length(row) for row in rows + eval_rows)
    model = load_model(args, tokenizer, longest).to(ranks.device)
    utils.broadcast_weights(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, eps=1e-5, weight_decay=0.0, fused=True
    )
    loss_fn = torch.compile(token_loss, dynamic=True) if args.compile else token_loss
    fill_id = tokenizer.eos_token_id  # Fills the padding, which no real token sees.

    run = utils.Run(args, ranks, Path(__file__).stem)
    state = {"model": model, "optimizer": optimizer}
    done = run.load_checkpoint(state) if args.resume else 0
    num_steps = args.num_steps or args.num_epochs * math.ceil(len(rows) / args.batch_size)
    batches = utils.global_batches(len(rows), args.batch_size, num_steps, args.seed, done)
    shown = ["epoch", "train/sft/loss", "eval/sft/loss", "train/sft/lr", "optim/grad_norm"]
    means = utils.Means()
    metrics = {}
    if done == 0 and eval_rows:
        metrics = evaluate(model, eval_rows, loss_fn, fill_id, args, ranks)
        run.log(0, metrics, shown)

    for step in utils.progress(done, num_steps, ranks, run.script):
        # 1. Batch: indices of rows, the same on all ranks.
        epoch, indices = next(batches)

        # 2. Loss of this rank's share of the batch, in micro-batches of rows of similar length.
        num_labels = sum(lengths[i] - rows[i]["num_unlabelled"] for i in indices)
        num_labels = max(num_labels, 1)  # Rows of empty texts have no label.
        for group in utils.micro_batch_rows(indices, lengths, args.micro_batch_size, ranks):
            part = [rows[i] for i in group]
            with utils.autocast(args, ranks.device):
                loss_sum = micro_batch_loss(model, part, means, loss_fn, fill_id, ranks.device)
            (loss_sum / num_labels).backward()
        # A sum and not a mean, because the loss was divided by the size of the whole batch.
        utils.sum_gradients(model)

        # 3. Update.
        lr = args.lr * (1 - (step - 1) / num_steps)
        optimizer.param_groups[0]["lr"] = lr
        max_norm = args.max_grad_norm or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        if not grad_norm.isfinite():
            raise UserError(f"step {step}: the gradient is not finite; lower --lr")
        optimizer.step()
        optimizer.zero_grad()

        # Log, evaluate, save. A saved step is logged too, so that resuming has whole means.
        is_last = step == num_steps
        evaluates = bool(eval_rows) and (is_last or step % args.eval_every == 0)
        saves = args.save_every > 0 and step % args.save_every == 0
        if is_last or evaluates or saves or step % args.log_every == 0:
            metrics = {f"train/{name}": value for name, value in means.over_ranks().items()}
            metrics |= {"train/sft/lr": lr, "optim/grad_norm": grad_norm.item(), "epoch": epoch}
            means = utils.Means()
            if evaluates:
                metrics |= evaluate(model, eval_rows, loss_fn, fill_id, args, ranks)
            run.log(step, metrics, shown)
        if saves:
            run.save_checkpoint(step, state)

    run.save_model("model", model, tokenizer)
    if ranks.is_main:
        loss = metrics.get("eval/sft/loss")
        print(f"\nheld-out loss {'not measured' if loss is None else f'{loss:.4f} nats a token'}")
        print(f"model folder  {run.folder / 'model'}")
        print(f"next          python reward_model.py --model {run.folder / 'model'}")


if __name__ == "__main__":
    utils.launch(main, tyro.cli(Args, use_underscores=True))
