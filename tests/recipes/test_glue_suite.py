"""`glue_suite.py`: its runs, what it goes on with, the table, the cards, and what it refuses."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification

import glue_suite
import run_glue
from hf_stompp.patching import packed_layers
from hf_stompp.results import COLLAPSED

SUITE: dict[str, Any] = {
    "seeds": [3, 4],
    "flags": {
        "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "dataloader_pin_memory": False, "learning_rate": 1e-3, "binarize": True, "progression": "global",
        "progression_end": 1.0, "hidden_weight": 0.5, "max_steps": 4,
    },
    "teacher": {"learning_rate": 2e-3},
    "tasks": {"sst2": {"flags": {"max_steps": 6, "join_texts": 2}, "teacher": {"max_steps": 5}}, "mrpc": None},
}  # fmt: skip
Suite = Callable[..., dict[str, Any]]


@pytest.fixture
def suite(tmp_path: Path, tiny_bert: str, write_split: Callable[..., Path], sst2_folder: Path) -> Suite:
    """Runs the suite above, changed as it is told, in `tmp_path / "out"`."""
    rows = {"sentence1": ["the soup was good", "the fish was bad"] * 2, "sentence2": ["the soup was bad"] * 4}
    for split in ("train", "validation"):
        write_split(f"mrpc/{split}.parquet", **rows, label=[1, 0, 0, 1])

    def run(*flags: str, content: Any = None) -> dict[str, Any]:
        path = tmp_path / "suite.yaml"
        path.write_text(yaml.safe_dump(SUITE if content is None else content))
        given = ["--output_dir", str(tmp_path / "out"), "--dataset_dir", str(sst2_folder)]
        return glue_suite.main([str(path), *given, "--model_name_or_path", tiny_bert, *flags])

    return run


def test_all_runs_their_table_and_cards(suite: Suite, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = suite("--cards", str(tmp_path / "cards"))
    out = tmp_path / "out"
    ended = {
        path.parent.relative_to(out).as_posix(): json.loads(path.read_text()) for path in out.glob("*/*/results.json")
    }
    assert set(ended) == {f"{task}/{name}" for task in ("sst2", "mrpc") for name in ("teacher", "seed-3", "seed-4")}
    assert {name: run["steps"] for name, run in ended.items() if "sst2" in name} == {
        "sst2/teacher": 5, "sst2/seed-3": 6, "sst2/seed-4": 6,
    }  # fmt: skip
    assert [ended[f"mrpc/{name}"]["learning_rate"] for name in ("teacher", "seed-3")] == [2e-3, 1e-3]
    assert ended["mrpc/seed-4"]["seed"] == 4 and ended["mrpc/teacher"]["binarization"] is None
    assert [ended[f"sst2/{name}"]["recipe"]["join_texts"] for name in ("teacher", "seed-3")] == [1, 2]
    # Students begin as their teacher, and learn from it.
    for run in ("sst2/seed-3", "sst2/seed-4"):
        assert (
            ended[run]["recipe"]["model_name_or_path"] == ended[run]["recipe"]["teacher"] == str(out / "sst2/teacher")
        )
    assert len(packed_layers(AutoModelForSequenceClassification.from_pretrained(out / "mrpc/seed-4/packed"))) == 12

    scores = [ended[f"sst2/seed-{seed}"]["rows"][-1]["accuracy"] for seed in (3, 4)]
    row = results["tasks"]["sst2"]
    assert (row["mean"], row["seeds"]) == (statistics.fmean(scores), 2)
    assert row["standard_deviation"] == pytest.approx(statistics.stdev(scores))
    assert row["full_precision"] == ended["sst2/teacher"]["rows"][-1]["accuracy"]
    collapsed = [ended[f"sst2/seed-{seed}"]["rows"][-1]["model"].endswith(COLLAPSED) for seed in (3, 4)]
    assert row["collapsed"] == sum(collapsed)
    f1 = [ended[f"mrpc/seed-{seed}"]["rows"][-1]["f1"] for seed in (3, 4)]
    assert results["tasks"]["mrpc"]["mean"] == pytest.approx(statistics.fmean(f1))
    assert json.loads((out / "results.json").read_text()) == results
    printed = capsys.readouterr().out
    assert (out / "table.md").read_text() in printed and f"{100 * row['mean']:.1f} ± " in printed

    card = ModelCard.load(tmp_path / "cards" / "sst2.md")
    assert card.content == ModelCard.load(out / "sst2/seed-3/packed/README.md").content
    (score,) = card.data.eval_results
    assert (score.metric_value, score.dataset_config) == (scores[0], "sst2")  # of the first seed, not of the best
    assert "full precision" in card.content and "seed 4" in card.content and str(tmp_path) not in card.content


def test_what_has_ended_is_not_made_again(suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def recorded(argv: list[str]) -> Any:
        made.append("/".join(Path(argv[-1]).parts[-2:]))
        if len(made) == 3:
            raise KeyboardInterrupt
        return run_glue.main(argv)

    monkeypatch.setattr(glue_suite, "run_glue", recorded)
    with pytest.raises(KeyboardInterrupt):
        suite("--tasks", "sst2")
    assert "2 of 6 runs have ended." in (tmp_path / "out" / "table.md").read_text()
    results = suite("--tasks", "sst2")
    assert made == ["sst2/teacher", "sst2/seed-3", "sst2/seed-4", "sst2/seed-4"]
    assert "3 of 6 runs have ended" in (tmp_path / "out" / "table.md").read_text()
    assert results["tasks"]["sst2"]["seeds"] == 2 and "mrpc" not in results["tasks"]
    with pytest.raises(ValueError, match="made otherwise .*: learning_rate was 0.002, and is 0.01"):
        suite("--tasks", "sst2", "--learning_rate", "1e-2")
    suite("--tasks", "sst2", "--logging_steps", "2")  # of which no score depends
    assert len(made) == 4


def test_a_run_is_made_again_by_its_recipe(suite: Suite, tmp_path: Path) -> None:
    suite("--tasks", "sst2", "--seeds", "3")
    folder = tmp_path / "out" / "sst2" / "seed-3"
    again = run_glue.main([str(folder / "recipe.yaml"), "--output_dir", str(tmp_path / "again")])
    rows = [json.loads((folder / "results.json").read_text())["rows"], again["rows"]]
    assert [{k: v for k, v in row.items() if k != "eval_seconds"} for row in rows[0]] == [
        {k: v for k, v in row.items() if k != "eval_seconds"} for row in rows[1]
    ]


def test_what_is_empty_is_nothing(suite: Suite, tmp_path: Path) -> None:
    flags = {k: v for k, v in SUITE["flags"].items() if k != "hidden_weight"}
    content = {"flags": flags, "seeds": [3], "teacher": None, "tasks": {"sst2": {"flags": None, "teacher": None}}}
    assert suite(content=content)["tasks"]["sst2"]["seeds"] == 1
    teacher = json.loads((tmp_path / "out" / "sst2" / "teacher" / "results.json").read_text())
    assert teacher["binarization"] is None and teacher["steps"] == 4


def test_a_part_of_a_suite_leaves_the_rest_in_the_table(suite: Suite, tmp_path: Path) -> None:
    suite("--tasks", "sst2", "--seeds", "4")
    results = suite("--tasks", "sst2", "--seeds", "3")
    assert set(results["runs"]["sst2"]) == {"teacher", "seed-3", "seed-4"}
    assert ModelCard.load(tmp_path / "out/sst2/seed-3/packed/README.md").content.count("seed 4")


def test_without_a_teacher(suite: Suite, tmp_path: Path, tiny_bert: str) -> None:
    content = {**SUITE, "flags": {k: v for k, v in SUITE["flags"].items() if k != "hidden_weight"}, "seeds": [3]}
    del content["teacher"], content["tasks"]
    results = suite(content=content | {"tasks": {"sst2": None}})
    assert results["tasks"]["sst2"]["full_precision"] is None
    assert results["tasks"]["sst2"]["standard_deviation"] is None
    run = json.loads((tmp_path / "out" / "sst2" / "seed-3" / "results.json").read_text())
    assert run["recipe"]["model_name_or_path"] == tiny_bert and run["recipe"]["teacher"] is None


def test_a_teacher_stays_in_full_precision(suite: Suite, tmp_path: Path) -> None:
    suite("--tasks", "sst2", "--seeds", "3", "--binarize", "True", "--learning_rate", "3e-3")
    teacher, student = (
        json.loads((tmp_path / "out" / "sst2" / name / "results.json").read_text()) for name in ("teacher", "seed-3")
    )
    assert teacher["binarization"] is None and student["binarization"] is not None
    assert teacher["learning_rate"] == student["learning_rate"] == 3e-3  # of the command line, for all


def test_a_teacher_that_has_collapsed_is_marked(suite: Suite, tmp_path: Path) -> None:
    content = {**SUITE, "teacher": {"learning_rate": 100.0, "max_steps": 8}, "tasks": {"sst2": None}, "seeds": [3]}
    results = suite(content=content)
    assert results["runs"]["sst2"]["teacher"]["collapsed"] and results["tasks"]["sst2"]["full_precision_collapsed"]
    assert "| 50.0 (collapsed) |" in (tmp_path / "out" / "table.md").read_text()


REFUSED: dict[str, tuple[Any, list[str], str]] = {
    "no mapping": ([1], [], r"received \[1\]; allowed: a mapping"),
    "key": ({**SUITE, "seed": 1}, [], "received the key 'seed'; allowed: flags, seeds, teacher, tasks"),
    "task": ({**SUITE, "tasks": {"sst3": None}}, [], "received 'sst3'; allowed: cola"),
    "tasks in a list": ({**SUITE, "tasks": ["sst2"]}, [], r"tasks: received \['sst2'\]; allowed: a mapping"),
    "no tasks": ({**SUITE, "tasks": None}, [], "it has no tasks"),
    "task that it has not": (SUITE, ["--tasks", "rte"], "tasks: received 'rte'; allowed: mrpc, sst2"),
    "seed that it has not": (SUITE, ["--seeds", "3", "5"], "seeds: received 5; allowed: 3, 4"),
    "key of a task": ({**SUITE, "tasks": {"sst2": {"max_steps": 3}}}, [], "tasks.sst2: received the key 'max_steps'"),
    "no seeds": ({**SUITE, "seeds": []}, [], r"seeds is \[\]; allowed: a list"),
    "a seed": ({**SUITE, "seeds": 0}, [], "seeds is 0; allowed: a list"),
    "a seed twice": ({**SUITE, "seeds": [1, 1]}, [], "of different whole numbers"),
    "flags": ({**SUITE, "flags": 3}, [], "flags: received 3; allowed: a mapping"),
    "flag": ({**SUITE, "flags": {"learning_rat": 1}}, [], "flags: the key 'learning_rat' is not a flag"),
    "a teacher besides": (SUITE, ["--teacher", "other"], "teacher: received 'other', but the suite makes"),
    "flag of the command line": (SUITE, ["--learning_ratt", "1"], "--learning_ratt is not a flag"),
    "no teacher, and weights of it": (
        {**{k: v for k, v in SUITE.items() if k != "teacher"}, "tasks": {"sst2": None}}, [], "without a teacher"
    ),
    "teacher of a task": ({k: v for k, v in SUITE.items() if k != "teacher"}, [], "teacher, and the suite has"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_run_is_refused_before_anything_is(case: str, suite: Suite, tmp_path: Path) -> None:
    content, flags, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        suite(*flags, content=content)
    assert not (tmp_path / "out").exists()


def test_a_suite_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError, match="there is no file 'none.yaml'"):
        glue_suite.main(["none.yaml", "--output_dir", "out"])


@pytest.mark.parametrize(
    "path", sorted(Path(glue_suite.__file__).parent.glob("suites/glue_*.yaml")), ids=lambda p: p.name
)
def test_suites_of_the_repository_are_sound(path: Path, tmp_path: Path) -> None:
    content = glue_suite.read_suite(str(path))
    runs = glue_suite.plan(content, tmp_path, {"model_name_or_path": "model"})
    assert len(runs) == len(content["tasks"]) * (len(content["seeds"]) + ("teacher" in content))
