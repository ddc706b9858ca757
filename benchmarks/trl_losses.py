"""The losses of dpo.py and the gradients of grpo_rlhf.py beside those of TRL 1.16.0.

Both sides get the same rows, policy and reference, and for GRPO the same advantages and the same
old log-probabilities, which are perturbed, so that some ratios are clipped.

    bash benchmarks/speed/peers.sh                # makes the environment of the peer
    python benchmarks/trl_losses.py --output my_losses.json

The policy and the reference are two different models, because where they are equal the loss of
DPO is log 2 whatever else is wrong. The peer runs in its own environment, in a process of its own,
which is this file with a folder as its argument.
"""

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
PEER = ROOT / ".peers/trl-1.16.0/bin/python"
KINDS = {"dpo": "sigmoid", "hinge": "hinge", "ipo": "ipo"}
BETA = 0.3
ROWS = [
    {"prompt": "abc", "chosen": "defg", "rejected": "a"},
    {"prompt": "b", "chosen": "g", "rejected": "gfedcba"},
    {"prompt": "gfabc", "chosen": "ab", "rejected": "ba"},
    {"prompt": "a", "chosen": "bcd", "rejected": "bce"},
]


def our_losses(folder):
    """{kind: mean loss over the rows}, by the functions of dpo.py."""
    sys.path.insert(0, str(ROOT))
    import dpo
    import utils

    tokenizer = utils.load_tokenizer(str(folder / "policy"))
    models = [
        AutoModelForCausalLM.from_pretrained(folder / name).eval()
        for name in ("policy", "reference")
    ]
    losses = {}
    for kind in KINDS:
        args = dpo.Args(loss=kind, beta=BETA, live_reference=True)
        pairs = dpo.load_comparisons(str(folder / "rows.jsonl"), tokenizer, args)
        policy, reference = models
        with torch.no_grad():
            loss = dpo.micro_batch_loss(
                policy,
                pairs,
                utils.Means(),
                reference,
                dpo.sequence_logprobs,
                tokenizer.eos_token_id,
                args,
                torch.device("cpu"),
            )
        losses[kind] = loss.item() / len(pairs)
    return losses


