"""A selection in a folder and on the hub: what is written is read again, and without a login nothing is sent."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from clue_fast.cli import main
from clue_fast.errors import FileFormatError, HubError
from clue_fast.selection import CONFLICT, SELECTION_FILE, Scores, Selection
from clue_fast.sites import ParamSlice, Site

SITE = Site("model.layers.0.mlp", "mlp", 4, 0, slices=(ParamSlice("model.layers.0.mlp.down_proj.weight", 1),))


@pytest.fixture
def selection() -> Selection:
    categories = torch.tensor([0, CONFLICT, 0, CONFLICT], dtype=torch.int8)
    return Selection([SITE], {SITE: categories}, {SITE: torch.rand(4)}, {"criterion": "difference"}, "f")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub that is a folder, in place of the client's calls."""
    store = tmp_path / "hub"

    def create_repo(self: Any, repo_id: str, private: bool | None = None, exist_ok: bool = False) -> None:
        (store / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self: Any, *, repo_id: str, folder_path: str, commit_message: str, revision: str | None) -> Any:
        assert self.token == "secret"
        shutil.copytree(folder_path, store / repo_id, dirs_exist_ok=True)
        return type("Done", (), {"commit_url": f"https://hub/{repo_id}/commit/1"})

    def download(repo_id: str, filename: str, **_: Any) -> str:
        if not (store / repo_id / filename).exists():
            raise FileNotFoundError(f"404: {repo_id} has no {filename}.")
        return str(store / repo_id / filename)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return store


def test_a_folder(selection: Selection, tmp_path: Path) -> None:
    selection.save_pretrained(tmp_path / "new" / "folder")
    assert Selection.from_pretrained(tmp_path / "new" / "folder").hash == selection.hash
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [SELECTION_FILE]
    with pytest.raises(FileFormatError, match=r"holds no selection\.safetensors"):
        Selection.from_pretrained(tmp_path)


def test_the_hub(selection: Selection, tmp_path: Path, hub: Path) -> None:
    assert selection.push_to_hub("me/units", token="secret") == "https://hub/me/units/commit/1"
    selection.save_pretrained(tmp_path / "here", push_to_hub=True, repo_id="me/others", token="secret")
    for name in ("me/units", "me/others"):
        assert Selection.from_pretrained(name).hash == selection.hash
    with pytest.raises(HubError, match=r"me/none is no folder here, and selection\.safetensors cannot be read"):
        Selection.from_pretrained("me/none")


def test_without_a_login(
    selection: Selection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(HubError, match="me/units cannot be pushed to without a login: log in with `hf auth login`"):
        selection.push_to_hub("me/units")
    selection.save(tmp_path / "selection")
    assert main(["push", str(tmp_path / "selection"), "me/units"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("clue-fast: me/units cannot be pushed to without a login") and error.count("\n") == 1


def test_offline_it_is_one_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="me/units is no folder here"):
        Selection.from_pretrained("me/units")


def test_short_reprs(selection: Selection) -> None:
    assert repr(selection) == f"Selection(2 of 4 units in 1 sites, difference, {selection.hash})"
    assert repr(Scores(selection.scores, "difference", "f")) == "Scores(difference, 4 units in 1 sites)"
