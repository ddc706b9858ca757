"""benchmarks/randomwalks.py on a tiny model; benchmarks/exact_optimum.py has a file of its own."""

import json

import pytest
import torch
from conftest import ROOT
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel

from benchmarks import randomwalks
from tasks import randomwalks as task
from utils import launch


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder to work in, with the task's data, a policy and a reward model of one layer."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "tasks").symlink_to(ROOT / "tasks")
    options = {"num_pairs": 100, "num_test_pairs": 20}
    task.main(task.Args(output_dir=str(folder / "data" / "randomwalks"), **options))
    tokenizer = task.build_tokenizer()
    config = task.build_config(tokenizer)
    config.update({"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 16, "num_labels": 1})
    config.initializer_range = 0.3
    torch.manual_seed(1)
    models = {"sft": GPT2LMHeadModel, "reward_model": GPT2ForSequenceClassification}
    for name, model_class in models.items():
        model_class(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def small(here, monkeypatch):
    """The flags of a benchmark of a few seconds."""
    monkeypatch.chdir(here)
    flags = {"sft": "sft", "reward_model": "reward_model", "lengths": (2,), "learned_updates": 1}
    flags |= {"kl_coefs": (0.0, 0.1), "seeds": (1, 2), "num_points": 2, "num_samples": 20}
    # No random walk of this model arrives, so that the bonus alone moves it.
    return {**flags, "entropy_coef": 0.5}


def read_result(folder):
    assert (folder / "curves.png").stat().st_size > 1000
    return json.loads((folder / "result.json").read_text())


def test_the_exact_experiment_and_its_merge(small, tmp_path, capsys):
    for seed in (1, 2):
        output = str(tmp_path / f"{seed}")
        randomwalks.main(randomwalks.Args(**{**small, "seeds": (seed,), "output": output}))
    capsys.readouterr()
    merged = tuple(str(tmp_path / f"{seed}" / "result.json") for seed in (1, 2))
    output = tmp_path / "both"
    randomwalks.main(randomwalks.Args(**small, merge=merged, output=str(output)))
    runs = read_result(output)["runs"]
    assert [run["seed"] for run in runs] == [1, 2]
    for run in runs:
        points = run["points"]
        assert [point["update"] for point in points] == [0, 1, 2]
        assert [point["rollouts"] for point in points] == [0, 128, 256]
        assert [point["optimizer_steps"] for point in points] == [0, 8, 16]
        # The first point is the SFT model itself, and each later one another policy.
        kl = [point["kl"]["mean"] for point in points]
        assert kl[0] == 0
        assert len(set(kl)) == 3
        assert all(0 <= point["optimality"]["mean"] <= 1 for point in points)
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["2"]]
    optimality = [run["points"][-1]["optimality"]["mean"] for run in runs]
    assert line.split()[1:4] == ["0", "16", "256"]
    assert line.split()[4:6] == [f"{sum(optimality) / 2:.3f}", f"{min(optimality):.3f}"]


def test_the_learned_experiment_has_a_run_for_each_coefficient_and_seed(small, tmp_path):
    output = tmp_path / "learned"
    randomwalks.main(randomwalks.Args(experiment="learned", output=str(output), **small))
    result = read_result(output)
    settings = [(run["kl_coef"], run["seed"]) for run in result["runs"]]
    assert settings == [(0.0, 1), (0.0, 2), (0.1, 1), (0.1, 2)]
    assert result["args"]["experiment"] == "learned"


def test_a_metric_over_seeds():
    runs = []
    for values in ((0.0, 1.0), (0.5, 3.0)):
        runs.append({"points": [{"update": i, "x": {"mean": x}} for i, x in enumerate(values)]})
    first, last = randomwalks.over_seeds(runs, "x")
    assert (first["mean"], first["least"], first["greatest"]) == (0.25, 0.0, 0.5)
    assert (last["mean"], last["least"], last["greatest"]) == (2.0, 1.0, 3.0)
    assert last["point"]["update"] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"sft": "nowhere"}, "nowhere: no such folder; run `bash demo.sh` first"),
        ({"experiment": "learned", "reward_model": "gone"}, "gone: no such folder"),
        ({"output": "sft"}, "--output sft: exists already"),
    ],
)
def test_mistakes_end_in_one_line(small, capsys, flags, message):
    with pytest.raises(SystemExit):
        launch(randomwalks.main, randomwalks.Args(**{"output": "new", **small, **flags}))
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_the_weights_of_the_policy_in_a_checkpoint():
    state = {"model": {"actor.model.a": 1, "critic.a": 2, "actor.model.b.c": 3}}
    assert randomwalks.policy_weights(state) == {"a": 1, "b.c": 3}
