"""Which flags of two runs differ."""

from persistence.files import differences


def test_flags_that_change_no_number_are_not_differences():
    config = {"lr": 0.1, "crop_scale": (0.08, 1.0), "num_workers": 4, "resume": False, "image_root": None}
    assert differences(config, {"lr": 0.1, "crop_scale": [0.08, 1.0], "num_workers": 0, "resume": True}) == ""
    assert differences(config, {"lr": 0.2, "num_workers": 4}) == "--lr 0.1 (was 0.2)"
    assert differences(config, {"imported_from": "published.tar"}) != ""
