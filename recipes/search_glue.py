r"""Search the schedule of a GLUE recipe, and its learning rate, with Optuna: `pip install -e .[recipes,search]`.

    python recipes/search_glue.py recipes/configs/sst2_minilm_stompp_ste.yaml \
        --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 --output_dir out/search --n_trials 30

Flags are those of `run_glue.py`, and the values there are where the search starts. A trial is a whole run; one that is
worse than the median of the others is stopped, but not before everything is frozen: until then, whoever freezes later
looks better. The study is kept in `OUTPUT_DIR/study.db`: the same command again goes on with it. It ends with
`best.yaml`, a recipe for `run_glue.py`, `trials.json`, and a picture, `trials.svg`.

The best of many scores on the same data is too good to be true: run `best.yaml` with other seeds.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

from hf_stompp import BinarizationConfig
from hf_stompp.checkpoint import write_json
from hf_stompp.patching import binary_layers
from recipe_flags import given_flags, parse_recipe
from recipe_utils import format_table, scale_losses, steps_of
from run_glue import RecipeArguments, check, make_model, make_trainer, prepare

try:
    import optuna
    from matplotlib import pyplot
except ImportError as error:
    raise ImportError(f"The search needs the extra `search`: pip install hf_stompp[search] ({error}).") from error

LAST_END = 0.8
"""Of the progressions that are tried: from then on, trials are compared."""
SCHEDULE = ("progression_end", "overlap", "refresh", "clip")


@dataclass
class SearchArguments:
    """The flags of the search alone."""

    n_trials: int = field(
        default=20, metadata={"help": "Trials of the whole study: those of earlier calls count, killed ones do not."}
    )
    search: list[str] = field(
        default_factory=lambda: ["learning_rate", *SCHEDULE],
        metadata={"help": f"What is searched; any of learning_rate, {', '.join(SCHEDULE)}."},
    )


TYPES = (SearchArguments, RecipeArguments, BinarizationConfig, TrainingArguments)
APART = ("n_trials", "output_dir", "disable_tqdm", "report_to", "logging_steps", "dataloader_num_workers")
"""Flags that the scores of a study do not depend on, and that may change while it goes on."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the search; returns what it writes to `trials.json`."""
    argv = sys.argv[1:] if argv is None else argv
    search, recipe, config, args = parse_recipe(argv, TYPES)
    check(recipe, args)
    check_search(search, recipe, args)
    torch.set_float32_matmul_precision(recipe.matmul_precision)
    args.eval_strategy, args.eval_steps, args.save_strategy = "steps", 0.1, "no"
    set_seed(args.seed)
    prepared = prepare(recipe, args)

    def model_init(trial: Any = None) -> PreTrainedModel:
        if trial is not None:
            space(trial)  # the Trainer asks for it later; of a trial, it is the same each time
        changed = {} if trial is None else {k: v for k, v in trial.params.items() if k in SCHEDULE}
        return make_model(prepared, recipe, dataclasses.replace(config, **changed))

    trainer = make_trainer(recipe, args, prepared, model_init=model_init)
    scale_losses(trainer)
    space = Space(search.search, args.learning_rate, first_end(trainer))
    folder = Path(args.output_dir)
    storage = f"sqlite:///{folder / 'study.db'}"
    first = {**vars(config), "learning_rate": args.learning_rate}
    folder.mkdir(parents=True, exist_ok=True)
    given = given_flags(argv, TYPES)
    made_with = {"search": search.search, **{name: value for name, value in given.items() if name not in APART}}
    done = take_up(storage, recipe.task_name, {name: first[name] for name in search.search}, made_with)
    if done < search.n_trials:
        trainer.hyperparameter_search(
            space,
            compute_objective=mean_score,
            n_trials=search.n_trials - done,
            direction="maximize",
            backend="optuna",
            storage=storage,
            study_name=recipe.task_name,
            load_if_exists=True,
            sampler=optuna.samplers.TPESampler(seed=args.seed + done),  # else it would suggest the same again
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=int(LAST_END * steps_of(trainer))),
            catch=(FloatingPointError,),  # a loss that is none is a bad trial
        )
    return report(storage, recipe.task_name, folder, argv, given)


def check_search(search: SearchArguments, recipe: RecipeArguments, args: TrainingArguments) -> None:
    if args.world_size > 1:
        raise ValueError(f"The search is for one process, and this is one of {args.world_size}: start it without any.")
    unknown = [name for name in search.search if name not in ("learning_rate", *SCHEDULE)]
    if unknown or not search.search:
        raise ValueError(
            f"search: received {unknown or search.search}; allowed: any of learning_rate, {', '.join(SCHEDULE)}."
        )
    if search.n_trials < 1:
        raise ValueError(f"n_trials: received {search.n_trials}; allowed: at least 1.")
    if not recipe.binarize and set(search.search) & set(SCHEDULE):
        raise ValueError("search: without --binarize there is no schedule; pass --search learning_rate.")