def peer_losses(folder):
    """The same by TRL's trainer."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    losses = {}
    for kind, name in KINDS.items():
        config = DPOConfig(
            output_dir=str(folder / "trl"),
            loss_type=name,
            beta=BETA,
            per_device_train_batch_size=len(ROWS),
            report_to="none",
            use_cpu=True,
            bf16=False,
        )
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder / "policy"),
            ref_model=AutoModelForCausalLM.from_pretrained(folder / "reference"),
            args=config,
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tokenizer,
        )
        trainer.model.eval()
        batch = next(iter(trainer.get_train_dataloader()))
        with torch.no_grad():
            losses[kind] = trainer.compute_loss(trainer.model, batch).item()
    return losses


# The loss norm of grpo_rlhf.py and the loss type of TRL.
NORMS = {"sequence": "grpo", "constant": "dr_grpo", "token": "bnpo"}
# All prompts have one length: TRL pads them on the left and passes no position ids, so that a model
# with learned positions sees other positions in the shorter ones.
LENGTHS = {"prompt": (3,) * 8, "response": (1, 6, 3, 5, 2, 6, 4, 1)}
RESPONSE_LENGTH = 6


def grpo_rows(folder):
    """Token ids, advantages, and old and reference log-probabilities of 8 rows, saved for both."""
    generator = torch.Generator().manual_seed(3)
    rows = {}
    for name, lengths in LENGTHS.items():
        rows[name] = [torch.randint(0, 7, (n,), generator=generator) for n in lengths]
    rows["advantages"] = torch.randn(8, generator=generator)
    for name in ("old", "ref"):
        noise = torch.randn(8, RESPONSE_LENGTH, generator=generator)
        rows[name] = -2.0 + 0.3 * noise
    torch.save(rows, folder / "rows.pt")


def our_gradients(folder):
    """{norm: {parameter: gradient}} of `grpo_loss`."""
    import grpo_rlhf
    import utils

    rows = torch.load(folder / "rows.pt")
    whole = [torch.cat(pair) for pair in zip(rows["prompt"], rows["response"], strict=True)]
    mask = torch.arange(RESPONSE_LENGTH) < torch.tensor(LENGTHS["response"])[:, None]
    batch = {
        "input_ids": utils.pad_right([row.tolist() for row in whole], 0),
        "prompt_lengths": torch.tensor(LENGTHS["prompt"]),
        "responses": utils.pad_right([row.tolist() for row in rows["response"]], 0),
        "mask": mask,
    }
    gradients = {}
    for norm in NORMS:
        policy = AutoModelForCausalLM.from_pretrained(folder / "policy").eval()
        logprobs_fn = functools.partial(grpo_rlhf.token_logprobs, temperature=1.0)
        args = grpo_rlhf.Args(
            loss_norm=norm, kl_in="loss", kl_coef=0.1, response_length=RESPONSE_LENGTH
        )
        new = grpo_rlhf.Actor(policy, logprobs_fn)(batch)["logprobs"]
        loss, _ = grpo_rlhf.grpo_loss(new, rows["old"], rows["ref"], rows["advantages"], mask, args)
        loss.backward()
        gradients[norm] = {name: x.grad for name, x in policy.named_parameters()}
    return gradients


def peer_gradients(folder):
    """The same by TRL's trainer, whose prompts are padded on the left."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rows = torch.load(folder / "rows.pt")

    def pad(sequences, on_the_left):
        width = max(len(x) for x in sequences)
        ids = torch.zeros(len(sequences), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, x in enumerate(sequences):
            columns = slice(width - len(x), None) if on_the_left else slice(0, len(x))
            ids[i, columns] = x
            mask[i, columns] = 1
        return ids, mask

    prompt_ids, prompt_mask = pad(rows["prompt"], on_the_left=True)
    completion_ids, completion_mask = pad(rows["response"], on_the_left=False)
    inputs = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": rows["advantages"],
        "old_per_token_logps": rows["old"],
        "ref_per_token_logps": rows["ref"],
        "num_items_in_batch": completion_mask.sum(),
    }
    gradients = {}
    for norm, loss_type in NORMS.items():
        config = GRPOConfig(
            output_dir=str(folder / "trl"),
            loss_type=loss_type,
            beta=0.1,
            epsilon=0.2,
            # TRL multiplies k3 by the probability ratio unless it is told not to.
            use_bias_correction_kl=False,
            num_generations=4,
            per_device_train_batch_size=8,
            max_completion_length=RESPONSE_LENGTH,
            report_to="none",
            use_cpu=True,
            bf16=False,
        )
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder / "policy"),
            reward_funcs=lambda completions, **columns: [0.0] * len(completions),
            args=config,
            train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS]),
            processing_class=AutoTokenizer.from_pretrained(folder / "policy"),
        )
        trainer.model.eval()
        trainer.compute_loss(trainer.model, inputs).backward()
        gradients[norm] = {name: x.grad for name, x in trainer.model.named_parameters()}
    return gradients


def largest_difference(ours, theirs):
    """The largest distance between two gradients of a parameter, in units of its norm."""
    distances = [
        ((theirs[name] - x).norm() / x.norm().clamp(min=1e-8)).item() for name, x in ours.items()
    ]
    return max(distances)


def main(output=None):
    sys.path.insert(0, str(ROOT))
    from benchmarks.exact_optimum import build_task
    from utils import environment

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for seed, name in ((1, "policy"), (2, "reference")):
            reference, _ = build_task(folder, seed)
            model = AutoModelForCausalLM.from_pretrained(reference)
            # Room for the longest row.
            positions = torch.nn.Embedding(32, model.config.n_embd)
            torch.nn.init.normal_(positions.weight, std=0.1)
            model.transformer.wpe = positions
            model.config.n_positions = 32
            model.save_pretrained(folder / name)
            AutoTokenizer.from_pretrained(reference).save_pretrained(folder / name)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        grpo_rows(folder)
        ours = our_losses(folder)
        gradients = our_gradients(folder)
        subprocess.run([PEER, __file__, "peer", folder], check=True)
        theirs = json.loads((folder / "peer.json").read_text())
        peer = torch.load(folder / "gradients.pt")
    differences = {norm: largest_difference(gradients[norm], peer[norm]) for norm in NORMS}
    for kind in KINDS:
        difference = abs(ours[kind] - theirs[kind])
        print(f"{kind:<8}{ours[kind]:>12.6f}{theirs[kind]:>12.6f}{difference:>12.1e}")
    for norm, difference in differences.items():
        print(f"gradient of grpo_loss, {norm}: {difference:.1e} of a parameter's norm")
    if output:
        result = {"beta": BETA, "ours": ours, "trl": theirs, "gradients": differences}
        result |= environment()
        Path(output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["peer"]:
        folder = Path(sys.argv[2])
        (folder / "peer.json").write_text(json.dumps(peer_losses(folder)))
        torch.save(peer_gradients(folder), folder / "gradients.pt")
    else:
        main(sys.argv[2] if sys.argv[1:2] == ["--output"] else None)
