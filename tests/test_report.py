"""The summary table, against counts made by hand."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_stompp import BinarizationConfig, binarize, pack, summary
from hf_stompp.patching import binary_layers


def test_counts_of_a_bert(tiny_model: Callable) -> None:
    model = tiny_model("bert")
    table = summary(model)
    assert table.parameters == sum(p.numel() for p in model.parameters())
    assert table.float_bytes == 4 * table.parameters
    rows = {row.name: row for row in table.rows}
    dense = rows["bert.encoder.layer.1.output.dense"]  # 48 → 32
    assert (dense.weight_bits, dense.input_bits, dense.levels, dense.unit) == (1, 1, "{0,+s}", 7)
    assert dense.parameters == 48 * 32 + 32
    assert dense.packed_bytes == 32 * 6 + 4 * 32 + 4 * 32 + 4 * (48 + 2)  # bits, scales, bias, thresholds and levels
    assert rows["bert.encoder.layer.0.attention.self.query"].levels == "{-s,+s}"
    assert rows["classifier"].skipped == "outside the base model" and rows["classifier"].weight_bits == 32
    assert rows["bert.pooler.dense"].skipped == "pooler=False"
    tables = {"word": 60, "position": 40, "token_type": 2}
    for name, entries in tables.items():
        row = rows[f"bert.embeddings.{name}_embeddings"]
        assert (row.role, row.parameters, row.packed_bytes) == ("embedding", 32 * entries, 4 * 32 * entries)


@pytest.mark.parametrize(
    "tables", [{"embedding_bits": 32}, {"embedding_bits": 8}, {"embedding_bits": 1}, {"embeddings": True}], ids=str
)
def test_it_is_the_same_before_during_and_after(tables: dict, tiny_model: Callable, tmp_path: Path) -> None:
    config = BinarizationConfig(exclude=["*.query"], pooler=True, **tables)
    before = summary(tiny_model("bert"), config)
    model = binarize(tiny_model("bert"), config)
    for layer in binary_layers(model).values():
        layer.set_frozen(1.0, step=1)
    during, packed = summary(model), pack(model)
    after = summary(packed)
    for table in (during, after):
        assert [(r.name, r.role, r.unit, r.weight_bits, r.packed_bytes) for r in table.rows] == [
            (r.name, r.role, r.unit, r.weight_bits, r.packed_bytes) for r in before.rows
        ]
    assert before.frozen_fraction == 0 and during.frozen_fraction == after.frozen_fraction == 1
    # The tensors of the file are what the table says; the header is all there is besides.
    packed.save_pretrained(tmp_path)
    size = os.path.getsize(tmp_path / "model.safetensors")
    header = 8 + int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert size - header == after.packed_bytes


def test_the_printed_table(tiny_model: Callable) -> None:
    model = binarize(tiny_model("distilbert"), BinarizationConfig(exclude=["*.ffn.lin2"]))
    binary_layers(model)["distilbert.transformer.layer.0.attention.q_lin"].set_frozen(0.5, step=1)
    text = str(summary(model))
    assert "distilbert.transformer.layer.0.attention.q_lin" in text and " 50% " in text
    assert text.count("exclude") == 2 and "kept because" in text
    assert "x smaller when packed" in text.splitlines()[-1]


def test_why_a_table_stays(tiny_model: Callable) -> None:
    config = BinarizationConfig(embeddings=True, exclude=["*.position_embeddings"])
    rows = {row.name.split(".")[-1]: row for row in summary(tiny_model("bert"), config).rows}
    assert rows["position_embeddings"].skipped == "exclude, embedding_bits=32"
    word = rows["word_embeddings"]
    assert (word.unit, word.weight_bits, word.frozen, word.skipped) == (0, 1, 0.0, "")
    assert word.packed_bytes == 60 * (32 // 8 + 4)
    assert rows["query"].unit == 5  # of the second block: four units in the first, after the tables


@pytest.mark.parametrize("config", [BinarizationConfig(activations=False)], ids=["w1a32"])
def test_weights_only(config: BinarizationConfig, tiny_model: Callable) -> None:
    row = next(row for row in summary(tiny_model("bert"), config).rows if row.unit == 0)
    assert (row.weight_bits, row.input_bits, row.levels) == (1, 32, "")
