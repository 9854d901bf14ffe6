"""An adapter on the Hub: published with a card that names its base, and pulled onto that base alone."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub, Repo
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, Trainer

from hf_stompp import StomppCallback, pack, push
from hf_stompp.patching import bits_of
from hf_stompp.trainer_card import TrainerCard

peft = pytest.importorskip("peft")
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402

from hf_stompp.peft import train_base  # noqa: E402
from hf_stompp.peft.card import UNNAMED_BASE, adapter_card  # noqa: E402

Run = Callable[[str], dict[str, Any]]
BASE, OTHER, ADAPTER = "user/tiny-1bit", "user/other-1bit", "user/tiny-adapter"
EXPECTED = {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture
def adapter_folder(packed_folder: Path, tmp_path: Path) -> Path:
    base = AutoModelForSequenceClassification.from_pretrained(packed_folder)
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS"))
    for name, values in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(values, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def begin(packed_folder: Path) -> str:
    """Code that publishes the base."""
    return (
        "import hf_stompp\nfrom peft import PeftModel\nfrom transformers import AutoModelForSequenceClassification\n"
        f"hf_stompp.push({str(packed_folder)!r}, {BASE!r})\n"
    )


def test_pushed_and_pulled_by_fresh_processes(
    hub: LoopbackHub, run: Run, packed_folder: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    done = run(
        "import hf_stompp\n"
        f"hf_stompp.push({str(packed_folder)!r}, {BASE!r})\n"
        f"info = hf_stompp.push({str(adapter_folder)!r}, {ADAPTER!r}, base_model={BASE!r})\n"
        f"again = hf_stompp.push({str(adapter_folder)!r}, {ADAPTER!r}, base_model={BASE!r})\n"
        "result = info.oid, again.oid\n"
    )
    head = hub.head(ADAPTER)
    assert done["error"] is None and done["result"] == [head.sha, head.sha]
    assert set(head.files) == EXPECTED and len(hub.repos[ADAPTER].commits) == 2
    assert head.files["adapter_model.safetensors"] == (adapter_folder / "adapter_model.safetensors").read_bytes()
    assert json.loads(head.files["adapter_config.json"])["base_model_name_or_path"] == BASE

    text = head.files["README.md"].decode()
    card = ModelCard(text)
    assert (card.data.base_model, card.data.base_model_relation, card.data.library_name) == (BASE, "adapter", "peft")
    assert f"base_model:adapter:{BASE}" in card.data.tags and UNNAMED_BASE not in text and str(tmp_path) not in text
    assert f"[{BASE}](https://huggingface.co/{BASE})" in text
    assert bits_of(AutoModelForSequenceClassification.from_pretrained(packed_folder)) in text

    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    pulled = run(
        f"{example}\nimport torch\nfrom transformers import AutoModelForSequenceClassification\n"
        "from peft import AutoPeftModelForSequenceClassification\n"
        "x = torch.arange(1, 7)[None] % 7\n"
        "with torch.no_grad():\n"
        "    result = [model(x).logits.tolist()]\n"
        "    for auto in (AutoModelForSequenceClassification, AutoPeftModelForSequenceClassification):\n"
        f"        result.append(auto.from_pretrained({ADAPTER!r}).eval()(x).logits.tolist())\n"
    )
    assert pulled["error"] is None
    here = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(packed_folder), adapter_folder)
    with torch.no_grad():
        expected = here(torch.arange(1, 7)[None] % 7).logits.tolist()
    assert pulled["result"] == [expected] * 3


def test_pulled_onto_another_base_it_is_refused_and_both_are_named(
    hub: LoopbackHub, run: Run, packed_folder: Path, adapter_folder: Path
) -> None:
    answer = run(
        begin(packed_folder) + "from hf_stompp.patching import packed_layers\n"
        f"hf_stompp.push({str(adapter_folder)!r}, {ADAPTER!r}, base_model={BASE!r})\n"
        f"model = AutoModelForSequenceClassification.from_pretrained({BASE!r})\n"
        "next(iter(packed_layers(model).values())).weight.data[0, 0] ^= 1\n"
        f"hf_stompp.push(model, {OTHER!r})\n"
        f"PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained({OTHER!r}), {ADAPTER!r})\n"
    )
    assert "ValueError" in answer["error"]
    assert f"trained on the bits of '{BASE}'" in answer["message"] and f"'{OTHER}' has others" in answer["message"]


def test_the_active_adapter_of_a_model_in_memory_is_pushed(
    hub: LoopbackHub, run: Run, packed_folder: Path, adapter_folder: Path
) -> None:
    answer = run(
        begin(packed_folder) + f"base = AutoModelForSequenceClassification.from_pretrained({BASE!r})\n"
        f"model = PeftModel.from_pretrained(base, {str(adapter_folder)!r}, adapter_name='food')\n"
        "model.peft_config['food'].base_model_name_or_path = model.get_base_model().name_or_path\n"
        f"hf_stompp.push(model, {ADAPTER!r})\n"
    )
    assert answer["error"] is None
    head = hub.head(ADAPTER)
    assert set(head.files) == EXPECTED
    card = ModelCard(head.files["README.md"].decode())
    assert card.data.base_model == BASE and "for a **1-bit** BertForSequenceClassification (W1A1)" in card.text


def test_a_base_that_the_hub_does_not_have(hub: LoopbackHub, run: Run, adapter_folder: Path) -> None:
    answer = run(
        f"import hf_stompp\nhf_stompp.push({str(adapter_folder)!r}, {ADAPTER!r}, base_model='user/nothing')\n"
    )
    assert "FileNotFoundError" in answer["error"] and "the Hub has no 'user/nothing'" in answer["message"]
    assert ADAPTER not in hub.repos


def test_a_persons_card_stays_and_gets_the_base(adapter_folder: Path, hub: LoopbackHub, run: Run) -> None:
    (adapter_folder / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    hub.repos[BASE] = Repo(private=False)
    hub.repos[BASE].branches["main"] = hub.repos[BASE].commit("made", {}, None)
    answer = run(f"import hf_stompp\nhf_stompp.push({str(adapter_folder)!r}, {ADAPTER!r}, base_model={BASE!r})\n")
    assert answer["error"] is None
    card = ModelCard(hub.head(ADAPTER).files["README.md"].decode())
    assert card.text.strip() == "# Mine" and card.data.license == "mit" and card.data.base_model == BASE


def test_what_cannot_be_published_is_refused_before_anything_is_sent(
    packed_folder: Path, adapter_folder: Path, make_model: Callable[..., PreTrainedModel]
) -> None:
    with pytest.raises(ValueError, match=rf"names its base '{packed_folder}', which is no id on the Hub.*base_model="):
        push(adapter_folder, ADAPTER)
    with pytest.raises(TypeError, match="what is pushed is no adapter"):
        push(packed_folder, BASE, base_model=BASE)
    with pytest.raises(TypeError, match="an adapter has that of its base"):
        push(adapter_folder, ADAPTER, tokenizer=object(), base_model=BASE)
    trained = train_base(get_peft_model(make_model(), LoraConfig(target_modules=["query"])))
    with pytest.raises(ValueError, match=r"base of this adapter is latent.*pack\(model\)"):
        push(trained, ADAPTER, base_model=BASE)
    trained.save_pretrained(adapter_folder.with_name("trained"))
    with pytest.raises(ValueError, match=r"base of this adapter is latent.*pack\(model\)"):
        push(adapter_folder.with_name("trained"), ADAPTER, base_model=BASE)
    inside = AutoModelForSequenceClassification.from_pretrained(packed_folder)
    inside.load_adapter(str(adapter_folder))
    with pytest.raises(ValueError, match="push takes a PeftModel with one active adapter"):
        push(inside, ADAPTER, base_model=BASE)
    weights = adapter_folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="adapter_model.safetensors is truncated or corrupted"):
        push(adapter_folder, ADAPTER, base_model=BASE)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="has no adapter_model.safetensors"):
        push(adapter_folder, ADAPTER, base_model=BASE)


def test_the_card_of_a_run(packed_folder: Path, adapter_folder: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(packed_folder)
    model = PeftModel.from_pretrained(base, adapter_folder)
    run = {
        "recipe": {"task_name": "sst2", "max_eval_samples": 64}, "seed": 1, "mask_seed": None, "steps": 300,
        "batch_size": 32, "learning_rate": 1e-3, "lr_scheduler": "linear", "warmup_steps": 15, "weight_decay": 0.0,
        "rows": [
            {"model": "base alone, reloaded", "accuracy": 0.5, "bytes": 1000, "eval_seconds": 1.0},
            {"model": "base and adapter, reloaded", "accuracy": 0.75, "bytes": 1500, "eval_seconds": 1.0},
        ],
    }  # fmt: skip
    text = str(adapter_card(model, results=run, base_model=BASE, dataset="nyu-mll/glue", command="python train.py"))
    assert "| base and adapter, reloaded | 0.7500 | 1,500 |" in text and "its first 64 rows" in text
    assert "300 steps of 32 examples" in text and "python train.py" in text and "`nyu-mll/glue` (`sst2`)" in text
    trained = sum(values.numel() for name, values in model.named_parameters() if ".default." in name)
    assert f"**Adapter:** {trained:,} parameters, {4 * trained:,} bytes" in text
    with pytest.raises(ValueError, match="adapter_name: received 'nobody'; allowed: default"):
        adapter_card(model, "nobody")


def test_the_trainers_card_is_that_of_the_adapter(
    make_model: Callable[..., PreTrainedModel], make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    model = train_base(get_peft_model(make_model(), LoraConfig(target_modules=["query"], task_type="SEQ_CLS")))
    trainer = make_trainer(model, callback=StomppCallback())
    trainer.train()
    trainer.model = pack(model)
    TrainerCard.install(trainer)()
    assert "An **adapter** (LORA, of PEFT)" in (Path(trainer.args.output_dir) / "README.md").read_text()
