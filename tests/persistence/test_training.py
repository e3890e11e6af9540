"""What a training keeps: its best model, a state to go on from, a row an epoch."""

import json

import pytest
import torch

from engine.distributed import Ranks
from engine.errors import UserError
from engine.run import Run
from methods.evaluation import EpisodeScores
from models import Model, build_backbone, build_head
from persistence.checkpoints import load_checkpoint
from persistence.run_files import TEST_FLAGS, Folders, RunName, training_files
from persistence.training import TrainState
from tests.helpers import make_split

BASE, VAL = make_split(split="base"), make_split(split="val", seed=1)


def a_training(root, resume=False, writes=True, run=None, competes=False):
    """A training of files below `root`, of a model that has done one step; with `resume`, it goes on from its state."""
    folders = Folders(root / "models", root / "results", resume=resume)
    name = RunName(3, 2, "toy", "toy", "arcMax", "Conv4")
    files = training_files("transferLearning", name, folders, {"lr": 0.1}, writes)
    if resume:
        files.find_state(TEST_FLAGS)
    backbone = build_backbone("Conv4", 16)
    model = Model(backbone, build_head("arcMax", backbone.feature_dim, 6, 20.0, 0.01), 0.1)
    return TrainState(files, model, BASE, run or Run(), competes)


def step(training):
    """Move the weights, as an epoch would."""
    model = training.model
    model.head.loss(model.head(model.backbone(torch.randn(4, 3, 16, 16))), torch.arange(4)).backward()
    model.optimizer.step()


def scores(n_right):
    """Two episodes of two ways, 10 queries a class, of which so many are right."""
    return EpisodeScores(torch.tensor([[[n_right, 10 - n_right], [10 - n_right, n_right]]] * 2))


def never():
    pytest.fail("there was nothing to validate")


def train(training, n_right, validate=never):
    """Epochs with these validation results; the backbone's weights after each."""
    weights = []
    with training.begin(VAL, training.n_done + len(n_right)):
        for epoch, n in zip(training.epochs(training.n_done + len(n_right), validate), n_right, strict=True):
            step(training)
            weights.append(weights_of(training))
            training.end_epoch(epoch, 1.5 - epoch, 0.25, scores(n))
    return weights


def weights_of(training):
    return training.model.backbone.layers[0].conv.weight.detach().clone()


def rows(training):
    return [json.loads(line) for line in training.files.metrics.path.read_text().splitlines()]


def test_the_first_of_the_best_models_is_kept_and_loaded_again(tmp_path):
    training = a_training(tmp_path)
    weights = train(training, [4, 6, 6, 5])
    checkpoint = load_checkpoint(training.files.best)
    assert (checkpoint.epoch, checkpoint.val_accuracy) == (1, pytest.approx(60))
    assert checkpoint.class_names == BASE.class_names and checkpoint.config == {"lr": 0.1}
    assert torch.equal(weights_of(training), weights[3])
    training.load_best()
    assert torch.equal(weights_of(training), weights[1])
    assert torch.equal(training.model.head.weight, checkpoint.head_state["weight"])


@pytest.mark.parametrize("competes", [False, True])
def test_a_training_goes_on_after_the_epochs_of_its_state(tmp_path, competes):
    first = a_training(tmp_path, competes=competes)
    train(first, [4, 6], lambda: scores(5))
    with open(first.files.metrics.path, "a") as file:
        file.write('{"epoch": 2}\n{"epo')  # of an epoch whose state was never written
    second = a_training(tmp_path, resume=True, competes=competes)
    assert not torch.equal(weights_of(second), weights_of(first))
    with second.begin(VAL, 4):
        assert list(second.epochs(4, never)) == [2, 3] and second.best == pytest.approx(0.6)
    assert torch.equal(weights_of(second), weights_of(first)) and len(rows(second)) == 2 + competes
    ours, theirs = (training.model.optimizer.state_dict()["state"] for training in (second, first))
    assert all(torch.equal(ours[i][k], theirs[i][k]) for i in theirs for k in theirs[i]) and len(theirs) > 8
    best = second.files.best.read_bytes()
    second.end_epoch(2, 1.0, 0.5, scores(5))
    assert second.files.best.read_bytes() == best and [row["epoch"] for row in rows(second)][-3:] == [0, 1, 2]


def test_each_epoch_says_how_long_the_others_will_take(tmp_path, capsys, monkeypatch):
    clock = iter(range(0, 10**6, 60))
    monkeypatch.setattr("persistence.training.time.time", lambda: float(next(clock)))
    train(a_training(tmp_path, competes=True), [4, 6, 6], lambda: scores(5))
    before, first, second, last = capsys.readouterr().out.splitlines()
    assert before.startswith("before training") and "to go" not in before
    assert first.endswith(", 2 min to go") and second.endswith(", 60 s to go") and "to go" not in last
    assert [line.split()[1] for line in (first, second, last)] == ["1", "2", "3"]


def test_a_state_of_more_epochs_or_of_other_images_is_refused(tmp_path):
    train(a_training(tmp_path), [4, 6])
    for val, n_epoch, part in ((VAL, 1, "2 epochs, more than --n_epoch 1"), (BASE, 3, "val images have changed")):
        with pytest.raises(UserError, match=part), a_training(tmp_path, resume=True).begin(val, n_epoch):
            pytest.fail("it went on")


def test_only_the_first_rank_writes(tmp_path):
    training = a_training(tmp_path, run=Run(ranks=Ranks(1, 2)))
    training.end_epoch(0, 1.0, 0.5, scores(5))
    assert training.n_done == 1 and not list(tmp_path.iterdir())


def test_a_test_without_training_keeps_the_weights_and_files(tmp_path):
    trained = a_training(tmp_path)
    train(trained, [4])
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    test = a_training(tmp_path, writes=False)
    before = weights_of(test)
    with test.begin(VAL, 0):
        assert not list(test.epochs(0, never))
    test.load_best()
    assert torch.equal(weights_of(test), before) and not torch.equal(before, weights_of(trained))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == kept


@pytest.mark.parametrize(("n_right", "best"), [([4, 5], -1), ([4, 6], 1)])
def test_a_model_that_competes_is_replaced_by_a_better_one_alone(tmp_path, capsys, n_right, best):
    training = a_training(tmp_path, competes=True)
    initial = weights_of(training)
    weights = train(training, n_right, lambda: scores(5))
    assert load_checkpoint(training.files.best).epoch == best
    training.load_best()
    assert torch.equal(weights_of(training), [*weights, initial][best])
    assert [(row["epoch"], row["loss"]) for row in rows(training)] == [(-1, None), (0, 1.5), (1, 0.5)]
    assert [row["val_accuracy"] for row in rows(training)] == pytest.approx([50, *(10 * n for n in n_right)])
    assert [row["base_accuracy"] for row in rows(training)] == [None, 25, 25]
    assert capsys.readouterr().out.startswith("before training  val 50.00 ")


def test_a_test_without_training_has_nothing_that_competes(tmp_path):
    test = a_training(tmp_path, writes=False, competes=True)
    assert not list(test.epochs(0, never)) and not list(tmp_path.iterdir())
