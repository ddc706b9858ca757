r"""DPO: train a policy on comparisons directly, without a reward model and without sampling.

Rafailov et al. 2023, "Direct preference optimization: your language model is secretly a reward
model"; Azar et al. 2023, "A general theoretical paradigm to understand learning from human
preferences" (IPO); Meng et al. 2024, "SimPO: simple preference optimization with a reference-free
reward"; Hong et al. 2024, "ORPO: monolithic preference optimization without reference model"; Zhao
et al. 2023, "SLiC-HF: sequence likelihood calibration with human feedback" (the hinge).

Before the first step:
    0. reference    the log-probabilities of all responses under the model as it is, for the losses
                    that compare with a reference
Each step:
    1. batch    rows of (prompt, chosen, rejected), which give two token sequences: the prompt with
                the chosen response, and with the rejected one, each ending with EOS
    2. loss     -log sigmoid(reward of chosen - reward of rejected), where the reward of a response
                is beta * (log-probability - its log-probability under the reference); the mean over
                the pairs of the batch on all ranks
    3. update   the gradient is clipped to the norm --max_grad_norm, and Adam takes a step. The
                learning rate falls linearly from lr in the first step to lr / num_steps in the last

One process:    python dpo.py
Eight GPUs:     torchrun --nproc_per_node=8 dpo.py --model runs/my_sft/model \
                    --dataset my_pairs.jsonl --lr 1e-6

Shapes. B pairs in a micro-batch; N = 2B sequences, the chosen ones first; T tokens in the longest
of them; V vocabulary.

Layout. Sequences are padded on the right. Causal attention never looks ahead, so no real token sees
the padding, and the model needs neither an attention mask nor position ids.

Losses
    - The steps above are those of --loss dpo; `dpo_loss` has the formulas of all five.
    - The log-probability of a response, a "logp", is that of its tokens, EOS included, given the
      prompt. dpo and hinge use the sum over its tokens, and ipo, simpo and orpo the mean. (The
      paper on IPO has no lengths; TRL uses the mean too.)
    - dpo, ipo and hinge compare with the reference. Its logps are computed before the first step
      and kept with the rows. --live_reference keeps a frozen copy of the model instead and runs it
      beside the policy, which is slower and needs no first pass. simpo and orpo have no reference.
    - Before the first step the policy is the reference. So where there is one, the rewards are 0
      up to rounding, and dpo's loss is log 2.
    - --label_smoothing is the assumed probability that a label is wrong. The loss of every pair is
      mixed with that of the swapped pair. It belongs to dpo and hinge.
    - --sft_coef adds the negative log-probability of the chosen response, per token and times the
      coefficient. orpo already includes that term with weight 1, so the flag is refused there.
    - orpo's loss compares log-odds. Its rewards, beta * logp, are logged and not trained on.
    - ipo asks for a difference of 1 / (2 beta) nats per token: 5 with the default beta.
    - The metrics rewards/* are those of --loss, beta included; logps/* are always sums, so that
      they can be compared between losses.
Rows
    - If a row has no column `prompt`, each side contains its prompt. Of a conversation (a list of
      messages) the last message is then the response, and the others are the prompt. In a plain
      text there is no boundary to be found, so all of it is scored but its first token, which has
      nothing before it. In dpo and hinge, what both sides begin with cancels in the difference. In
      the other losses, and with --sft_coef, it does not: give them a column `prompt`.
    - A `prompt` that is a text is ignored where the sides are conversations.
    - A pair with a side of more than --max_length tokens is left out, never cut. The number of such
      pairs is printed.
    - A pair whose sides have the same tokens is left out, and the number of such pairs printed.
    - The held-out pairs are those of --eval_dataset. Without it they are one row in twenty of
      --dataset, chosen by the seed, and exact copies of them are not trained on; other pairs with
      the same prompt are. Held-out pairs are evaluated before the first step, every --eval_every
      steps, and after the last.
Steps
    - All ranks draw the same batch. It is sorted by length, and with n ranks, rank r takes the
      pairs r, r + n, r + 2n and so on. The ranks add up their gradients before the norm is clipped;
      a rank that gets no pair of a small last batch adds zeros.
Precision
    - Models are loaded in fp32 and without dropout. With --precision bf16 forward and backward
      compute in bf16 through autocast; the log-softmax, the loss, the weights and the optimizer
      state are fp32.
    - --compile compiles each transformer layer and `sequence_logprobs`. It is the default on CUDA.
"""

