"""`push`: a binarized model to the Hub, whole and in one commit, or not at all."""

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError  # HTTPError: of the HTTP library it uses
from transformers import PreTrainedModel
from transformers.utils import is_peft_available, logging

from hf_stompp.card import UNNAMED, model_card, render
from hf_stompp.checkpoint import check_kind, checksums, load_complete, read_json, wrong_file
from hf_stompp.figures import Figures
from hf_stompp.results import Scored

logger = logging.get_logger(__name__)

__all__ = ["model_card", "push"]

_CARD = "README.md"
# Left behind in the repository, these would be loaded instead of, or beside, what is pushed.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
_NOT_PUSHED = (".*", "checkpoint-*")
_WAITS = (1.0, 4.0)  # seconds before the second and the third attempt
# A conflict is tried again too: the first attempt may have gone through and only its answer been lost.
_MAY_PASS = (None, 408, 409, 412, 500, 502, 503, 504)
_CHANGED = (OSError, "the repository changed during the push, and was left alone. Look at it, and push again")
_ADVICE: dict[int, tuple[type[OSError], str]] = {
    401: (PermissionError, "Log in with `hf auth login`, set HF_TOKEN or pass token=, with one that may write"),
    403: (PermissionError, "the token may not write there. Use one that may, or your own name, or create_pr=True"),
    404: (FileNotFoundError, "the Hub knows no such user, organization, repository or branch. Check the names"),
    409: _CHANGED,
    412: _CHANGED,
    413: (OSError, 'a file is too large for the Hub. Save in shards: save_pretrained(..., max_shard_size="1GB")'),
    429: (ConnectionError, "too many requests. Wait some minutes, and push again"),
}
_Answer = TypeVar("_Answer")


def push(
    model_or_folder: Any,
    repo_id: str,
    *,
    tokenizer: Any = None,
    base_model: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    card: ModelCard | str | None = None,
    latent: bool = False,
) -> CommitInfo:
    """Publishes a packed model, or an adapter on one, on the Hub with its model card, in one commit: the repository is
    never half published.

    Before anything is sent, the model is loaded from the very files. What failed for the moment is tried again; a
    commit whose answer was lost is recognised by its content and not made twice. It also deletes replaced weights.

    Args:
        model_or_folder (`PreTrainedModel`, `PeftModel`, `str` or `Path`): A packed model, or a model with an adapter,
            of which the adapter is pushed; or the folder of either, which is pushed as it is, without hidden files and
            `checkpoint-*`.
        repo_id (`str`): `user/name`, created if it does not exist.
        tokenizer (*optional*): Of a model, or its image processor: anything with `save_pretrained`. A folder holds its
            own.
        base_model (`str`, *optional*): Of an adapter, the Hub id of the model it was trained on; without it, the name
            that this was loaded by.
        private (`bool`, *optional*): Visibility of the repository; an existing one must have it already.
        revision (`str`, *optional*, defaults to `"main"`): The branch, created from `main` if it does not exist.
        commit_message (`str`, *optional*): The title of the commit.
        create_pr (`bool`, *optional*, defaults to `False`): Open a pull request instead of committing to the branch.
        token (`str` or `bool`, *optional*): Without it the one of the environment or of `hf auth login`.
        card (`ModelCard` or `str`, *optional*): The text of `README.md`, instead of the one there. Without it, one in
            the repository that a person wrote stays, and so does one of hf_stompp that is right for these files; else
            the folder's is taken; if that has none, [`model_card`] writes one.
        latent (`bool`, *optional*, defaults to `False`): Also push a latent checkpoint, which is full-precision.

    Returns:
        `huggingface_hub.CommitInfo`: The commit; the last one there was if nothing has changed.

    Raises:
        TypeError: A tokenizer beside a folder, a `base_model` of what is no adapter; or neither a model nor a folder.
        FileNotFoundError: The folder is incomplete; or the Hub knows no such user or branch (404).
        ValueError: A full-precision or latent model, a corrupted file; an adapter whose base has no Hub id; a card in
            the folder that is of other files; a repository of another visibility.
        PermissionError: No token, a wrong one, or one that may not write there (401, 403).
        OSError: The repository changed meanwhile (409, 412), or a file is too large (413).
        ConnectionError: The Hub could not be reached, or failed several times.

    Example:

        >>> push(pack(model), "user/bert-sst2-1bit", tokenizer=tokenizer)  # doctest: +SKIP
    """
    with tempfile.TemporaryDirectory() as temporary:
        base = None
        if _is_adapter(model_or_folder):
            folder, text = _saved_adapter(model_or_folder, tokenizer, base_model, Path(temporary))
            text = text if card is None else str(card)
            base = read_json(folder, "adapter_config.json")["base_model_name_or_path"]
        elif base_model is not None:
            raise TypeError(f"base_model: received {base_model!r}, but what is pushed is no adapter. Drop it.")
        else:
            folder, model = _saved(model_or_folder, tokenizer, Path(temporary), latent)
            text = _card_text(card, model, folder)
        files = _files(folder)
        message = commit_message or "Upload a 1-bit model with hf_stompp"
        publication = _Publication(HfApi(token=token, library_name="hf_stompp"), repo_id, revision, create_pr, private)
        try:
            if base is not None:
                _check_base(publication.api, base)
            return publication.commit(files, text, message, lambda there: card is None and _stays(there, folder))
        except (HTTPError, json.JSONDecodeError) as error:
            raise _explained(error, publication) from error


