"""Running sums: a task whose answer can be checked, and that a small model must learn to think for.

The prompt is a row of digits in base 4, and the answer is their sum modulo 4:

    prompt "31230123"               3 + 1 + 2 + 3 + 0 + 1 + 2 + 3 = 15, and 15 modulo 4 is 3

A response may answer at once, or write the running sums first, one for each digit:

    response "3"                    the answer alone
    response ":30211203=3"          ":", the sums of the first 1, 2, ... 8 digits, "=", the answer

A small transformer cannot learn the direct answer at this length: its guesses are right once in 4
times. It can learn the running sums, because each of them needs one digit and the sum before it.
So what reinforcement learning has to find out is known beforehand. Demonstrations write the sums in
a share p of cases, and a model that imitates them has

    sampled accuracy    p + (1 - p) / 4         it thinks as often as the demonstrations do
    greedy accuracy     1 / 4                   its most likely response is the direct answer

The reward is 1 for the right answer and 0 for any other; it says nothing about running sums. A
policy that is trained on it learns to write them all the same, its accuracy goes to 1, and its
responses become several times as long. That is the small, explained form of what DeepSeek-AI et al.
(2025) report of R1. With p = 0 there is nothing to select, and the accuracy stays at 1/4.

    python tasks/running_sum.py                            # writes data/running_sum/
    python tasks/running_sum.py --share 0 --output_dir data/never_thinks

What is written (a second call writes the same bytes):

    model/                  tokenizer and config of a GPT-2 of 2 layers, without weights, so that it
                            is trained from scratch
    demonstrations.jsonl    prompt, completion: for sft.py
    prompts.jsonl           prompt, base: for grpo_rlhf.py and ppo_rlhf.py
    prompts_test.jsonl      the same, held out: none of them is in another file

The exact reward is `--reward_fn tasks/running_sum.py:reward`, and `--monitor_fn
tasks/running_sum.py:thinks` logs how often the running sums are written.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, PreTrainedTokenizerFast

START = ":"
ANSWER = "="
SEPARATOR = "|"


@dataclass
class Args:
    base: int = 4
    """digits run from 0 to base - 1, and sums are taken modulo base; 2 to 10"""
    num_digits: int = 8
    """digits in a prompt"""
    share: float = 0.2
    """share of the demonstrations that write the running sums, the p of the text above"""
    num_demonstrations: int = 30_000
    """rows of demonstrations.jsonl"""
    num_prompts: int = 4_000
    """rows of prompts.jsonl, all distinct"""
    num_test_prompts: int = 500
    """rows of prompts_test.jsonl, all distinct"""
    seed: int = 1
    """seed of all rows"""
    output_dir: str = "data/running_sum"
    """folder to write; files of the same names in it are replaced, others are left alone"""


# --------------------------------------------------------------------------------------------------
# The sums and the reward


def running_sums(prompt, base):
    """The sums of the first 1, 2, ... digits of a prompt modulo base, as a text of as many digits.

    prompt: a text of digits below base, such as "3123".
    """
    sums = np.cumsum([int(digit) for digit in prompt]) % base
    return "".join(str(total) for total in sums)


def completion(prompt, base, thinks):
    """The right response to a prompt: the answer alone, or after the running sums."""
    sums = running_sums(prompt, base)
    return f"{START}{sums}{ANSWER}{sums[-1]}" if thinks else sums[-1]


def reward(prompts, responses, base, **columns):
    """1.0 for each response with the right answer, and 0.0 for any other.

    The answer is what stands after the last "=", or the whole response where there is none. What is
    written before it does not count. prompts, responses: decoded texts; spaces and separators
    around them do not count. base: one number for each row, as in prompts.jsonl.
    """
    rewards = []
    for prompt, response, row_base in zip(prompts, responses, base, strict=True):
        digits = prompt.strip().strip(SEPARATOR)
        answer = response.strip().strip(SEPARATOR).split(ANSWER)[-1]
        rewards.append(float(answer == running_sums(digits, row_base)[-1]))
    return rewards


def thinks(prompts, responses, **columns):
    """1.0 for each response that starts to write running sums, right or wrong, else 0.0."""
    return [float(response.strip().startswith(START)) for response in responses]


# --------------------------------------------------------------------------------------------------
# The rows, the model and the files


def draw_prompts(rng, base, num_digits, count, taken):
    """count distinct prompts that are not in `taken`, a set, to which they are added."""
    prompts = []
    while len(prompts) < count:
        prompt = "".join(str(digit) for digit in rng.randint(base, size=num_digits))
        if prompt not in taken:
            taken.add(prompt)
            prompts.append(prompt)
    return prompts


def draw_demonstrations(rng, args, held_out):
    """Rows of prompt and completion; prompts may occur twice, but none of `held_out`."""
    rows = []
    while len(rows) < args.num_demonstrations:
        prompt = "".join(str(digit) for digit in rng.randint(args.base, size=args.num_digits))
        row_thinks = rng.rand() < args.share
        if prompt not in held_out:
            row_completion = completion(prompt, args.base, row_thinks)
            rows.append({"prompt": prompt, "completion": row_completion})
    return rows


def build_tokenizer(base):
    """One token for each character; there is no token for unknown characters."""
    tokens = [*map(str, range(base)), START, ANSWER, SEPARATOR, "<pad>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=SEPARATOR))
    # The pattern `.` would let newlines through.
    any_character = Regex(r"[\s\S]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(any_character, "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        unk_token=SEPARATOR,
        pad_token="<pad>",
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def build_config(tokenizer):
    """A GPT-2 of 2 layers and width 128."""
    return GPT2Config(
        architectures=["GPT2LMHeadModel"],
        vocab_size=len(tokenizer),
        n_positions=256,
        n_embd=128,
        n_layer=2,
        n_head=4,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        summary_first_dropout=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def check_args(args):
    """Raise ValueError for a flag that is out of bounds."""
    if not 2 <= args.base <= 10:
        raise ValueError(f"--base must lie in 2 .. 10, not {args.base}")
    if not 0 <= args.share <= 1:
        raise ValueError(f"--share must lie in 0 .. 1, not {args.share}")
    for flag in ("num_digits", "num_demonstrations", "num_prompts", "num_test_prompts"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} must be at least 1, not {getattr(args, flag)}")
    if args.num_digits > 100:
        raise ValueError(f"--num_digits must be at most 100, not {args.num_digits}")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed must lie in 0 .. 2**32 - 1, not {args.seed}")
    # A half is left for the demonstrations, which must not contain the held-out prompts.
    if 2 * (args.num_prompts + args.num_test_prompts) > args.base**args.num_digits:
        reason = "--num_prompts and --num_test_prompts: together more than half of the"
        raise ValueError(f"{reason} {args.base**args.num_digits} prompts that there are")
    for path in [Path(args.output_dir), *Path(args.output_dir).parents]:
        if path.exists() and not path.is_dir():
            raise ValueError(f"--output_dir {args.output_dir}: {path} is a file, not a folder")


def main(args):
    try:
        check_args(args)
    except ValueError as error:
        sys.exit(f"running_sum.py: {error}")

    rng = np.random.RandomState(args.seed)
    taken = set()
    test_prompts = draw_prompts(rng, args.base, args.num_digits, args.num_test_prompts, taken)
    prompts = draw_prompts(rng, args.base, args.num_digits, args.num_prompts, taken)
    tables = {
        "demonstrations": draw_demonstrations(rng, args, set(test_prompts)),
        "prompts": [{"prompt": prompt, "base": args.base} for prompt in prompts],
        "prompts_test": [{"prompt": prompt, "base": args.base} for prompt in test_prompts],
    }

    output_dir = Path(args.output_dir)
    tokenizer = build_tokenizer(args.base)
    tokenizer.save_pretrained(output_dir / "model")
    build_config(tokenizer).save_pretrained(output_dir / "model")
    for name, rows in tables.items():
        lines = [json.dumps(row) + "\n" for row in rows]
        (output_dir / f"{name}.jsonl").write_text("".join(lines))

    chance = 1 / args.base
    sampled = args.share + (1 - args.share) * chance
    print(f"a prompt            {prompts[0]}")
    for row_thinks in (False, True):
        print(f"a response          {completion(prompts[0], args.base, row_thinks)}")
    print(f"imitation gives     accuracy {sampled:.3f} sampled, {chance:.3f} greedy")
    print(f"written             {output_dir}: model, {', '.join(f'{n}.jsonl' for n in tables)}")
    flags = f"--model {output_dir / 'model'} --dataset {output_dir / 'demonstrations.jsonl'}"
    print(f"next                python sft.py {flags} --batch_size 128 --lr 1e-3 --num_steps 800")


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
