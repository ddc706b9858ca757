"""More rated text for ilql_rlhf.py: samples rated by a reward model, beside what people rated.

    python tools/evaluate.py --model runs/sentiment/sft/model \\
        --reward_models runs/sentiment/reward_model_a/model --dataset data/sentiment/rated.jsonl \\
        --num_samples 7534 --temperature 0.7 --response_length 24 --precision bf16 \\
        --batch_size 128 --samples runs/sentiment/samples.jsonl
    python tools/rated_samples.py --rated data/sentiment/rated.jsonl \\
        --samples runs/sentiment/samples.jsonl --scorer reward_model_a \\
        --output data/sentiment/rated_and_sampled.jsonl

People's ratings and a reward model's scores have scales of their own, so each part is brought to
mean 0 and standard deviation 1 by itself. Samples that were cut off before they ended are left out
and counted: as rows they would teach an end that nobody chose.

This costs a reward model and the samples, neither of which ILQL needs otherwise.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

# The scripts are files in the root and not a package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.evaluate import write_whole
from utils import UserError, launch, load_rows


@dataclass
class Args:
    rated: str
    """rows with prompt+completion+reward"""
    samples: tuple[str, ...]
    """files that evaluate.py wrote with --samples"""
    scorer: str
    """name of the score in them that becomes the reward"""
    output: str
    """a JSONL file, which must not exist yet"""


def standardised(rows):
    """The rows with rewards of mean 0 and (biased) standard deviation 1."""
    rewards = torch.tensor([row["reward"] for row in rows], dtype=torch.float64)
    if len(rows) < 2 or rewards.min() == rewards.max():
        raise UserError("fewer than two different rewards: they have no scale")
    rewards = (rewards - rewards.mean()) / rewards.std(correction=0)
    return [{**row, "reward": reward} for row, reward in zip(rows, rewards.tolist(), strict=True)]


def load_columns(path, texts, others):
    """The rows of a file as dicts of these columns, of which the first hold texts."""
    rows = load_rows(path, [texts])
    for name in others:
        if name not in rows.column_names:
            has = ", ".join(rows.column_names)
            raise UserError(f"{path}: needs the column {name}; it has {has}")
    return rows.select_columns([*texts, *others]).to_list()


def load_samples(args):
    """(rows with prompt, completion and reward of the samples that ended, how many did not)."""
    kept = []
    num_cut = 0
    for path in args.samples:
        for row in load_columns(path, ("query", "response"), ("scores", "has_eos")):
            if args.scorer not in row["scores"]:
                raise UserError(f"--scorer {args.scorer}: {path} has {', '.join(row['scores'])}")
            if not row["has_eos"]:
                num_cut += 1
                continue
            reward = row["scores"][args.scorer]
            kept.append({"prompt": row["query"], "completion": row["response"], "reward": reward})
    return kept, num_cut


def main(args):
    if Path(args.output).exists():
        raise UserError(f"--output {args.output}: exists already; name another file or remove it")
    rated = load_columns(args.rated, ("prompt", "completion"), ("reward",))
    sampled, num_cut = load_samples(args)
    rows = standardised(rated) + standardised(sampled)
    write_whole(args.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{args.output}: {len(rated)} rated rows and {len(sampled)} samples")
    print(f"left out: {num_cut} samples that had no end")


if __name__ == "__main__":
    launch(main, tyro.cli(Args, use_underscores=True))
