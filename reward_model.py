"""A reward model from comparisons, the second stage of RLHF.

Ziegler et al. 2019, "Fine-tuning language models from human preferences"; Stiennon et al. 2020,
"Learning to summarize from human feedback", section 3.4; Ouyang et al. 2022, "InstructGPT".

Each step:
    1. batch    rows of (prompt, chosen, rejected): two token sequences a row, each ending with EOS
    2. loss     -log sigmoid(score of chosen - score of rejected - margin): the model of Bradley and
                Terry; the mean over all pairs of the batch, on all ranks. The score is a linear
                head on the hidden state of a sequence's last real token
    3. update   AdamW, with a learning rate that decays linearly to 0
At the end:
    4. centre   the mean score of the demonstrations goes into the config as `score_mean`, and
                `last_token_scores` subtracts it: a score of 0 then means "like a demonstration"

One process:    python reward_model.py
Eight GPUs:     torchrun --nproc_per_node=8 reward_model.py --model runs/my_sft/model \\
                    --dataset my_pairs.jsonl

Shapes: B pairs in a micro-batch, 2B sequences (the chosen first), T tokens, d hidden width.

Sequences are padded on the right. Causal attention never looks ahead, so the real tokens cannot see
the padding, whatever it holds: there is no attention mask, and positions count from 0.

Rules that you might not expect:
    - The score is read at the last real token, found by the row's length and never by its ids.
    - The head starts at N(0, 1/(d + 1)) and has no bias, because the plain class for sequence
      classification has none. A model that has a head already, such as another reward model, keeps
      it. The head is computed in fp32.
    - A pair with a side longer than --max_length is left out and counted, never cut.
    - `margin`, in units of the score, is a column of the data; without it the margin is 0.
    - During training, and in the logged scores, nothing is subtracted: `score_mean` is 0 until the
      end. A constant added to all scores does not change the loss.
    - Accuracy counts a tie as half. Dropout is off.
    - Without --eval_dataset one row in twenty is held out, and copies of it are not trained on. It
      is evaluated before the first step, every --eval_every steps, and at the end.
    - With --compile each transformer layer is compiled, and nothing else is.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from transformers import AutoModelForSequenceClassification

from utils import Means, Run, UserError, autocast, check_at_least, check_divides, check_positions
from utils import check_shared_flags, compile_layers, encode_pair, fit_to_tokenizer, global_batches
from utils import gradient_step, hold_out, init_ranks, launch, load_pretrained, load_rows
from utils import load_tokenizer, newest_run, pack_rows, pad_right, progress, resolve_args
from utils import save_pretrained, split_by_length, to_device, wrap


@dataclass
class Args:
    model: str | None = None
    """what is trained: a Hub name or a folder; none: the newest finished run of sft.py"""
    dataset: str = "data/randomwalks/preferences.jsonl"
    """rows with prompt+chosen+rejected, or chosen+rejected with the prompt inside both; optionally
    margin, in units of the score"""
    eval_dataset: str | None = None
    """held-out rows of the same kind; none: one in twenty rows of --dataset, not trained on"""
    demonstrations: str | None = None
    """rows with prompt+completion whose mean score becomes 0; none: demonstrations.jsonl beside
    --dataset if it is there, else scores are not centred"""
    max_rows: int | None = None
    """use only the first so many rows of --dataset; none: all of them"""
    output_dir: str | None = None
    """the run folder, which must not exist yet; none: runs/reward_model__<seed>__<time>"""
    seed: int = 1
    """seeds the head, the held-out rows and the order of the rows"""
    num_epochs: int = 1
    """passes over the rows"""
    num_steps: int | None = None
    """optimizer steps in all; none: as many as num_epochs passes take"""
    batch_size: int = 64
    """pairs per optimizer step, over all ranks"""
    micro_batch_size: int = 64
    """pairs per forward and backward on one rank: saves memory and does not change the objective"""
    max_length: int = 512
    """tokens of prompt and response together; pairs with a longer side are left out and counted"""
    lr: float = 1e-3
    """learning rate of the first step; decays linearly to 0"""
    max_grad_norm: float = 1.0
    """gradients of a larger global norm are scaled down to it; 0: never"""
    use_margin: bool = True
    """subtract the column margin inside the loss, where the rows have one"""
    precision: Literal["fp32", "bf16"] = "bf16" if torch.cuda.is_available() else "fp32"
    """what forward and backward compute in; weights, optimizer state and scores stay fp32"""
    compile: bool = torch.cuda.is_available()
    """compile each transformer layer"""
    log_every: int = 20
    """steps between two lines of metrics"""
    eval_every: int = 200
    """steps between two evaluations on the held-out rows"""
    save_every: int = 0
    """steps between two checkpoints to resume from; 0: none"""
    resume: str | None = None
    """a run folder: go on from its newest checkpoint, with its own arguments"""
    timeout_minutes: float = 60
    """how long a rank waits for the others before the job fails"""
    track: Literal["none", "wandb", "tensorboard"] = "none"
    """where metrics go besides metrics.jsonl"""


# --------------------------------------------------------------------------------------------------
# The algorithm


def preference_loss(chosen_scores, rejected_scores, margin=None):
    """-log sigmoid(chosen - rejected - margin) of each pair, (B,), in nats; all inputs (B,).

    Ouyang et al. 2022, equation 1; the margin is that of Touvron et al. 2023 (Llama 2), equation 2.
    """
    difference = chosen_scores - rejected_scores
    if margin is not None:
        difference = difference - margin
    return -F.logsigmoid(difference)


# --------------------------------------------------------------------------------------------------
# The model


def score_head(model, hidden):
    """Scores (...) in fp32 of hidden states (..., d): the linear head, less the config's centre."""
    weight = model.score.weight[0].float()
    scores = (hidden.float() * weight).sum(-1)
    return scores - getattr(model.config, "score_mean", 0.0)


