"""What unlearn leaves behind is a plain Hugging Face checkpoint that knows nothing of this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import clue_fast
from clue_fast.demo.people import make_people, records_of
from clue_fast.demo.pretraining import train_tokenizer

PEOPLE = make_people(4, seed=2)
FORGET, RETAIN = records_of(PEOPLE[:1]), records_of(PEOPLE[1:])
TOKENS = torch.arange(3, 43).reshape(2, 20)

LOAD = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "clue_fast":
            raise ModuleNotFoundError("clue_fast is not installed here")

sys.meta_path.insert(0, Blocker())
try:
    import clue_fast
except ModuleNotFoundError:
    pass
else:
    sys.exit("the blocker does not block")

import safetensors.torch, torch, transformers
folder, tokens, logits = sys.argv[1:]
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
print(model.dtype, type(model).__module__.partition(".")[0], tokenizer.decode(tokenizer("Who?")["input_ids"]))
with torch.no_grad():
    found = model(safetensors.torch.load_file(tokens)["tokens"]).logits
safetensors.torch.save_file({"logits": found}, logits)
"""


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def unlearned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """The folder that unlearn wrote, and the model in memory afterwards."""
    tokenizer = train_tokenizer(FORGET + RETAIN, vocab_size=400)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # as from_pretrained does, which leaves the rotary buffers in float32
        parameter.data = parameter.data.to(request.param)
    folder = tmp_path_factory.mktemp("unlearned") / "out"
    clue_fast.unlearn(
        model, tokenizer, forget=FORGET, retain=RETAIN, output_dir=folder, fraction=0.1, epochs=2, progress=False
    )
    return folder, model


def test_loads_without_the_package_and_gives_the_same_logits(
    unlearned: tuple[Path, LlamaForCausalLM], tmp_path: Path
) -> None:
    folder, model = unlearned
    safetensors.torch.save_file({"tokens": TOKENS}, tmp_path / "tokens")
    arguments = [folder, tmp_path / "tokens", tmp_path / "logits"]
    done = subprocess.run([sys.executable, "-c", LOAD, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(model.dtype), "transformers", "Who?"]
    with torch.no_grad():
        expected = model(TOKENS).logits
    found = safetensors.torch.load_file(tmp_path / "logits")["logits"]
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_holds_no_trace_of_the_package(unlearned: tuple[Path, LlamaForCausalLM]) -> None:
    """Neither names, nor tensors, nor files of a stock checkpoint more or less; the evidence lies beside it."""
    folder, model = unlearned
    evidence = {"README.md", "selection.safetensors", "results.json", "report.html"}
    evidence |= {"selection.png", "scores.png", "training.png"}
    names = {path.name for path in folder.iterdir()}
    assert evidence < names
    for name in names - evidence:
        content = (folder / name).read_bytes().lower()
        assert b"clue" not in content, name
    stock = LlamaForCausalLM(model.config)
    with safetensors.safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(stock.state_dict())
        for name in file.keys():  # noqa: SIM118
            assert file.get_tensor(name).dtype == model.dtype
    written = json.loads((folder / "config.json").read_text())
    assert set(written) <= set(stock.config.to_dict()) | {"architectures", "transformers_version"}
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert written.get("use_cache", True) is True


def test_no_pickle_is_among_it(unlearned: tuple[Path, LlamaForCausalLM]) -> None:
    folder, _ = unlearned
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".png", ".jinja", ".md", ".html"}
