r"""A reward model from comparisons, the second stage of RLHF.

Ziegler et al. 2019, "Fine-tuning language models from human preferences"; Stiennon et al. 2020,
"Learning to summarize from human feedback", section 3.4; Ouyang et al. 2022, "Training language
models to follow instructions with human feedback".

Each step:
    1. batch    rows of (prompt, chosen, rejected): two token sequences a row, each ending with EOS
    2. loss     -log sigmoid(score of chosen - score of rejected - margin): the model of Bradley and
                Terry; the mean over all pairs of the batch, on all ranks. The score is a linear
                head on the hidden state of a sequence's last real token
    3. update   gradients clipped to --max_grad_norm, then Adam; the learning rate falls linearly
                from lr in the first step to lr / num_steps in the last
At the end, if there are demonstrations:
    4. centre   their mean score goes into the config as `score_mean`, and `score_head` subtracts it
                from then on: a score of 0 means "like the average demonstration"

One process:    python reward_model.py
Eight GPUs:     torchrun --nproc_per_node=8 reward_model.py --model runs/my_sft/model \
                    --dataset my_pairs.jsonl --lr 2e-5

Shapes: B pairs in a micro-batch, N = 2B sequences (the chosen first), T tokens, d hidden width.

Sequences are padded on the right. Causal attention never looks ahead, so the real tokens cannot see
the padding, whatever it holds. The model itself is given no attention mask; ours only says how long
each sequence is.

Rules that you might not expect:
    - The score is read at the last real token, which is the EOS. It is found by the length of the
      sequence, never by its ids.
    - The head starts at N(0, 1/(d + 1)) and has no bias, because AutoModelForSequenceClassification
      has none. A model that has a head already, such as another reward model, keeps it.
    - A row without `prompt` must contain it in both sides. If the sides are conversations (lists of
      messages), their last message is the response; a `prompt` that is a text is ignored then.
    - A pair with a side longer than --max_length is dropped, never cut, and so is a demonstration.
      How many were dropped is printed.
    - The column `margin`, in units of the score, is subtracted in the loss. The metric rm/loss
      includes it; rm/accuracy and rm/margin do not, and a tie counts as half in the accuracy.
    - `score_mean` is 0 during training, also for a reward model that had another: the loss would
      not notice a constant added to all scores. The library's own forward does not subtract it;
      `last_token_scores` does.
    - Without --eval_dataset one row in twenty is held out, drawn by the seed, and exact copies of
      these rows are not trained on either.
    - Held-out pairs are evaluated before the first step, every --eval_every steps, and at the end.
    - Models are loaded in fp32 and without dropout. Under --precision bf16 the hidden states are in
      bf16; the scores and the loss are computed in fp32, and weights and optimizer state stay fp32.
    - With --compile, which is the default on CUDA, each transformer layer is compiled, and nothing
      else is.

What the helpers from utils.py do, as far as the algorithm needs them:
    encode_pair(prompt, response)    token ids of both and EOS, in one list
    global_batches                   row numbers of each step, in a new order each epoch
    split_by_length(lengths, size,   this rank's share, every world_size-th row in order of length,
      ranks)                         in groups of at most `size`; one empty group if it has none
    pack_rows(input_ids, mask)       every row's real tokens moved to the left, and their number
    wrap(model, ranks)               DDP around it, if there are several ranks
    Means                            exact means by name, over micro-batches and ranks
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
from utils import clear_gradients, hold_out, init_ranks, launch, load_pretrained, load_rows
from utils import load_tokenizer, newest_run, pack_rows, pad_right, progress, resolve_args
from utils import save_pretrained, split_by_length, to_device, wrap


@dataclass
class Args:
    model: str | None = None
    """the model to train: a Hub name or a folder; none: the newest finished run of sft.py"""
    dataset: str = "data/randomwalks/preferences.jsonl"
    """rows with prompt+chosen+rejected, or chosen+rejected with the prompt inside both; optionally
    margin, in units of the score"""
    eval_dataset: str | None = None
    """held-out rows of the same kind; none: one in twenty rows of --dataset, not trained on"""
    demonstrations: str | None = None
    """rows with prompt+completion whose mean score becomes 0; none: demonstrations.jsonl beside
    --dataset if it is there, else scores are not centred"""
    max_rows: int | None = None
    """use only this many rows, the first ones, of --dataset; none: all rows"""
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
    """learning rate of the first step (for the small task; about 2e-5 for a pretrained model)"""
    max_grad_norm: float = 1.0
    """clip the norm of the gradient, over all parameters, to this; 0: do not clip"""
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
    """continue the run in this folder from its newest checkpoint, with the arguments it had"""
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


class Scorer(torch.nn.Module):
    """A module whose forward is `last_token_scores`, because DDP wraps the forward of a module."""

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
        if not isinstance(margin, int | float) or not math.isfinite(margin):
            raise UserError(f"{path}: row {number}: margin is {margin!r}, not a finite number")
        prompt = row.get("prompt", "")
        try:
            # Prompt, response and EOS in one list.
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
    """The number of tokens of the longer side of a pair."""
    return max(len(row["chosen"]), len(row["rejected"]))


def load_data(args, tokenizer):
    """(training rows, held-out rows)."""
    rows = load_comparisons(args.dataset, tokenizer, args, args.max_rows)
    if args.eval_dataset:
        return rows, load_comparisons(args.eval_dataset, tokenizer, args)
    return hold_out(rows, args.seed)


def encode_demonstrations(args, tokenizer):
    """Token ids of the demonstrations that fit; an empty list where there is no file of them."""
    path = args.demonstrations
    beside = Path(args.dataset).with_name("demonstrations.jsonl")
    if path is None and beside.is_file():
        path = str(beside)
    if path is None:
        return []
    rows = load_rows(path, [("prompt", "completion")])
    encoded = [encode_pair(tokenizer, row["prompt"], row["completion"]) for row in rows]
    kept = [ids for ids in encoded if len(ids) <= args.max_length]
    if len(kept) < len(encoded):
        left_out = f"left out {len(encoded) - len(kept)} of {len(encoded)} demonstrations"
        print(f"{path}: {left_out} longer than {args.max_length} tokens")
    if not kept:
        reason = f"every one is longer than --max_length {args.max_length}"
        raise UserError(f"{path}: no demonstration is left; {reason}")
    return kept


def collate(sequences, fill_id):
    """Lists of ids as a batch on the CPU: input_ids and attention_mask (N,T), right padded."""
    input_ids = pad_right(sequences, fill_id)
    attention_mask = pad_right([[True] * len(ids) for ids in sequences], False)
    return {"input_ids": input_ids, "attention_mask": attention_mask}


# --------------------------------------------------------------------------------------------------
# Training


def micro_batch_loss(scorer, rows, means, fill_id, device):
    """The summed loss of a micro-batch of pairs, 0-d; adds what is logged to `means`."""
    has_rows = len(rows) > 0
    if not has_rows:
        # A rank without rows takes part with a pair that does not count: the others wait for it.
        rows = [{"chosen": [fill_id], "rejected": [fill_id], "margin": 0.0}]
    is_real = torch.full((len(rows),), has_rows, device=device)

    sequences = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
    batch = to_device(collate(sequences, fill_id), device)
    margin = torch.tensor([row["margin"] for row in rows], device=device)
    chosen_scores, rejected_scores = scorer(**batch).chunk(2)
    losses = preference_loss(chosen_scores, rejected_scores, margin)

    difference = chosen_scores - rejected_scores
    accuracy = 0.5 + 0.5 * torch.sign(difference)
    means.add({"rm/loss": losses, "rm/accuracy": accuracy, "rm/margin": difference}, is_real)
    return torch.where(is_real, losses, 0).sum()


@torch.no_grad()
def evaluate(scorer, rows, fill_id, args, ranks):
    """The held-out metrics by name, over all ranks."""
    means = Means()
    lengths = [pair_length(row) for row in rows]
    for group in split_by_length(lengths, args.micro_batch_size, ranks):
        part = [rows[i] for i in group]
        with autocast(args, ranks.device):
            micro_batch_loss(scorer, part, means, fill_id, ranks.device)
    return {f"eval/{name}": value for name, value in means.over_ranks().items()}


@torch.no_grad()
def mean_score(scorer, sequences, fill_id, args, ranks):
    """The mean score of lists of token ids, over all ranks."""
    means = Means()
    lengths = [len(ids) for ids in sequences]
    for group in split_by_length(lengths, 2 * args.micro_batch_size, ranks):
        part = [sequences[i] for i in group] or [[fill_id]]
        is_real = torch.full((len(part),), len(group) > 0, device=ranks.device)
        batch = to_device(collate(part, fill_id), ranks.device)
        with autocast(args, ranks.device):
            means.add({"score": scorer(**batch)}, is_real)
    return means.over_ranks()["score"]


def check_flags(args):
    """Refuse what is out of bounds, before anything is loaded."""
    check_shared_flags(args)
    check_at_least(args, 1, "num_epochs", "num_steps", "max_rows", "max_length")
    check_at_least(args, 1, "log_every", "eval_every")


def load_model(args, tokenizer, longest):
    """The model with its score head; a UserError if it has fewer than `longest` positions."""
    kind = AutoModelForSequenceClassification
    model, missing = load_pretrained(kind, args.model, ["score.weight"], num_labels=1)
    check_positions(model.config, longest, "--max_length", args.model)
    if missing:  # The names of weights that the folder lacks.
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
    longest = max(pair_length(row) for row in rows + eval_rows)
    longest = max([longest, *(len(ids) for ids in demonstrations)])
    model = load_model(args, tokenizer, longest).to(ranks.device)
    scorer = Scorer(model)
    train_model = wrap(scorer, ranks)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, eps=1e-5, weight_decay=0.0, fused=True
    )
    fill_id = tokenizer.eos_token_id  # Stands after a row, where no token sees it.

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
        metrics = evaluate(scorer, eval_rows, fill_id, args, ranks)
        run.log(0, metrics, shown)

    for step in progress(done, num_steps, ranks, run.script):
        # 1. Batch: the rows of all ranks, and this rank's share of them in micro-batches.
        epoch, numbers = next(batches)
        batch = [rows[i] for i in numbers]
        lengths = [pair_length(row) for row in batch]
        groups = split_by_length(lengths, args.micro_batch_size, ranks)

        # 2. Loss: the sum over all ranks divided by their number of pairs.
        for i, group in enumerate(groups):
            # With several ranks, DDP exchanges gradients in the last backward only.
            train_model.require_backward_grad_sync = i + 1 == len(groups)
            part = [batch[j] for j in group]
            with autocast(args, ranks.device):
                loss_sum = micro_batch_loss(train_model, part, means, fill_id, ranks.device)
            # DDP averages gradients over ranks; the factor turns that average into a sum.
            (loss_sum * ranks.world_size / len(batch)).backward()

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
            metrics |= {"train/rm/lr": lr, "optim/grad_norm": grad_norm.item(), "epoch": epoch}
            means = Means()
            if evaluates:
                metrics |= evaluate(scorer, eval_rows, fill_id, args, ranks)
            run.log(step, metrics, shown)
        if saves:
            run.save_checkpoint(step, state)

    # 4. Centre.
    if demonstrations:
        model.config.score_mean = mean_score(scorer, demonstrations, fill_id, args, ranks)
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