import copy
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
    model: str | None = None
    """the model to train, a Hub name or a folder. If not given: the newest finished run of
    sft.py"""
    dataset: str = "data/randomwalks/preferences.jsonl"
    """rows with prompt+chosen+rejected, or chosen+rejected with the prompt inside both"""
    eval_dataset: str | None = None
    """held-out rows of the same kind. If not given: one row in twenty of --dataset"""
    max_rows: int | None = None
    """use only the first max_rows rows of --dataset. If not given: all rows"""
    output_dir: str | None = None
    """the run folder, which must not exist yet. If not given: runs/dpo__<seed>__<time>"""
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
    loss: Literal["dpo", "ipo", "simpo", "hinge", "orpo"] = "dpo"
    """what is minimised; see `dpo_loss`"""
    beta: float | None = None
    """scales the rewards: the larger, the closer the policy stays to its reference, if it has one.
    In orpo it is the weight of the odds ratio (lambda in the paper). If not given: 2 for simpo,
    else 0.1"""
    simpo_gamma: float | None = None
    """by how much a chosen reward should exceed the rejected one, with --loss simpo. If not given:
    1"""
    label_smoothing: float = 0.0
    """the assumed probability that a label is wrong, with --loss dpo or hinge; below 0.5"""
    sft_coef: float = 0.0
    """weight of the negative log-probability per token of the chosen response"""
    live_reference: bool = False
    """run the reference beside the policy, and not once over all rows before the first step"""
    lr: float = 3e-4
    """learning rate of the first step; a pretrained model needs about 1e-6. The default suits the
    random walks"""
    max_grad_norm: float = 1.0
    """the norm of the gradient, over all parameters, is clipped to this; 0 switches clipping off"""
    precision: Literal["fp32", "bf16"] = "bf16" if torch.cuda.is_available() else "fp32"
    """what forward and backward compute in; weights, optimizer state and the loss stay fp32"""
    compile: bool = torch.cuda.is_available()
    """compile each transformer layer and the log-probabilities"""
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


# The losses that compare with a reference; those that take sums over a response, where the others
# take means; and those that accept label smoothing.
NEEDS_REFERENCE = ("dpo", "ipo", "hinge")
TAKES_SUMS = ("dpo", "hinge")
TAKES_SMOOTHING = ("dpo", "hinge")


def sequence_logprobs(logits, labels):
    """(sums (N,), counts (N,)): the log-probability of each response in nats, and its tokens.

    logits (N,L,V) at L positions. labels (N,L): the input ids at the same positions, or -100 for
    what is not part of the response. The shift is made here and nowhere else: the logits at one
    position predict the label at the next. The sums are in fp32 or better.
    """
    logits = logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels[:, 1:]
    mask = labels != -100
    tokens = labels.masked_fill(~mask, 0)
    token_logits = logits.gather(-1, tokens[..., None]).squeeze(-1)
    logprobs = token_logits - torch.logsumexp(logits, dim=-1)
    return torch.where(mask, logprobs, 0.0).sum(1), mask.sum(1)


