"""`from_pretrained` and `save_pretrained`: latent checkpoints, packed checkpoints, and everything that is wrong."""

import filecmp
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from hf_stompp import BinarizationConfig, binarize, calibrate, pack
from hf_stompp.patching import binary_layers, packed_layers, packed_tables
from hf_stompp.quantizer import StomppHfQuantizer, register


@pytest.fixture
def float_folder(tiny_model: Callable, tmp_path: Path) -> Path:
    tiny_model("bert").save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@pytest.fixture
def packed_folder(tiny_model: Callable, tiny_batch: Callable, tmp_path: Path) -> Path:
    save_packed(tiny_model("bert"), tiny_batch(), tmp_path / "packed")
    return tmp_path / "packed"


def save_packed(
    model: PreTrainedModel,
    batch: dict,
    folder: Path,
    config: BinarizationConfig | None = None,
    dtype: torch.dtype | None = None,
    **kwargs,
) -> PreTrainedModel:
    binarize(model, config)
    calibrate(model, batch)
    for layer in binary_layers(model).values():
        layer.set_frozen(1.0, step=3)
    packed = pack(model, dtype=dtype)
    packed.save_pretrained(folder, **kwargs)
    return packed


def assert_same_tensors(a: torch.nn.Module, b: torch.nn.Module) -> None:
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def test_from_pretrained_gives_the_model_of_binarize(architecture: str, tiny_model: Callable, tmp_path: Path) -> None:
    tiny_model(architecture).save_pretrained(tmp_path)
    config = BinarizationConfig(replace_gelu=True, embeddings=True)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=config)
    patched = binarize(AutoModelForSequenceClassification.from_pretrained(tmp_path), config)
    assert_same_tensors(loaded, patched)
    assert dict(loaded.config.quantization_config) == dict(patched.config.quantization_config)
    assert {n: (m.key, m.unit, getattr(m, "unsigned", None)) for n, m in binary_layers(loaded).items()} == {
        n: (m.key, m.unit, getattr(m, "unsigned", None)) for n, m in binary_layers(patched).items()
    }
    assert str(loaded) == str(patched)
    assert not getattr(loaded, "hf_quantizer", None) and not loaded.is_quantized  # an ordinary, trainable model


def test_config_as_a_dict(float_folder: Path) -> None:
    config = {"quant_method": "stompp", "activations": False}
    model = AutoModelForSequenceClassification.from_pretrained(float_folder, quantization_config=config)
    assert all(layer.activation_scale is None for layer in binary_layers(model).values())


def test_latents_stay_float32_in_a_half_precision_model(float_folder: Path, tiny_batch: Callable) -> None:
    config = BinarizationConfig(embeddings=True)
    model = BertForSequenceClassification.from_pretrained(
        float_folder, dtype=torch.bfloat16, quantization_config=config
    )
    for layer in binary_layers(model).values():
        kept = (layer.weight, layer.frozen_fraction, getattr(layer, "activation_scale", layer.weight))
        assert {tensor.dtype for tensor in kept} == {torch.float32}
    assert model.bert.embeddings(torch.tensor([[1, 2]])).dtype == torch.bfloat16
    patched = binarize(BertForSequenceClassification.from_pretrained(float_folder, dtype=torch.bfloat16), config)
    assert {layer.weight.dtype for layer in binary_layers(patched).values()} == {torch.float32}
    assert model.classifier.weight.dtype == torch.bfloat16
    assert model(**tiny_batch()).logits.isfinite().all()


def test_latent_checkpoint_reloads_with_its_masks(
    architecture: str, tiny_model: Callable, tiny_batch: Callable, tmp_path: Path
) -> None:
    model = binarize(tiny_model(architecture), BinarizationConfig(refresh=0.3, embeddings=True))
    calibrate(model, tiny_batch())
    for layer in binary_layers(model).values():
        layer.set_frozen(0.4, step=7)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert_same_tensors(model, again)
    for name, layer in binary_layers(model).items():
        for kind in layer.MASKS:
            assert torch.equal(getattr(layer, f"{kind}_mask"), getattr(again.get_submodule(name), f"{kind}_mask"))
        assert 0 < layer.weight_mask.sum() < layer.weight_mask.numel()


