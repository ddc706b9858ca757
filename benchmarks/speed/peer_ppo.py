"""TRL's PPO trainer as a contender of speed.py: run by the Python of .peers/trl-1.12.0 with one argument, the job as JSON.

The same models, prompts, batch, epochs and clip ranges as ours, a separate value model, no gradient checkpointing, and
no sampling or scoring beyond the update's own. rollout is the trainer's generation, update starts at its first
training forward, score is what lies between.
"""

import contextlib
import json
import os
import sys

from turns import Turns, clock

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class TakeTurns(TrainerCallback):
    def __init__(self, turns):
        self.turns, self.generated, self.scored, self.rollout = turns, 0.0, None, 0.0

    def on_step_end(self, args, state, control, **_):
        now = clock()
        self.turns.step_done(rollout=self.rollout, score=self.scored - self.generated, update=now - self.scored)
        self.scored = None


def main(job):
    turns = Turns(job["warmup"], job["steps"])
    if job["dtype"] == "bf16":
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # this trainer makes its own Accelerator, which reads it here
    tokenizer = AutoTokenizer.from_pretrained(job["policy"], padding_side="left")
    prompts = load_dataset("json", data_files=job["prompts"], split="train")
    prompts = prompts.map(lambda row: {"input_ids": tokenizer(row["prompt"]).input_ids}, remove_columns=["prompt"])
    policy, reference = (AutoModelForCausalLM.from_pretrained(job["policy"], dtype=torch.float32) for _ in range(2))
    value_model, reward = (
        AutoModelForSequenceClassification.from_pretrained(job["critic"], num_labels=1, dtype=torch.float32)
        for _ in range(2)
    )
    config = PPOConfig(
        output_dir=job["output_dir"],
        per_device_train_batch_size=job["micro_batch"],
        gradient_accumulation_steps=job["batch"] // job["micro_batch"],
        local_rollout_forward_batch_size=job["micro_batch"],
        total_episodes=job["batch"] * job["max_steps"],
        num_ppo_epochs=job["epochs"],
        num_mini_batches=1,
        response_length=job["response"],
        temperature=1.0,
        learning_rate=1e-6,
        bf16=job["dtype"] == "bf16",
        gradient_checkpointing=False,
        num_sample_generations=0,
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    taking_turns = TakeTurns(turns)
    # The trainer builds an evaluation loader even when it never evaluates.
    trainer = PPOTrainer(
        config,
        tokenizer,
        policy,
        reference,
        reward,
        prompts,
        value_model,
        eval_dataset=prompts,
        callbacks=[taking_turns],
    )
    batch_generation, accumulate = ppo_trainer.batch_generation, trainer.accelerator.accumulate

    def timed_generation(*args, **kwargs):
        began = clock()
        output = batch_generation(*args, **kwargs)
        taking_turns.generated = clock()
        taking_turns.rollout = taking_turns.generated - began
        return output

    @contextlib.contextmanager
    def timed_accumulate(*models):
        taking_turns.scored = taking_turns.scored or clock()
        with accumulate(*models):
            yield

    ppo_trainer.batch_generation, trainer.accelerator.accumulate = timed_generation, timed_accumulate
    if trainer.accelerator.mixed_precision != {"fp32": "no", "bf16": "bf16"}[job["dtype"]]:
        raise RuntimeError(f"asked for {job['dtype']}, the trainer computes in {trainer.accelerator.mixed_precision}")
    trainer.train()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
