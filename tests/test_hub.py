"""A push publishes all of a model or nothing, whatever happens on the way; a pull gives back the same bits."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback_hub import LoopbackHub
from safetensors.torch import load, load_file
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from hf_stompp import model_card
from hf_stompp.card import UNNAMED

REPO = "user/tiny-1bit"


@pytest.fixture
def pushed(run: Callable[[str], dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Pushes a folder from a fresh process: `pushed(folder, repo_id, private=True)`."""

    def call(folder: Path, repo_id: str = REPO, **arguments: Any) -> dict[str, Any]:
        return run(
            "import hf_stompp\n"
            f"info = hf_stompp.push({str(folder)!r}, {repo_id!r}, **{arguments!r})\n"
            "result = {'oid': info.oid, 'pr_url': info.pr_url}\n"
        )

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_published(hub: LoopbackHub, folder: Path, repo_id: str = REPO) -> None:
    """All of the folder is there, in one commit."""
    head = hub.head(repo_id)
    assert head.files.items() >= contents(folder).items()
    assert set(head.files) - set(contents(folder)) <= {".gitattributes", "README.md"}
    assert len(hub.repos[repo_id].commits) == 2 and head.parent == hub.repos[repo_id].commits[0].sha


def assert_nothing_published(hub: LoopbackHub, repo_id: str = REPO) -> None:
    if repo_id in hub.repos:
        assert [set(commit.files) for commit in hub.repos[repo_id].commits] == [{".gitattributes"}]


# --- what is published -----------------------------------------------------------------------------------------------


def test_pushed_and_pulled_by_fresh_processes(
    hub: LoopbackHub, run: Callable[[str], dict[str, Any]], packed_folder: Path, tmp_path: Path
) -> None:
    done = run(
        "import hf_stompp\n"
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n"
        f"model = AutoModelForSequenceClassification.from_pretrained({str(packed_folder)!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(packed_folder)!r})\n"
        f"result = hf_stompp.push(model, {REPO!r}, tokenizer=tokenizer, commit_message='One bit').oid\n"
    )
    head = hub.head(REPO)
    assert done["error"] is None and done["result"] == head.sha and head.title == "One bit"
    assert len(hub.repos[REPO].commits) == 2 and not hub.repos[REPO].private
    expected = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert set(head.files) == expected | {".gitattributes"}
    there, here = load(head.files["model.safetensors"]), load_file(packed_folder / "model.safetensors")
    assert there.keys() == here.keys() and all(torch.equal(there[key], here[key]) for key in here)

    # The reader has the repository's name, and the example in its card.
    example = re.search(r"```python\n(.*?)```", head.files["README.md"].decode(), re.DOTALL)[1]
    assert f'model="{REPO}"' in example
    pulled = run(
        f"{example}\nimport torch\nfrom transformers import AutoModelForSequenceClassification\n"
        f"model = AutoModelForSequenceClassification.from_pretrained({REPO!r})\n"
        f"torch.save(model.state_dict(), {str(tmp_path / 'pulled.pt')!r})\n"
        "result = predict('this is an example .')\n"
    )
    assert pulled["error"] is None and pulled["result"][0]["label"] in ("LABEL_0", "LABEL_1")
    state = torch.load(tmp_path / "pulled.pt")
    assert state.keys() == here.keys()
    assert all(state[key].dtype == here[key].dtype and torch.equal(state[key], here[key]) for key in here)


