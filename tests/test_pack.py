"""Packing is exact: the packed model computes what the fully frozen latent model computes."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, BertForMaskedLM, PreTrainedModel

from hf_stompp import BinarizationConfig, binarize, calibrate, pack, summary, unpack
from hf_stompp.layers import BinaryEmbedding, BinaryLinear, PackedLinear
from hf_stompp.patching import binary_layers, packed_layers, packed_tables

VARIANTS = {
    "w1a1": BinarizationConfig(),
    "w1a1-relu": BinarizationConfig(replace_gelu=True),
    "w1a32": BinarizationConfig(activations=False),
    "tensor-scale": BinarizationConfig(scale="tensor", learn_activation_shift=False),
    "no-scale": BinarizationConfig(scale="none", activation_levels="signed"),
    "tables": BinarizationConfig(embeddings=True),
}


def freeze(model: PreTrainedModel, fraction: float = 1.0) -> PreTrainedModel:
    for layer in binary_layers(model).values():
        layer.set_frozen(fraction, step=5)
    return model


def frozen_model(model: PreTrainedModel, batch: dict, config: BinarizationConfig) -> PreTrainedModel:
    """A fully frozen model whose learned tensors are not at their starting values."""
    binarize(model, config)
    if config.activations:
        calibrate(model, batch)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in binary_layers(model).values():
            layer.weight[0, :3] = torch.tensor([0.0, -0.0, 1e-30])
            for learned in ("bias", "activation_shift"):
                tensor = getattr(layer, learned, None)
                if tensor is not None:
                    tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    return freeze(model)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_packed_logits_equal_the_frozen_latent_ones(
    architecture: str, config: BinarizationConfig, tiny_model: Callable, tiny_batch: Callable
) -> None:
    latent = frozen_model(tiny_model(architecture), tiny_batch(), config)
    packed = pack(latent)
    assert (packed_layers(packed) | packed_tables(packed)).keys() == binary_layers(latent).keys()
    assert not binary_layers(packed)
    for size, length in ((1, 5), (3, 9), (8, 17)):
        batch = tiny_batch(size=size, length=length, seed=size)
        with torch.no_grad():
            expected, got = latent(**batch).logits, packed(**batch).logits
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        assert expected.std() > 0


def test_packed_layer_against_a_float64_reference(tiny_model: Callable, tiny_batch: Callable) -> None:
    latent = frozen_model(tiny_model("bert"), tiny_batch(), BinarizationConfig())
    generator = torch.Generator().manual_seed(0)
    for name, packed in packed_layers(pack(latent)).items():
        layer = latent.get_submodule(name)
        assert isinstance(layer, BinaryLinear)
        x = torch.randn(7, layer.in_features, generator=generator)
        w, x64 = layer.weight.detach().double().numpy(), x.double().numpy()
        alpha = np.abs(w).mean(axis=1, keepdims=True)
        gamma = layer.activation_scale.item()
        if layer.unsigned:
            x_hat = np.where(x64 >= gamma / 2, gamma, 0.0)
        else:
            x_hat = np.where(x64 - layer.activation_shift.detach().double().numpy() >= 0, gamma, -gamma)
        expected = x_hat @ (alpha * np.where(w >= 0, 1.0, -1.0)).T + layer.bias.detach().double().numpy()
        np.testing.assert_allclose(packed(x).detach().numpy(), expected, rtol=1e-5, atol=1e-5)


def test_one_bit_a_weight(tiny_model: Callable, tiny_batch: Callable) -> None:
    packed = pack(frozen_model(tiny_model("minilm"), tiny_batch(), BinarizationConfig()))
    for layer in packed_layers(packed).values():
        assert layer.weight.dtype == torch.uint8
        assert layer.weight.nbytes == layer.out_features * -(-layer.in_features // 8)
        assert layer.weight_scale.nbytes == 4 * layer.out_features


def test_pack_leaves_the_model_as_it_was(tiny_model: Callable, tiny_batch: Callable) -> None:
    latent = frozen_model(tiny_model("bert"), tiny_batch(), BinarizationConfig())
    latent.train()
    before = copy.deepcopy(latent.state_dict())
    packed = pack(latent)
    after = latent.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)
    assert latent.training and not packed.training
    assert latent.config.quantization_config.mode == "train" and packed.config.quantization_config.mode == "packed"
    packed.classifier.weight.data.zero_()
    assert latent.classifier.weight.abs().sum() > 0


def test_unpack_is_the_inverse(architecture: str, tiny_model: Callable, tiny_batch: Callable) -> None:
    batch = tiny_batch()
    packed = pack(frozen_model(tiny_model(architecture), batch, BinarizationConfig()))
    latent = unpack(packed)
    again = pack(latent)
    for name, layer in packed_layers(packed).items():
        other = again.get_submodule(name)
        assert torch.equal(layer.weight, other.weight)
        torch.testing.assert_close(layer.weight_scale, other.weight_scale, rtol=1e-6, atol=0)
        for tensor in ("activation_threshold", "activation_levels"):
            assert torch.equal(getattr(layer, tensor), getattr(other, tensor))
    # Trainable again: a gradient reaches the latent weights.
    latent.train()(**batch).logits.sum().backward()
    assert all(layer.weight.grad is not None for layer in binary_layers(latent).values())


def test_packed_model_in_half_precision_keeps_scales_and_thresholds(
    tiny_model: Callable, tiny_batch: Callable
) -> None:
    packed = pack(frozen_model(tiny_model("bert"), tiny_batch(), BinarizationConfig()))
    before = {name: layer.activation_threshold.clone() for name, layer in packed_layers(packed).items()}
    for layer in packed_layers(packed).values():
        layer.to(torch.bfloat16)
    for name, layer in packed_layers(packed).items():
        assert layer.weight.dtype == torch.uint8 and layer.weight_scale.dtype == torch.float32
        assert torch.equal(layer.activation_threshold, before[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_weight_made_in_half_precision_is_the_rounded_one(dtype: torch.dtype) -> None:
    layer = PackedLinear.empty(nn.Linear(13, 5), binary_input=False)
    layer.weight.random_(0, 256)
    layer.weight_scale.copy_(torch.tensor([0.0, 1e-9, 1e-6, 0.0123, 7.0]))
    assert torch.equal(layer.dequantized_weight(dtype), layer.dequantized_weight().to(dtype))


def test_to_float_is_the_exact_weight(tiny_model: Callable, tiny_batch: Callable) -> None:
    latent = frozen_model(tiny_model("bert"), tiny_batch(), BinarizationConfig(activations=False))
    packed = pack(latent)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    for name, layer in packed_layers(packed).items():
        if layer.in_features == 32:
            assert torch.equal(layer.to_float()(x), latent.get_submodule(name)(x))


def test_a_half_frozen_model_is_refused(tiny_model: Callable) -> None:
    model = freeze(binarize(tiny_model("bert"), BinarizationConfig()), 0.25)
    with pytest.raises(ValueError, match=r"frozen fraction of this one is 0\.2500 .*query"):
        pack(model)


def test_wrong_models_are_refused(tiny_model: Callable, tiny_batch: Callable) -> None:
    with pytest.raises(ValueError, match="not binarized"):
        pack(tiny_model("bert"))
    packed = pack(frozen_model(tiny_model("bert"), tiny_batch(), BinarizationConfig()))
    with pytest.raises(ValueError, match="packed already"):
        pack(packed)
    with pytest.raises(ValueError, match="binarized already"):
        binarize(packed, BinarizationConfig())
    with pytest.raises(ValueError, match="no packed layer"):
        unpack(tiny_model("bert"))
    with pytest.raises(ValueError, match="weights=False"):
        pack(freeze(binarize(tiny_model("bert"), BinarizationConfig(weights=False))))


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
def test_regression_and_multi_label_heads(problem_type: str, tiny_model: Callable, tiny_batch: Callable) -> None:
    labels = 1 if problem_type == "regression" else 4
    model = tiny_model("bert", num_labels=labels, problem_type=problem_type)
    batch = tiny_batch()
    latent = frozen_model(model, batch, BinarizationConfig())
    targets = torch.rand(3, labels).round() if labels > 1 else torch.rand(3)
    loss = latent.train()(**batch, labels=targets).loss
    loss.backward()
    assert loss.isfinite() and binary_layers(latent)["bert.encoder.layer.0.output.dense"].weight.grad.abs().sum() > 0
    packed = pack(latent)
    torch.testing.assert_close(packed(**batch).logits, latent.eval()(**batch).logits, rtol=1e-5, atol=1e-6)
    assert isinstance(packed.bert.encoder.layer[0].output.dense, PackedLinear)


@pytest.mark.usefixtures("reference_kernels")
def test_autocast_gives_both_the_same_bits(tiny_model: Callable, tiny_batch: Callable) -> None:
    batch = tiny_batch(size=8, length=20)
    for scale in (0.3, 0.7001, 1.2345):
        latent = frozen_model(tiny_model("bert"), batch, BinarizationConfig())
        for layer in binary_layers(latent).values():
            layer.activation_scale.data.fill_(scale)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(pack(latent)(**batch).logits, latent(**batch).logits)


def test_real_minilm(minilm: str, tiny_batch: Callable) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(minilm)
    batch = tiny_batch()
    latent = frozen_model(model, batch, BinarizationConfig(replace_gelu=True))
    torch.testing.assert_close(pack(latent)(**batch).logits, latent(**batch).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [16, 8, 4, 1])
def test_embedding_tables_of_few_bits(
    bits: int, architecture: str, tiny_model: Callable, tiny_batch: Callable
) -> None:
    batch = tiny_batch()
    latent = frozen_model(tiny_model(architecture), batch, BinarizationConfig())
    packed = pack(latent, embedding_bits=bits)
    tables = packed_tables(packed)
    assert tables and all(table.bits == bits for table in tables.values())
    assert packed.config.quantization_config.embedding_bits == bits
    assert latent.config.quantization_config.embedding_bits == 32
    # The same as a latent model whose tables have been rounded.
    rounded = copy.deepcopy(latent)
    for name, table in tables.items():
        rounded.get_submodule(name).weight.data.copy_(table.to_float().weight)
    with torch.no_grad():
        torch.testing.assert_close(packed(**batch).logits, rounded(**batch).logits, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(unpack(packed)(**batch).logits, packed(**batch).logits, rtol=1e-5, atol=1e-6)


def test_the_config_says_how_many_bits_a_table_gets(tiny_model: Callable, tiny_batch: Callable) -> None:
    latent = frozen_model(tiny_model("bert"), tiny_batch(), BinarizationConfig(embedding_bits=4))
    assert {table.bits for table in packed_tables(pack(latent)).values()} == {4}
    assert not packed_tables(pack(latent, embedding_bits=32))
    with pytest.raises(ValueError, match=r"embedding_bits is 3; allowed: .*32, 16, 8, 4, 1"):
        pack(latent, embedding_bits=3)


def test_a_table_of_the_training_has_one_bit_beside_rounded_ones(
    tiny_model: Callable, tiny_batch: Callable, tmp_path: Path
) -> None:
    batch, word = tiny_batch(), "bert.embeddings.word_embeddings"
    latent = frozen_model(tiny_model("bert"), batch, BinarizationConfig(include=["*.word_embeddings"]))
    packed = pack(latent, embedding_bits=8)
    bits = {name: table.bits for name, table in packed_tables(packed).items()}
    assert bits == {name: 1 if name == word else 8 for name in bits} and len(bits) == 3
    again = unpack(packed)
    assert isinstance(again.get_submodule(word), BinaryEmbedding) and again.get_submodule(word).fraction == 1
    assert type(again.bert.embeddings.position_embeddings) is torch.nn.Embedding
    packed.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, packed(**batch).logits)
        torch.testing.assert_close(again(**batch).logits, packed(**batch).logits, rtol=1e-5, atol=1e-6)


def test_a_model_of_which_only_the_tables_are_binary(tiny_model: Callable, tiny_batch: Callable) -> None:
    batch = tiny_batch()
    config = BinarizationConfig(embeddings=True, activations=False, exclude=["*encoder*"])
    latent = frozen_model(tiny_model("bert"), batch, config)
    packed = pack(latent)
    assert not packed_layers(packed) and summary(packed).frozen_fraction == 1.0
    with torch.no_grad():
        torch.testing.assert_close(unpack(packed)(**batch).logits, latent(**batch).logits, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="binarized already"):
        binarize(packed)
    with pytest.raises(ValueError, match="packed already"):
        pack(packed)


def test_a_packed_table_does_not_load_into_a_tied_output_layer(
    tiny_model: Callable, tiny_batch: Callable, tmp_path: Path
) -> None:
    latent = frozen_model(tiny_model("bert"), tiny_batch(), BinarizationConfig(embeddings=True))
    pack(latent).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"word_embeddings packed, but BertForMaskedLM shares it with its output layer"
    ):
        BertForMaskedLM.from_pretrained(tmp_path)


def test_a_table_is_not_resized_under_its_mask(tiny_model: Callable, tiny_batch: Callable) -> None:
    latent = frozen_model(tiny_model("bert"), tiny_batch(), BinarizationConfig(embeddings=True))
    latent.resize_token_embeddings(64, mean_resizing=False)
    with pytest.raises(ValueError, match=r"embeddings.word_embeddings was resized to \(64, 32\).*before the model"):
        latent(**tiny_batch())


def test_a_table_tied_to_the_output_layer_stays(tiny_model: Callable, tiny_batch: Callable) -> None:
    latent = frozen_model(tiny_model("bert", "MaskedLM"), tiny_batch(), BinarizationConfig())
    packed = pack(latent, embedding_bits=8)
    assert set(packed_tables(packed)) == {
        "bert.embeddings.position_embeddings",
        "bert.embeddings.token_type_embeddings",
    }
    rows = {row.name: row for row in summary(packed).rows}
    assert "tied" in rows["cls.predictions.decoder"].skipped and rows["cls.predictions.decoder"].weight_bits == 32


def test_the_rest_in_half_precision(tiny_model: Callable, tiny_batch: Callable) -> None:
    latent = frozen_model(tiny_model("bert"), tiny_batch(), BinarizationConfig())
    half = pack(latent, embedding_bits=8, dtype=torch.bfloat16)
    full = pack(latent, embedding_bits=8)
    assert half.dtype == torch.bfloat16 and full.dtype == torch.float32 == latent.dtype
    for name, layer in packed_layers(full).items():
        other = half.get_submodule(name)
        for tensor in ("weight", "weight_scale", "activation_threshold", "activation_levels"):
            assert torch.equal(getattr(layer, tensor), getattr(other, tensor))
        assert other.bias.dtype == torch.bfloat16
    logits, expected = half(**tiny_batch()).logits, full(**tiny_batch()).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all() and not torch.equal(logits.float(), expected)
