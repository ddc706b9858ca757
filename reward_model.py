r"""A reward model from comparisons, the second stage of RLHF.

Ziegler et al. 2019, "Fine-tuning language models from human preferences"; Stiennon et al. 2020,
"Learning to summarize from human feedback", section 3.4; Ouyang et al. 2022, "Training language
models to follow instructions with human feedback".

Each step:
    1. batch    rows of (prompt, chosen, rejected), which give two token sequences: the prompt with
                the chosen response, and with the rejected one, each ending with EOS
    2. loss     -log sigmoid(score of chosen - score of rejected - margin), the model of Bradley and
                Terry; the mean over the pairs of the batch on all ranks
    3. update   the gradient is clipped to the norm --max_grad_norm, and Adam takes a step. The
                learning rate falls linearly from lr in the first step to lr / num_steps in the last

One process:    python reward_model.py
Eight GPUs:     torchrun --nproc_per_node=8 reward_model.py --model runs/my_sft/model \
                    --dataset my_pairs.jsonl --lr 2e-5

Shapes. B pairs in a micro-batch; N = 2B sequences, the chosen ones first; T tokens in the longest
of them.

Layout. Sequences are padded on the right. Causal attention never looks ahead, so no real token sees
the padding, and the model needs neither an attention mask nor position ids.

Scores
    - The score of a sequence is a linear head on the hidden state of its last real token, which is
      EOS. It is found by the length of the sequence, never by its ids. `attention_mask` tells the
      length alone.
    - The head has no bias, because AutoModelForSequenceClassification has none. Its weights start
      at N(0, 1/(d + 1)) with the hidden width d; a model that has a head already, such as another
      reward model, keeps it.
Centring
    - At the end, if there are demonstrations, their mean score goes into the config as
      `score_mean`, and `score_head` subtracts it from then on: a score of 0 means "like the average
      demonstration". The library's own forward does not subtract it.
    - `score_mean` is 0 during training, also for a reward model that had another: the loss would
      not notice a constant added to all scores.
    - A demonstration of more than --max_length tokens is left out, and the number of them printed.
Rows
    - If a row has no column `prompt`, each side contains its prompt. If the sides are
      conversations (lists of messages), the last message of a side is then the response and the
      others are the prompt; a text is all response. A `prompt` that is a text beside conversations
      is ignored.
    - A pair with a side of more than --max_length tokens is left out, never cut. The number of such
      pairs is printed.
    - A pair whose sides have the same tokens is left out, and the number of such pairs printed.
    - The column `margin`, in units of the score, is subtracted inside the loss. The metric rm/loss
      includes it; rm/accuracy and rm/margin, which is chosen - rejected, do not. A tie counts as
      half in the accuracy.
    - The held-out pairs are those of --eval_dataset. Without it they are one row in twenty of
      --dataset, chosen by the seed, and exact copies of them are not trained on; other pairs with
      the same prompt are. Held-out pairs are evaluated before the first step, every --eval_every
      steps, and after the last.
Steps
    - Every pair is a row of its own. Others put all pairs of a prompt into one batch.
    - All ranks draw the same batch. It is sorted by length, and with n ranks, rank r takes the
      pairs r, r + n, r + 2n and so on. The ranks add up their gradients before the norm is clipped;
      a rank that gets no pair of a small last batch adds zeros.
Precision
    - Models are loaded in fp32 and without dropout. With --precision bf16 forward and backward
      compute in bf16 through autocast; the scores, the loss, the weights and the optimizer state
      are fp32.
    - --compile compiles each transformer layer. It is the default on CUDA.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from transformers import AutoModelForSequenceClassification

import utils
from utils import UserError


@dataclass
class Args:
    model: str | None = None
    """the model to train, a Hub name or a folder. If not given: the newest finished run of
    sft.py"""
    dataset: str = "data/randomwalks/preferences.jsonl"
    """rows with prompt+chosen+rejected, or chosen+rejected with the prompt inside both; optionally
    margin, in units of the score"""
    eval_dataset: str | None = None
    """held-out rows of the same kind. If not given: one row in twenty of --dataset"""
    max_rows: int | None = None
    """use only the first max_rows rows of --dataset. If not given: all rows"""
    output_dir: str | None = None
    """the run folder, which must not exist yet. If not given: runs/reward_model__<seed>__<time>"""
    seed: int = 1
    """determines weights that start at random, the held-out rows and the order of the rows"""
    num_epochs: int = 1
    """passes over the rows"""
    num_steps: int | None = None
    """optimizer steps in total. If not given: as many as num_epochs
    passes take; if given, num_epochs is ignored"""
    batch_size: int = 64
    """pairs per optimizer step, over all ranks"""
    micro_batch_size: int = 64
    """pairs per forward and backward on one rank. Fewer pairs need less memory, contain less
    padding, and do not change the result"""
    max_length: int = 512
    """the most tokens that prompt and response may have together; pairs with a longer side are left
    out and counted on the screen"""
    use_margin: bool = True
    """subtract the column margin inside the loss, where the rows have one"""
    demonstrations: str | None = None
    """rows with prompt+completion whose mean score becomes 0. If not given: demonstrations.jsonl
    beside --dataset; if that does not exist, scores are not centred"""
    lr: float = 1e-3
    """learning rate of the first step; a pretrained model needs about 2e-5. The default suits the
    random walks"""
    max_grad_norm: float = 1.0
    """the norm of the gradient, over all parameters, is clipped to this; 0 switches clipping off"""
    precision: Literal["fp32", "bf16"] = "bf16" if torch.cuda.is_available() else "fp32"
    """what forward and backward compute in; weights, optimizer state and scores stay fp32"""
    compile: bool = torch.cuda.is_available()
    """compile each transformer layer"""
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
# Data


def load_comparisons(path, tokenizer, args, max_rows=None):
    """[{"chosen", "rejected", "margin"}] of the rows that fit and whose sides differ.

    chosen and rejected are sides: the token ids of a prompt, and of a response with EOS at its end.
    """

    def encode(row):
        margin = row.get("margin", 0.0) if args.use_margin else 0.0
        if not isinstance(margin, int | float) or not math.isfinite(margin):
            raise UserError(f"margin is {margin!r}, not a finite number")
        prompt = row.get("prompt", "")
        chosen = utils.encode_pair(tokenizer, prompt, row["chosen"])
        rejected = utils.encode_pair(tokenizer, prompt, row["rejected"])
        return [{"chosen": chosen, "rejected": rejected, "margin": float(margin)}]

    rows = utils.load_rows(path, [("chosen", "rejected")], max_rows)
    pairs = utils.encode_rows(path, rows, encode)
    pairs = utils.leave_out_equal(path, pairs)
    return utils.leave_out_long(path, pairs, pair_length, args.max_length)


def side_length(side):
    """The tokens of a side, prompt and response together."""
    prompt_ids, response_ids = side
    return len(prompt_ids) + len(response_ids)


def pair_length(pair):
    """The tokens of the longer side of a pair."""
    return max(side_length(pair["chosen"]), side_length(pair["rejected"]))


def load_data(args, tokenizer):
    """(training pairs, held-out pairs)."""
    pairs = load_comparisons(args.dataset, tokenizer, args, args.max_rows)
    if args.eval_dataset:
        return pairs, load_comparisons(args.eval_dataset, tokenizer, args)
    return utils.hold_out(pairs, args.seed)


def collate(sides, fill_id):
    """The sides as tensors (N,T) on the CPU, padded on the right."""
    sequences = [prompt_ids + response_ids for prompt_ids, response_ids in sides]
    input_ids = utils.pad_right(sequences, fill_id)
    attention_mask = utils.pad_right([[True] * len(ids) for ids in sequences], False)
    return {"input_ids": input_ids, "attention_mask": attention_mask}


# --------------------------------------------------------------------------------------------------
# Training


def micro_batch_loss(model, pairs, means, fill_id, device):
    """The summed loss of a micro-batch of pairs, 0-d; adds what is logged to `means`."""
    sides = [pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs]
    batch = utils.to_device(collate(sides, fill_id), device)
    margin = torch.tensor([pair["margin"] for pair in pairs], device=device)
    chosen_scores, rejected_scores = last_token_scores(model, **batch).chunk(2)
    losses = preference_loss(chosen_scores, rejected_scores, margin)

    difference = chosen_scores - rejected_scores
    accuracy = 0.5 + 0.5 * torch.sign(difference)
    means.add({"rm/loss": losses, "rm/accuracy": accuracy, "rm/margin": difference})
    return losses.sum()


@torch.no_grad()
def evaluate(model, pairs, fill_id, args, ranks):
    """The held-out metrics by name, over all ranks."""
    means = utils.Means()
    lengths = [pair_length(pair) for pair in pairs]
    for group in utils.micro_batch_rows(range(len(pairs)), lengths, args.micro_batch_size, ranks):
        part = [pairs[i] for i in group]
        with utils.autocast(args, ranks.device):
            micro_batch_loss(model, part, means, fill_id, ranks.device)
    return {f"eval/{name}": value for name, value in means.over_ranks().items()}


# --------------------------------------------------------------------------------------------------
# Centring


def load_demonstration_sides(args, tokenizer):
    """The demonstrations that fit, as sides; an empty list where there is no file of them."""
    path = args.demonstrations
    beside = Path(args.dataset).with_name("demonstrations.jsonl")
    if path is None and beside.is_file():
        path = str(beside)
    if path is None:
        return []

    def encode(row):
        return [utils.encode_pair(tokenizer, row["prompt"], row["completion"])]

    rows = utils.load_rows(path, [("prompt", "completion")])
    sides = utils.encode_rows(path, rows, encode)
    return utils.leave_out_long(path, sides, side_length, args.max_length)


@torch.no_grad()
def centre_scores(model, demonstrations, fill_id, args, ranks):
    """Put the mean score of the demonstrations, which are sides, into config.score_mean.

    It is a mean over all ranks. Without demonstrations score_mean stays 0.
    """
    means = utils.Means()
    lengths = [side_length(side) for side in demonstrations]
    size = 2 * args.micro_batch_size  # As many sequences as in a micro-batch of pairs.
    for group in utils.micro_batch_rows(range(len(lengths)), lengths, size, ranks):
        part = [demonstrations[i] for i in group]
        batch = utils.to_device(collate(part, fill_id), ranks.device)
        with utils.autocast(args, ranks.device):
            means.add({"score": last_token_scores(model, **batch)})
    if demonstrations:
        model.config.score_mean = means.over_ranks()["score"]
    if ranks.is_main:
        centred = "" if demonstrations else " (not centred)"
        print(f"score_mean        {model.config.score_mean:.4f}{centred}")


# --------------------------------------------------------------------------------------------------
# Setting up, and the loop


def check_flags(args):
    """Refuse what is out of bounds, before anything is loaded."""
    utils.check_shared_flags(args)
    utils.check_at_least(args, 1, "num_epochs", "num_steps", "max_rows", "max_length")
    utils.check_at_least(args, 1, "log_every", "eval_every")


def load_model(args, tokenizer, longest):
    """The model with its score head; a UserError if it has fewer than `longest` positions."""
    kind = AutoModelForSequenceClassification
    model, missing = utils.load_pretrained(kind, args.model, ["score.weight"], num_labels=1)
    utils.check_positions(model.config, longest, "--max_length", args.model)
    utils.fit_to_tokenizer(model, tokenizer)
    if missing:  # The folder has no head, so it is a language model.
        torch.nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
    model.config.score_mean = 0.0
    if args.compile:  # Last, because a copy of a compiled model is not compiled.
        utils.compile_layers(model)
    return model


def main(args):
    args = utils.resolve_args(args)
    check_flags(args)
    args.model = args.model or utils.newest_run("sft", args.dataset)
    tokenizer = utils.load_tokenizer(args.model)
    pairs, eval_pairs = load_data(args, tokenizer)
    lengths = [pair_length(pair) for pair in pairs]
    longest = max(pair_length(pair) for pair in pairs + eval_pairs)
    demonstrations = load_demonstration_sides(args, tokenizer)
    longest = max([longest, *(side_length(side) for side in demonstrations)])

    ranks = utils.init_ranks(args.timeout_minutes)
    utils.check_divides(ranks.world_size, args.batch_size, "--batch_size by the number of ranks")
    torch.manual_seed(args.seed)
    model = load_model(args, tokenizer, longest).to(ranks.device)
    utils.broadcast_weights(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, eps=1e-5, weight_decay=0.0, fused=True
    )
    fill_id = tokenizer.eos_token_id  # Fills the padding, which no real token sees.

    run = utils.Run(args, ranks, Path(__file__).stem)
    state = {"model": model, "optimizer": optimizer}
    done = run.load_checkpoint(state) if args.resume else 0
    num_steps = args.num_steps or args.num_epochs * math.ceil(len(pairs) / args.batch_size)
    batches = utils.global_batches(len(pairs), args.batch_size, num_steps, args.seed, done)
    shown = ["epoch", "train/rm/loss", "train/rm/accuracy", "train/rm/margin"]
    shown += ["eval/rm/loss", "eval/rm/accuracy", "train/rm/lr"]
    means = utils.Means()
    metrics = {}
    if done == 0 and eval_pairs:
        metrics = evaluate(model, eval_pairs, fill_id, args, ranks)
        run.log(0, metrics, shown)

    for step in utils.progress(done, num_steps, ranks, run.script):
        # 1. Batch: indices of pairs, the same on all ranks.
        epoch, indices = next(batches)

        # 2. Loss of this rank's share of the batch, in micro-batches of pairs of similar length.
        for group in utils.micro_batch_rows(indices, lengths, args.micro_batch_size, ranks):
            part = [pairs[i] for i in group]
            with utils.autocast(args, ranks.device):
                loss_sum = micro_batch_loss(model, part, means, fill_id, ranks.device)
            (loss_sum / len(indices)).backward()
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
        evaluates = bool(eval_pairs) and (is_last or step % args.eval_every == 0)
        saves = args.save_every > 0 and step % args.save_every == 0
        if is_last or evaluates or saves or step % args.log_every == 0:
            metrics = {f"train/{name}": value for name, value in means.over_ranks().items()}
            metrics |= {"train/rm/lr": lr, "optim/grad_norm": grad_norm.item(), "epoch": epoch}
            means = utils.Means()
            if evaluates:
                metrics |= evaluate(model, eval_pairs, fill_id, args, ranks)
            run.log(step, metrics, shown)
        if saves:
            run.save_checkpoint(step, state)

    centre_scores(model, demonstrations, fill_id, args, ranks)
    run.save_model("model", model, tokenizer)
    if ranks.is_main:
        accuracy = metrics.get("eval/rm/accuracy")
        print(f"\nheld-out accuracy {'not measured' if accuracy is None else f'{accuracy:.4f}'}")
        print(f"model folder      {run.folder / 'model'}")
        print(f"next              python ppo_rlhf.py --reward_model {run.folder / 'model'}")


if __name__ == "__main__":
    utils.launch(main, tyro.cli(Args, use_underscores=True))
