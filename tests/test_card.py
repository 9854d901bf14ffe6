"""A model card says what is so: its text as a whole, its numbers against the files, its example by running it."""

import contextlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import PreTrainedModel
from verified import freeze

from hf_stompp import BinarizationConfig, binarize, model_card, pack
from hf_stompp.figures import Figures
from hf_stompp.patching import binary_layers

GOLDEN = Path(__file__).with_name("golden_card.md")


def run_of(accuracy: float, config: BinarizationConfig | None, **changes: Any) -> dict[str, Any]:
    """What `recipes/run_glue.py` writes to `results.json`."""
    stages = ["latent fp32", "packed, reloaded"] if config else ["full precision"]
    rows = [{"model": stage, "accuracy": accuracy, "bytes": 1000, "eval_seconds": 1.5} for stage in stages]
    recipe = {"task_name": "sst2", "model_name_or_path": "google-bert/bert-base-uncased", "max_eval_samples": None}
    return {
        "recipe": {**recipe, "max_train_samples": None, "binarize": config is not None},
        "binarization": config and config.to_dict(),
        "seed": 3,
        "mask_seed": config and config.mask_seed,
        "batch_size": 32,
        "learning_rate": 4e-4,
        "lr_scheduler": "linear",
        "warmup_steps": 60,
        "weight_decay": 0.01,
        "steps": 600,
        "rows": rows,
        **changes,
    }


def test_a_whole_card(packed_folder: Path) -> None:
    config = BinarizationConfig()
    baseline = BinarizationConfig(surrogate="ste", progression="none")
    card = model_card(
        packed_folder,
        results=run_of(0.8765, config),
        compared={"full precision": run_of(0.9123, None), "STE baseline": run_of(0.8511, baseline)},
        repo_id="user/bert-sst2-1bit",
        base_model="google-bert/bert-base-uncased",
        dataset="nyu-mll/glue",
        license="apache-2.0",
        command="python recipes/run_glue.py recipes/configs/sst2_minilm_stompp_ste.yaml",
    )
    golden = re.escape(GOLDEN.read_text(encoding="utf-8").rstrip("\n"))
    golden = golden.replace("<n>", r"[\d,]+(\.\d+)?").replace("<sha>", "[0-9a-f]{64}")
    assert re.fullmatch(golden, card.content)


def test_it_says_what_a_student_was_taught_by(packed_folder: Path) -> None:
    run = run_of(0.8765, BinarizationConfig())
    assert "teacher" not in model_card(packed_folder, results=run).content.lower()
    taught = {"teacher": "out/teacher", "temperature": 2.0, "logits_weight": 1.0, "hidden_weight": 0.5}
    run["recipe"] |= {**taught, "labels_weight": 0.0}
    assert (
        "; mask seed 0. The loss is the distance to a full-precision model that was fine-tuned for the task, with the "
        "weights 1 for logits, 0.5 for hidden states and temperature 2.\n"
    ) in model_card(packed_folder, results=run).content
    run["recipe"]["join_texts"] = 3
    said = "temperature 2. It judges texts with up to 2 random others behind them.\n"
    assert said in model_card(packed_folder, results=run).content
    run["recipe"] |= {"replace_words": 0.3, "text_copies": 4}
    said = (
        "random others behind them, and in which a share of 0.3 of the words that are one token is replaced by near "
        "ones, and drawn anew for each of 4 copies.\n"
    )
    assert said in model_card(packed_folder, results=run).content


