"""TRL's SFT and reward trainers as contenders, run by the Python of .peers/trl-1.16.0.

Its one argument is the job as JSON. The models, rows, batch and micro-batch are ours; the loss is
on the completion alone, without packing, gradient checkpointing, evaluation, saving or reporting.
"""

import json
import sys

from turns import Turns

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import AutoTokenizer, TrainerCallback
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer


class TakeTurns(TrainerCallback):
    def __init__(self, turns):
        self.turns = turns

    def on_step_end(self, args, state, control, **_):
        self.turns.step_done()


def main(job):
    turns = Turns(job["warmup"], job["steps"])
    options = {
        "output_dir": job["output_dir"],
        "per_device_train_batch_size": job["micro_batch"],
        "gradient_accumulation_steps": job["batch"] // job["micro_batch"],
        "max_steps": job["max_steps"],
        "learning_rate": 1e-6,
        "bf16": job["dtype"] == "bf16",
        "gradient_checkpointing": False,
        "logging_steps": job["steps"],
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "max_length": job["prompt"] + job["response"],
    }
    if job["part"] == "sft":
        model = AutoModelForCausalLM.from_pretrained(job["policy"], dtype=torch.float32)
        config = SFTConfig(**options)
        kind = SFTTrainer
    else:
        model = AutoModelForSequenceClassification.from_pretrained(
            job["critic"], num_labels=1, dtype=torch.float32
        )
        config = RewardConfig(**options)
        kind = RewardTrainer
    trainer = kind(
        model,
        args=config,
        train_dataset=load_dataset("json", data_files=job["rows"], split="train"),
        processing_class=AutoTokenizer.from_pretrained(job["policy"]),
        callbacks=[TakeTurns(turns)],
    )
    trainer.train()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
