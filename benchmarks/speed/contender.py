"""One contender in the environment of the scripts: ours, `generate` of transformers, or the floor.

compare.py starts it with one argument, the job as JSON; turns.py says how it takes turns. The
scripts are not imitated: `main` runs as it would for anyone, on the folders that shapes.py wrote.
Only `progress`, which counts its steps, is replaced by one that waits between turns. The seconds of
PPO's phases are those that the run writes into metrics.jsonl. For decoding, the call of `generate`
that `main` makes is repeated, with the arguments that `main` gives it and new uniforms.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

sys.path.append(str(Path(__file__).resolve().parents[2]))  # The scripts are files in the root.

import floors
import ppo_rlhf
import reward_model
import sft
import utils
from shapes import EOS, PAD, Workload
from turns import Turns
from utils import left_pad, load_rows

PHASES = ("rollout", "score", "update")


def waiting_steps(turns, read_sums):
    """A stand-in for `utils.progress`: the same numbers, but a wait whenever a turn is over."""

    def steps(done, total, ranks, name):
        for step in range(done + 1, total + 1):
            yield step
            turns.step_done(**read_sums())
        raise RuntimeError(f"{name}: {total} steps were too few for the turns wanted")

    return steps


def shared_flags(job):
    """Flags that all scripts have."""
    return {
        "batch_size": job["batch"],
        "micro_batch_size": job["micro_batch"],
        "lr": 1e-6,
        "precision": job["dtype"],
        "compile": job["compile"],
        "output_dir": job["output_dir"],
    }


def ppo_args(job):
    """The arguments of ppo_rlhf.py for a job."""
    return ppo_rlhf.Args(
        model=job["policy"],
        reward_model=job["critic"],
        dataset=job["prompts"],
        total_episodes=job["batch"] * job["max_steps"],
        num_epochs=job["epochs"],
        query_length=job["prompt"],
        response_length=job["response"],
        missing_eos_score="none",
        **shared_flags(job),
    )


def run_ppo(job, turns):
    """Updates of ppo_rlhf.py."""

    def read_sums():
        line = Path(job["output_dir"], "metrics.jsonl").read_text().splitlines()[-1]
        metrics = json.loads(line)
        sums = {name: metrics[f"time/{name}"] for name in PHASES}
        return sums | {"response_tokens": metrics["val/sequence_lengths"] * job["batch"]}

    utils.progress = waiting_steps(turns, read_sums)
    ppo_rlhf.main(ppo_args(job))


def run_decode(job, turns):
    """Batches of ppo_rlhf.py's `generate`."""
    generate = ppo_rlhf.generate

    def repeated(model, queries, query_mask, uniforms, **options):
        while True:
            generate(model, queries, query_mask, torch.rand_like(uniforms), **options)
            turns.step_done()

    ppo_rlhf.generate = repeated
    ppo_rlhf.main(ppo_args(job))


def run_transformers(job, turns):
    """Batches of transformers' `generate`, with pure sampling as PPO needs it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if job["dtype"] == "bf16" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(job["policy"])
    ids = [tokenizer(row["prompt"]).input_ids for row in load_rows(job["prompts"], [("prompt",)])]
    queries, query_mask = left_pad(ids, job["prompt"], PAD, device)
    policy = AutoModelForCausalLM.from_pretrained(job["policy"], dtype=dtype).to(device)
    while True:
        policy.generate(
            queries,
            attention_mask=query_mask.long(),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=job["response"],
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
        turns.step_done()


def run_sft(job, turns):
    """Steps of sft.py."""
    utils.progress = waiting_steps(turns, dict)
    args = sft.Args(
        model=job["policy"],
        dataset=job["rows"],
        eval_dataset=job["held_out"],
        num_steps=job["max_steps"],
        log_every=job["steps"],
        eval_every=job["max_steps"],
        **shared_flags(job),
    )
    sft.main(args)


def run_reward_model(job, turns):
    """Steps of reward_model.py."""
    utils.progress = waiting_steps(turns, dict)
    args = reward_model.Args(
        model=job["critic"],
        dataset=job["rows"],
        eval_dataset=job["held_out"],
        num_steps=job["max_steps"],
        log_every=job["steps"],
        eval_every=job["max_steps"],
        **shared_flags(job),
    )
    reward_model.main(args)


def run_floor(job, turns):
    """Every step measures the phases anew; their sum is the floor of a step."""
    model = floors.model_of(AutoConfig.from_pretrained(job["policy"]))
    dtype = torch.bfloat16 if job["dtype"] == "bf16" else torch.float32
    work = Workload(**{name: job[name] for name in Workload.__dataclass_fields__})
    found = floors.phases(model, work)
    while True:
        turns.step_done(**{name: floors.phase_seconds(x, dtype) for name, x in found.items()})


OURS = {
    "ppo": run_ppo,
    "chat": run_ppo,
    "decode": run_decode,
    "sft": run_sft,
    "reward_model": run_reward_model,
}
OTHERS = {"transformers": run_transformers, "floor": run_floor}


def main(job):
    turns = Turns(job["warmup"], job["steps"])
    if job["engine"] == "ours":
        OURS[job["part"]](job, turns)
        return
    with torch.no_grad():
        OTHERS[job["engine"]](job, turns)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