def test_verified_on_the_hub(
    hub: LoopbackHub, run: Callable[[str], dict[str, Any]], pushed: Callable[..., dict[str, Any]], packed_folder: Path
) -> None:
    """What is pushed passes; a repository where a byte was changed since does not."""
    (packed_folder / "onnx").mkdir()
    (packed_folder / "onnx" / "model.onnx").write_bytes(b"large")
    assert pushed(packed_folder)["error"] is None
    files = hub.head(REPO).files
    weights = bytearray(files["model.safetensors"])
    weights[-1] ^= 1
    hub.create("user/changed", {**files, "model.safetensors": bytes(weights)})
    done = run(
        "import hf_stompp\n"
        "def statuses(repo, **options):\n"
        "    return [check.status for check in hf_stompp.verify(repo, **options).checks]\n"
        f"result = [statuses({REPO!r}), statuses('user/changed', revision='main')]\n"
    )
    assert done["error"] is None
    assert done["result"] == [[*6 * ["passed"], "skipped"], ["passed", "failed", *5 * ["skipped"]]]
    assert not any("onnx" in request for request in hub.requests if request.startswith(("GET", "HEAD")))
    for repo, options in (("user/absent", ""), (REPO, ", revision='absent'")):
        done = run(f"import hf_stompp\nhf_stompp.verify({repo!r}{options})\n")
        assert done["error"][0] == "FileNotFoundError" and "is neither a folder nor a repository" in done["message"]
    hub.fault("GET", "/api/models/", "drop")
    done = run("import hf_stompp\nhf_stompp.verify('user/other')\n")
    assert done["error"][0] == "ConnectionError" and "could not be downloaded from the Hub" in done["message"]


def test_a_folder_is_pushed_as_it_is(
    hub: LoopbackHub, pushed: Callable[..., dict[str, Any]], packed_folder: Path
) -> None:
    (packed_folder / "notes").mkdir()
    (packed_folder / "notes" / "run.txt").write_text("600 steps")
    before = contents(packed_folder)
    (packed_folder / "checkpoint-4").mkdir()
    (packed_folder / "checkpoint-4" / "optimizer.pt").write_bytes(b"large")
    (packed_folder / ".env").write_text("secret")
    assert pushed(packed_folder)["error"] is None
    published = dict(hub.head(REPO).files)
    assert published.pop("README.md").startswith(b"---\n") and published.pop(".gitattributes") == b""
    assert published == before
    assert contents(packed_folder) == before | {"checkpoint-4/optimizer.pt": b"large", ".env": b"secret"}


def test_the_same_again_is_no_commit(
    hub: LoopbackHub, pushed: Callable[..., dict[str, Any]], packed_folder: Path
) -> None:
    first, second = pushed(packed_folder), pushed(packed_folder)
    assert first["result"] == second["result"] and len(hub.repos[REPO].commits) == 2
    (packed_folder / "notes.txt").write_text("new")
    third = pushed(packed_folder)
    assert third["result"]["oid"] == hub.head(REPO).sha and len(hub.repos[REPO].commits) == 3


def test_which_card(hub: LoopbackHub, pushed: Callable[..., dict[str, Any]], packed_folder: Path) -> None:
    own = f"---\nlicense: mit\n---\n# {UNNAMED}\n"
    (packed_folder / "README.md").write_text(own)
    assert pushed(packed_folder)["error"] is None
    assert hub.head(REPO).files["README.md"] == f"---\nlicense: mit\n---\n# {REPO}\n".encode()
    assert (packed_folder / "README.md").read_text() == own
    # Without a name in front, it is the user's.
    assert pushed(packed_folder, "short")["error"] is None
    assert hub.head("user/short").files["README.md"].endswith(b"# user/short\n")
    # The repository's own stays …
    hub.create("user/edited", {"README.md": b"by hand"})
    assert pushed(packed_folder, "user/edited")["error"] is None
    assert hub.head("user/edited").files["README.md"] == b"by hand" and "config.json" in hub.head("user/edited").files
    # … unless another is given.
    assert pushed(packed_folder, "user/edited", card="---\nlicense: mit\n---\nnew")["error"] is None
    assert hub.head("user/edited").files["README.md"] == b"---\nlicense: mit\n---\nnew"