def _check_base(api: HfApi, base: str) -> None:
    if not _again(lambda: api.repo_exists(base)):
        raise FileNotFoundError(
            f"base_model: the Hub has no {base!r}, or not for you, so that nobody could load the adapter; nothing was "
            "uploaded. Push the base first, or pass the id that it has."
        )


def _saved(model_or_folder: Any, tokenizer: Any, temporary: Path, latent: bool) -> tuple[Path, PreTrainedModel]:
    """The folder to push, and the model as it loads from there; one in memory is saved into `temporary` before."""
    folder = temporary
    if isinstance(model_or_folder, PreTrainedModel):
        name = f"This {type(model_or_folder).__name__}"
        check_kind(getattr(model_or_folder.config, "quantization_config", None), name, latent=latent)
        model_or_folder.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    elif tokenizer is not None:
        raise TypeError("push takes a tokenizer with a model; save it into the folder: tokenizer.save_pretrained.")
    else:
        folder = Path(model_or_folder)
    model = load_complete(folder, latent=latent)
    _warn_of_missing_processor(model, folder)
    return folder, model


def _is_adapter(model_or_folder: Any) -> bool:
    if isinstance(model_or_folder, (str, os.PathLike)):
        return (Path(model_or_folder) / "adapter_config.json").is_file()
    return hasattr(model_or_folder, "peft_config")


def _saved_adapter(model_or_folder: Any, tokenizer: Any, base_model: str | None, temporary: Path) -> tuple[Path, str]:
    if not is_peft_available():
        raise ImportError(f"{model_or_folder} is an adapter of PEFT; pip install peft, or hf_stompp[peft].")
    from hf_stompp.peft.publishing import saved_adapter

    if tokenizer is not None:
        raise TypeError("tokenizer: an adapter has that of its base, which is pushed with it. Drop it.")
    if isinstance(model_or_folder, (str, os.PathLike)):
        return saved_adapter(None, _files(Path(model_or_folder)), base_model, temporary)
    return saved_adapter(model_or_folder, {}, base_model, temporary)


def _warn_of_missing_processor(model: PreTrainedModel, folder: Path) -> None:
    kinds = {
        "input_ids": ("tokenizer", "tokenizer_config.json", "AutoTokenizer"),
        "pixel_values": ("image processor", "preprocessor_config.json", "AutoImageProcessor"),
    }
    name, file, loader = kinds.get(model.main_input_name, ("", "", ""))
    if name and not (folder / file).is_file():
        logger.warning(
            f"There is no {name} ({file}) with the model: `pipeline` will not load it. Save that of the base model "
            f'into the folder, {loader}.from_pretrained("…").save_pretrained("…"), or pass tokenizer= with a model.'
        )


