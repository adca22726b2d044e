"""`make gpu-check` up to the first launch: its order, its refusals, its time and its files, with the GPU replaced."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import gpu_check, machine
from bench.gpu_check import FOUND, SANITIZED, Finished, Outcome, Step, check, outcome, require_gpu, steps, write
from clue_fast.errors import BackendError

ROOT = Path(__file__).parents[2]
CLEAN = "========= ERROR SUMMARY: 0 errors"


class Machine:
    """Stands in for the GPU: every command takes as long as it is told, on a clock of its own.

    Attributes:
        answers: name of a step -> what comes of it; the others pass.
        takes: name of a step -> seconds; the others take one.
        ran: the steps in their order, with the seconds that they were given.
    """

    def __init__(self, answers: dict[str, Finished] | None = None, takes: dict[str, float] | None = None) -> None:
        self.answers, self.takes = answers or {}, takes or {}
        self.ran: dict[str, float] = {}
        self.now = 1000.0

    def __call__(self, step: Step, at_most: float) -> Finished:
        self.ran[step.name] = at_most
        takes = self.takes.get(step.name, 1.0)
        self.now += min(takes, at_most)
        if takes > at_most:
            return Finished(None, "....")
        if step.kind == "bench":
            options = list(step.command)
            folder = Path(options[options.index("--results") + 1])
            (folder / f"{Path(step.name).name}.json").write_text(f'{{"samples of": "{step.name}"}}')
        return self.answers.get(step.name, Finished(0, f"3 passed in 1 s\n{CLEAN}"))

    def check(self, planned: list[Step], budget: float = 540.0) -> dict[str, Outcome]:
        done = check(planned, self, budget, lambda: self.now, say=lambda line: None)
        assert [one.step for one in done] == planned
        return {one.step.name: one for one in done}


@pytest.fixture
def planned(tmp_path: Path) -> list[Step]:
    return steps(tmp_path)


def kinds(names: dict[str, float], planned: list[Step]) -> list[str]:
    return [step.kind for step in planned if step.name in names]


def test_all_of_it_in_order(planned: list[Step]) -> None:
    gpu = Machine()
    found = gpu.check(planned)
    assert list(gpu.ran) == [step.name for step in planned]
    order = [step.kind for step in planned]
    assert order == sorted(order, key=["build", "test", "sanitizer", "bench"].index) and set(order) == {
        "build",
        "test",
        "sanitizer",
        "bench",
    }
    assert {one.status for one in found.values()} == {"passed"}


RED = {
    "a test fails": {"operators on CUDA and Triton": Finished(1, "1 failed, 80 passed")},
    "no test is there": {"tests marked gpu": Finished(5, "12 deselected")},
    "all tests skip": {"tests marked gpu": Finished(0, "9 skipped in 1 s")},
    "a sanitizer finds something": {"racecheck": Finished(FOUND, "========= ERROR SUMMARY: 2 errors")},
    "tests under a sanitizer fail": {"memcheck": Finished(1, f"1 failed\n{CLEAN}")},
}


@pytest.mark.parametrize("answers", RED.values(), ids=RED)
def test_nothing_is_measured_or_written_while_something_is_red(
    answers: dict[str, Finished], planned: list[Step], tmp_path: Path
) -> None:
    gpu = Machine(answers)
    found = gpu.check(planned)
    assert kinds(gpu.ran, planned) == ["build", "test", "test", "sanitizer", "sanitizer"]  # which may tell the reason
    (name,) = answers
    assert found[name].red and found["ops/bench_conflict_score"].reason == f"{name} is red"
    with pytest.raises(RuntimeError, match=f"no result is kept while these are red: {name}"):
        write(tmp_path / "results", tmp_path, list(found.values()), {})
    assert not (tmp_path / "results").exists()


def test_nothing_runs_after_a_build_that_failed(planned: list[Step]) -> None:
    gpu = Machine({"extension": Finished(1, "error: nvcc failed")})
    found = gpu.check(planned)
    assert list(gpu.ran) == ["extension"]
    assert found["extension"].reason == "error: nvcc failed" and found["memcheck"].reason == "extension is red"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Finished(1, "========= Error: Device not supported\n3 passed"), "Device not supported"),
        (Finished(None, "compute-sanitizer cannot be started: No such file or directory"), "cannot be started"),
    ],
)
def test_a_sanitizer_that_this_machine_refuses_is_named(answer: Finished, reason: str, planned: list[Step]) -> None:
    gpu = Machine({"memcheck": answer})
    found = gpu.check(planned)
    assert found["memcheck"].status == "not run" and reason in found["memcheck"].reason
    assert len(gpu.ran) == len(planned) and not any(one.red for one in found.values())


def test_a_benchmark_that_fails_or_skips_leaves_the_others(planned: list[Step], tmp_path: Path) -> None:
    answers = {"model/bench_localize": Finished(0, "4 skipped"), "ops/bench_sparse_linear": Finished(1, "1 failed")}
    gpu = Machine(answers)
    found = gpu.check(planned)
    assert (found["model/bench_localize"].status, found["ops/bench_sparse_linear"].status) == ("not run", "failed")
    content = json.loads(write(tmp_path / "results", tmp_path, list(found.values()), {"gpu": "one"}).read_text())
    assert content["machine"] == {"gpu": "one"}
    assert {step["name"]: step["status"] for step in content["steps"]} == {n: one.status for n, one in found.items()}
    assert json.loads((tmp_path / "results" / "bench_conflict_score.json").read_text()) == {
        "samples of": "ops/bench_conflict_score"
    }


def test_it_ends_in_its_time(planned: list[Step]) -> None:
    """However long anything takes: a step is stopped at its own limit, and at the end of all."""
    slow = {step.name: 1e6 for step in planned if step.kind == "bench"}
    gpu = Machine(takes=slow | {"memcheck": 1e6})
    found = gpu.check(planned, budget=300.0)
    assert gpu.now == pytest.approx(1300.0)
    assert gpu.ran["extension"] == 150 and gpu.ran["memcheck"] == 75
    last = list(gpu.ran)[-1]
    assert gpu.ran[last] < 120 and found[last].status == "out of time"
    assert found["model/bench_localize"].reason == "no time was left"
    assert not any(one.red for one in found.values())


def test_tests_that_did_not_end_are_red(planned: list[Step]) -> None:
    gpu = Machine(takes={"tests marked gpu": 1e6})
    found = gpu.check(planned)
    assert found["tests marked gpu"].status == "out of time" and found["tests marked gpu"].red
    assert "bench" not in kinds(gpu.ran, planned)


def test_the_gates_leave_time_for_benchmarks(planned: list[Step]) -> None:
    """When everything before them takes a half of its limit, as it should."""
    gates = sum(step.at_most for step in planned if step.kind != "bench")
    assert gpu_check.MINUTES * 60 - gates / 2 >= 200


# What does run here: the commands themselves, without a GPU.


def test_a_command_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    parent = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    started = time.monotonic()
    finished = gpu_check.run(Step("long", "test", (sys.executable, "-c", parent), 1), 1.0)
    assert time.monotonic() - started < 3 and finished.code is None
    time.sleep(max(0.0, 4 - (time.monotonic() - started)))
    assert not mark.exists()


def test_commands_get_their_environment_and_output() -> None:
    show = (
        "import os; print(os.environ['CLUE_FAST_TEST_REQUIRE_GPU'], os.environ.get('PYTORCH_NO_CUDA_MEMORY_CACHING'))"
    )
    command = (sys.executable, "-c", show)
    assert gpu_check.run(Step("one", "test", command, 9), 60).output == "1 None\n"
    assert gpu_check.run(Step("two", "sanitizer", command, 9), 60) == Finished(0, "1 1\n")
    missing = Step("three", "sanitizer", ("no-such-command",), 9)
    assert outcome(missing, gpu_check.run(missing, 9), 0.0).status == "not run"


def test_the_sanitizer_watches_tests_that_exist() -> None:
    text = "".join(path.read_text() for path in (ROOT / "tests" / "ops").glob("test_*.py"))
    for name in SANITIZED.split(" or "):
        assert re.search(rf"^def {name}", text, re.MULTILINE), name


COLLECT = """
import json, sys, pytest
codes = {}
for name, arguments in json.load(sys.stdin).items():
    codes[name] = int(pytest.main([*arguments, "--collect-only", "-qq"]))