class Space:
    """What a trial suggests; the Trainer takes the learning rate from it, and models are made with the rest."""

    def __init__(self, names: Sequence[str], learning_rate: float, first_end: float) -> None:
        self.names, self.learning_rate, self.first_end = names, learning_rate, first_end

    def __call__(self, trial: Any) -> dict[str, float]:
        suggestions: dict[str, Callable[[str], float]] = {
            "learning_rate": lambda name: trial.suggest_float(
                name, self.learning_rate / 4, self.learning_rate * 4, log=True
            ),
            "progression_end": lambda name: trial.suggest_float(name, self.first_end, LAST_END),
            "overlap": lambda name: trial.suggest_float(name, 1.0, 4.0),
            "refresh": lambda name: trial.suggest_float(name, 0.01, 1.0, log=True),
            "clip": lambda name: trial.suggest_float(name, 1.0, 4.0),
        }
        found = {name: suggestions[name](name) for name in self.names}
        return {name: value for name, value in found.items() if name == "learning_rate"}


def first_end(trainer: Trainer) -> float:
    """The earliest end of a progression that is tried: each unit needs a step."""
    units = {layer.unit for layer in binary_layers(trainer.model).values()}
    return min(LAST_END, max(0.2, (len(units) + 1) / steps_of(trainer)))


def mean_score(metrics: dict[str, float]) -> float:
    """The mean of a task's metrics, as GLUE has it."""
    ends = ("loss", "runtime", "per_second")
    scores = [value for name, value in metrics.items() if name.startswith("eval_") and not name.endswith(ends)]
    return sum(scores) / len(scores)


def take_up(storage: str, name: str, first: dict[str, float | None], made_with: dict[str, Any]) -> int:
    """Make the study, with a trial of the values that the recipe has, or go on with it; how many trials it has."""
    study = optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
    running = study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
    before = study.user_attrs.get("made_with", {})
    if study.trials and before != made_with:
        names = sorted(key for key in {**before, **made_with} if before.get(key) != made_with.get(key))
        what = ", ".join(f"{key} was {before.get(key)!r}, and is {made_with.get(key)!r}" for key in names)
        raise ValueError(
            f"{storage} holds a study that was made otherwise (None where nothing was given): {what}. Give the same "
            "again, or pass another --output_dir."
        )
    study.set_user_attr("made_with", made_with)
    for trial in running:  # by a search that was killed
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(trial.params)
    if not study.trials:  # optuna cannot take no clip, nor 0 on a scale of logarithms
        study.enqueue_trial({name: value for name, value in first.items() if value})
    done = optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED
    return len(study.get_trials(states=done))


def report(storage: str, name: str, folder: Path, argv: Sequence[str], given: dict[str, Any]) -> dict[str, Any]:
    study = optuna.load_study(storage=storage, study_name=name)
    trials = [{"trial": t.number, "state": t.state.name, "score": t.value, **t.params} for t in study.trials]
    ended = [trial for trial in trials if trial["state"] == "COMPLETE"]
    results: dict[str, Any] = {"command": list(argv), "best": None, "trials": trials}
    if not ended:
        raise RuntimeError(f"No trial of {folder / 'study.db'} came to its end: see what it says above.")
    results["best"] = max(ended, key=lambda trial: trial["score"])
    write_json(folder / "trials.json", results)
    write_best(folder / "best.yaml", given, study.best_params)
    draw(trials, study.user_attrs["made_with"]["search"], folder / "trials.svg")
    print(format_table(sorted(ended, key=lambda trial: -trial["score"])[:10]))
    print(f"{len(trials)} trials, {len(ended)} to their end. The best as a recipe, on other seeds than the search's:")
    print(f"python recipes/run_glue.py {folder / 'best.yaml'} --seed 1 --output_dir {folder / 'best-1'}")
    return results


def write_best(path: Path, given: dict[str, Any], params: dict[str, float]) -> None:
    """The recipe of the best trial: what was given in a file and in flags, and what was found."""
    recipe = {name: value for name, value in given.items() if name not in ("n_trials", "search")}
    recipe |= {"do_train": True, "output_dir": str(path.with_name("best")), **params}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


def draw(trials: Sequence[dict[str, Any]], names: Sequence[str], path: Path) -> None:
    """The score of each trial over its number, and over each value that was searched."""
    figure, all_axes = pyplot.subplots(1, 1 + len(names), figsize=(3 * (1 + len(names)), 3), sharey=True)
    for axes, name in zip(all_axes, ["trial", *names], strict=True):
        for state, marker in (("COMPLETE", "o"), ("PRUNED", "x")):
            shown = [t for t in trials if t["state"] == state and t["score"] is not None]
            axes.plot([t.get(name) for t in shown], [t["score"] for t in shown], marker, label=state.lower())
        axes.set_xlabel(name)
        if name in ("learning_rate", "refresh"):
            axes.set_xscale("log")
    all_axes[0].set_ylabel("score")
    all_axes[0].legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