def _card_text(card: ModelCard | str | None, model: PreTrainedModel, folder: Path) -> str:
    """The card that is given, else the folder's own, else one that is written now."""
    if card is None and (folder / _CARD).is_file():
        text = (folder / _CARD).read_text(encoding="utf-8")
        wrong = _contradiction(text, folder, model.config.quantization_config.mode)
        if wrong:
            raise ValueError(
                f"{folder / _CARD} {wrong}: it is the card of another model; nothing was uploaded. Write it again: "
                f"`hf-stompp card {folder} --force`, or model_card(...).save(...); or pass card=."
            )
        return text
    return str(render(model, folder, {}, Scored()) if card is None else card)


def _figures(text: str) -> Figures | None:
    """What a card states that hf_stompp wrote; None of one that a person wrote."""
    try:
        figures = Figures.read(text)
    except ValueError:  # edited until it was no JSON any more
        return None
    return figures if figures.checksums or isinstance(figures.config, dict) else None


def _contradiction(text: str, folder: Path, mode: str) -> str:
    """What a card states that is not so of the folder's files; empty if there is nothing."""
    figures = _figures(text)
    if figures is None:
        return ""
    other = (figures.config or {}).get("mode", mode)
    if other != mode:
        return f"is of a model in mode {other!r}, not {mode!r}"
    return wrong_file(folder, figures.checksums)


def _stays(text: str, folder: Path) -> bool:
    """Whether the repository's card stays: a person's always, one of hf_stompp if it states the files of `folder`, and
    that has no card itself: it says more than one written now, which knows no scores."""
    figures = _figures(text)
    if figures is None:
        return True
    return not (folder / _CARD).is_file() and figures.checksums == Figures.read(checksums(folder)).checksums != {}


def _files(folder: Path) -> dict[str, Path]:
    """What is pushed of a folder: path in the repository → file."""
    paths = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name.as_posix(): path
        for name, path in paths.items()
        if not any(fnmatch(part, pattern) for part in name.parts for pattern in _NOT_PUSHED)
    }


