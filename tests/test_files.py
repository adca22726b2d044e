"""Files appear whole or not at all, and are refused when they are damaged, of another kind or of another version."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import safetensors.torch
import torch

from clue_fast.errors import FileFormatError, OutputError
from clue_fast.files import (
    FORMAT_VERSION,
    check_output,
    check_output_file,
    load_tensors,
    output_folder,
    save_json,
    save_tensors,
    tensors_hash,
)

TENSORS = {
    "halves": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "sums": torch.tensor([1.0, -0.0, float("inf")], dtype=torch.float64),
    "strided": torch.arange(6).reshape(2, 3).t(),
    "none": torch.zeros(0, 5, dtype=torch.int8),
}
HEADER = {"sites": [{"path": "a.b"}], "text": "Löw\n"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "thing.safetensors"
    save_tensors(path, "thing", TENSORS, HEADER)
    return path


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


class TestTensors:
    def test_come_back_as_they_were(self, path: Path) -> None:
        tensors, header = load_tensors(path, "thing")
        assert header == HEADER
        assert tensors.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert tensors[name].dtype == tensor.dtype
            assert tensors[name].shape == tensor.shape
            assert tensors[name].contiguous().flatten().tolist() == tensor.contiguous().flatten().tolist()
        assert str(tensors["sums"][1].item()) == "-0.0"

    def test_an_existing_file_is_replaced(self, path: Path) -> None:
        save_tensors(path, "thing", {"x": torch.ones(1)}, {})
        assert list(load_tensors(path, "thing")[0]) == ["x"]
        assert names(path.parent) == [path.name]

    def test_others_may_read_it(self, path: Path) -> None:
        assert stat.S_IMODE(path.stat().st_mode) == 0o644

    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
    def test_interrupted_the_old_file_stays(
        self, path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def half(tensors: object, name: Path, metadata: object) -> None:
            Path(name).write_bytes(b"half")
            raise error

        monkeypatch.setattr(safetensors.torch, "save_file", half)
        for target in (path, path.parent / "new.safetensors"):
            with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else OutputError, match=r"^$|No space"):
                save_tensors(target, "thing", {"x": torch.ones(1)}, {})
        assert names(path.parent) == [path.name]
        assert load_tensors(path, "thing")[1] == HEADER

    @pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
    def test_truncated(self, path: Path, keep: float) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: int(keep * len(content))])
        with pytest.raises(FileFormatError, match=r"thing\.safetensors is truncated or not a thing file"):
            load_tensors(path, "thing")

    def test_extended(self, path: Path) -> None:
        path.write_bytes(path.read_bytes() + b"more")
        with pytest.raises(FileFormatError, match="truncated or not"):
            load_tensors(path, "thing")

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileFormatError, match=r"none\.safetensors: no such file"):
            load_tensors(tmp_path / "none.safetensors", "thing")

    def test_a_pickle_is_never_loaded(self, tmp_path: Path) -> None:
        torch.save({"x": torch.ones(1)}, tmp_path / "x.pt")
        with pytest.raises(FileFormatError, match="truncated or not"):
            load_tensors(tmp_path / "x.pt", "thing")

    def test_of_another_kind(self, path: Path) -> None:
        with pytest.raises(FileFormatError, match="holds thing, not a selection"):
            load_tensors(path, "selection")

    def test_of_another_program(self, tmp_path: Path) -> None:
        safetensors.torch.save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
        with pytest.raises(FileFormatError, match="another program, not a selection"):
            load_tensors(tmp_path / "model.safetensors", "selection")

    def test_of_another_version(self, tmp_path: Path) -> None:
        metadata = {"clue_fast": "thing", "version": str(FORMAT_VERSION + 1), "header": "{}"}
        safetensors.torch.save_file({"x": torch.ones(1)}, tmp_path / "x", metadata=metadata)
        with pytest.raises(FileFormatError, match=f"version {FORMAT_VERSION + 1}, this package reads {FORMAT_VERSION}"):
            load_tensors(tmp_path / "x", "thing")

    @pytest.mark.parametrize("header", [{}, {"header": "{"}])
    def test_with_a_damaged_header(self, tmp_path: Path, header: dict[str, str]) -> None:
        metadata = {"clue_fast": "thing", "version": str(FORMAT_VERSION), **header}
        safetensors.torch.save_file({"x": torch.ones(1)}, tmp_path / "x", metadata=metadata)
        with pytest.raises(FileFormatError, match="damaged header"):
            load_tensors(tmp_path / "x", "thing")


class TestOutputFile:
    def test_json(self, tmp_path: Path) -> None:
        save_json(tmp_path / "x.json", HEADER)
        assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == HEADER
        with pytest.raises(TypeError):
            save_json(tmp_path / "x.json", {"x": object()})
        assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == HEADER
        assert names(tmp_path) == ["x.json"]

    def test_a_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="it is a folder; name a file"):
            save_tensors(tmp_path, "thing", TENSORS, HEADER)

    def test_a_folder_that_does_not_exist(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="choose a folder that exists"):
            check_output_file(tmp_path / "none" / "x")


class TestOutputFolder:
    def test_takes_its_name_when_all_is_well(self, tmp_path: Path) -> None:
        with output_folder(tmp_path / "a" / "b") as folder:
            (folder / "x").write_text("whole")
            assert not (tmp_path / "a" / "b").exists()
        assert (tmp_path / "a" / "b" / "x").read_text() == "whole"
        assert names(tmp_path / "a") == ["b"]

    def test_an_empty_folder_is_taken(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        with output_folder(tmp_path / "out") as folder:
            (folder / "x").write_text("whole")
        assert names(tmp_path / "out") == ["x"]

    @pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
    def test_interrupted_nothing_stays(self, tmp_path: Path, error: type[BaseException]) -> None:
        def write() -> None:
            with output_folder(tmp_path / "out") as folder:
                (folder / "x").write_text("half")
                raise error

        with pytest.raises(error):
            write()
        assert names(tmp_path) == []

    def test_a_check_makes_nothing(self, tmp_path: Path) -> None:
        check_output(tmp_path / "a" / "b" / "c")
        assert names(tmp_path) == []

    def test_what_is_there_is_kept(self, tmp_path: Path) -> None:
        (tmp_path / "precious").write_text("keep me")
        with pytest.raises(OutputError, match="is not empty; name a new one or empty it"), output_folder(tmp_path):
            pass
        with pytest.raises(OutputError, match="is a file"):
            check_output(tmp_path / "precious")
        with pytest.raises(OutputError, match="cannot be made"):
            check_output(tmp_path / "precious" / "out")
        assert (tmp_path / "precious").read_text() == "keep me"


def test_a_hash_is_of_names_shapes_dtypes_and_bits() -> None:
    found = tensors_hash(TENSORS)
    assert found == tensors_hash(dict(reversed(TENSORS.items()))) and len(found) == 16
    changes = {
        "sums": [torch.tensor([1.0, 0.0, float("inf")], dtype=torch.float64), TENSORS["sums"].float()],
        "strided": [TENSORS["strided"].reshape(2, 3)],
        "none": [torch.zeros(5, 0, dtype=torch.int8)],
    }
    others = [tensors_hash({**TENSORS, name: other}) for name, some in changes.items() for other in some]
    others.append(tensors_hash({("whole" if name == "halves" else name): own for name, own in TENSORS.items()}))
    assert len({found, *others}) == 6