print("\\n" + json.dumps(codes))
"""


@pytest.mark.slow
def test_every_command_selects_something(planned: list[Step]) -> None:
    """Exit code 0, and not 5, which is that of no tests; in one process, for what all of them import."""
    selections = {}
    for step in planned:
        if step.kind != "build":
            words = step.command[step.command.index("pytest") + 1 :]
            selections[step.name] = [word for word in words if word not in ("-n", "4")]
    gpu = selections["tests marked gpu"]
    gpu[gpu.index("tests")] = "tests/ops"  # all of them would take longer
    command = [sys.executable, "-c", COLLECT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, input=json.dumps(selections))
    codes = json.loads(done.stdout.splitlines()[-1])
    assert codes == dict.fromkeys(selections, 0), done.stdout[-2000:] + done.stderr[-2000:]


def test_what_a_machine_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match=r"torch .* sees no CUDA device"):
        require_gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda *_, **__: None)
    with pytest.raises(BackendError, match="nvcc is neither on the PATH"):
        require_gpu()
    monkeypatch.setattr(gpu_check.shutil, "which", lambda *_, **__: "/bin/nvcc")
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None if name == "hypothesis" else name)
    with pytest.raises(BackendError, match="hypothesis is not installed"):
        require_gpu()


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Machine], int]:
    """Runs the command with a machine in the place of the GPU; its exit code."""

    def run(gpu: Machine) -> int:
        monkeypatch.setattr(gpu_check, "require_gpu", lambda: None)
        monkeypatch.setattr(gpu_check, "check", lambda planned, budget: list(gpu.check(planned, budget).values()))
        monkeypatch.setattr(machine, "use_device", lambda name: None)
        monkeypatch.setattr(sys, "argv", ["gpu_check", "--results", str(tmp_path / "results"), "--commit", "abc"])
        monkeypatch.setenv("CLUE_FAST_COMMIT", "")  # is put back after the test
        try:
            gpu_check.main()
        except SystemExit as error:
            return int(error.code or 0)
        return 0

    return run


def test_the_command_writes_what_it_found(main: Callable[[Machine], int], tmp_path: Path) -> None:
    assert main(Machine()) == 0
    content = json.loads((tmp_path / "results" / "check.json").read_text())
    assert content["machine"]["commit"] == "abc" and {"gpu", "torch", "python"} <= set(content["machine"])
    assert len(list((tmp_path / "results").glob("bench_*.json"))) == 10


def test_the_command_writes_nothing_while_a_test_is_red(
    main: Callable[[Machine], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(Machine({"tests marked gpu": Finished(1, "1 failed")})) == 1
    assert "tests marked gpu" in capsys.readouterr().err and not (tmp_path / "results").exists()