def test_a_card_of_hf_stompps_is_replaced(
    hub: LoopbackHub,
    run: Callable[[str], dict[str, Any]],
    pushed: Callable[..., dict[str, Any]],
    frozen_bert: PreTrainedModel,
    packed_folder: Path,
    tmp_path: Path,
) -> None:
    """It states what the files are; another model's would be wrong, and `verify` would say so."""
    frozen_bert.save_pretrained(tmp_path / "latent")
    assert pushed(tmp_path / "latent", latent=True)["error"] is None
    assert pushed(packed_folder)["error"] is None
    other = AutoModelForSequenceClassification.from_pretrained(packed_folder)
    other.classifier.bias.data += 1
    card = model_card(packed_folder, license="mit")
    other.save_pretrained(packed_folder)
    assert pushed(packed_folder)["error"] is None
    checks = "[check.status for check in hf_stompp.verify({!r}).checks]"
    done = run(f"import hf_stompp\nresult = {checks.format(REPO)}\n")
    assert done["error"] is None and done["result"] == [*6 * ["passed"], "skipped"]

    # The folder's own card of other files is not published …
    card.save(packed_folder / "README.md")
    done = pushed(packed_folder)
    assert done["error"][0] == "ValueError" and "README.md states the SHA-256" in done["message"]
    assert f"`hf-stompp card {packed_folder} --force`" in done["message"]
    (packed_folder / "README.md").write_text(str(card).replace("  model.safetensors", "  model-1.safetensors"))
    assert "states a checksum of model-1.safetensors, which is not there" in pushed(packed_folder)["message"]
    (packed_folder / "README.md").write_text(str(model_card(tmp_path / "latent")))
    assert "is of a model in mode 'train', not 'packed'" in pushed(packed_folder)["message"]
    # … but a new one is, and what it says more stays as long as it is right.
    model_card(packed_folder, license="mit").save(packed_folder / "README.md")
    assert pushed(packed_folder)["error"] is None
    published = hub.head(REPO).files["README.md"]
    assert b"license: mit" in published
    (packed_folder / "README.md").unlink()
    assert pushed(packed_folder)["error"] is None and hub.head(REPO).files["README.md"] == published


def test_a_card_that_cannot_be_read(
    hub: LoopbackHub, pushed: Callable[..., dict[str, Any]], packed_folder: Path
) -> None:
    hub.create(REPO, {"README.md": b"by hand"})
    hub.fault("HEAD", "/resolve/", 503)
    done = pushed(packed_folder)
    assert "ConnectionError" in done["error"] and "Push again" in done["message"]
    assert len(hub.repos[REPO].commits) == 1


def test_branch_and_pull_request(hub: LoopbackHub, pushed: Callable[..., dict[str, Any]], packed_folder: Path) -> None:
    assert pushed(packed_folder, revision="trial")["error"] is None
    assert set(hub.head(REPO).files) == {".gitattributes"} and "config.json" in hub.head(REPO, "trial").files
    done = pushed(packed_folder, create_pr=True)
    assert done["result"]["pr_url"] == f"{hub.url}/{REPO}/discussions/1"
    assert set(hub.head(REPO).files) == {".gitattributes"} and "config.json" in hub.head(REPO, "refs/pr/1").files


def test_private(hub: LoopbackHub, pushed: Callable[..., dict[str, Any]], packed_folder: Path) -> None:
    assert pushed(packed_folder, private=True)["error"] is None and hub.repos[REPO].private
    hub.create("user/public")
    done = pushed(packed_folder, "user/public", private=True)
    assert done["error"][0] == "ValueError"
    assert "private: received True, but user/public exists and is not private" in done["message"]
    assert_nothing_published(hub, "user/public")