def dpo_loss(
    chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, kind,
    label_smoothing=0.0, simpo_gamma=1.0,
):  # fmt: skip
    """(losses, chosen_rewards, rejected_rewards) of pairs, all inputs and outputs (B,).

    Logps are sums over the response for kind "dpo" and "hinge", and means over its tokens for
    "ipo", "simpo" and "orpo". The last two have no reference: ref_*_logps are None. With rewards r
    = beta * (logp - ref_logp), or beta * logp without a reference:

    dpo     -log sigmoid(r_chosen - r_rejected) (Rafailov et al. 2023, equation 7)
    ipo     ((r_chosen - r_rejected) / beta - 1 / (2 beta))^2 (Azar et al. 2023, equation 17)
    hinge   max(0, 1 - (r_chosen - r_rejected)) (Zhao et al. 2023; the reference inside is that of
            Liu et al. 2023, "Statistical rejection sampling improves preference optimization")
    simpo   -log sigmoid(r_chosen - r_rejected - simpo_gamma) (Meng et al. 2024, equation 6)
    orpo    -logp_chosen - beta * log sigmoid(log odds_chosen - log odds_rejected), where the odds
            of p = exp(logp) are p / (1 - p) (Hong et al. 2024, equations 6 and 7)

    In dpo and hinge a share label_smoothing of the loss is that of the swapped pair.
    """
    if label_smoothing and kind not in TAKES_SMOOTHING:
        raise ValueError(f"label_smoothing belongs to dpo and hinge, not to {kind}")
    chosen_rewards = beta * chosen_logps
    rejected_rewards = beta * rejected_logps
    if kind in NEEDS_REFERENCE:
        chosen_rewards = chosen_rewards - beta * ref_chosen_logps
        rejected_rewards = rejected_rewards - beta * ref_rejected_logps
    margins = chosen_rewards - rejected_rewards

    if kind == "dpo":
        losses = -F.logsigmoid(margins)
        swapped_losses = -F.logsigmoid(-margins)
        losses = (1 - label_smoothing) * losses + label_smoothing * swapped_losses
    elif kind == "hinge":
        losses = torch.relu(1 - margins)
        swapped_losses = torch.relu(1 + margins)
        losses = (1 - label_smoothing) * losses + label_smoothing * swapped_losses
    elif kind == "ipo":
        log_ratio_difference = margins / beta  # IPO's difference has no beta in it.
        losses = (log_ratio_difference - 1 / (2 * beta)) ** 2
    elif kind == "simpo":
        losses = -F.logsigmoid(margins - simpo_gamma)
    elif kind == "orpo":
        log_odds_ratio = log_odds(chosen_logps) - log_odds(rejected_logps)
        losses = -chosen_logps - beta * F.logsigmoid(log_odds_ratio)
    else:
        raise ValueError(f"no such loss: {kind}")
    return losses, chosen_rewards, rejected_rewards


def log_odds(logps):
    """log(p / (1 - p)) of p = exp(logps), with p at most 1 - 1e-6, where it is still finite."""
    logps = logps.clamp(max=-1e-6)
    return logps - torch.log(-torch.expm1(logps))


# --------------------------------------------------------------------------------------------------
# Data


def load_comparisons(path, tokenizer, args, max_rows=None):
    """[{"chosen", "rejected"}] of the rows that fit and whose sides differ.

    chosen and rejected are sides: the token ids of a prompt, and of a response with EOS at its end.
    """

    def encode(row):
        prompt = row.get("prompt", "")
        chosen = utils.encode_pair(tokenizer, prompt, row["chosen"])
        rejected = utils.encode_pair(tokenizer, prompt, row["rejected"])
        if min(side_length(chosen), side_length(rejected)) < 2:
            raise UserError("a side without a prompt and without a response has nothing to predict")
        return [{"chosen": chosen, "rejected": rejected}]

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


def both_sides(pairs):
    """The 2B sides of B pairs, the chosen ones first."""
    return [pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs]


def collate(sides, fill_id):
    """input_ids and labels of sides as tensors (N,T) on the CPU, padded on the right."""
    sequences = [prompt_ids + response_ids for prompt_ids, response_ids in sides]
    labels = [[-100] * len(prompt_ids) + response_ids for prompt_ids, response_ids in sides]
    input_ids = utils.pad_right(sequences, fill_id)
    return {"input_ids": input_ids, "labels": utils.pad_right(labels, -100)}


# --------------------------------------------------------------------------------------------------
# Training


def side_logps(model, sides, logprobs_fn, fill_id, device):
    """(sums (N,), per_token (N,)): the log-probabilities of the responses of sides.

    logprobs_fn: `sequence_logprobs` or its compiled version.
    """
    batch = utils.to_device(collate(sides, fill_id), device)
    # Logits before the last token of the shortest prompt predict nothing but prompts: they are not
    # computed. The labels are cut at the same position, and not shifted. With one side "a b c EOS",
    # of which "a b" is the prompt, the logits of b, c and EOS are computed: that of b predicts c,
    # that of c predicts EOS, and the last predicts nothing.
    start = max(min(len(prompt_ids) for prompt_ids, _ in sides) - 1, 0)
    labels = batch["labels"][:, start:]
    output = model(batch["input_ids"], use_cache=False, logits_to_keep=labels.shape[1])
    sums, counts = logprobs_fn(output.logits, labels)
    return sums, sums / counts


