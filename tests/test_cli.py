"""The command line: what each command prints and writes, its exit code, and one line for each error."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from test_card import run_of
from transformers import PreTrainedModel

from hf_stompp import BinarizationConfig, cli, pack, summary


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command: its exit code, standard output and error, without the progress bars."""

    def call(*argv: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(word) for word in argv])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture
def refused(run: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """The message of a command that is an error."""

    def call(*argv: Any) -> str:
        code, printed, errors = run(*argv)
        last = errors.splitlines()[-1]
        assert code == 2 and printed == "" and last.startswith("hf-stompp: error: ") and "Traceback" not in errors
        return last

    return call


def test_the_program_itself(packed_folder: Path) -> None:
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "hf_stompp.cli", "verify", str(packed_folder), "--no-scores", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["ok"] is True and answer["source"] == str(packed_folder)
    assert answer["checks"][0] == {"name": "files", "status": "passed", "message": answer["checks"][0]["message"]}


@pytest.mark.parametrize("argv", [[], ["unknown"], ["verify"], ["push", "folder"], ["pack", "a", "b", "--dtype", "x"]])
def test_wrong_words(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    assert ended.value.code == 2 and "hf-stompp" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", "summary", "pack", "push", "card", "verify"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*filter(None, [command]), "--help"])
    assert ended.value.code == 0 and f"usage: hf-stompp {command}".strip() in capsys.readouterr().out


def test_summary(
    run: Callable[..., tuple[int, str, str]],
    refused: Callable[..., str],
    tiny_model: Callable[..., PreTrainedModel],
    frozen_bert: PreTrainedModel,
    packed_folder: Path,
    tmp_path: Path,
) -> None:
    model = tiny_model("bert")
    model.save_pretrained(tmp_path / "float")
    code, printed, _ = run("summary", tmp_path / "float", "--pooler", "--no_activations")
    assert (code, printed) == (0, f"{summary(model, BinarizationConfig(pooler=True, activations=False))}\n")
    assert run("summary", packed_folder)[1] == f"{summary(pack(frozen_bert))}\n"
    assert "overlap is 0.5" in refused("summary", packed_folder, "--overlap", "0.5")
    for folder in (packed_folder, tmp_path / "latent"):
        frozen_bert.save_pretrained(tmp_path / "latent")
        message = refused("summary", folder, "--pooler")
        assert f"--pooler: received True, but {folder} is binarized already, as its own config" in message
    assert str(tmp_path / "absent") in refused("summary", tmp_path / "absent")


def test_pack(
    run: Callable[..., tuple[int, str, str]],
    refused: Callable[..., str],
    frozen_bert: PreTrainedModel,
    packed_folder: Path,
    tmp_path: Path,
) -> None:
    latent = tmp_path / "latent"
    frozen_bert.save_pretrained(latent)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (latent / name).write_bytes((packed_folder / name).read_bytes())
    assert run("pack", latent, tmp_path / "out" / "1bit")[0] == 0
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in (tmp_path / "out" / "1bit").iterdir()} == names
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"1bit"}  # no draft is left behind
    for name in names:
        assert (tmp_path / "out" / "1bit" / name).read_bytes() == (packed_folder / name).read_bytes()

    (tmp_path / "empty").mkdir()
    assert run("pack", latent, tmp_path / "empty", "--embedding-bits", "8", "--dtype", "float16")[0] == 0
    tensors = load_file(tmp_path / "empty" / "model.safetensors")
    assert tensors["bert.embeddings.word_embeddings.weight"].dtype == torch.uint8
    assert tensors["classifier.weight"].dtype == torch.float16

    assert "OUT: received" in refused("pack", latent, tmp_path / "empty")
    assert "embedding_bits is 7; allowed:" in refused("pack", latent, tmp_path / "new", "--embedding_bits", "7")
    assert "packed already" in refused("pack", packed_folder, tmp_path / "new")
    assert "There is no folder" in refused("pack", tmp_path / "absent", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_push(
    run: Callable[..., tuple[int, str, str]],
    refused: Callable[..., str],
    packed_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "offline mode is enabled" in refused("push", packed_folder, "user/tiny")
    assert "--card: received" in refused("push", packed_folder, "user/tiny", "--card", tmp_path / "absent.md")
    pushed: list[Any] = []

    def push(*args: Any, **options: Any) -> SimpleNamespace:
        pushed.append((args, options))
        return SimpleNamespace(commit_url="https://hub/user/tiny/commit/1", pr_url=None)

    monkeypatch.setattr(cli, "push", push)
    (tmp_path / "card.md").write_text("# Tiny")
    flags = ["--private", "--revision", "trial", "--commit-message", "One bit", "--card", tmp_path / "card.md"]
    code, printed, _ = run("push", packed_folder, "user/tiny", *flags)
    assert (code, printed) == (0, "https://hub/user/tiny/commit/1\n")
    options = {"private": True, "revision": "trial", "commit_message": "One bit", "card": "# Tiny"}
    others = {"create_pr": False, "latent": False, "base_model": None}
    assert pushed == [((str(packed_folder), "user/tiny"), options | others)]
    assert run("push", "adapter", "user/adapter", "--base-model", "user/tiny")[0] == 0
    assert pushed[1][1]["base_model"] == "user/tiny"


def test_card(
    run: Callable[..., tuple[int, str, str]], refused: Callable[..., str], packed_folder: Path, tmp_path: Path
) -> None:
    files = {"own": run_of(0.9, BinarizationConfig()), "full": run_of(0.95, None)}
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    own = ["--results", tmp_path / "own.json", "--dataset", "nyu-mll/glue", "--license", "mit"]
    assert run("card", packed_folder, *own, "--compared", f"full precision={tmp_path / 'full.json'}")[0] == 0
    card = ModelCard.load(packed_folder / "README.md")
    assert card.data.eval_results[0].metric_value == 0.9 and card.data.license == "mit"
    assert "| full precision (full precision) | 0.9500 |" in card.content
    assert not [file for file in packed_folder.iterdir() if file.name.endswith(".tmp")]

    before = card.content
    assert "README.md exists. Pass --force" in refused("card", packed_folder)
    code, printed, _ = run("card", packed_folder, "--output", "-", "--repo-id", "user/tiny")
    assert code == 0 and "# user/tiny" in printed
    assert ModelCard.load(packed_folder / "README.md").content == before
    assert run("card", packed_folder, "--force")[0] == 0
    assert "None was recorded" in (packed_folder / "README.md").read_text()

    there = [packed_folder, "--force"]
    assert "--compared: received 'full'; allowed: NAME=FILE" in refused("card", *there, *own, "--compared", "full")
    assert "--results: received 'absent'; allowed: a file" in refused("card", *there, "--results", "absent")
    assert "results: no recipe, rows, " in refused("card", *there, "--results", packed_folder / "config.json")
    for content, message in {
        '{"rows": []}': "results: no recipe, binarization, seed, mask_seed, steps, batch_size, ",
        json.dumps(run_of(0.9, BinarizationConfig()) | {"rows": [{"accuracy": 1}]}): "no rows[0].model, rows[0].bytes",
        json.dumps(run_of(0.9, BinarizationConfig()) | {"rows": 3}): "results: rows is no list",
        json.dumps(run_of(0.9, BinarizationConfig()) | {"recipe": None}): "results: recipe is no mapping",
        "[]": "is not what a recipe writes to results.json",
    }.items():
        (tmp_path / "other.json").write_text(content)
        assert message in refused("card", *there, "--results", tmp_path / "other.json")
    (tmp_path / "other.json").write_text(json.dumps({"rows": []}))
    assert "compared['fp']: no recipe" in refused("card", *there, *own, "--compared", f"fp={tmp_path / 'other.json'}")


def test_a_bug_shows_where_it_is(packed_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr(cli, "verify", broken)
    with pytest.raises(TypeError, match="a bug"):
        cli.main(["verify", str(packed_folder)])


def test_verify(
    run: Callable[..., tuple[int, str, str]], refused: Callable[..., str], packed_folder: Path, tmp_path: Path
) -> None:
    code, printed, _ = run("verify", packed_folder, "--no_scores")
    assert code == 0 and printed.endswith(f"{packed_folder}: ok\n")
    assert "tolerance: received -1.0; allowed" in refused("verify", packed_folder, "--tolerance", "-1")
    assert "is neither a folder nor a repository" in refused("verify", tmp_path / "absent")
    (packed_folder / "model.safetensors").write_bytes(b"")
    code, printed, _ = run("verify", packed_folder)
    assert code == 1 and printed.splitlines()[0].startswith("files      failed ")
    code, printed, _ = run("verify", packed_folder, "--json")
    assert code == 1 and json.loads(printed)["checks"][0]["status"] == "failed"
