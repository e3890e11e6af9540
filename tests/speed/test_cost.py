"""The commands that say what the paper's tables cost, and how the stages grow."""

import sys

import pytest
import torch

from models import build_backbone
from speed import cost, growth, ranks
from speed.common import count_flops


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_operations_of_an_image_are_those_of_the_real_network():
    forward, training, d = cost.per_image("Conv4")
    backbone = build_backbone("Conv4", 84)
    x = torch.randn(2, 3, 84, 84)
    assert (2 * forward, d) == (count_flops(lambda: backbone(x)), 1600)
    # The images need no gradient, so the first convolution has one product less.
    first = 2 * 84 * 84 * 64 * 3 * 9
    assert training == 3 * forward - first == count_flops(lambda: backbone(x).sum().backward()) / 2


def test_more_base_images_cost_an_episode_in_feature_space_only_their_scores():
    few, more = (cost.feature_episode(n, d=8) for n in (cost.N_COUNTED, cost.N_COUNTED + 128))
    base, novel = growth.random_source("base", cost.N_COUNTED + 128, 8, 20), growth.random_source("novel", 400, 8, 5)
    task = cost.sample_episodes(novel.split, cost.EpisodeShape(5, 5, 50), 1, 0).task(0)
    counted = count_flops(lambda: cost.align_features([task], novel, base, growth.HEAD, cost.Run(), 0))
    assert few < more == counted


def test_the_cost_table_has_each_dataset_and_the_papers_total(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cost", "--backbones", "Conv4", "--gpu_tflops", "1", "--gpu_share", "0.5"])
    monkeypatch.setattr(cost, "STEP_FLOPS", 1e8)
    monkeypatch.setattr(cost, "feature_episode", lambda n_base, d: 0.0)
    monkeypatch.setattr(cost, "keep_memory", lambda: None)
    cost.main()
    lines = capsys.readouterr().out.splitlines()
    rows = {row[1]: row for row in map(cells_of, lines) if row[0] == "Conv4"}
    assert {name.split(",")[0] for name in rows if name != "84"} == cost.IMAGES.keys()
    assert rows["CUB"][2] == "5,885 / 2,950 / 2,953" and "FC100, not in the paper" in rows

    def of(dataset, stage):
        multiplications, _, gpu = rows[dataset][3 + stage].split("; ")
        return float(multiplications), gpu

    forward, training, _ = cost.per_image("Conv4")
    # Stage 1 is 600 epochs of the base images, and the val images embedded once in each.
    stage_1 = 600 * (38_400 * training + 9_600 * forward) + 12_000 * forward
    assert of("miniImagenet", 0) == (pytest.approx(stage_1 / 2e15, rel=0.01), cost.duration(stage_1 / 5e11))
    # Both datasets of the paper, two shots: stage 1, and two alignments.
    total = sum(2 * (of(name, 0)[0] + 2 * of(name, 2)[0]) for name in ("miniImagenet", "CUB"))
    assert float(lines[-1].split(": ")[1].split(";")[0]) == pytest.approx(total, abs=1)


def test_growth_has_a_row_for_each_size_way_and_shot(monkeypatch, capsys):
    monkeypatch.setattr(growth, "in_child", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(growth, "keep_memory", lambda: None)
    flags = ["--n_base", "60", "1300", "--ways", "2", "3", "--shots", "1", "2", "--d", "8", "--n_steps", "1"]
    monkeypatch.setattr(sys, "argv", ["growth", *flags])
    growth.main()
    rows = [cells_of(line) for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    stage_1 = [row for row in rows if len(row) == 7 and row[0] in ("60", "1,300")]
    assert [row[:2] for row in stage_1] == [["60", "1"], ["1,300", "3"]]
    for row, steps in zip(stage_1, (1, 21), strict=True):
        assert float(row[3]) == pytest.approx(float(row[2]) * steps, abs=0.01 * steps + 0.5)
    stage_3 = [row[:3] for row in rows if len(row) == 8 and row[1] in ("2", "3")]
    tasks = [("60", "2", "2"), ("1,300", "2", "2"), ("60", "2", "1"), ("60", "3", "1"), ("60", "3", "2")]
    assert stage_3 == list(map(list, tasks))


def test_a_step_reads_images_spread_over_the_whole_cache(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(growth, "keep_memory", lambda: None)
    monkeypatch.setattr(growth, "train_one_epoch", lambda model, images, *rest: seen.append(images))
    growth.base_training(str(tmp_path), 1280, 2)
    assert [part.images.shape for part in seen] == 2 * [(64, 3, 84, 84)]
    assert all(part.images.flatten(1).any(1).all() for part in seen)
    labels = [label for part in seen for label in part.labels.tolist()]
    assert labels == [i * 10 * 3 // 1280 for i in range(128)]


def test_ranks_have_a_row_each_of_the_same_work(monkeypatch):
    """Here of one process, in this one; what several do is tests/scripts/test_distributed.py's."""
    monkeypatch.setattr(ranks, "keep_memory", lambda: None)
    monkeypatch.setattr(ranks, "BATCH", 4)
    monkeypatch.setattr(ranks, "D", 8)
    asked = []

    def in_this_process(command, **options):
        asked.append((command[command.index("--nproc_per_node") + 1], options["env"]["OMP_NUM_THREADS"]))
        return ranks.measure(1, 1)

    monkeypatch.setattr(ranks.subprocess, "check_output", in_this_process)
    rows = [cells_of(line) for line in ranks.table([1, 2], 1, 1).splitlines()[2:]]
    assert asked == [("1", "1"), ("2", "1")] and [row[0] for row in rows] == ["1", "2"]
    assert rows[0][2] == rows[0][4] == "1.00x" and all(float(row[1]) > 0 and float(row[3]) > 0 for row in rows)