@torch.no_grad()
def add_reference_logps(pairs, reference, logprobs_fn, fill_id, args, ranks):
    """Give each pair `ref_logps`: the logps of its chosen and of its rejected response."""
    lengths = [pair_length(pair) for pair in pairs]
    found = []
    for group in utils.micro_batch_rows(range(len(pairs)), lengths, args.micro_batch_size, ranks):
        part = [pairs[i] for i in group]
        sides = both_sides(part)
        with utils.autocast(args, ranks.device):
            sums, per_token = side_logps(reference, sides, logprobs_fn, fill_id, ranks.device)
        logps = sums if args.loss in TAKES_SUMS else per_token
        chosen_logps, rejected_logps = logps.chunk(2)
        found += zip(group, chosen_logps.tolist(), rejected_logps.tolist(), strict=True)
    for share in utils.gather_objects(found):
        for i, chosen_logp, rejected_logp in share:
            pairs[i]["ref_logps"] = (chosen_logp, rejected_logp)


def reference_logps(pairs, reference, logprobs_fn, fill_id, args, device):
    """(chosen, rejected): the reference's logps (B,) that `dpo_loss` compares with, or two None."""
    if args.loss not in NEEDS_REFERENCE:
        return None, None
    if reference is None:
        logps = torch.tensor([pair["ref_logps"] for pair in pairs], device=device)
        return logps[:, 0], logps[:, 1]
    sides = both_sides(pairs)
    with torch.no_grad():
        sums, per_token = side_logps(reference, sides, logprobs_fn, fill_id, device)
    logps = sums if args.loss in TAKES_SUMS else per_token
    return logps.chunk(2)


def micro_batch_loss(model, pairs, means, reference, logprobs_fn, fill_id, args, device):
    """The summed loss of a micro-batch of pairs, 0-d; adds what is logged to `means`.

    reference: the frozen copy of --live_reference, or None.
    """
    sides = both_sides(pairs)
    sums, per_token = side_logps(model, sides, logprobs_fn, fill_id, device)
    logps = sums if args.loss in TAKES_SUMS else per_token
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        *logps.chunk(2),
        *reference_logps(pairs, reference, logprobs_fn, fill_id, args, device),
        args.beta,
        args.loss,
        args.label_smoothing,
        args.simpo_gamma,
    )
    chosen_per_token, _ = per_token.chunk(2)
    losses = losses - args.sft_coef * chosen_per_token

    margins = chosen_rewards - rejected_rewards
    chosen_sums, rejected_sums = sums.chunk(2)
    means.add(
        {
            "loss": losses,
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/margins": margins,
            "rewards/accuracies": 0.5 + 0.5 * torch.sign(margins),  # A tie counts as half.
            "logps/chosen": chosen_sums,
            "logps/rejected": rejected_sums,
        }
    )
    return losses.sum()


@torch.no_grad()
def evaluate(model, pairs, reference, logprobs_fn, fill_id, args, ranks):
    """The held-out metrics by name, over all ranks."""
    means = utils.Means()
    lengths = [pair_length(pair) for pair in pairs]
    for group in utils.micro_batch_rows(range(len(pairs)), lengths, args.micro_batch_size, ranks):
        part = [pairs[i] for i in group]
        with utils.autocast(args, ranks.device):
            micro_batch_loss(
                model, part, means, reference, logprobs_fn, fill_id, args, ranks.device
            )
    return {f"eval/{name}": value for name, value in means.over_ranks().items()}


# --------------------------------------------------------------------------------------------------
# Setting up, and the loop


def check_flags(args):
    """Refuse what is out of bounds, before anything is loaded."""
    utils.check_shared_flags(args)
    utils.check_at_least(args, 1, "num_epochs", "num_steps", "max_rows", "max_length")
    utils.check_at_least(args, 1, "log_every", "eval_every")
    utils.check_at_least(args, 0, "simpo_gamma", "sft_coef")
    utils.check_above_zero(args, "beta")
    if not 0 <= args.label_smoothing < 0.5:
        raise UserError(f"--label_smoothing {args.label_smoothing}: must be at least 0, below 0.5")
    if args.simpo_gamma is not None and args.loss != "simpo":
        raise UserError(f"--simpo_gamma: belongs to --loss simpo, not to {args.loss}")
    if args.label_smoothing and args.loss not in TAKES_SMOOTHING:
        raise UserError(f"--label_smoothing: belongs to --loss dpo and hinge, not to {args.loss}")
    if args.live_reference and args.loss not in NEEDS_REFERENCE:
        raise UserError(f"--live_reference: --loss {args.loss} has no reference")
    if args.sft_coef > 0 and args.loss == "orpo":
        raise UserError("--sft_coef: --loss orpo already includes this term, with weight 1")