def test_packed_checkpoint_round_trip_is_byte_identical(
    architecture: str, tiny_model: Callable, tiny_batch: Callable, tmp_path: Path
) -> None:
    batch = tiny_batch()
    packed = save_packed(tiny_model(architecture), batch, tmp_path / "a", BinarizationConfig(replace_gelu=True))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["config.json", "model.safetensors"]
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", files, shallow=False)[0] == files
    torch.testing.assert_close(again(**batch).logits, packed(**batch).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "tables", [{"embeddings": True}, *({"embedding_bits": bits} for bits in (16, 8, 4, 1))], ids=str
)
def test_small_embeddings_make_the_round_trip(
    tables: dict, dtype: torch.dtype | None, tiny_model: Callable, tiny_batch: Callable, tmp_path: Path
) -> None:
    config = BinarizationConfig(**tables)
    packed = save_packed(tiny_model("bert"), tiny_batch(), tmp_path / "a", config, dtype)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    assert again.dtype == (dtype or torch.float32)
    assert_same_tensors(packed, again)
    again.save_pretrained(tmp_path / "b")
    for file in ("config.json", "model.safetensors"):
        assert filecmp.cmp(tmp_path / "a" / file, tmp_path / "b" / file, shallow=False)
    full = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert full(**tiny_batch()).logits.dtype == torch.float32
    assert_same_tensors(AutoModel.from_pretrained(tmp_path / "a"), again.bert)


TABLE = "bert.embeddings.word_embeddings"
BROKEN_TABLES = {
    "no-scale": lambda t: t.pop(f"{TABLE}.weight_scale"),
    "no-weight": lambda t: t.pop(f"{TABLE}.weight"),
    "neither": lambda t: [t.pop(f"{TABLE}.weight_scale"), t.pop(f"{TABLE}.weight")],
    "short-scale": lambda t: t.update({f"{TABLE}.weight_scale": torch.ones(59)}),
    "nan-scale": lambda t: t[f"{TABLE}.weight_scale"].fill_(float("nan")),
    "other-bits": lambda t: t.update({f"{TABLE}.weight": torch.zeros(60, 32, dtype=torch.uint8)}),
    "norm": lambda t: t.pop("bert.embeddings.LayerNorm.weight"),
}


