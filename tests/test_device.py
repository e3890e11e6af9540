"""What runs on a device gives the CPU's numbers there: AA_DEVICE=cuda python -m pytest -m device (make test-gpu).

Without that variable the device is the CPU, where both sides must be equal to the bit.
"""

import math
import shutil

import pytest
import torch

from args_parser import args_parser, from_flags
from data.episodes import EpisodeShape, sample_episodes
from data.transforms import Augmentation, TrainingImages
from engine import run as engine_run
from engine.precision import Precision
from engine.run import Run, move_if_fits
from methods.alignment import AlignmentSetting
from methods.evaluation import evaluate_heads
from methods.feature_alignment import align_episodes
from methods.features import embed, image_source, trainable_blocks
from methods.novel_finetune import HeadFit, fit_heads
from models import HEADS, build_backbone, build_head
from photos import fitting
from tests.helpers import (
    ALIGN,
    CHECKPOINT,
    CURVE,
    DEVICE,
    ONE_OF_EACH,
    STAGE_1,
    STAGE_3,
    TINY,
    TRAIN,
    call,
    folders,
    make_split,
    numbers,
)
from tests.helpers import result as result_of
from tests.helpers import run as run_process

pytestmark = pytest.mark.device
NAME = DEVICE.type
ON_CPU = DEVICE.type == "cpu"
# Float32 of another device, with TF32 off: sums in another order. Several steps of Adam magnify them.
CLOSE = {"rtol": 0.0, "atol": 0.0} if ON_CPU else {"rtol": 1e-4, "atol": 1e-5}
STEPS = {"rtol": 0.0, "atol": 0.0} if ON_CPU else {"rtol": 2e-2, "atol": 2e-3}
POINTS = 0.0 if ON_CPU else 12.0  # of accuracy, over the few queries of a tiny run
META = [*TINY, "--n_epoch", 2, "--episodes_per_epoch", 3, "--n_way", 3, "--train_n_query", 4, "--val_episodes", 4]
META += ["--n_episodes", 6]
ALIGNMENTS = {
    "none": ["--alignment", "none"],
    "naive": ["--alignment", "naive"],
    "centroid": [],
    "last block": ["--align_blocks", 1],
    "weight clipping": ["--alignment", "adversarial", "--critic_hidden", 16],
    "gradient penalty": ["--alignment", "adversarial", "--critic_hidden", 16, "--critic_constraint", "gp"],
    "head alone": ["--align_blocks", 0],
}


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch):
    """TF32 off: its ten bits of mantissa would hide a real difference."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def close(actual: torch.Tensor, expected: torch.Tensor, **tolerance: float) -> None:
    """Equal within CLOSE, or another tolerance, wherever the actual tensor is."""
    torch.testing.assert_close(actual.cpu(), expected, **{**CLOSE, **tolerance})


@pytest.mark.parametrize("name", HEADS)
def test_a_head_has_the_loss_and_the_gradients_of_the_cpu(name):
    z, y = torch.randn(12, 16, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 4
    found = []
    for device in (DEVICE, torch.device("cpu")):
        head = build_head(name, 16, 4, 5.0, 0.01, torch.Generator().manual_seed(1)).to(device)
        loss = head.loss(head(z.to(device)), y.to(device))
        loss.backward()
        found.append((loss.detach(), *(p.grad for p in head.parameters())))
    for actual, expected in zip(*found, strict=True):
        close(actual, expected)


@pytest.mark.parametrize("name", HEADS)
def test_heads_fitted_together_are_those_of_the_cpu(name):
    z, y = torch.randn(3, 10, 16, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 5
    weights = []
    for device in (DEVICE, torch.device("cpu")):
        head = HeadFit(method=name).new_head(16, 5, [torch.Generator().manual_seed(i) for i in range(3)]).to(device)
        fit_heads(head, z.to(device), y.expand(3, 10).to(device), 30, 1e-3)
        weights.append(head.weight.detach())
    close(*weights, **STEPS)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_backbone_has_the_features_and_the_gradients_of_the_cpu(name):
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for device in (DEVICE, torch.device("cpu")):
        torch.manual_seed(0)
        net = build_backbone(name, 32).to(device, memory_format=torch.channels_last).train()
        for module in net.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        z = net(x.to(device, memory_format=torch.channels_last))
        z.square().mean().backward()
        first = next(p for p in net.parameters() if p.dim() == 4)
        found.append((z.detach(), first.grad))
    for actual, expected in zip(*found, strict=True):
        close(actual, expected, **({} if ON_CPU else {"rtol": 1e-2, "atol": 1e-3}))


def test_a_batch_is_augmented_as_on_the_cpu():
    split = make_split()
    batches = [
        TrainingImages(split.images, split.train_sizes, split.labels, 16, Augmentation(), device).batch(
            torch.arange(0, 48, 3), torch.Generator().manual_seed(0)
        )
        for device in (DEVICE, torch.device("cpu"))
    ]
    assert batches[0].device.type == DEVICE.type and batches[0].is_contiguous(memory_format=torch.channels_last)
    close(*batches, **({} if ON_CPU else {"atol": 2e-3}))


@pytest.mark.parametrize("kind", ALIGNMENTS)
def test_an_episode_aligned_on_the_device_scores_as_on_the_cpu(kind):
    flags = ["--ft_n_epoch", 20, "--align_iters", 3, "--n_B", 2, "--aug_size", 4, *ALIGNMENTS[kind]]
    args = args_parser("alignment", list(map(str, flags)))
    found = []
    for device in (DEVICE, torch.device("cpu")):
        torch.manual_seed(0)
        run, net = Run(device=device), build_backbone("Conv4", 16)
        blocks = trainable_blocks(net.to(device, memory_format=torch.channels_last), args.align_blocks)
        novel, base = make_split((10,) * 4), make_split((10,) * 6, seed=1, split="base")
        episodes = sample_episodes(novel, EpisodeShape(3, 2, 3), 2, 0)
        sources = [image_source(net, blocks, split, run) for split in (novel, base)]
        setting = from_flags(AlignmentSetting, args)
        found.append([e for _, e in align_episodes(blocks, episodes, *sources, setting, run, range(2))])
    for actual, expected in zip(*found, strict=True):
        assert actual.aligned.device.type == DEVICE.type
        close(actual.finetuned, expected.finetuned, **STEPS)
        if actual.related.classes == expected.related.classes:  # a tie may fall the other way elsewhere
            close(actual.aligned, expected.aligned, **({} if ON_CPU else {"rtol": 0.1, "atol": 0.1}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_features_and_episodes_are_those_of_the_cpu(precision):
    split = make_split((12,) * 5)
    episodes = sample_episodes(split, EpisodeShape(5, 2, 6), 8, 0)
    found = []
    for device in (DEVICE, torch.device("cpu")):
        torch.manual_seed(0)
        run = Run(device=device, precision=Precision(precision, device.type))
        net = build_backbone("Conv4", 16).to(device, memory_format=torch.channels_last)
        z = embed(net, split.images, run)
        found.append((z, evaluate_heads(z, episodes, HeadFit(ft_n_epoch=20), run).accuracy.mean().item()))
    assert found[0][0].dtype == torch.float32
    close(found[0][0], found[1][0], **({} if ON_CPU else {"rtol": 2e-2, "atol": 5e-2 if precision == "bf16" else 1e-4}))
    assert abs(found[0][1] - found[1][1]) <= (0.0 if ON_CPU else 0.1)


def test_fp16_skips_a_step_whose_gradient_overflows_and_goes_on():
    precision = Precision("fp16", DEVICE.type)
    weight = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    precision.backward_and_step((weight * 1e38).sum() * 1e10, optimizer)
    assert weight.detach().tolist() == [1.0, 1.0, 1.0]
    scale = precision.scaler.get_scale()
    precision.backward_and_step(weight.sum(), optimizer)
    assert weight.detach().tolist() == pytest.approx([0.9, 0.9, 0.9])
    assert scale < 65536.0


def test_images_that_take_more_than_half_of_the_device_stay_where_they_are(monkeypatch):
    images = torch.zeros(10, 3, 8, 8, dtype=torch.uint8)
    if DEVICE.type == "cuda":
        assert move_if_fits(images, DEVICE).device.type == "cuda"
    monkeypatch.setattr(engine_run.torch.cuda, "mem_get_info", lambda device: (images.nbytes, 2**40))
    assert move_if_fits(images, torch.device("cuda")).device.type == "cpu"


@pytest.mark.parametrize("method", HEADS)
def test_stage_1_runs_on_the_device_and_repeats_itself(method, trained, tmp_path):
    found = []
    for root in (tmp_path / "first", tmp_path / "second"):
        where = [*folders(root), "--benchmarks_dir", trained / "benchmarks", "--device", NAME]
        outcome = call("transferLearning", *TRAIN, "--method", method, *where)
        assert outcome.status == 0, outcome.err
        found.append(numbers(root, "transferLearning"))
    assert found[0] == found[1]
    if method == "arcMax":
        assert abs(found[0]["accuracy"] - result_of(trained, STAGE_1)["accuracy"]) <= POINTS


@pytest.mark.parametrize("method", ["ProtoNet", "MatchingNet", "RelationNet", "RelationNet_softmax"])
def test_stage_2_runs_on_the_device(method, trained, tmp_path):
    where = [*folders(tmp_path), "--benchmarks_dir", trained / "benchmarks"]
    outcome = call("metaLearning", *META, "--method", method, *where, "--device", NAME)
    assert outcome.status == 0, outcome.err


@pytest.mark.parametrize("kind", ALIGNMENTS)
def test_stage_3_runs_on_the_device(kind, workspace):
    outcome = call("associative_alignment", *ALIGN, *ALIGNMENTS[kind], *folders(workspace), "--device", NAME)
    assert outcome.status == 0, outcome.err


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_aligns_on_the_device(precision, trained, tmp_path):
    where = [*folders(tmp_path), "--benchmarks_dir", trained / "benchmarks", "--device", NAME, "--precision", precision]
    for script, flags in (("transferLearning", TRAIN), ("associative_alignment", ALIGN)):
        outcome = call(script, *flags, *where)
        assert outcome.status == 0, outcome.err
    assert math.isfinite(result_of(tmp_path, STAGE_1)["accuracy"])


def test_a_state_of_the_cpu_goes_on_on_the_device_and_back(trained, tmp_path):
    where = [*folders(tmp_path), "--benchmarks_dir", trained / "benchmarks", "--resume"]
    for n_epoch, device in ((1, "cpu"), (2, NAME), (3, "cpu")):
        outcome = call("transferLearning", *TRAIN, *where, "--n_epoch", n_epoch, "--device", device)
        assert outcome.status == 0, outcome.err
    through = numbers(tmp_path, "transferLearning")
    if ON_CPU:
        shutil.rmtree(tmp_path / "results")
        outcome = call("transferLearning", *TRAIN, *where[:-1], "--n_epoch", 3)
        assert outcome.status == 0, outcome.err
        assert numbers(tmp_path, "transferLearning") == through


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", ["none", "centroid", "head alone"])
def test_predict_labels_on_the_device_and_its_classifier_elsewhere(kind, half, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "MAPPED", 0 if half else fitting.MAPPED)
    novel = trained / "benchmarks" / "tiny" / "novel"
    flags = ["--support", novel, "--base", trained / "benchmarks" / "tiny", "--ft_n_epoch", 20, *ALIGNMENTS[kind]]
    flags += ["--align_iters", 2, "--aug_size", 4, "--n_B", 2, "--save", tmp_path / "kept.tar"]
    flags += ["--checkpoint", trained / "results" / "models" / CHECKPOINT, "--device", NAME]
    label = ["--query", novel, "--quiet", "--cache_dir", tmp_path / "cache", "--out"]
    outcome = call("predict", *flags, *label, tmp_path / "out")
    assert outcome.status == 0, outcome.err
    outcome = call("predict", "--classifier", tmp_path / "kept.tar", *label, tmp_path / "again", "--device", "cpu")
    assert outcome.status == 0, outcome.err
    there, here = ((tmp_path / out / "predictions.csv").read_text().splitlines() for out in ("out", "again"))
    assert len(there) == len(here) == 1 + 48
    if ON_CPU:
        assert there == here


@pytest.mark.parametrize("n_blocks", [0, 1])
def test_the_last_blocks_train_on_the_device(n_blocks, trained, tmp_path):
    where = [*folders(tmp_path), "--benchmarks_dir", trained / "benchmarks", "--device", NAME]
    given = ["--init_from", trained / "results" / "models" / CHECKPOINT, "--train_blocks", n_blocks]
    outcome = call("transferLearning", *TRAIN, *where, *given)
    assert outcome.status == 0, outcome.err


def test_a_meta_learner_warms_up_on_the_device(trained, tmp_path):
    where = [*folders(tmp_path), "--benchmarks_dir", trained / "benchmarks", "--device", NAME]
    given = ["--init_from", trained / "results" / "models" / CHECKPOINT, "--warm_up_epochs", 1]
    outcome = call("metaLearning", *META, "--method", "RelationNet", *where, *given)
    assert outcome.status == 0, outcome.err


@pytest.mark.parametrize("kind", ["centroid", "head alone"])
def test_an_episode_of_the_device_is_resumed_saved_and_drawn(kind, workspace):
    flags = [*CURVE, *ALIGNMENTS[kind], *folders(workspace), "--device", NAME]
    for n in (2, 3):
        outcome = call("associative_alignment", *flags, "--n_episodes", n, "--resume", "--save_episode", n - 1)
        assert outcome.status == 0, outcome.err
    outcome = call("reporting.figures", workspace / "results")
    skipped = [line for line in outcome.out.splitlines() if line.startswith("skipped")]
    assert outcome.status == 0 and len(skipped) == 1 and "shots.png" in skipped[0], outcome


def test_as_many_ranks_as_there_are_devices_agree_with_one(workspace):
    n = torch.cuda.device_count() if DEVICE.type == "cuda" else 2
    where = folders(workspace)
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", n, "associative_alignment.py"]
    run_process("-m", *torchrun, *ALIGN, *where, "--device", NAME)
    together = result_of(workspace, STAGE_3)["accuracy"]
    outcome = call("associative_alignment", *ALIGN, *where, "--device", NAME, "--overwrite")
    assert outcome.status == 0, outcome.err
    assert abs(together - result_of(workspace, STAGE_3)["accuracy"]) <= POINTS
