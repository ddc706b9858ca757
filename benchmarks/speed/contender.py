"""One contender of speed.py that runs in this environment: our scripts through their own `main`, the `generate` of
transformers, or the floor. Started by speed.py with one argument, the job as JSON; takes turns as turns.py describes.

The scripts are not imitated: `main` runs as it would for anyone, on the folders that speed.py wrote, and only `progress`,
which counts its steps, is replaced by one that waits between them. Phase times are read from the run's metrics.jsonl.
Decoding is the very call of `generate` that main makes, with the arguments that main gives it, repeated with new
uniforms.
"""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts are files in the root, not a package

import floors
import ilql_rlhf
import ppo_rlhf
import reward_model
import sft
from turns import Turns
from utils import init_ranks, load_pretrained, load_rows


def last_line(path):
    """The newest metrics of a run."""
    return json.loads(Path(path, "metrics.jsonl").read_text().splitlines()[-1])


def waiting_steps(turns, read_phases):
    """A stand-in for utils.progress: the same numbers, but a wait whenever a turn is complete."""

    def steps(done, total, ranks, name):
        for step in range(done + 1, total + 1):
            yield step
            turns.step_done(**read_phases())
        raise RuntimeError(f"{name}: {total} steps were too few for the turns wanted")

    return steps


def common(job, steps):
    """Arguments that all scripts share; rows per forward are memory only and equal for all contenders."""
    return {
        "batch_size": job["batch"],
        "micro_batch_size": job["micro_batch"],
        "lr": 1e-6,
        "precision": job["dtype"],
        "compile": job["engine"] == "compiled",
        "output_dir": job["output_dir"],
        **steps,
    }


def ppo_args(job):
    return ppo_rlhf.Args(
        model=job["policy"],
        reward_model=job["critic"],
        dataset=job["prompts"],
        total_episodes=job["batch"] * job["max_steps"],
        num_epochs=job["epochs"],
        num_minibatches=1,
        query_length=job["prompt"],
        response_length=job["response"],
        missing_eos_score="none",
        **common(job, {}),
    )


def run_ppo(job, turns):
    def phases():
        if os.environ.get("RANK", "0") != "0":  # rank 0 writes the line, perhaps after the others are done
            return {}
        line = last_line(job["output_dir"])
        return {name: line[f"time/{name}"] for name in ("rollout", "score", "update")}

    ppo_rlhf.progress = waiting_steps(turns, phases)
    ppo_rlhf.main(ppo_args(job))


def run_decode(job, turns):
    generate = ppo_rlhf.generate

    def repeated(model, queries, query_mask, uniforms, *args, **kwargs):
        while True:
            uniforms = torch.rand_like(uniforms)
            responses = generate(model, queries, query_mask, uniforms, *args, **kwargs)
            turns.step_done(tokens=ppo_rlhf.response_mask(responses, [job["eos_id"]]).sum().item())

    ppo_rlhf.generate = repeated
    ppo_rlhf.main(ppo_args(job))


def run_generate(job, turns):
    """transformers: pure sampling as PPO needs it, on the same prompts."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = ppo_rlhf.load_tokenizer(job["policy"])
    rows = load_rows(job["prompts"], [("prompt",)])
    ids = [tokenizer(row["prompt"]).input_ids for row in rows][: job["batch"]]
    queries, query_mask = ppo_rlhf.left_pad(ids, job["prompt"], tokenizer.pad_token_id, device)
    policy, _ = load_pretrained(AutoModelForCausalLM, job["policy"])
    policy = policy.to(device, torch.bfloat16 if job["dtype"] == "bf16" else torch.float32)
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": job["response"]}
    sampling |= {"eos_token_id": job["eos_id"], "pad_token_id": tokenizer.pad_token_id}
    while True:
        output = policy.generate(queries, attention_mask=query_mask.long(), **sampling)
        responses = output[:, queries.shape[1] :]
        turns.step_done(tokens=ppo_rlhf.response_mask(responses, [job["eos_id"]]).sum().item())


def run_sft(job, turns):
    sft.progress = waiting_steps(turns, dict)
    steps = {"num_epochs": job["max_steps"] // job["steps"], "log_every": job["steps"], "eval_every": job["max_steps"]}
    paths = {"model": job["policy"], "dataset": job["completions"], "eval_dataset": job["held_out_completions"]}
    sft.main(sft.Args(**paths, **common(job, steps)))


def run_reward_model(job, turns):
    reward_model.progress = waiting_steps(turns, dict)
    steps = {"num_epochs": job["max_steps"] // job["steps"], "log_every": job["steps"], "eval_every": job["max_steps"]}
    paths = {"model": job["critic"], "dataset": job["comparisons"], "eval_dataset": job["held_out_comparisons"]}
    reward_model.main(reward_model.Args(**paths, **common(job, steps)))


def run_ilql(job, turns):
    ilql_rlhf.progress = waiting_steps(turns, dict)
    steps = {"num_epochs": job["max_steps"] // job["steps"], "log_every": job["steps"]}
    ilql_rlhf.main(ilql_rlhf.Args(model=job["policy"], dataset=job["rated"], **common(job, steps)))


def run_floor(job, turns):
    init_ranks()  # for the allocator's settings, which our scripts have
    policy, critic = (floors.model_shape(AutoConfig.from_pretrained(job[name])) for name in ("policy", "critic"))
    sizes = (job["batch"], job["prompt"], job["response"])
    work = floors.phases(policy, critic, job["part"], *sizes, job["epochs"])
    dtype, measure = (torch.bfloat16 if job["dtype"] == "bf16" else torch.float32), None
    if not torch.cuda.is_available():
        measure = floors.cpu_floor(work, dtype)
    step_bytes = floors.decode_bytes(policy, *sizes, dtype.itemsize)
    prefill = sum(floors.product_flops(group) for group in work.get("rollout", ([], 0))[0][:1])
    while True:
        if measure is None:
            speeds = floors.peak_flops(dtype), floors.bandwidth()
            seconds = floors.gpu_seconds(work, step_bytes, prefill, *speeds)
        else:
            seconds = measure()
        turns.step_done(**seconds, gflop=sum(map(floors.phase_flops, work.values())) / 1e9)


RUNS = {"ppo": run_ppo, "decode": run_decode, "sft": run_sft, "reward_model": run_reward_model, "ilql": run_ilql}
RUNS["ranks"] = run_ppo


def main(job):
    turns = Turns(job["warmup"], job["steps"], compiled=job["engine"] == "compiled")
    run = {"floor": run_floor, "generate": run_generate}.get(job["engine"]) or RUNS[job["part"]]
    with torch.no_grad() if job["engine"] in ("floor", "generate") else torch.enable_grad():
        run(job, turns)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
