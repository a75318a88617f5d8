"""The deploy example: exported files loaded by other processes, and the C++ program."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters

import lesson_code as lesson
from real_world.deploy.cpp import to_csv
from real_world.deploy.formats import FORMATS, ExportFormat, export_and_verify

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "real_world.deploy"]
SAMPLE = "0.5,-1.2,0.3,0.8\n"


def run(
    *command: object, input: str = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository; return its status and what it printed."""
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=ROOT, input=input, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory) -> tuple[Path, str]:
    """Run the example without a checkpoint; return its output folder and what it printed."""
    folder = tmp_path_factory.mktemp("deployed")
    done = run(*COMMAND, "--cpp", "--output", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"(\[cpuinfo.*\n)*", done.stderr), "nothing but ExecuTorch's log"
    return folder, done.stdout


@pytest.fixture(scope="module")
def model(deployed) -> lesson.SimpleClassifier:
    return lesson.load_checkpoint(deployed[0] / "lesson.pt")[0].requires_grad_(False)


@pytest.fixture(scope="module")
def predict(deployed) -> list[Path]:
    """Return the command of the C++ program."""
    return [deployed[0] / "cpp" / "predict", deployed[0] / "lesson.pt2"]


def answers(text: str) -> dict[int, tuple[int, list[float]]]:
    """Return the class and the probabilities by line number."""
    rows = csv.reader(text.splitlines())
    return {int(row[0]): (int(row[1]), [float(value) for value in row[2:]]) for row in rows}


# %% Formats
def test_every_format_is_exported_and_verified(deployed):
    folder, printed = deployed
    names = [fmt.name for fmt in FORMATS]
    assert re.findall(r"^  (\S+) +lesson\.", printed, re.MULTILINE) == names
    assert printed.count("max error") == printed.count(" ok\n") == 5
    assert "`torch.jit.script` is deprecated. Please switch to `torch.compile`" in printed
    rows = re.findall(r"^    (\S+)(?: +\d+\.\d +\d+\.\d\d x){3}$", printed, re.MULTILINE)
    assert rows == ["eager", *names]
    files = {path.name for path in folder.iterdir()}
    assert files == {"lesson.pt", "cpp", *(fmt.filename for fmt in FORMATS)}


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_loaded_model_takes_any_batch_size(deployed, model, fmt):
    counters["inductor"].clear()
    torch.set_num_threads(1)  # compiled code is cached for a number of threads
    with torch.inference_mode():
        forward = fmt.load(deployed[0] / fmt.filename, model)
        for batch_size in (1, 2, 63, 1024):
            X = torch.randn(batch_size, 4)
            torch.testing.assert_close(forward(X), model(X), rtol=0, atol=1e-5)
    if fmt.name == "torch.compile":
        assert counters["inductor"]["fxgraph_cache_hit"] > 0
        assert counters["inductor"]["fxgraph_cache_miss"] == 0


@pytest.mark.parametrize("error", [1e-4, float("nan")])
@pytest.mark.parametrize("batch_size", [1, 64, 1000, 1024])
def test_one_wrong_logit_at_one_batch_size_fails_the_check(model, tmp_path, batch_size, error):
    def wrong(batch):
        logits = model(batch)
        logits[-1, -1] += error if len(batch) == batch_size else 0
        return logits

    fmt = ExportFormat("wrong", "", "wrong", lambda _, path: path.touch(), lambda *_: wrong)
    with pytest.raises(lesson.CheckFailed, match="max error"):
        export_and_verify(fmt, model, torch.randn(1024, 4), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_formats_that_are_not_available_are_one_line_each(deployed, tmp_path):
    lesson_pt = tmp_path / "lesson.pt"
    lesson_pt.write_bytes((deployed[0] / "lesson.pt").read_bytes())
    (tmp_path / "lesson.pt2").write_text("exported from an earlier model")
    no_compiler = {**os.environ, "PATH": "/nowhere"}
    done = run(*COMMAND, "--cpp", "--output", tmp_path, env=no_compiler)
    assert done.returncode == 1
    assert done.stderr.endswith("error: the C++ program needs AOTInductor, see above\n")
    assert done.stdout.count("not available: No working C++ compiler") == 2
    assert done.stdout.count(" ok\n") == 2
    assert {path.name for path in tmp_path.iterdir()} == {"lesson.pt", "lesson.ts", "lesson.pte"}


EXPORT_COMPILED = """
import pathlib, sys, torch, lesson_code
from real_world.deploy.formats import FORMATS, export_and_verify
model = lesson_code.load_checkpoint(sys.argv[1])[0].requires_grad_(False)
export_and_verify(FORMATS[1], model, torch.randn(1024, 4), pathlib.Path(sys.argv[2]))
"""


def test_disabled_compiler_cache_is_one_line(deployed, tmp_path):
    environment = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    script = (sys.executable, "-c", EXPORT_COMPILED)
    done = run(*script, deployed[0] / "lesson.pt", tmp_path, env=environment)
    expected = r"  torch.compile +not available: the compiler's cache is disabled .+\n"
    assert re.fullmatch(expected, done.stdout), done.stderr


# %% C++
def test_cpp_program_links_no_python(predict):
    libraries = [line.split()[0] for line in run("ldd", predict[0]).stdout.splitlines()]
    assert "libtorch_cpu.so" in libraries
    assert [name for name in libraries if "python" in name] == []


def test_cpp_answers_are_those_of_predict(predict, model):
    X = torch.randn(1000, 4, generator=torch.Generator().manual_seed(3))
    done = run(*predict, input=to_csv(X))
    assert (done.returncode, done.stderr) == (0, "")
    classes, probabilities = lesson.predict(model, X)
    given = answers(done.stdout)
    assert list(given) == list(range(1, 1001))
    assert [label for label, _ in given.values()] == classes.tolist()
    cpp_probabilities = torch.tensor([row for _, row in given.values()])
    torch.testing.assert_close(cpp_probabilities, probabilities, rtol=0, atol=1e-6)


PEAK_MEMORY = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""  # in a small process: a child's peak includes its parent's memory before exec


def test_memory_does_not_grow_with_the_input(predict):
    kilobytes = []
    for samples in (10_000, 1_000_000):
        done = run(sys.executable, "-c", PEAK_MEMORY, *predict, input=SAMPLE * samples)
        assert done.returncode == 0
        kilobytes.append(int(done.stdout))
    assert kilobytes[1] - kilobytes[0] < 4096


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1,2,3", "has 3 values, the model takes 4"),
        ("1,2,3,4,5", "has 5 values, the model takes 4"),
        ("1,2,3,", "has '', which is not a finite number"),
        ("", "has '', which is not a finite number"),
        ("1,\x1b[31m,3,4", "has '?[31m', which is not a finite number"),
        ("1,nan,3,4", "has 'nan', which is not a finite number"),
        ("1,2,3,1e39", "has '1e39', which is not a finite number"),
        ("3e38,3e38,3e38,3e38", "has values so large that the result is not finite"),
    ],
)
def test_invalid_line_gets_a_message_and_no_answer(predict, line, message):
    done = run(*predict, input=f"{SAMPLE}{line}\n{SAMPLE}")
    assert (done.returncode, done.stderr) == (1, f"predict: line 2 {message}\n")
    given = answers(done.stdout)
    assert list(given) == [1, 3]
    assert given[1] == given[3]


