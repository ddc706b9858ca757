"""benchmarks/growth.py: its points, its picture, the whole command on one tiny point."""

import json
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "benchmarks")]

import growth
from utils import UserError

AXES = {"batches": (2, 4), "responses": (8, 16), "vocabularies": (32,), "sizes": ("1x24", "2x24", "2x24")}
BASE = {"base_batch": 2, "base_response": 8, "base_vocabulary": 32, "base_size": "1x24"}


def test_one_size_varies_at_a_time_and_no_point_is_measured_twice():
    base, found = growth.points(growth.Args(**AXES, **BASE))
    assert base == {"batches": 2, "responses": 8, "vocabularies": 32, "sizes": "1x24"}
    varied = [base | {"batches": 4}, base | {"responses": 16}, base | {"sizes": "2x24"}]
    assert found == [base, *varied]
    assert growth.layer_parameters("4x256") == 12 * 4 * 256**2


def test_a_panel_shows_the_points_of_its_axis_and_nothing_else():
    base, found = growth.points(growth.Args(**AXES, **BASE))
    points = []
    for number, point in enumerate(found, start=1):
        medians = {name: float(10**k + number) for k, name in enumerate(growth.speed.PHASES)}
        phases = {name: {"median": x, "low": x - 0.5, "high": x + 0.5} for name, x in medians.items()}
        floor = {name: {"median": x / 2, "low": x / 3, "high": x} for name, x in medians.items()}
        points.append(point | {"ours": phases, "floor": floor})
    args = {"prompt_length": 3, "num_epochs": 1, "engine": "eager", "dtype": "fp32"}
    figure = growth.figure_of({"points": points[::-1], "base": base, "args": args})
    lines = [[(list(x), list(y)) for x, y in (line.get_data() for line in panel.lines)] for panel in figure.axes]
    assert lines[0][0] == ([2, 4], [2.0, 3.0]) and lines[0][1] == ([2, 4], [1.0, 1.5])  # rollout and its floor by batch
    assert lines[1][4] == ([8, 16], [101.0, 103.0])  # update by response length
    assert lines[2][2] == ([32], [11.0])  # score by vocabulary
    shade = figure.axes[0].collections[0].get_datalim(figure.axes[0].transData)
    assert (shade.y0, shade.y1) == (1.5, 3.5)  # rollout, from the least to the most
    assert lines[3][4] == ([12 * 24**2, 24 * 24**2], [101.0, 104.0])


def test_the_base_has_the_turns_of_both_its_readings():
    def reading(*seconds):
        ours = [dict.fromkeys(growth.COLOURS, x) for x in seconds]
        turns = {"ours": ours, "floor": [dict.fromkeys(growth.COLOURS, 2.0) for _ in seconds]}
        return {"turns": turns, "ours": "replaced", "floor": "replaced", "over_floor": "replaced"}

    base, other = dict.fromkeys(growth.AXES, 1), dict.fromkeys(growth.AXES, 1) | {"batches": 2}
    kept = other | {"ours": {}}
    record = {"base": base, "points": [kept, base | reading(9.0, 3.0)], "base_again": base | reading(4.0, 5.0)}
    unchanged, merged = growth.points_of(record)
    assert unchanged == kept
    assert merged["ours"]["update"] == {"median": 4.5, "low": 3.0, "high": 9.0}
    assert merged["floor"]["score"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert merged["over_floor"]["rollout"] == {"median": 2.25, "low": 1.5, "high": 4.5}
    del record["base_again"]
    assert growth.points_of(record) == record["points"]


def test_one_point_measured_and_drawn(tmp_path, capsys):
    one = {"batches": (2,), "responses": (8,), "vocabularies": (32,), "sizes": ("1x24",), **BASE}
    output = tmp_path / "growth.json"
    options = {"prompt_length": 3, "engine": "eager", "dtype": "fp32", "repeats": 1, "threads": 1}
    growth.main(growth.Args(**one, **options, output=str(output)))
    record = json.loads(output.read_text())
    (point,) = record["points"]
    assert point["recompiles"] == 0 and len(point["turns"]["ours"]) == len(point["turns"]["floor"]) == 1
    assert record["base_again"]["ours"]["update"]["median"] > 0
    assert all(point[key][name]["median"] > 0 for key in ("ours", "floor") for name in growth.speed.PHASES)
    assert output.with_suffix(".png").stat().st_size > 10000
    output.with_suffix(".png").unlink()
    growth.main(growth.Args(input=str(output)))
    assert output.with_suffix(".png").exists() and capsys.readouterr().out.count("the base at the end") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of them"),
        ({"output": __file__}, "must end in .json"),
        ({"output": "new.json", "repeats": 0}, "at least 1"),
        ({"output": "new.json", "sizes": ("4y256",)}, "--sizes 4y256: give"),
        ({"output": "new.json", "batches": (0,)}, "must be at least 1"),
    ],
)
def test_mistakes_end_in_one_line(options, message):
    with pytest.raises(UserError, match=message):
        growth.main(growth.Args(**options))
