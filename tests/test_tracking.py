"""--track: the numbers of metrics.jsonl reach TensorBoard and W&B under the same keys, inside the run folder."""

import time
from dataclasses import make_dataclass

import pytest
import torch

import utils
from conftest import read_jsonl, write_jsonl


@pytest.fixture
def train(tmp_path, gpt2_folder, run_script):
    """Three steps of sft.py as a process of its own, whose end must not lose what a tracker still holds."""

    def run(track, **environment):
        rows = [{"prompt": "ab"[: 1 + i % 2], "completion": "cdef"[: 1 + i % 4]} for i in range(6)]
        dataset = write_jsonl(tmp_path / "rows.jsonl", rows)
        flags = {"model": gpt2_folder, "dataset": dataset, "eval_dataset": dataset, "output_dir": tmp_path / "run"}
        flags |= {"batch_size": 2, "micro_batch_size": 2, "num_epochs": 1, "log_every": 1, "track": track}
        args = [part for name, value in flags.items() for part in (f"--{name}", value)]
        done = run_script("sft.py", [*args, "--no-compile"], cwd=tmp_path, **environment)
        assert done.returncode == 0, done.stderr
        assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "run"}  # nothing beside the run folder
        lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
        assert [line["step"] for line in lines] == [1, 2, 3] and "eval/sft/loss" in lines[-1]
        return tmp_path / "run", lines

    return run


def test_tensorboard_holds_the_keys_and_numbers_of_metrics_jsonl(train):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder, lines = train("tensorboard")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {key for line in lines for key in line} - {"step"}
    for key in events.Tags()["scalars"]:
        ours = [(line["step"], line[key]) for line in lines if key in line]
        theirs = [(event.step, event.value) for event in events.Scalars(key)]
        assert [step for step, _ in ours] == [step for step, _ in theirs]
        assert [value for _, value in theirs] == pytest.approx([value for _, value in ours], rel=1e-5)


def test_tensorboard_holds_a_step_once_it_is_logged(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.summary.writer.record_writer import RecordWriter

    write = RecordWriter.write
    monkeypatch.setattr(RecordWriter, "write", lambda self, data: (time.sleep(0.1), write(self, data)))  # a slow disk
    flags = {"seed": 1, "output_dir": str(tmp_path / "run"), "resume": None, "track": "tensorboard"}
    run = utils.Run(make_dataclass("Args", flags)(**flags), utils.Ranks(0, 1, torch.device("cpu")), "sft")
    for step in (1, 2, 3):
        run.log(step, {"train/sft/loss": float(step), "optim/grad_norm": 0.5})
        events = accumulator.EventAccumulator(str(tmp_path / "run")).Reload()  # the run goes on: nothing is closed
        assert [event.step for event in events.Scalars("optim/grad_norm")] == list(range(1, step + 1))


def test_wandb_writes_an_offline_run_inside_the_run_folder(train):
    pytest.importorskip("wandb")
    folder, lines = train("wandb", WANDB_MODE="offline", WANDB_SILENT="true", WANDB_ERROR_REPORTING="false")
    [record] = folder.glob("wandb/offline-run-*/*.wandb")
    content = record.read_bytes()
    for key in {key for line in lines for key in line} - {"step"}:
        assert key.encode() in content
