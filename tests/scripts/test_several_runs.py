"""Several seeds, ways and shots in one command: the files and numbers of as many commands, and what names them."""

import json
import shutil

import pytest

from persistence import feature_cache
from tests.helpers import ALIGN, CHECKPOINT, CURVE, RUN, STAGE_1, TINY, TRAIN, call, folders, make_benchmark, numbers

SHORT = [*TRAIN, "--n_epoch", 1]


def ran(script, *flags):
    outcome = call(script, *flags)
    assert outcome.status == 0, outcome.err
    return outcome


def tables(results):
    return {path.stem: json.loads(path.read_text()) for path in (results / "tables").glob("*.json")}


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A folder in which stage 1 has run with two seeds and tested each training on two shots."""
    root = tmp_path_factory.mktemp("several")
    make_benchmark(root / "benchmarks" / "tiny")
    ran("transferLearning", *SHORT, *folders(root), "--seed", 0, 1, "--n_shot", 2, 1)
    return root


def test_each_seed_has_files_of_its_own_and_the_numbers_of_a_command_of_its_own(several, tmp_path):
    assert {path.name for path in (several / "results" / "models").glob("*.tar")} == {
        *(CHECKPOINT, f"{RUN}_last.tar", f"{RUN}_seed1_bestModel.tar", f"{RUN}_seed1_last.tar")
    }
    one_shot = STAGE_1.replace("2shot", "1shot")
    found = tables(several / "results")
    assert set(found) == {STAGE_1, f"{STAGE_1}_seed1", one_shot, f"{one_shot}_seed1"}
    for name, record in found.items():
        config = record["config"]
        assert (config["seed"], config["n_shot"]) == (int("seed1" in name), 1 if "1shot" in name else 2)
        assert record["seed"] == config["seed"] and record["n_shot"] == config["n_shot"]
    shutil.copytree(several / "benchmarks", tmp_path / "benchmarks")
    ran("transferLearning", *SHORT, *folders(tmp_path), "--seed", 1)
    alone = numbers(tmp_path, "transferLearning")
    assert alone["accuracy_per_episode"] == found[f"{STAGE_1}_seed1"]["accuracy_per_episode"]
    best = tmp_path / "results" / "models" / f"{RUN}_seed1_bestModel.tar"
    ran("transferLearning", *SHORT, *folders(tmp_path), "--seed", 1, "--n_shot", 1, "--n_epoch", 0, "--init_from", best)
    tested = tables(tmp_path / "results")[f"{one_shot}_seed1"]
    assert tested["accuracy_per_episode"] == found[f"{one_shot}_seed1"]["accuracy_per_episode"]


def test_stage_3_aligns_one_backbone_on_several_tasks_and_embeds_each_split_once(several, tmp_path, monkeypatch):
    embedded, outputs = [], feature_cache.outputs
    monkeypatch.setattr(feature_cache, "outputs", lambda *given: embedded.append(given[0]) or outputs(*given))
    where = [*folders(several), "--results_dir", tmp_path, "--cache_dir", tmp_path / "cache"]
    tasks = ["--n_shot", 2, 1, "--test_n_way", 3, 2, "--align_blocks", 0]
    ran("associative_alignment", *ALIGN, *where, *tasks)
    found = tables(tmp_path)
    assert sorted((record["n_way"], record["n_shot"]) for record in found.values()) == [(2, 1), (2, 2), (3, 1), (3, 2)]
    assert {record["checkpoint"] for record in found.values()} == {str(several / "results" / "models" / CHECKPOINT)}
    assert len(embedded) == 2  # base and novel images, for all four
    ran("associative_alignment", *ALIGN, *where, *tasks, "--seed", 1)
    assert {record["checkpoint"] for name, record in tables(tmp_path).items() if "seed1" in name} == {
        str(several / "results" / "models" / f"{RUN}_seed1_bestModel.tar")
    }


def test_stage_2_tests_a_way_that_val_has_too_few_classes_for(tmp_path):
    make_benchmark(tmp_path / "benchmarks" / "tiny", n_class=(6, 4, 6))
    flags = [*TINY, "--n_epoch", 1, "--episodes_per_epoch", 2, "--train_n_way", 3, "--train_n_query", 2]
    flags += ["--val_episodes", 3, "--n_episodes", 4, *folders(tmp_path), "--test_n_way", 3, 5]
    ran("metaLearning", *flags)
    assert sorted(record["n_way"] for record in tables(tmp_path / "results").values()) == [3, 5]


def test_a_checkpoint_of_another_shot_is_named_with_the_flag_that_uses_it(trained):
    outcome = call("associative_alignment", *CURVE, *folders(trained), "--n_shot", 1)
    best = trained / "results" / "models" / CHECKPOINT
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert f"--init_from {best}" in outcome.err and "3way_1shot" in outcome.err


@pytest.mark.parametrize("finished", [True, False])
def test_files_of_a_seed_without_it_in_their_names_are_still_read(several, tmp_path, finished):
    root = shutil.copytree(several, tmp_path / "copy")
    results = root / "results"
    for path in [path for path in results.rglob("*_seed1*") if path.is_file()]:
        path.replace(path.with_name(path.name.replace("_seed1", "")))
    if not finished:
        (results / "tables" / f"{STAGE_1}.json").unlink()
    again = ran("transferLearning", *SHORT, *folders(root), "--seed", 1, "--resume")
    assert "resumed after epoch 1" in again.out and not list(results.rglob("*_seed1*.tar"))
    ran("associative_alignment", *ALIGN, *folders(root), "--seed", 1)
    (record,) = [record for name, record in tables(results).items() if "alignment" in name]
    assert record["checkpoint"] == str(results / "models" / CHECKPOINT)
    ran("transferLearning", *SHORT, *folders(root), "--seed", 2)  # another seed does not meet them
    assert (results / "models" / f"{RUN}_seed2_bestModel.tar").is_file()


def test_n_query_is_what_the_smallest_class_allows(trained, tmp_path):
    where = [*folders(trained), "--results_dir", tmp_path]
    flags = [flag for i, flag in enumerate(ALIGN) if "--n_query" not in ALIGN[max(0, i - 1) : i + 1]]
    outcome = ran("associative_alignment", *flags, *where, "--align_blocks", 0)
    (record,) = tables(tmp_path).values()
    assert record["n_query"] == record["config"]["n_query"] == 6  # of 8 images, with 2 in the support
    assert "note: --n_query 6" in outcome.out and "has 8 images" in outcome.out