def test_replaced_weights_do_not_stay(
    hub: LoopbackHub, pushed: Callable[..., dict[str, Any]], packed_folder: Path, tmp_path: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(packed_folder)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    hub.create(REPO, {"model.safetensors": b"old", "notes.txt": b"kept", "onnx/model.safetensors": b"kept"})
    assert pushed(tmp_path / "sharded")["error"] is None
    files = hub.head(REPO).files
    assert "model.safetensors" not in files and files["notes.txt"] == files["onnx/model.safetensors"] == b"kept"
    assert len(hub.repos[REPO].commits) == 2
    assert pushed(packed_folder)["error"] is None
    assert {name for name in hub.head(REPO).files if name.startswith("model")} == {"model.safetensors"}


def test_latent_on_request(
    hub: LoopbackHub, pushed: Callable[..., dict[str, Any]], frozen_bert: PreTrainedModel, tmp_path: Path
) -> None:
    frozen_bert.save_pretrained(tmp_path / "latent")
    assert pushed(tmp_path / "latent", latent=True)["error"] is None
    assert "**latent** checkpoint" in hub.head(REPO).files["README.md"].decode()


# --- what goes wrong on the way --------------------------------------------------------------------------------------

REQUESTS = {
    "create": ("POST", "/api/repos/create"),
    "info": ("GET", f"/api/models/{REPO}"),
    "preupload": ("POST", "/preupload/"),
    "batch": ("POST", "/objects/batch"),
    "upload": ("PUT", "/upload/"),
    "validate": ("POST", "/api/validate-yaml"),
    "commit": ("POST", "/commit/"),
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_a_request_that_fails_for_the_moment(
    request_: tuple[str, str], hub: LoopbackHub, pushed: Callable[..., dict[str, Any]], packed_folder: Path
) -> None:
    for kind in (503, "lost"):
        hub.reset()
        hub.fault(*request_, kind, times=1)
        done = pushed(packed_folder)
        assert done["error"] is None, done["message"]
        assert done["result"]["oid"] == hub.head(REPO).sha and len(done["waits"]) == 1
        assert_published(hub, packed_folder)  # in one commit, also where the answer to the first was lost


ALWAYS = {name: (request_, 503, "the Hub answered 503") for name, request_ in REQUESTS.items()}
# Of this one the client reads the answer, which is no JSON, before its status.
ALWAYS["validate"] = (REQUESTS["validate"], 503, "the Hub could not be reached")
ALWAYS |= {f"{name}, cut": (REQUESTS[name], "drop", "the Hub could not be reached") for name in ("create", "commit")}


@pytest.mark.parametrize(("request_", "kind", "message"), ALWAYS.values(), ids=ALWAYS)
def test_a_request_that_always_fails(
    request_: tuple[str, str],
    kind: int | str,
    message: str,
    hub: LoopbackHub,
    pushed: Callable[..., dict[str, Any]],
    packed_folder: Path,
) -> None:
    hub.fault(*request_, kind)
    done = pushed(packed_folder)
    assert "ConnectionError" in done["error"] and message in done["message"] and "Push again" in done["message"]
    assert done["waits"] and sum(done["waits"]) < 60
    assert_nothing_published(hub)


def test_a_commit_that_is_always_lost_is_made_once(
    hub: LoopbackHub, pushed: Callable[..., dict[str, Any]], packed_folder: Path
) -> None:
    hub.fault("POST", "/commit/", "lost")
    assert pushed(packed_folder)["error"] is None
    assert_published(hub, packed_folder)


def test_no_token_and_a_wrong_one(
    hub: LoopbackHub, pushed: Callable[..., dict[str, Any]], packed_folder: Path
) -> None:
    for token, message in ((False, "was given no token"), ("hf_wrong", "refused the token")):
        done = pushed(packed_folder, token=token)
        assert done["error"][0] == "PermissionError" and f"the Hub {message}" in done["message"]
        assert "hf auth login" in done["message"] and "hf_wrong" not in done["message"] and not done["waits"]
    assert not hub.repos


REFUSED: dict[str, tuple[str, tuple[str, str, int] | None, str, str]] = {
    "namespace": ("acme/tiny", None, "PermissionError", "the token may not write there.*403: You don't have the"),
    "no user": ("nobody/tiny", None, "FileNotFoundError", r"knows no such user.*404: There is no such organization"),
    "read only": (REPO, ("POST", "/commit/", 403), "PermissionError", r"create_pr=True \(403"),
    "not found": (REPO, ("POST", "/commit/", 404), "FileNotFoundError", r"Check the names \(404"),
    "conflict": (REPO, ("POST", "/commit/", 409), "OSError", r"changed during the push.*push again \(409"),
    "large commit": (REPO, ("POST", "/commit/", 413), "OSError", r"too large for the Hub.*max_shard_size.*\(413"),
    "large file": (REPO, ("PUT", "/upload/", 413), "OSError", r"too large for the Hub.*max_shard_size.*\(413"),
    "limited": (REPO, ("POST", "/commit/", 429), "ConnectionError", r"too many requests.*\(429"),
    "other": (REPO, ("POST", "/commit/", 422), "OSError", r"refused the push, and nothing was published \(422"),
}


@pytest.mark.parametrize(("repo_id", "fault", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_a_refusal(
    repo_id: str,
    fault: tuple[str, str, int] | None,
    error: str,
    message: str,
    hub: LoopbackHub,
    pushed: Callable[..., dict[str, Any]],
    packed_folder: Path,
) -> None:
    if fault:
        hub.fault(*fault)
    done = pushed(packed_folder, repo_id)
    assert done["error"][0] == error and re.search(message, done["message"]), done
    assert done["message"].startswith(repo_id)
    assert len(done["waits"]) == (2 if error == "OSError" and "409" in message else 0)
    assert_nothing_published(hub, repo_id)


def test_an_unknown_revision(hub: LoopbackHub, pushed: Callable[..., dict[str, Any]], packed_folder: Path) -> None:
    done = pushed(packed_folder, revision="refs/pr/7")
    assert done["error"][0] == "FileNotFoundError" and f"{REPO}, revision refs/pr/7: " in done["message"]
    assert_nothing_published(hub)


def test_somebody_else_commits_meanwhile(
    hub: LoopbackHub, pushed: Callable[..., dict[str, Any]], packed_folder: Path
) -> None:
    def other() -> None:
        repo = hub.repos[REPO]
        repo.branches["main"] = repo.commit("theirs", {"theirs.txt": b""}, hub.head(REPO))

    hub.fault("POST", "/commit/", other, times=1)
    done = pushed(packed_folder)
    assert done["error"][0] == "OSError" and "412: A commit has happened since" in done["message"]
    assert hub.head(REPO).files == {"theirs.txt": b""} and len(hub.repos[REPO].commits) == 2


def test_a_lost_pull_request_is_not_opened_twice(
    hub: LoopbackHub, pushed: Callable[..., dict[str, Any]], packed_folder: Path
) -> None:
    hub.fault("POST", "/commit/", "lost", times=1)
    done = pushed(packed_folder, create_pr=True)
    assert "ConnectionError" in done["error"] and "look before pushing again" in done["message"]
    assert [name for name in hub.repos[REPO].branches if name.startswith("refs/pr/")] == ["refs/pr/1"]


def test_a_repository_that_ignores_a_file(
    hub: LoopbackHub, pushed: Callable[..., dict[str, Any]], packed_folder: Path
) -> None:
    hub.create(REPO, {".gitignore": b"model.safetensors"})
    done = pushed(packed_folder)
    assert done["error"][0] == "ValueError" and "ignores model.safetensors; nothing was published" in done["message"]
    assert len(hub.repos[REPO].commits) == 1


def test_a_card_without_metadata(hub: LoopbackHub, pushed: Callable[..., dict[str, Any]], packed_folder: Path) -> None:
    done = pushed(packed_folder, card="no metadata")
    assert done["error"][0] == "ValueError" and "README.md" in done["message"]
    assert_nothing_published(hub)
