"""A classifier as a program: what it computes is what predict.py does, inside and outside of this repository."""

import json
import subprocess
import sys

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from data.decode import Reading
from data.image_cache import eval_view
from engine.run import Run
from methods.features import embed
from models import build_head
from persistence.checkpoints import create_backbone
from photos.classifier import Classifier, Fitted, classify
from photos.classifier_file import save_classifier
from photos.confidence import Confidence
from photos.images import View, decode_views
from photos.portable import eval_pixels
from tests.helpers import call

SIZES = [(40, 33), (16, 16), (9, 70), (201, 150), (1, 60)]  # width, height
NAMES = ["heron", "tern", "Möwe"]


def fitted(rule="published"):
    """A classifier of three classes, whose probabilities differ from image to image."""
    backbone = create_backbone("Conv4", 16, seed=0).eval()
    backbone.eval_resize = rule
    head = build_head("softMax", backbone.feature_dim, 3, 1.0, 0.0).requires_grad_(False)
    z, y = embed(backbone, decode_views(pictures()[:3], View(16, rule, Reading()), 1)[0], Run()), torch.arange(3)
    apart = z - z.mean(0)
    head.weight.copy_(3 * apart / apart.square().sum(1).mean())
    head.bias.copy_(-head.weight @ z.mean(0))
    confidence = Confidence([1, 1, 1], [1, 1, 1], 2, temperature=0.7)
    classifier = Classifier(backbone, backbone, head, head, NAMES, z, y, ["a", "b", "c"], confidence, -1.0)
    return Fitted(
        classifier, {"img_size": 16, "eval_resize": rule, "backbone": "Conv4", "alignment": "none", "method": "softMax"}
    )


def pictures():
    """Images of SIZES: noise, of which resizing and rounding leave the least, and smooth ones."""
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in SIZES]
    return noise + [np.asarray(Image.fromarray(image[:4, :4]).resize((90, 50))) for image in noise]


def ours(made, images):
    """The probabilities that predict.py gives to images, (n, n_way)."""
    views = decode_views(images, View(16, made.classifier.backbone.eval_resize, Reading()), 1)[0]
    return classify(made.classifier, views, Run()).probabilities


@pytest.mark.parametrize("rule", ["published", "none", "short:18", "both:24", "both:24:bicubic", "short:16:bicubic"])
def test_the_pixels_of_any_image_are_those_of_pillow(rule):
    for image in pictures():
        height, width, _ = image.shape
        if height > 2 * width and int(PIL.__version__.split(".")[0]) < 13:
            continue  # the order of the axes was another, and so the rounding
        expected = eval_view(Image.fromarray(image), 16, rule)
        np.testing.assert_array_equal(eval_pixels(torch.tensor(image), 16, rule), expected)


@pytest.fixture
def kept(tmp_path):
    save_classifier(tmp_path / "my.classifier", fitted("short:18"))
    return tmp_path


def exported(folder, name, *more):
    return call("predict", "--classifier", folder / "my.classifier", "--export", folder / name, "--quiet", *more)


def test_a_program_of_torch_export_labels_without_this_repository(kept):
    outcome = exported(kept, "model.pt2")
    assert outcome.status == 0 and "program " in outcome.out, outcome.err
    images = pictures()
    np.savez(kept / "images.npz", *images)
    alone = (
        "import json, numpy, sys, torch\n"
        "extra = {'class_names.json': ''}\n"
        "program = torch.export.load('model.pt2', extra_files=extra).module()\n"
        "images = numpy.load('images.npz').values()\n"
        "answers = [program(torch.tensor(image)) for image in images]\n"
        "assert not {'photos', 'models', 'engine'} & set(sys.modules)\n"
        "print(json.dumps([json.loads(extra['class_names.json']), [p.tolist() for _, p in answers]]))\n"
    )
    found = subprocess.run([sys.executable, "-c", alone], cwd=kept, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    names, probabilities = json.loads(found.stdout)
    assert names == NAMES
    torch.testing.assert_close(torch.tensor(probabilities), ours(fitted("short:18"), images), atol=1e-3, rtol=0)


def test_an_onnx_file_labels_as_predict_does(kept):
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    outcome = exported(kept, "model.onnx")
    assert outcome.status == 0 and outcome.err == "" and outcome.out.count("\n") <= 8, outcome
    session = onnxruntime.InferenceSession(kept / "model.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == NAMES
    images = pictures()
    labels, probabilities = zip(*(session.run(None, {"image": image}) for image in images), strict=True)
    expected = ours(fitted("short:18"), images)
    torch.testing.assert_close(torch.tensor(np.stack(probabilities)), expected, atol=1e-4, rtol=0)
    assert [int(label) for label in labels] == expected.argmax(1).tolist()
    assert len({*map(int, labels)}) == 3
    assert {path.name for path in kept.iterdir()} == {"my.classifier", "model.onnx"}  # the weights are inside


def network_that_looks_at_its_values():
    """A backbone, custom:tests.photos.test_portable:..., that torch.export cannot follow."""

    class Looks(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3)) * (2 if x.sum().item() > 0 else 1)

    net = Looks()
    net.img_size = 16
    return net


@pytest.mark.parametrize(
    "name, expected",
    [
        ("model.tflite", ["--export", "model.tflite", ".onnx", ".pt2"]),
        ("my.classifier.pt2", ["is there already", "--overwrite", "--export"]),
    ],
)
def test_a_wrong_export_is_one_line_and_writes_nothing(kept, name, expected):
    (kept / "my.classifier.pt2").write_bytes(b"kept")
    outcome = exported(kept, name)
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and all(part in outcome.err for part in expected)
    assert (kept / "my.classifier.pt2").read_bytes() == b"kept" and len(list(kept.iterdir())) == 2


def test_without_onnxscript_one_line_says_what_to_install(kept, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    outcome = exported(kept, "model.onnx")
    assert outcome.status == 2 and "pip install onnxscript" in outcome.err and outcome.err.count("\n") == 1


def test_a_network_that_cannot_be_followed_is_one_line(kept):
    name = "custom:tests.photos.test_portable:network_that_looks_at_its_values"
    made = fitted()
    backbone = create_backbone(name, 16, seed=0).eval()
    head = build_head("cosMax", 3, 3, 20.0, 0.0, torch.Generator().manual_seed(0)).requires_grad_(False)
    parts = vars(made.classifier) | {"backbone": backbone, "aligned": backbone, "head": head, "finetuned": head}
    classifier = Classifier(**parts | {"z_support": torch.randn(3, 3)})
    save_classifier(kept / "my.classifier", Fitted(classifier, made.facts | {"backbone": name}))
    outcome = exported(kept, "model.pt2", "--backbone", name)
    assert outcome.status == 2 and "torch cannot export custom:" in outcome.err and outcome.err.count("\n") == 1
    assert not (kept / "model.pt2").exists()
