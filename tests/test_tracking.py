"""--track: the numbers of metrics.jsonl reach TensorBoard and W&B under the same keys.

Whatever a tracker writes lies inside the run folder.
"""

import time
from dataclasses import make_dataclass

import pytest
import torch

import utils
from conftest import read_jsonl, write_jsonl


@pytest.fixture
def train(tmp_path, gpt2_folder, run_script):
    """Three steps of sft.py, whose end as a process must not lose what a tracker still holds."""

    def run(track, **environment):
        rows = [{"prompt": "ab"[: 1 + i % 2], "completion": "cdef"[: 1 + i % 4]} for i in range(6)]
        dataset = write_jsonl(tmp_path / "rows.jsonl", rows)
        flags = {
            "model": gpt2_folder,
            "dataset": dataset,
            "eval_dataset": dataset,
            "output_dir": tmp_path / "run",
            "batch_size": 2,
            "micro_batch_size": 2,
            "num_epochs": 1,
            "log_every": 1,
            "track": track,
        }
        args = [part for name, value in flags.items() for part in (f"--{name}", value)]
        done = run_script("sft.py", [*args, "--no-compile"], cwd=tmp_path, **environment)
        assert done.returncode == 0, done.stderr
        assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "run"}
        lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
        assert [line["step"] for line in lines] == [0, 1, 2, 3]
        assert "eval/sft/loss" in lines[0]
        assert "eval/sft/loss" in lines[-1]
        return tmp_path / "run", lines

    return run


def keys_of(lines):
    return {key for line in lines for key in line} - {"step"}


def test_tensorboard_holds_the_keys_and_numbers_of_metrics_jsonl(train):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder, lines = train("tensorboard")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    assert set(events.Tags()["scalars"]) == keys_of(lines)
    for key in keys_of(lines):
        ours = {line["step"]: line[key] for line in lines if key in line}
        theirs = {event.step: event.value for event in events.Scalars(key)}
        assert theirs == pytest.approx(ours, rel=1e-5)


def test_tensorboard_holds_a_step_once_it_is_logged(tmp_path, monkeypatch):
    """Also where the disk is slow, and while the run goes on."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.summary.writer.record_writer import RecordWriter

    write = RecordWriter.write

    def write_slowly(self, data):
        time.sleep(0.1)
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", write_slowly)
    flags = {"seed": 1, "output_dir": str(tmp_path / "run"), "resume": None, "track": "tensorboard"}
    args = make_dataclass("Args", flags)(**flags)
    run = utils.Run(args, utils.Ranks(0, 1, torch.device("cpu")), "sft")
    for step in (1, 2, 3):
        run.log(step, {"train/sft/loss": float(step), "optim/grad_norm": 0.5})
        events = accumulator.EventAccumulator(str(tmp_path / "run")).Reload()
        steps = [event.step for event in events.Scalars("optim/grad_norm")]
        assert steps == list(range(1, step + 1))


def test_wandb_writes_an_offline_run_inside_the_run_folder(train):
    pytest.importorskip("wandb")
    settings = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    folder, lines = train("wandb", **settings)
    [record] = folder.glob("wandb/offline-run-*/*.wandb")
    content = record.read_bytes()
    for key in keys_of(lines):
        assert key.encode() in content
