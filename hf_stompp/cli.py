"""The command line `hf-stompp`: the functions of the package on saved models."""

import argparse
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, HfArgumentParser

from hf_stompp.card import UNNAMED, model_card
from hf_stompp.checkpoint import load_complete, model_class, read_json, weight_bytes, whole_folder
from hf_stompp.config import QUANT_METHOD, BinarizationConfig
from hf_stompp.hub import push
from hf_stompp.patching import pack
from hf_stompp.report import plot, summary
from hf_stompp.verification import verify

_PROGRAM = "hf-stompp"
# Of tokenizers and image processors.
_PROCESSING = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "preprocessor_config.json",
)
# What a wrong argument, folder, network or installation raises; anything else is a bug, and shows where it is.
_EXPECTED = (OSError, ValueError, ImportError, SafetensorError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, or 1 where a verification failed, or 2 for wrong use.

    Example:

        >>> main(["summary", "out/sst2/packed"])  # doctest: +SKIP
    """
    try:
        arguments = _parser().parse_args(argv)
        return arguments.run(arguments)
    except _EXPECTED as error:
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"{_PROGRAM}: error: {text}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(_PROGRAM, description="1-bit models: look at, pack, publish and verify them.")
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_summary(commands)
    _add_pack(commands)
    _add_push(commands)
    _add_card(commands)
    _add_verify(commands)
    _add_plot(commands)
    return parser


def _version() -> str:
    try:
        return version("hf_stompp")
    except PackageNotFoundError:
        return "(run from its sources, not installed)"


def _flag(parser: argparse.ArgumentParser, name: str, help: str, **options: Any) -> None:
    """Adds `--two-words`, which may be written `--two_words` too, as the flags of the recipes are."""
    spellings = dict.fromkeys((f"--{name}", f"--{name.replace('-', '_')}"))
    parser.add_argument(*spellings, help=help, **options)


def _command(commands: Any, name: str, run: Any, help: str, **options: Any) -> Any:
    parser = commands.add_parser(name, help=help, description=help, **options)
    parser.set_defaults(run=run)
    return parser


# --- the commands --------------------------------------------------------------------------------------------------


def _add_summary(commands: Any) -> None:
    fields = HfArgumentParser(BinarizationConfig, add_help=False)
    text = "Print what is, or would be, binarized in a model, layer by layer, and where its bytes are."
    parser = _command(commands, "summary", _summary, text, parents=[fields], conflict_handler="resolve")
    parser.add_argument("model", help="folder or Hub id of a full-precision, latent or packed model")


def _summary(arguments: argparse.Namespace) -> int:
    names = [field.name for field in dataclasses.fields(BinarizationConfig) if field.init]
    config = BinarizationConfig(**{name: getattr(arguments, name) for name in names})
    adapter = Path(arguments.model, "adapter_config.json")
    if adapter.is_file():
        content = read_json(adapter.parent, adapter.name)
        own = content.get("hf_stompp_base")
        base = content.get("base_model_name_or_path") if own is None else os.path.normpath(adapter.parent / own)
        raise ValueError(
            f"{arguments.model} is an adapter. Look at its base, {base}; or at both: summary(model) in Python."
        )
    saved = AutoConfig.from_pretrained(arguments.model, trust_remote_code=False)
    if (getattr(saved, "quantization_config", None) or {}).get("quant_method") == QUANT_METHOD:
        plain = BinarizationConfig()
        given = [name for name in names if getattr(config, name) != getattr(plain, name)]
        if given:
            raise ValueError(
                f"--{given[0]}: received {getattr(config, given[0])!r}, but {arguments.model} is binarized "
                "already, as its own config says. Drop the flag, or give the full-precision model."
            )
    found = model_class(saved.architectures, arguments.model)
    print(summary(found.from_pretrained(arguments.model, trust_remote_code=False), config))
    return 0


def _add_pack(commands: Any) -> None:
    parser = _command(commands, "pack", _pack, "Pack a trained, fully frozen checkpoint into bits.")
    parser.add_argument("latent", metavar="LATENT_FOLDER", help="what the training saved")
    parser.add_argument("out", metavar="OUT", help="the new folder, which must not exist or be empty")
    _flag(parser, "embedding-bits", "bits of the embedding tables; by default as configured", type=int)
    dtypes = ["float32", "float16", "bfloat16"]
    _flag(parser, "dtype", "of what stays in floats; by default as it is", choices=dtypes)
    _flag(parser, "keep-batch-norms", "fold none into thresholds, so that unpack() works", action="store_true")


def _pack(arguments: argparse.Namespace) -> int:
    latent, out = Path(arguments.latent), Path(arguments.out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"OUT: received {str(out)!r}, which exists; allowed: a new folder, or an empty one.")
    dtype = arguments.dtype and getattr(torch, arguments.dtype)
    model, fold = load_complete(latent, latent=True), not arguments.keep_batch_norms
    packed = pack(model, embedding_bits=arguments.embedding_bits, dtype=dtype, fold_batch_norm=fold)
    with whole_folder(out) as draft:
        packed.save_pretrained(draft)
        for file in sorted({file for pattern in _PROCESSING for file in latent.glob(pattern)}):
            shutil.copy(file, draft)
    print(f"{out}: {weight_bytes(out):,} bytes of weights")
    return 0


def _add_push(commands: Any) -> None:
    parser = _command(commands, "push", _push, "Publish a packed model on the Hub, in one commit.")
    parser.add_argument("folder", metavar="FOLDER", help="a packed model")
    parser.add_argument("repo_id", metavar="REPO_ID", help="user/name, made if there is none")
    _flag(parser, "private", "make the repository private", action="store_const", const=True)
    _flag(parser, "revision", "the branch; by default main")
    _flag(parser, "commit-message", "the title of the commit")
    _flag(parser, "create-pr", "open a pull request instead of committing to the branch", action="store_true")
    _flag(parser, "latent", "also push a latent checkpoint, which is full-precision", action="store_true")
    _flag(parser, "card", "file with the text of README.md; without it as push does", metavar="FILE")
    _flag(parser, "base-model", "of an adapter: Hub id of the model it was trained on")


def _push(arguments: argparse.Namespace) -> int:
    info = push(
        arguments.folder,
        arguments.repo_id,
        private=arguments.private,
        revision=arguments.revision,
        commit_message=arguments.commit_message,
        create_pr=arguments.create_pr,
        card=arguments.card and _read("--card", arguments.card),
        latent=arguments.latent,
        base_model=arguments.base_model,
    )
    print(info.pr_url or info.commit_url)
    return 0


def _add_card(commands: Any) -> None:
    parser = _command(commands, "card", _card, "Write the model card of a saved model.")
    parser.add_argument("folder", metavar="FOLDER", help="a packed or latent model")
    _flag(parser, "results", "results.json of the run that made it", metavar="FILE")
    compared = "a run to show beside it; any number of them"
    _flag(parser, "compared", compared, nargs="+", action="extend", default=[], metavar="NAME=FILE")
    _flag(parser, "dataset", "Hub id of the data")
    _flag(parser, "split", "what the results were scored on; by default what they say, else validation")
    _flag(parser, "base-model", "Hub id of the pretrained model")
    _flag(parser, "license", "a license id of the Hub")
    _flag(parser, "repo-id", "the repository it is for; without it, push fills it in", default=UNNAMED)
    _flag(parser, "command", "the training command")
    _flag(parser, "output", "file to write; - prints; by default FOLDER/README.md", metavar="FILE")
    _flag(parser, "force", "overwrite the card that is there", action="store_true")


def _card(arguments: argparse.Namespace) -> int:
    path = Path(arguments.output or Path(arguments.folder, "README.md"))
    printed = arguments.output == "-"
    if not printed and path.exists() and not arguments.force:
        raise ValueError(f"{path} exists. Pass --force to overwrite it, or --output with another file, or - to print.")
    card = model_card(
        arguments.folder,
        results=arguments.results and _read_json("--results", arguments.results),
        compared=dict(_named_run(text) for text in arguments.compared),
        dataset=arguments.dataset,
        split=arguments.split,
        base_model=arguments.base_model,
        license=arguments.license,
        repo_id=arguments.repo_id,
        command=arguments.command,
    )
    if printed:
        print(card)
        return 0
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text(str(card), encoding="utf-8")
    os.replace(draft, path)
    print(path)
    return 0


def _add_verify(commands: Any) -> None:
    parser = _command(commands, "verify", _verify, "Check a packed model: its files, its card, its scores.")
    parser.add_argument("source", metavar="FOLDER_OR_REPO", help="a packed model, or its Hub id")
    _flag(parser, "revision", "of the repository; by default main")
    _flag(
        parser,
        "dataset-dir",
        "folder of parquet files, or of images as SPLIT/CLASS/*.png; by default the Hub's data",
        metavar="FOLDER",
    )
    _flag(parser, "metric", "evaluate module, its path or Hub id, as recipes/metrics/glue or recipes/metrics/accuracy")
    _flag(parser, "tolerance", "how far a score may be off; 0.005 by default", type=float, default=0.005)
    _flag(parser, "no-scores", "do not score the model again", action="store_true")
    _flag(parser, "json", "print JSON", action="store_true")


def _verify(arguments: argparse.Namespace) -> int:
    done = verify(
        arguments.source,
        revision=arguments.revision,
        dataset_dir=arguments.dataset_dir,
        metric=arguments.metric,
        tolerance=arguments.tolerance,
        scores=not arguments.no_scores,
    )
    print(json.dumps({"ok": done.ok, **dataclasses.asdict(done)}, indent=2) if arguments.json else done)
    return 0 if done.ok else 1


def _add_plot(commands: Any) -> None:
    text = "Draw the dynamics of a training: the front, losses and scores, gradients, flips."
    parser = _command(commands, "plot", _plot, text)
    parser.add_argument("log", metavar="LOG", help="a Trainer's output folder, a checkpoint or a trainer_state.json")
    _flag(parser, "output", "a .png, .svg or .pdf; by default dynamics.png beside the log", metavar="FILE")


def _plot(arguments: argparse.Namespace) -> int:
    log = Path(arguments.log)
    output = Path(arguments.output or (log if log.is_dir() else log.parent) / "dynamics.png")
    plot(log, output)
    print(output)
    return 0


# --- files ---------------------------------------------------------------------------------------------------------


def _read(flag: str, path: str) -> str:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{flag}: received {path!r}; allowed: a file.")
    return Path(path).read_text(encoding="utf-8")


def _read_json(flag: str, path: str) -> dict[str, Any]:
    try:
        content = json.loads(_read(flag, path))
    except ValueError as error:
        raise ValueError(f"{flag}: {path} is no JSON ({error}); allowed: the results.json of a recipe.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{flag}: {path} is not what a recipe writes to results.json; allowed: that file.")
    return content


def _named_run(text: str) -> tuple[str, dict[str, Any]]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ValueError(f"--compared: received {text!r}; allowed: NAME=FILE, as STE=out/ste/results.json.")
    return name, _read_json("--compared", path)


if __name__ == "__main__":
    sys.exit(main())
