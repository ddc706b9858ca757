"""TRL's SFT and reward trainers as contenders of speed.py: run by the Python of .peers/trl-1.16.0 with the job as JSON.

The same models, rows and batch as ours, loss on the completion alone, no packing, no gradient checkpointing, no
evaluation, saving or reporting.
"""

import json
import sys

from turns import Turns

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer


class TakeTurns(TrainerCallback):
    def __init__(self, turns):
        self.turns = turns

    def on_step_end(self, args, state, control, **_):
        self.turns.step_done()


def main(job):
    turns = Turns(job["warmup"], job["steps"])
    is_sft = job["part"] == "sft"
    path, rows = (job["policy"], job["completions"]) if is_sft else (job["critic"], job["comparisons"])
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = load_dataset("json", data_files=rows, split="train")
    if is_sft:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
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
    trainer_class, config = (SFTTrainer, SFTConfig(**options)) if is_sft else (RewardTrainer, RewardConfig(**options))
    trainer_class(
        model, args=config, train_dataset=rows, processing_class=tokenizer, callbacks=[TakeTurns(turns)]
    ).train()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