def load_model(args, tokenizer, longest):
    """The language model; a UserError if it has fewer than `longest` positions."""
    model, _ = utils.load_pretrained(AutoModelForCausalLM, args.model)
    utils.check_positions(model.config, longest, "--max_length", args.model)
    utils.fit_to_tokenizer(model, tokenizer)
    return model


def main(args):
    args = utils.resolve_args(args)
    check_flags(args)
    args.model = args.model or utils.newest_run("sft", args.dataset)
    if args.beta is None:
        args.beta = 2.0 if args.loss == "simpo" else 0.1
    if args.loss == "simpo" and args.simpo_gamma is None:
        args.simpo_gamma = 1.0
    tokenizer = utils.load_tokenizer(args.model)
    pairs, eval_pairs = load_data(args, tokenizer)
    lengths = [pair_length(pair) for pair in pairs]
    longest = max(pair_length(pair) for pair in pairs + eval_pairs)

    ranks = utils.init_ranks(args.timeout_minutes)
    utils.check_divides(ranks.world_size, args.batch_size, "--batch_size by the number of ranks")
    torch.manual_seed(args.seed)
    model = load_model(args, tokenizer, longest).to(ranks.device)
    utils.broadcast_weights(model)
    reference = None
    if args.live_reference:
        reference = copy.deepcopy(model).requires_grad_(False)
    logprobs_fn = sequence_logprobs
    if args.compile:
        logprobs_fn = torch.compile(sequence_logprobs, dynamic=True)
        utils.compile_layers(model, reference)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, eps=1e-5, weight_decay=0.0, fused=True
    )
    fill_id = tokenizer.eos_token_id  # Fills the padding, which no real token sees.

    # 0. Reference: the initial model. A checkpoint is loaded after this, so that a resumed run has
    # the same reference.
    if args.loss in NEEDS_REFERENCE and not args.live_reference:
        add_reference_logps(pairs + eval_pairs, model, logprobs_fn, fill_id, args, ranks)

    run = utils.Run(args, ranks, Path(__file__).stem)
    state = {"model": model, "optimizer": optimizer}
    done = run.load_checkpoint(state) if args.resume else 0
    num_steps = args.num_steps or args.num_epochs * math.ceil(len(pairs) / args.batch_size)
    batches = utils.global_batches(len(pairs), args.batch_size, num_steps, args.seed, done)
    shown = ["epoch", "train/loss", "train/rewards/accuracies", "train/rewards/margins"]
    shown += ["train/logps/chosen", "eval/loss", "eval/rewards/accuracies", "train/lr"]
    loss_options = (reference, logprobs_fn, fill_id, args)
    means = utils.Means()
    metrics = {}
    if done == 0 and eval_pairs:
        metrics = evaluate(model, eval_pairs, *loss_options, ranks)
        run.log(0, metrics, shown)

    for step in utils.progress(done, num_steps, ranks, run.script):
        # 1. Batch: indices of pairs, the same on all ranks.
        epoch, indices = next(batches)

        # 2. Loss of this rank's share of the batch, in micro-batches of pairs of similar length.
        for group in utils.micro_batch_rows(indices, lengths, args.micro_batch_size, ranks):
            part = [pairs[i] for i in group]
            with utils.autocast(args, ranks.device):
                loss_sum = micro_batch_loss(model, part, means, *loss_options, ranks.device)
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
            metrics |= {"train/lr": lr, "optim/grad_norm": grad_norm.item(), "epoch": epoch}
            means = utils.Means()
            if evaluates:
                metrics |= evaluate(model, eval_pairs, *loss_options, ranks)
            run.log(step, metrics, shown)
        if saves:
            run.save_checkpoint(step, state)

    run.save_model("model", model, tokenizer)
    if ranks.is_main:
        accuracy = metrics.get("eval/rewards/accuracies")
        print(f"\nheld-out accuracy {'not measured' if accuracy is None else f'{accuracy:.4f}'}")
        print(f"model folder      {run.folder / 'model'}")
        print(f"next              python tools/evaluate.py --run {run.folder}")


if __name__ == "__main__":
    utils.launch(main, tyro.cli(Args, use_underscores=True))