class _Publication:
    """The way of a set of files into one commit of a repository."""

    def __init__(self, api: HfApi, repo_id: str, revision: str | None, create_pr: bool, private: bool | None) -> None:
        self.api, self.repo_id, self.revision = api, repo_id, revision
        self.create_pr, self.private = create_pr, private

    def commit(self, folder: Mapping[str, Path], card: str, message: str, stays: Callable[[str], bool]) -> CommitInfo:
        """Commits what differs from the repository, but for a card there that `stays`. Each attempt looks anew.

        All attempts name the same parent, so that the Hub refuses a second commit where the first went through; and
        where it did, the next attempt finds nothing to change and returns it.
        """
        self._prepare()
        files: dict[str, Path | bytes] = {**folder, _CARD: card.replace(UNNAMED, self.repo_id).encode()}
        parent, waits = None, iter(_WAITS)
        while True:
            info = _again(lambda: self.api.model_info(self.repo_id, revision=self.revision))
            parent = parent or info.sha
            there = {file.rfilename for file in info.siblings or ()}
            kept = _CARD in there and stays(self._card(info.sha))
            added = [CommitOperationAdd(name, source) for name, source in files.items() if name != _CARD or not kept]
            if kept:
                logger.warning_once(f"{self.repo_id} keeps its {_CARD}; to replace it, pass card=.")
            stale = sorted(name for name in there - set(files) if any(fnmatch(name, weights) for weights in _WEIGHTS))
            where: dict[str, Any] = {"revision": self.revision, "create_pr": self.create_pr}
            self._upload(added, where)
            operations: list[Any] = [*added, *(CommitOperationDelete(name) for name in stale)]
            try:
                return self.api.create_commit(
                    self.repo_id, operations, commit_message=message, parent_commit=parent, **where
                )
            except (HTTPError, json.JSONDecodeError) as error:
                wait = next(waits, None)
                # A pull request has no parent to conflict with: a second one would be opened.
                if wait is None or self.create_pr or _status(error) not in _MAY_PASS:
                    raise
                time.sleep(wait)

    def _card(self, commit: str | None) -> str:
        """The repository's card."""

        def download() -> str:
            try:
                return self.api.hf_hub_download(self.repo_id, _CARD, revision=commit)
            except LocalEntryNotFoundError as error:  # the client wraps in it what happened on the way
                if isinstance(error.__cause__, HTTPError):
                    raise error.__cause__ from None
                raise

        return Path(_again(download)).read_text(encoding="utf-8", errors="replace")

    def _prepare(self) -> None:
        """Makes sure of the repository and its branch; both are left as they are if they exist."""
        url = _again(lambda: self.api.create_repo(self.repo_id, private=self.private, exist_ok=True))
        self.repo_id = url.repo_id  # with the user's name, if only the model's was given
        private = _again(lambda: self.api.model_info(self.repo_id)).private
        if self.private is not None and private is not None and private != self.private:
            raise ValueError(
                f"private: received {self.private}, but {self.repo_id} exists and is {'not ' * (not private)}private; "
                "nothing was uploaded. Change its visibility in its settings, push to another name, or drop private."
            )
        branch = self.revision
        if branch is not None and branch != "main" and not branch.startswith("refs/") and not self.create_pr:
            _again(lambda: self.api.create_branch(self.repo_id, branch=branch, exist_ok=True))

    def _upload(self, added: list[CommitOperationAdd], where: dict[str, Any]) -> None:
        """Uploads, with the client's own attempts, what does not fit into the commit; nobody sees it before that."""
        try:
            self.api.preupload_lfs_files(self.repo_id, added, free_memory=False, **where)
        except RuntimeError as error:  # the client wraps in it what happened in its threads
            if isinstance(error.__cause__, HTTPError):
                raise error.__cause__ from None
            raise
        # The client leaves these out without a word, and the repository would be half a model.
        ignored = [operation.path_in_repo for operation in added if getattr(operation, "_should_ignore", False)]
        if ignored:
            raise ValueError(
                f"The .gitignore of {self.repo_id} ignores {', '.join(ignored)}; nothing was published. Remove the "
                "pattern there, then push again."
            )


def _again(call: Callable[[], _Answer]) -> _Answer:
    """Makes an idempotent request, and makes it again if it failed for the moment."""
    for wait in _WAITS:
        try:
            return call()
        except (HTTPError, json.JSONDecodeError) as error:
            if _status(error) not in _MAY_PASS:
                raise
            time.sleep(wait)
    return call()


def _response(error: BaseException) -> Any:
    """The Hub's answer behind an error; None where none came, or none that was the Hub's."""
    return getattr(error, "response", None)


def _status(error: BaseException) -> int | None:
    response = _response(error)
    return None if response is None else response.status_code


def _explained(error: Exception, publication: _Publication) -> Exception:
    """What happened and what to do about it, for an error of the Hub or of the way there."""
    status, response = _status(error), _response(error)
    said = getattr(error, "server_message", None) or str(error.__cause__ or error).strip().splitlines()[0]
    if status is None or status >= 500:
        again = "No repository is half published by it. Push again: what is there already is not sent twice"
        if publication.create_pr:
            again = "A pull request may have been opened all the same: look before pushing again"
        what = f"answered {status}" if status else f"could not be reached ({said})"
        return ConnectionError(f"{publication.repo_id}: the Hub {what}, several times. {again}.")
    kind, advice = _ADVICE.get(status, (OSError, "the Hub refused the push, and nothing was published"))
    if status == 401:
        sent = "refused the token" if "authorization" in response.request.headers else "was given no token"
        advice = f"the Hub {sent}. {advice}"
    return kind(f"{publication.repo_id}, revision {publication.revision or 'main'}: {advice} ({status}: {said}).")