FIELD = st.one_of(
    st.floats(-1e30, 1e30).map(repr),
    st.sampled_from(["nan", "inf", "-inf", "1e300", "1E5", "1e-60", "+1.5", " 2.\t", "0x1", "1e"]),
    st.text(alphabet="0123456789.- x", max_size=6),
)
NUMBER = re.compile(r"\+?-?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def is_sample(line: str) -> bool:
    fields = [field.strip() for field in line.split(",")]
    numbers = [field for field in fields if NUMBER.fullmatch(field)]
    return len(fields) == len(numbers) == 4 and all(abs(float(n)) <= 1e30 for n in numbers)


@settings(max_examples=20, deadline=None)
@given(lines=st.lists(st.lists(FIELD, min_size=3, max_size=5).map(",".join), max_size=100))
def test_every_line_is_answered_correctly_or_refused(predict, model, lines):
    done = run(*predict, input="\n".join(lines))
    lines = "\n".join(lines).splitlines()  # an empty last line is no line
    samples = {number: line for number, line in enumerate(lines, 1) if is_sample(line)}
    refused = re.findall(r"^predict: line (\d+) .+$", done.stderr, re.MULTILINE)
    assert done.returncode == (len(samples) < len(lines))
    assert sorted([*map(int, refused), *samples]) == list(range(1, len(lines) + 1))
    given = answers(done.stdout)
    assert given.keys() == samples.keys()
    if samples:
        X = torch.tensor([[float(field) for field in line.split(",")] for line in samples.values()])
        probabilities = torch.tensor([row for _, row in given.values()])
        expected = lesson.predict(model, X)[1]
        torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-6)


def test_answers_do_not_wait_for_the_end_of_the_input(predict):
    pipe = subprocess.PIPE
    with subprocess.Popen(predict, stdin=pipe, stdout=pipe, text=True, bufsize=1) as program:
        for line_number in (1, 2, 3):
            program.stdin.write(SAMPLE)
            assert program.stdout.readline().startswith(f"{line_number},")


def test_file_that_is_not_a_package(predict, tmp_path):
    content = predict[1].read_bytes()
    torchscript = predict[1].with_suffix(".ts").read_bytes()
    for wrong in (b"", b"not a package", content[:-1000], torchscript):
        path = tmp_path / "a package.pt2"
        path.write_bytes(wrong)
        done = run(predict[0], path)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(rf"predict: cannot load {path}: .+\n", done.stderr)


def test_full_disk_closed_pipe_and_endless_line(predict, tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    program = f"'{predict[0]}' '{predict[1]}'"
    for script, status, message in (
        (f"echo {SAMPLE.strip()} | {program} > /dev/full", 1, "cannot write the answers: No space"),
        (f"yes {SAMPLE.strip()} | {program} | head -n 1", 0, ""),
        (f"yes | tr -d '\\n' | {program}", 1, "a line is longer than 65536 bytes"),
    ):
        done = run("bash", "-c", script, env=environment)
        assert done.returncode == status
        assert done.stderr.startswith(f"predict: {message}" if message else message)
    assert list(tmp_path.iterdir()) == [], "the unpacked package is deleted"