def last_token_scores(model, input_ids, attention_mask):
    """The score (B,), in fp32, of each row at its last real token.

    model: a plain AutoModelForSequenceClassification with one label. input_ids (B,T);
    attention_mask (B,T): which tokens are real, whatever side the padding is on and whatever ids it
    holds, because the rows are packed to the left first.
    """
    input_ids, lengths = pack_rows(input_ids, attention_mask)
    hidden = model.base_model(input_ids, use_cache=False).last_hidden_state
    rows = torch.arange(len(lengths), device=lengths.device)
    return score_head(model, hidden[rows, lengths - 1])


class Scorer(torch.nn.Module):
    """`last_token_scores` as a module, so that DDP can wrap the forward of the loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return last_token_scores(self.model, input_ids, attention_mask)


# --------------------------------------------------------------------------------------------------
# Data


def load_comparisons(path, tokenizer, args, max_rows=None):
    """[{"chosen", "rejected", "margin"}] of the rows that fit: two lists of ids and a number."""
    rows = []
    for number, row in enumerate(load_rows(path, [("chosen", "rejected")], max_rows), start=1):
        margin = row.get("margin", 0.0) if args.use_margin else 0.0
        if not isinstance(margin, int | float) or not abs(margin) < 1e30:
            raise UserError(f"{path}: row {number}: margin is {margin!r}, not a finite number")
        prompt = row.get("prompt", "")
        try:
            chosen = encode_pair(tokenizer, prompt, row["chosen"])
            rejected = encode_pair(tokenizer, prompt, row["rejected"])
        except Exception as error:  # Chat templates refuse conversations in many ways.
            raise UserError(f"{path}: row {number}: {error}") from error
        rows.append({"chosen": chosen, "rejected": rejected, "margin": float(margin)})
    kept = [row for row in rows if pair_length(row) <= args.max_length]
    if len(kept) < len(rows):
        left_out = len(rows) - len(kept)
        print(
            f"{path}: left out {left_out} of {len(rows)} pairs longer than {args.max_length} tokens"
        )
    if not kept:
        reason = f"every one is longer than --max_length {args.max_length}"
        raise UserError(f"{path}: no pair is left; {reason}")
    return kept


def pair_length(row):
    """Tokens of the longer side of a pair."""
    return max(len(row["chosen"]), len(row["rejected"]))


def load_data(args, tokenizer):
    """(training rows, held-out rows)."""
    rows = load_comparisons(args.dataset, tokenizer, args, args.max_rows)
    if args.eval_dataset:
        return rows, load_comparisons(args.eval_dataset, tokenizer, args)
    return hold_out(rows, args.seed)


def encode_demonstrations(args, tokenizer):
    """Token ids of the demonstrations that fit; none where there is no file of them."""
    beside = Path(args.dataset).with_name("demonstrations.jsonl")
    if args.demonstrations is None and beside.is_file():
        args.demonstrations = str(beside)
    if args.demonstrations is None:
        return []
    rows = load_rows(args.demonstrations, [("prompt", "completion")])
    encoded = [encode_pair(tokenizer, row["prompt"], row["completion"]) for row in rows]
    return [ids for ids in encoded if len(ids) <= args.max_length]


def collate(sequences, pad_id):
    """Lists of ids as a batch on the CPU: input_ids and attention_mask (N,T), right padded."""
    input_ids = pad_right(sequences, pad_id)
    attention_mask = pad_right([[True] * len(ids) for ids in sequences], False)
    return {"input_ids": input_ids, "attention_mask": attention_mask}


# --------------------------------------------------------------------------------------------------
# Training


def batch_loss(model, rows, means, tokenizer, device):
    """The summed loss of some pairs, 0-d; adds what is logged to `means`."""
    pad_id = tokenizer.eos_token_id
    # A rank that gets no row of an epoch's last batch still has to exchange gradients.
    is_real = torch.full((max(len(rows), 1),), len(rows) > 0, device=device)
    rows = rows or [{"chosen": [pad_id], "rejected": [pad_id], "margin": 0.0}]

    sequences = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
    batch = to_device(collate(sequences, pad_id), device)
    margin = torch.tensor([row["margin"] for row in rows], device=device)
    chosen_scores, rejected_scores = model(**batch).chunk(2)
    losses = preference_loss(chosen_scores, rejected_scores, margin)

    difference = chosen_scores - rejected_scores
    accuracy = 0.5 + 0.5 * torch.sign(difference)
    stats = {"rm/loss": losses, "rm/accuracy": accuracy, "rm/margin": difference}
    means.add(stats, is_real)
    return torch.where(is_real, losses, 0).sum()


@torch.no_grad()
def evaluate(model, rows, args, ranks, **options):
    """The held-out metrics by name, over all ranks."""
    means = Means()
    lengths = [pair_length(row) for row in rows]
    for group in split_by_length(lengths, args.micro_batch_size, ranks):
        with autocast(args, ranks.device):
            batch_loss(model, [rows[i] for i in group], means, device=ranks.device, **options)
    return {f"eval/{name}": value for name, value in means.over_ranks().items()}


@torch.no_grad()
def mean_score(scorer, sequences, args, tokenizer, ranks):
    """The mean score of rows of token ids, over all ranks."""
    means = Means()
    lengths = [len(ids) for ids in sequences]
    for group in split_by_length(lengths, 2 * args.micro_batch_size, ranks):
        part = [sequences[i] for i in group] or [[tokenizer.eos_token_id]]
        is_real = torch.full((len(part),), len(group) > 0, device=ranks.device)
        batch = to_device(collate(part, tokenizer.eos_token_id), ranks.device)
        with autocast(args, ranks.device):
            means.add({"score": scorer(**batch)}, is_real)
    return means.over_ranks()["score"]


def check_flags(args):
    """Refuse what is out of bounds, before anything is loaded."""
    check_shared_flags(args)
    check_at_least(args, 1, "num_epochs", "num_steps", "max_rows", "max_length")
    check_at_least(args, 1, "log_every", "eval_every")


def load_model(args, tokenizer, rows):
    """The model with its score head, checked to be long enough for all rows."""
    kind = AutoModelForSequenceClassification
    model, missing = load_pretrained(kind, args.model, ["score.weight"], num_labels=1)
    longest = max(pair_length(row) for row in rows)
    check_positions(model.config, longest, "--max_length", args.model)
    if missing:
        torch.nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
    fit_to_tokenizer(model, tokenizer)
    model.config.score_mean = 0.0
    if args.compile:
        compile_layers(model)
    return model


def main(args):
    args = resolve_args(args)
    check_flags(args)
    args.model = args.model or newest_run("sft", args.dataset)
    tokenizer = load_tokenizer(args.model)
    rows, eval_rows = load_data(args, tokenizer)
    demonstrations = encode_demonstrations(args, tokenizer)

    ranks = init_ranks(args.timeout_minutes)
    check_divides(ranks.world_size, args.batch_size, "--batch_size by the number of ranks")
    torch.manual_seed(args.seed)
    model = load_model(args, tokenizer, rows + eval_rows).to(ranks.device)
    scorer = Scorer(model)
    train_model = wrap(scorer, ranks)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, eps=1e-5, weight_decay=0.0, fused=True
    )
    options = {"tokenizer": tokenizer}

    run = Run(args, ranks, "reward_model")
    state = {"model": model, "optimizer": optimizer}
    done = run.load_checkpoint(state) if args.resume else 0
    num_steps = args.num_steps or args.num_epochs * math.ceil(len(rows) / args.batch_size)
    batches = global_batches(len(rows), args.batch_size, num_steps, args.seed, done)
    shown = ["epoch", "train/rm/loss", "train/rm/accuracy", "train/rm/margin"]
    shown += ["eval/rm/loss", "eval/rm/accuracy", "train/rm/lr"]
    means = Means()
    metrics = {}
    if done == 0 and eval_rows:
        metrics = evaluate(scorer, eval_rows, args, ranks, **options)
        run.log(0, metrics, shown)

    for step in progress(done, num_steps, ranks, "reward_model"):
        # 1. Batch: the rows of all ranks, and this rank's share of them in micro-batches.
        epoch, numbers = next(batches)
        batch = [rows[i] for i in numbers]
        groups = split_by_length([pair_length(row) for row in batch], args.micro_batch_size, ranks)

        # 2. Loss: the sum over all ranks divided by their number of pairs.
        for i, group in enumerate(groups):
            # With several ranks, gradients are exchanged in the last backward only.
            train_model.require_backward_grad_sync = i == len(groups) - 1
            with autocast(args, ranks.device):
                loss_sum = batch_loss(
                    train_model, [batch[j] for j in group], means, device=ranks.device, **options
                )
            # DDP averages over ranks; times their number, the average is the sum.
            (loss_sum * ranks.world_size / len(batch)).backward()

        # 3. Update.
        lr = args.lr * (1 - (step - 1) / num_steps)
        optimizer.param_groups[0]["lr"] = lr
        grad_norm = gradient_step(model, optimizer, args.max_grad_norm)

        # Log, evaluate, save.
        evaluates = bool(eval_rows) and (step % args.eval_every == 0 or step == num_steps)
        saves = args.save_every > 0 and step % args.save_every == 0
        if step % args.log_every == 0 or evaluates or saves or step == num_steps:
            if not grad_norm.isfinite():
                raise UserError(f"step {step}: the gradient is not finite; lower --lr")
            metrics = {f"train/{name}": value for name, value in means.over_ranks().items()}
            metrics |= {"train/rm/lr": lr, "optim/grad_norm": grad_norm.item(), "epoch": epoch}
            means = Means()
            if evaluates:
                metrics |= evaluate(scorer, eval_rows, args, ranks, **options)
            run.log(step, metrics, shown)
        if saves:
            run.save_checkpoint(step, state)

    # 4. Centre.
    if demonstrations:
        model.config.score_mean = mean_score(scorer, demonstrations, args, tokenizer, ranks)
    if ranks.is_main:
        save_pretrained(run.folder / "model", model, tokenizer)
        accuracy = metrics.get("eval/rm/accuracy")
        print(f"\nheld-out accuracy {'not measured' if accuracy is None else f'{accuracy:.4f}'}")
        centred = "" if demonstrations else " (not centred)"
        print(f"score_mean        {model.config.score_mean:.4f}{centred}")
        print(f"model folder      {run.folder / 'model'}")
        next_flags = f"--model {args.model} --reward_model {run.folder / 'model'}"
        print(f"next              python ppo_rlhf.py {next_flags}")


if __name__ == "__main__":
    launch(main, tyro.cli(Args, use_underscores=True))
