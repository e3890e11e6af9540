"""Work that cannot fit ends in one line before it begins."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from data.episodes import EpisodeShape, sample_episodes
from data.image_cache import ImageFiles, load_images
from engine.budget import check_disk, check_memory, free_memory
from engine.errors import UserError
from engine.run import Run
from models import build_backbone
from persistence.feature_cache import FeatureCache
from tests.helpers import make_split


def test_what_fits_passes_and_a_folder_need_not_exist(tmp_path):
    check_memory("it", 1, "take less")
    check_disk("it", 1, tmp_path / "a" / "b", "take less")
    with pytest.raises(UserError, match="GB of disk in "):
        check_disk("it", 10**18, tmp_path / "a" / "b", "take less")


@pytest.mark.parametrize(("kind", "named"), [("cuda", "1.0 GB of memory of cuda:1, of which 0.5"), ("mps", None)])
def test_memory_is_that_of_the_device_of_the_run(monkeypatch, kind, named):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((5 + device.index) * 10**8 - 10**8, 10**12))
    device = torch.device(kind, 1)
    if named:
        with pytest.raises(UserError, match=f"^it takes {named} GB are free: take less$"):
            check_memory("it", 10**9, "take less", device)
    else:
        check_memory("it", 10**18, "take less", device)  # nothing says how much is free


def test_what_pytorch_keeps_of_a_gpu_and_does_not_use_is_free(monkeypatch):
    for name, n_bytes in (("mem_get_info", (10, 100)), ("memory_reserved", 50), ("memory_allocated", 20)):
        monkeypatch.setattr(torch.cuda, name, lambda device, n_bytes=n_bytes: n_bytes)
    assert free_memory(torch.device("cuda")) == 40


def test_huge_numbers_of_episodes_end_before_they_are_drawn():
    with pytest.raises(UserError, match="10{14} episodes takes .*lower --n_episodes"):
        sample_episodes(make_split(), EpisodeShape(3, 2, 3), 10**14, 0)


@pytest.mark.parametrize("img_size", [200_000, 10_000_000])
def test_huge_images_end_before_any_is_decoded(tmp_path, img_size):
    (tmp_path / "a.png").write_bytes(b"")
    files = ImageFiles("toy", [tmp_path / "a.png"], ["a.png"], None)
    with pytest.raises(UserError, match=r"takes .*GB .*: give a smaller --img_size"):
        load_images(files, img_size, tmp_path / "cache", 1, quiet=True)
    assert not list((tmp_path / "cache").iterdir())


@pytest.fixture
def little_disk(monkeypatch):
    """A disk of 1500 free bytes."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1500))


def test_images_to_train_on_end_before_any_is_decoded(tmp_path, little_disk):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    files = ImageFiles("toy", [tmp_path / "a.png"], ["a.png"], 0.08)
    with pytest.raises(UserError, match="^decoding to 16 x 16 pixels takes .* of disk .*smaller --img_size"):
        load_images(files, 16, tmp_path / "cache", 1, quiet=True)
    assert list((tmp_path / "cache").iterdir()) == []


def test_features_that_the_disk_cannot_keep_end_before_they_are_made(tmp_path, little_disk):
    cache, backbone = FeatureCache(tmp_path, Run()), build_backbone("Conv4", 16)
    with pytest.raises(UserError, match="^keeping the features of features64_.* of disk .*another --cache_dir"):
        cache.features(backbone, make_split())
    with pytest.raises(UserError, match="^keeping the features of half64_.*another --cache_dir"):
        cache.half_features(backbone, make_split())
    assert list(tmp_path.iterdir()) == []
