"""TRL's PPO trainer as a contender, run by the Python of .peers/trl-1.12.0 with the job as JSON.

The models, prompts, batch, micro-batch, epochs and number of optimizer steps are ours; there is a
separate value model, no gradient checkpointing, and no sampling or scoring beyond the update's own.
Prompts are padded on the left by the trainer's own collator. rollout is the trainer's generation,
update starts at its first forward for training, and score is what lies between.
"""

import contextlib
import json
import os
import sys

from turns import Turns, clock

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

batch_generation = ppo_trainer.batch_generation


class TakeTurns(TrainerCallback):
    """Takes the time of the phases, and reports them at the end of an update."""

    def __init__(self, turns, eos_id):
        self.turns = turns
        self.eos_id = eos_id
        self.sums = {}
        self.generated = 0.0
        self.scored = None

    def timed_generation(self, model, queries, *args):
        """The trainer's generation, with the number of tokens that it sampled."""
        began = clock()
        sequences, logits = batch_generation(model, queries, *args)
        self.generated = clock()
        is_end = sequences[:, queries.shape[1] :] == self.eos_id
        is_after_end = is_end.cumsum(1) - is_end.long() > 0
        self.sums = {"rollout": self.generated - began}
        self.sums["response_tokens"] = (~is_after_end).sum().item()
        return sequences, logits

    def on_step_end(self, args, state, control, **_):
        self.sums["score"] = self.scored - self.generated
        self.sums["update"] = clock() - self.scored
        self.scored = None
        self.turns.step_done(**self.sums)


def load_models(job):
    """(policy, reference, value model, reward model)."""
    language_model = AutoModelForCausalLM
    scorer = AutoModelForSequenceClassification
    options = {"dtype": torch.float32}
    policy = language_model.from_pretrained(job["policy"], **options)
    reference = language_model.from_pretrained(job["policy"], **options)
    value_model = scorer.from_pretrained(job["critic"], num_labels=1, **options)
    reward_model = scorer.from_pretrained(job["critic"], num_labels=1, **options)
    return policy, reference, value_model, reward_model


def load_prompts(job, tokenizer):
    """The prompts as token ids."""
    prompts = load_dataset("json", data_files=job["prompts"], split="train")
    return prompts.map(
        lambda row: {"input_ids": tokenizer(row["prompt"]).input_ids}, remove_columns=["prompt"]
    )


def main(job):
    turns = Turns(job["warmup"], job["steps"])
    if job["dtype"] == "bf16":
        # This trainer makes an Accelerator of its own, which reads the precision here.
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    tokenizer = AutoTokenizer.from_pretrained(job["policy"], padding_side="left")
    prompts = load_prompts(job, tokenizer)
    policy, reference, value_model, reward_model = load_models(job)
    config = PPOConfig(
        output_dir=job["output_dir"],
        per_device_train_batch_size=job["micro_batch"],
        gradient_accumulation_steps=job["batch"] // job["micro_batch"],
        local_rollout_forward_batch_size=job["micro_batch"],
        total_episodes=job["batch"] * job["max_steps"],
        num_ppo_epochs=job["epochs"],
        num_mini_batches=1,
        response_length=job["response"],
        stop_token="eos",
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
    take_turns = TakeTurns(turns, tokenizer.eos_token_id)
    trainer = PPOTrainer(
        config,
        tokenizer,
        policy,
        reference,
        reward_model,
        prompts,
        value_model,
        eval_dataset=prompts,  # The trainer builds a loader for it even when it never evaluates.
        callbacks=[take_turns],
    )
    accelerator = trainer.accelerator
    # The prompts are one batch, so every batch is the last one of its pass over them. There the
    # accelerator would step after each micro-batch instead of after all of them.
    accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
    accumulate = accelerator.accumulate

    @contextlib.contextmanager
    def timed_accumulate(*models):
        take_turns.scored = take_turns.scored or clock()
        with accumulate(*models):
            yield

    accelerator.accumulate = timed_accumulate
    ppo_trainer.batch_generation = take_turns.timed_generation
    if accelerator.mixed_precision != ("bf16" if job["dtype"] == "bf16" else "no"):
        raise RuntimeError(f"the trainer computes in {accelerator.mixed_precision}")
    trainer.train()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
