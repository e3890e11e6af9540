"""What the files of a run are called, and which flags of two runs differ."""

from pathlib import Path

from persistence.run_files import RunName, differences


def test_the_best_model_has_the_published_file_name():
    path = RunName(5, 5, "miniImagenet", "miniImagenet", "arcMax", "Conv4").best_model(Path("models"))
    assert path == Path("models/5way_5shot_miniImagenet_arcMax_Conv4_bestModel.tar")
    assert ":" not in RunName(5, 1, "CUB", "CUB", "arcMax", "torchvision:resnet50").best_model(Path("models")).name


def test_flags_that_change_no_number_are_not_differences():
    config = {"lr": 0.1, "crop_scale": (0.08, 1.0), "num_workers": 4, "resume": False, "image_root": None}
    assert differences(config, {"lr": 0.1, "crop_scale": [0.08, 1.0], "num_workers": 0, "resume": True}) == ""
    assert differences(config, {"lr": 0.2, "num_workers": 4}) == "--lr 0.1 (was 0.2)"
    assert differences(config, {"imported_from": "published.tar"}) != ""
