"""`search_glue.py`: a study that is stopped and gone on with, and the recipe it ends with."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

optuna = pytest.importorskip("optuna", reason="optuna is not installed")

import run_glue  # noqa: E402
import search_glue  # noqa: E402
from hf_stompp import StomppCallback  # noqa: E402
from hf_stompp.patching import is_packed  # noqa: E402

RECIPE = str(Path(__file__).parents[2] / "recipes" / "configs" / "demo.yaml")
SMALL = [
    "--max_steps", "30", "--warmup_steps", "0", "--max_train_samples", "320", "--max_eval_samples", "40",
    "--per_device_train_batch_size=32", "--use_cpu", "True", "--report_to", "none", "--disable_tqdm", "True",
]  # fmt: skip


def search(folder: Path, *flags: str) -> dict[str, Any]:
    return search_glue.main([RECIPE, *SMALL, "--output_dir", str(folder), *flags])


def study(folder: Path) -> Any:
    return optuna.load_study(storage=f"sqlite:///{folder / 'study.db'}", study_name="synthetic")


def test_a_study_is_gone_on_with_and_ends_in_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[dict[str, float]] = []

    class Recorder(StomppCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            config = kwargs["model"].config.quantization_config
            ours = {name: getattr(config, name) for name in names[1:]}
            trained.append({"learning_rate": args.learning_rate, **ours})

    monkeypatch.setattr(run_glue, "StomppCallback", Recorder)
    folder, names = tmp_path / "study", ["learning_rate", "progression_end", "clip"]
    first = search(folder, "--n_trials", "2", "--search", *names)
    assert [trial["state"] for trial in first["trials"]] == ["COMPLETE"] * 2
    # Each was trained with what it says.
    assert trained == [{name: trial[name] for name in names} for trial in first["trials"]]
    # The first one has the values of the recipe.
    assert first["trials"][0] | {"learning_rate": 2e-3, "progression_end": 0.5, "clip": 2.0} == first["trials"][0]

    # A search that was killed leaves a trial that runs for ever; it is run again.
    killed = study(folder).ask()
    search_glue.Space(names, 2e-3, 0.3)(killed)
    second = search(folder, "--n_trials", "3", "--search", *names)
    states = [trial["state"] for trial in second["trials"]]
    assert states[:3] == ["COMPLETE", "COMPLETE", "FAIL"] and states[3] in ("COMPLETE", "PRUNED") and len(states) == 4
    assert second["trials"][:2] == first["trials"]
    assert {name: second["trials"][3][name] for name in names} == killed.params
    assert trained[2] == killed.params
    with pytest.raises(
        ValueError, match=r"otherwise .*: search was \['lea.*'\], and is \['clip'\]\. .* another --output"
    ):
        search(folder, "--n_trials", "4", "--search", "clip")
    for name, value in {"surrogate": "none", "seed": "7", "weight_decay": "0.5", "learning_rate": "0.5"}.items():
        with pytest.raises(ValueError, match=rf"nothing was given\): {name} was .*, and is '?{value}'?\. Give"):
            search(folder, f"--{name}={value}", "--n_trials", "4", "--search", *names)
    assert search(folder, "--n_trials", "3", "--search", *names) == second | {"command": second["command"]}

    assert json.loads((folder / "trials.json").read_text()) == second
    assert "</svg>" in (folder / "trials.svg").read_text()
    best = second["best"]
    assert best["score"] == max(trial["score"] for trial in second["trials"] if trial["state"] == "COMPLETE")
    recipe = yaml.safe_load((folder / "best.yaml").read_text())
    assert {name: recipe[name] for name in names} == {name: best[name] for name in names}
    assert recipe["max_steps"] == 30 and "n_trials" not in recipe
    results = run_glue.main([str(folder / "best.yaml"), "--output_dir", str(tmp_path / "best"), "--seed", "1"])
    assert {name: results["binarization"].get(name) for name in names[1:]} == {name: best[name] for name in names[1:]}
    assert results["learning_rate"] == best["learning_rate"] and results["seed"] == 1
    assert is_packed(run_glue.AutoModelForSequenceClassification.from_pretrained(tmp_path / "best" / "packed"))


def test_a_trial_that_is_worse_is_stopped_once_everything_is_frozen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The fifth, of which four others can have a median, has the worst scores.
    monkeypatch.setattr(search_glue, "mean_score", lambda metrics: float(len(study(tmp_path).trials) < 5))
    found = search(tmp_path, "--n_trials", "5", "--search", "clip")
    assert [trial["state"] for trial in found["trials"]] == ["COMPLETE"] * 4 + ["PRUNED"]
    steps = study(tmp_path).trials[4].intermediate_values
    assert max(steps) == search_glue.LAST_END * 30 and len(study(tmp_path).trials[0].intermediate_values) == 10


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--search", "order"], r"search: received \['order'\]; allowed: any of learning_rate, progression_end"),
        (["--n_trials", "0"], "n_trials: received 0; allowed: at least 1"),
        (["--binarize", "False"], "without --binarize there is no schedule; pass --search learning_rate"),
        (["--load_best_model_at_end", "True"], "load_best_model_at_end"),
    ],
)
def test_what_cannot_be_searched(flags: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        search(tmp_path, *flags)


def test_the_score_is_the_mean_of_the_metrics() -> None:
    metrics = {"eval_loss": 9.0, "eval_f1": 0.5, "eval_accuracy": 0.75, "eval_runtime": 3.0, "epoch": 1.0}
    assert search_glue.mean_score({**metrics, "eval_samples_per_second": 8.0}) == 0.625