def test_its_numbers(packed_folder: Path) -> None:
    card = model_card(packed_folder).content
    size = (packed_folder / "model.safetensors").stat().st_size
    # As BERT is built: six layers of its block; three embeddings, three norms, the pooler and a head of two classes.
    layers = 4 * [(32, 32)] + [(48, 32), (32, 48)]
    binary = sum(n * k + n for n, k in layers)
    embeddings, norms, pooler, head = (60 + 40 + 2) * 32, 3 * 2 * 32, 32 * 32 + 32, 2 * 32 + 2
    floats = 4 * (binary + embeddings + norms + pooler + head)
    assert f"**Weights:** {size:,} bytes; in float32 they are {floats:,}, {floats / size:.1f} times as many" in card
    # Bits; then in float32 the scales, biases, thresholds and two levels.
    packed = sum(n * -(-k // 8) + 4 * (n + n + k + 2) for n, k in layers)
    assert f"| 6 | 1 | 1 | `{{0,+s}} or {{-s,+s}}` | {binary:,} | {4 * binary:,} | {packed:,} |" in card
    assert f"| embedding tables | 3 | 32 | 32 |  | {embeddings:,} | {4 * embeddings:,} | {4 * embeddings:,} |" in card


def test_which_files_have_a_checksum(packed_folder: Path) -> None:
    deciding = ["vocab words.txt", "spiece.model", "generation_config.json"]
    others = [".tokenizer_config.json", "results.json", "requirements.txt", "trainer_state.json"]
    for name in deciding + others:
        (packed_folder / name).write_text("{}")
    stated = Figures.read(model_card(packed_folder).content).checksums
    own = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert list(stated) == sorted(own + deciding)


def test_structured_results(packed_folder: Path) -> None:
    results = run_of(0.5, BinarizationConfig())
    for row, matched, mismatched in zip(results["rows"], (0.7, 0.71), (0.6, 0.61), strict=True):
        del row["accuracy"]
        row |= {"matched_accuracy": matched, "mismatched_accuracy": mismatched, "matched_f1": 0.5}
    results["recipe"] |= {"task_name": "mnli", "max_eval_samples": 100}
    results |= {"columns": ["premise", "hypothesis"], "max_length": 128, "metric_config": "mnli"}
    given = {"dataset": "nyu-mll/glue", "base_model": "google-bert/bert-base-uncased", "license": "mit"}
    card = ModelCard(model_card(packed_folder, results=results, **given).content)
    assert card.data.base_model == "google-bert/bert-base-uncased" and card.data.base_model_relation == "quantized"
    assert (card.data.license, card.data.library_name) == ("mit", "transformers")
    assert card.data.datasets == "nyu-mll/glue" and card.data.pipeline_tag == "text-classification"
    scores = {(s.dataset_split, s.metric_type): s for s in card.data.eval_results}
    assert {key: score.metric_value for key, score in scores.items()} == {
        ("validation_matched", "accuracy"): 0.71,
        ("validation_mismatched", "accuracy"): 0.61,
        ("validation_matched", "f1"): 0.5,
    }
    for score in scores.values():
        assert (score.dataset_type, score.dataset_config) == ("nyu-mll/glue", "mnli")
        read = {"columns": ["premise", "hypothesis"], "max_length": 128, "first_rows": 100}
        assert score.dataset_args == read and score.metric_config == "mnli"
        assert score.metric_args == {"seed": 3, "mask_seed": 0}
    assert "its first 100 rows only" in card.content


def test_metrics_of_a_users_own(packed_folder: Path) -> None:
    results = run_of(0.5, BinarizationConfig())
    for row in results["rows"]:
        row |= {"macro_f1": 0.4, "balanced_accuracy": 0.3, "matched_pearson": 0.2, "dev_f1": 0.1}
    card = ModelCard(model_card(packed_folder, results=results | {"parts": ["dev"]}).content)
    found = {score.metric_type: (score.dataset_split, score.metric_value) for score in card.data.eval_results}
    assert found == {
        "accuracy": ("validation", 0.5),
        "macro_f1": ("validation", 0.4),
        "balanced_accuracy": ("validation", 0.3),
        "pearsonr": ("validation_matched", 0.2),
        "f1": ("validation_dev", 0.1),
    }


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({}, "clipped weights and activations are replaced by hard binary ones layer by layer"),
        ({"activations": False}, "clipped weights are replaced by hard binary ones layer by layer"),
        ({"progression": "none"}, "in all layers at once (the straight-through baseline, not StoMPP)."),
        (
            {"progression": "none", "surrogate": "none", "progression_start": 0.5},
            "at once, after 50% of the steps (without a gradient from then on, neither StoMPP nor the",
        ),
        (
            {"progression": "none", "progression_start": 1.0},
            "weights and activations are clipped and never become binary (the clipped network, not StoMPP).",
        ),
        ({"embeddings": True}, "1-bit entries of its embedding tables), 0% frozen"),
    ],
)
def test_how_it_was_made(
    config: dict[str, Any], sentence: str, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = binarize(tiny_model("bert", num_hidden_layers=1), BinarizationConfig(**config))
    text = model_card(model, repo_id=str(tmp_path)).content
    assert sentence in text
    clipped = config.get("progression_start") == 1.0
    assert clipped == ("How to get the 1-bit model" not in text) == ("pack(" not in text)
    assert Figures.read(text).bits == ("W1A32" if "activations" in config else "W1A1")
    model.save_pretrained(tmp_path)
    if clipped:
        (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        exec(example, {})


def test_packed_embeddings(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    pack(freeze(tiny_model("bert", num_hidden_layers=1), embeddings=True)).save_pretrained(tmp_path)
    text = model_card(tmp_path).content
    assert "are stored as bits; the entries of its embedding tables have 1 bit too. In training" in text


def test_nothing_is_stated_that_is_not_known(frozen_bert: PreTrainedModel, packed_folder: Path) -> None:
    results = run_of(0.5, BinarizationConfig())
    results["recipe"]["model_name_or_path"] = str(packed_folder)  # where it lies on a disk is not a base model
    for card in (model_card(pack(frozen_bert)), model_card(packed_folder, results=results)):
        assert card.data.base_model is None and "base_model" not in card.content and card.data.datasets is None
        assert card.data.license is None and "**License:** not recorded" in card.content
        assert "**Base model:** not recorded" in card.content and str(packed_folder.parent) not in card.content
    assert model_card(frozen_bert).data.eval_results is None
    assert "## Scores\n\nNone was recorded." in model_card(frozen_bert).content
    assert "100% frozen: it holds" in model_card(frozen_bert).content


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "MaskedLM", "MultipleChoice", ""])
def test_the_example_runs_as_written(
    head: str, tiny_model: Callable[..., PreTrainedModel], packed_folder: Path
) -> None:
    model = binarize(tiny_model("bert", head, num_hidden_layers=1))
    for layer in binary_layers(model).values():
        layer.set_frozen(1.0, step=1)
    pack(model).save_pretrained(packed_folder)
    printed = {}
    for tokenizer in (True, False):
        if not tokenizer:
            (packed_folder / "tokenizer_config.json").unlink()
        card = model_card(packed_folder, repo_id=str(packed_folder)).content
        (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(example, {})
        printed[tokenizer] = output.getvalue()
    expected = {"SequenceClassification": "'label': 'LABEL_", "TokenClassification": "'entity': 'LABEL_"}
    assert expected.get(head, "") in printed[True]
    assert "logits=tensor(" in printed[False] or "last_hidden_state=tensor(" in printed[False]


def test_scores_of_another_run_are_refused(packed_folder: Path, frozen_bert: PreTrainedModel) -> None:
    own = run_of(0.5, BinarizationConfig())
    with pytest.raises(ValueError, match=r"another BinarizationConfig \(clip, mask_seed\) than the model's"):
        model_card(packed_folder, results=run_of(0.5, BinarizationConfig(clip=1.5, mask_seed=4)))
    with pytest.raises(ValueError, match="another BinarizationConfig .full precision."):
        model_card(packed_folder, results=run_of(0.5, None))
    with pytest.raises(ValueError, match=r"no row of a packed model, only of \['latent fp32'\]"):
        model_card(packed_folder, results=own | {"rows": own["rows"][:1]})
    with pytest.raises(ValueError, match=r"compared\['fp'\] has task_name 'cola', but results has 'sst2'"):
        model_card(packed_folder, results=own, compared={"fp": run_of(0.5, None, recipe={"task_name": "cola"})})


def test_a_full_precision_model_has_none(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="BertForSequenceClassification is not binarized"):
        model_card(tiny_model("bert"))
    tiny_model("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not binarized: it has no quantization_config"):
        model_card(tmp_path)


def test_nothing_to_compare_with_is_an_error(packed_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"compared has \['STE baseline'\].*pass results too"):
        model_card(packed_folder, compared={"STE baseline": run_of(0.8, BinarizationConfig())})