@pytest.mark.parametrize("change", BROKEN_TABLES.values(), ids=BROKEN_TABLES)
def test_broken_tables_are_refused_by_name(
    change: Callable, tiny_model: Callable, tiny_batch: Callable, tmp_path: Path
) -> None:
    save_packed(tiny_model("bert"), tiny_batch(), tmp_path, BinarizationConfig(embedding_bits=4))
    change_tensors(tmp_path, change)
    with pytest.raises(ValueError, match=r"embeddings\.(word_embeddings|LayerNorm\.weight)"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_a_packed_table_that_the_config_does_not_list_is_refused(
    tiny_model: Callable, tiny_batch: Callable, tmp_path: Path
) -> None:
    save_packed(tiny_model("bert"), tiny_batch(), tmp_path, BinarizationConfig(embeddings=True))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]["modules"]["embeddings.word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"table bert.embeddings.word_embeddings.* does not list it with its bits"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_does_not_round_scales_and_thresholds(dtype: torch.dtype, packed_folder: Path) -> None:
    full = AutoModelForSequenceClassification.from_pretrained(packed_folder)
    half = AutoModelForSequenceClassification.from_pretrained(packed_folder, dtype=dtype)
    assert half.classifier.weight.dtype == dtype
    for name, layer in packed_layers(full).items():
        for tensor in ("weight", "weight_scale", "activation_threshold", "activation_levels"):
            assert torch.equal(getattr(layer, tensor), getattr(half.get_submodule(name), tensor))


def test_packed_file_holds_one_bit_a_weight(packed_folder: Path) -> None:
    tensors = load_file(packed_folder / "model.safetensors")
    weight = tensors["bert.encoder.layer.0.output.dense.weight"]
    assert weight.dtype == torch.uint8 and weight.shape == (32, 48 // 8)
    linears = [name.removesuffix("_scale") for name in tensors if name.endswith(".weight_scale")]
    assert len(linears) == 12 and all(tensors[name].dtype == torch.uint8 for name in linears)


def test_sharded_checkpoint(tiny_model: Callable, tiny_batch: Callable, tmp_path: Path) -> None:
    packed = save_packed(tiny_model("bert"), tiny_batch(), tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_tensors(packed, AutoModelForSequenceClassification.from_pretrained(tmp_path))


def test_backbone_from_a_head_checkpoint_and_the_reverse(
    packed_folder: Path, tiny_batch: Callable, tmp_path: Path
) -> None:
    head = AutoModelForSequenceClassification.from_pretrained(packed_folder)
    backbone = AutoModel.from_pretrained(packed_folder)
    assert len(packed_layers(backbone)) == 12
    assert_same_tensors(backbone, head.bert)
    backbone.save_pretrained(tmp_path)
    assert_same_tensors(AutoModelForSequenceClassification.from_pretrained(tmp_path).bert, head.bert)


def test_loading_without_the_package_fails_loudly(packed_folder: Path) -> None:
    code = f"from transformers import AutoModel; AutoModel.from_pretrained({str(packed_folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "size mismatch" in done.stderr.lower() or "mismatched" in done.stderr.lower(), done.stderr[-2000:]


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("layer", ["bert.embeddings.word_embeddings", "bert.encoder.layer.0.output.dense"])
@pytest.mark.parametrize("how", ["bin", "state_dict"])
def test_checkpoints_without_a_header_are_checked_too(
    how: str, layer: str, tiny_model: Callable, tiny_batch: Callable, tmp_path: Path
) -> None:
    config = BinarizationConfig(embedding_bits=8)
    packed = save_packed(tiny_model("bert", "MaskedLM"), tiny_batch(), tmp_path, config)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()

    def load() -> PreTrainedModel:
        if how == "state_dict":
            return BertModel.from_pretrained(None, config=AutoConfig.from_pretrained(tmp_path), state_dict=state)
        torch.save(state, tmp_path / "pytorch_model.bin")
        return AutoModel.from_pretrained(tmp_path)

    loaded = load().state_dict()  # with a pooler besides; the word embeddings are tied in the head, hence not packed
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in packed.bert.state_dict().items())
    scale = f"{layer}.weight_scale"
    if scale in state:
        del state[scale]
        with pytest.raises(ValueError, match=r"output\.dense\.weight_scale"):
            load()


def test_nothing_goes_to_disk(packed_folder: Path) -> None:
    device_map = {"bert.embeddings": "cpu", "bert.pooler": "cpu", "classifier": "cpu", "bert.encoder": "disk"}
    with pytest.raises(ValueError, match="device_map puts modules on disk"):
        AutoModelForSequenceClassification.from_pretrained(packed_folder, device_map=device_map)


DENSE = "bert.encoder.layer.0.output.dense"
BROKEN = {
    "no-scale": lambda t: t.pop(f"{DENSE}.weight_scale"),
    "no-weight": lambda t: t.pop(f"{DENSE}.weight"),
    "no-bias": lambda t: t.pop(f"{DENSE}.bias"),
    "no-threshold": lambda t: t.pop(f"{DENSE}.activation_threshold"),
    "no-levels": lambda t: t.pop(f"{DENSE}.activation_levels"),
    "short-scale": lambda t: t.update({f"{DENSE}.weight_scale": torch.ones(31)}),
    "half-scale": lambda t: t.update({f"{DENSE}.weight_scale": torch.ones(32, dtype=torch.float16)}),
    "float-weight": lambda t: t.update({f"{DENSE}.weight": torch.ones(32, 48)}),
    "negative-scale": lambda t: t[f"{DENSE}.weight_scale"].fill_(-1),
    "nan-scale": lambda t: t[f"{DENSE}.weight_scale"].fill_(float("nan")),
    "wrong-levels": lambda t: t[f"{DENSE}.activation_levels"].copy_(torch.tensor([0.5, 1.0])),
    "infinite-threshold": lambda t: t[f"{DENSE}.activation_threshold"].fill_(float("inf")),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_a_broken_packed_checkpoint_is_refused_by_name(change: Callable, packed_folder: Path) -> None:
    change_tensors(packed_folder, change)
    with pytest.raises(ValueError, match=r"encoder\.layer\.0\.output\.dense\."):
        AutoModelForSequenceClassification.from_pretrained(packed_folder)


def test_a_whole_missing_layer_is_refused(packed_folder: Path) -> None:
    change_tensors(packed_folder, lambda t: [t.pop(key) for key in list(t) if key.startswith(DENSE)])
    with pytest.raises(ValueError, match=r"encoder\.layer\.0\.output\.dense\.weight"):
        AutoModelForSequenceClassification.from_pretrained(packed_folder)


def test_set_padding_bits_are_refused(tiny_model: Callable, tiny_batch: Callable, tmp_path: Path) -> None:
    save_packed(tiny_model("bert", intermediate_size=44), tiny_batch(), tmp_path)
    change_tensors(tmp_path, lambda t: t[f"{DENSE}.weight"][3, -1].fill_(255))
    with pytest.raises(ValueError, match=r"dense\.weight .*padding"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.99], ids=lambda keep: f"{keep:.1%}")
def test_a_truncated_file_is_refused(keep: float, packed_folder: Path) -> None:
    file = packed_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or corrupted"):
        AutoModelForSequenceClassification.from_pretrained(packed_folder)


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= changes
    file.write_text(json.dumps(config))


def test_a_newer_format_version_is_refused(packed_folder: Path) -> None:
    edit_config(packed_folder, format_version=99)
    with pytest.raises(ValueError, match=r"format_version is 99.*upgrade"):
        AutoModelForSequenceClassification.from_pretrained(packed_folder)


def test_keys_of_a_newer_version_are_kept(packed_folder: Path, tmp_path: Path) -> None:
    edit_config(packed_folder, invented_later=3)
    with pytest.warns(UserWarning, match="invented_later"):
        model = AutoModelForSequenceClassification.from_pretrained(packed_folder)
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]["invented_later"] == 3


def test_a_latent_checkpoint_without_its_state_is_refused(tiny_model: Callable, tmp_path: Path) -> None:
    binarize(tiny_model("bert"), BinarizationConfig()).save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda t: t.pop(f"{DENSE}.frozen_fraction"))
    with pytest.raises(ValueError, match=r"output\.dense\.frozen_fraction"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_binary_activations_cannot_be_packed_while_loading(float_folder: Path) -> None:
    with pytest.raises(ValueError, match=r'mode="packed".*activations=False.*pack\(\)'):
        AutoModel.from_pretrained(float_folder, quantization_config=BinarizationConfig(mode="packed"))


@pytest.mark.parametrize("bits", [32, 8])
def test_weights_are_packed_while_loading(bits: int, float_folder: Path, tiny_batch: Callable, tmp_path: Path) -> None:
    config = BinarizationConfig(mode="packed", activations=False, embedding_bits=bits)
    model = AutoModelForSequenceClassification.from_pretrained(float_folder, quantization_config=config)
    trained = AutoModelForSequenceClassification.from_pretrained(
        float_folder, quantization_config=BinarizationConfig(activations=False, embedding_bits=bits)
    )
    for layer in binary_layers(trained).values():
        layer.set_frozen(1.0, step=1)
    assert_same_tensors(model, pack(trained))
    assert dict(model.config.quantization_config) == dict(pack(trained).config.quantization_config)
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed")
    assert_same_tensors(model, again)


@pytest.mark.usefixtures("reference_kernels")
@pytest.mark.parametrize(
    "config",
    [BinarizationConfig(replace_gelu=True, embedding_bits=4), BinarizationConfig(activations=False)],
    ids=["w1a1", "w1a32"],
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_dequantized_is_the_same_model(
    config: BinarizationConfig,
    dtype: torch.dtype | None,
    architecture: str,
    tiny_model: Callable,
    tiny_batch: Callable,
    tmp_path: Path,
) -> None:
    batch = tiny_batch()
    save_packed(tiny_model(architecture), batch, tmp_path, config, dtype)
    packed = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    floats = AutoModelForSequenceClassification.from_pretrained(tmp_path).dequantize()
    assert not packed_layers(floats) and not packed_tables(floats)
    assert not floats.is_quantized and "quantization_config" not in floats.config.to_dict()
    with torch.no_grad():
        expected = packed(**batch).logits
        torch.testing.assert_close(floats(**batch).logits, expected, rtol=1e-6, atol=1e-7)
    assert floats.dtype == packed.dtype == (dtype or torch.float32)


def test_a_dequantized_model_warns_of_saving_it(
    packed_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("hf_stompp"), "propagate", True)
    AutoModelForSequenceClassification.from_pretrained(packed_folder).dequantize()
    assert "would load as another model" in caplog.text


def test_a_dequantized_model_exports_to_onnx(packed_folder: Path, tiny_batch: Callable, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    batch = tiny_batch()
    floats = AutoModelForSequenceClassification.from_pretrained(packed_folder).dequantize()
    expected = AutoModelForSequenceClassification.from_pretrained(packed_folder)(**batch).logits.detach()
    file = str(tmp_path / "model.onnx")
    torch.onnx.export(floats, (), file, kwargs=dict(batch), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
    np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_the_trainer_refuses_to_train_a_packed_model(packed_folder: Path, tmp_path: Path) -> None:
    packed = AutoModelForSequenceClassification.from_pretrained(packed_folder)
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(packed, TrainingArguments(tmp_path, use_cpu=True, report_to="none"))


def test_trainer_resume_restores_renamed_modules(float_folder: Path) -> None:
    """ViT-like renames and legacy names: a checkpoint of a training model has the names of its modules."""
    tensors = load_file(float_folder / "model.safetensors")
    legacy = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
              for k, v in tensors.items()}  # fmt: skip
    save_file(legacy, float_folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForSequenceClassification.from_pretrained(float_folder, quantization_config=BinarizationConfig())
    model.save_pretrained(float_folder.parent / "latent")
    saved = load_file(float_folder.parent / "latent" / "model.safetensors")
    assert set(saved) == set(model.state_dict())


def test_registering_twice_does_nothing() -> None:
    register()
    register()
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["stompp"] is BinarizationConfig
    assert AUTO_QUANTIZER_MAPPING["stompp"] is StomppHfQuantizer
