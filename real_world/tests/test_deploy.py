"""The exported forms, read back by other processes, and the C++ program, which has no Python in it.

pytest real_world/tests/test_deploy.py
"""

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
from real_world import deploy, quiet

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "real_world.deploy"]


@pytest.fixture(scope="module")
def deployed(tmp_path_factory) -> tuple[Path, str]:
    """Run the page once, without a checkpoint; return its folder and its transcript."""
    folder = tmp_path_factory.mktemp("deployed")
    command = [*COMMAND, "--cpp", "--output", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return folder, done.stdout


@pytest.fixture(scope="module")
def model(deployed):
    return lesson.load_checkpoint(deployed[0] / "lesson.pt")[0].requires_grad_(False)


# The forms


def test_every_form_is_built_and_answers_as_the_network_does(deployed):
    folder, transcript = deployed
    names = "TorchScript", "torch.compile", "AOTInductor", "ExecuTorch"
    assert re.findall(r"^  (\S+) +lesson\.", transcript, re.MULTILINE) == list(names)
    assert transcript.count("largest difference") == transcript.count(" ok\n") == 5
    assert "`torch.jit.script` is deprecated. Please switch to `torch.compile`" in transcript
    table = transcript.split("ExecuTorch its own):\n")[1].splitlines()
    assert [line.split()[0] for line in table[1:6]] == ["eager", *names]
    assert all(len(re.findall(r"\d+\.\d  +\d\.\d\d x", line)) == 3 for line in table[1:6])
    files = {path.name for path in folder.iterdir()}
    assert files == {"lesson.pt", "cpp", *(form.file for form in deploy.FORMS)}


@pytest.mark.parametrize("form", deploy.FORMS, ids=lambda form: form.name)
def test_a_form_read_from_its_file_takes_batches_of_any_size(deployed, model, form):
    counters["inductor"].clear()
    torch.set_num_threads(1)  # as deploy has it: the compiled code is for so many threads
    with torch.inference_mode(), quiet():
        network = form.load(deployed[0] / form.file, model)
        for rows in (1, 2, 63, 1024):
            X = torch.randn(rows, 4)
            torch.testing.assert_close(network(X), model(X), rtol=0, atol=1e-5)
    if form.name == "torch.compile":
        assert counters["inductor"]["fxgraph_cache_hit"] > 0, "it was read, not compiled again"


def test_a_form_that_answers_something_else_is_an_error(model, tmp_path, capsys):
    rows = torch.randn(1024, 4)
    for row, error in ((0, 1e-4), (1023, 1e-4), (1023, float("nan"))):

        def altered(X, row=row, error=error):
            return model(X) + error * (rows[row] == X).all(dim=1, keepdim=True)

        form = deploy.Form("altered", "", "f", lambda _, path: path.touch(), lambda *_: altered)
        with pytest.raises(lesson.CheckFailed, match="largest difference"):
            deploy.make(form, model, rows, tmp_path)
        assert capsys.readouterr().out.endswith("FAILED\n")


def test_a_form_that_is_wrong_for_one_size_of_batch_is_found_out(model):
    for size in (1, 64, 1000, 1024):
        off = deploy.difference(
            lambda X, size=size: model(X) + (len(X) == size), model, torch.randn(1024, 4)
        )
        assert off > 0.1


def test_what_cannot_be_built_is_one_line_and_keeps_the_file_that_was_there(
    model, tmp_path, capsys, monkeypatch
):
    form = next(form for form in deploy.FORMS if form.name == "ExecuTorch")
    (tmp_path / form.file).write_text("precious")
    partitioner = "executorch.backends.xnnpack.partition.xnnpack_partitioner"
    monkeypatch.setitem(sys.modules, partitioner, None)
    assert deploy.make(form, model, torch.randn(1024, 4), tmp_path) is None
    printed = capsys.readouterr().out
    assert re.match(r"  ExecuTorch +cannot be built here: ", printed)
    assert (printed.count("\n"), [path.name for path in tmp_path.iterdir()]) == (1, [form.file])
    assert (tmp_path / form.file).read_text() == "precious"


def test_without_a_compiler_the_rest_goes_on_and_cpp_says_why_not(deployed, tmp_path):
    lesson.save_checkpoint(
        tmp_path / "lesson.pt", *lesson.load_checkpoint(deployed[0] / "lesson.pt")
    )
    command = [*COMMAND, "--cpp", "--output", str(tmp_path)]
    nothing = {**os.environ, "PATH": "/nowhere"}
    done = subprocess.run(command, cwd=ROOT, env=nothing, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        f"deploy: the C++ program answers from {tmp_path}/lesson.pt2, which could not be built\n"
    )
    assert done.stdout.count("cannot be built here: No working C++ compiler") == 2
    assert done.stdout.count("largest difference") == done.stdout.count(" ok\n") == 2


def test_a_torn_checkpoint_and_a_wrong_option_get_a_sentence(deployed, tmp_path):
    whole = (deployed[0] / "lesson.pt").read_bytes()
    (tmp_path / "lesson.pt").write_bytes(whole[:-100])
    for options, status, sentence in (
        (("--output", str(tmp_path)), 1, f"deploy: cannot load {tmp_path}/lesson.pt (BadZipFile: "),
        (("--output", "/proc/none"), 1, "deploy: "),
        (("--cp",), 2, "deploy: unrecognized arguments: --cp"),
    ):
        done = subprocess.run([*COMMAND, *options], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (status, 1), done.stderr
        assert done.stderr.startswith(sentence)


# C++


def predict(deployed, text: bytes | str, **options: object) -> subprocess.CompletedProcess:
    """Run the C++ program on `text`."""
    folder, _ = deployed
    command = [folder / "cpp" / "predict", folder / "lesson.pt2"]
    text = text.encode() if isinstance(text, str) else text
    return subprocess.run(command, input=text, capture_output=True, timeout=60, **options)


def answers(done: subprocess.CompletedProcess) -> dict[int, tuple[int, list[float]]]:
    """Return the class and the probabilities that were written, by line."""
    rows = csv.reader(done.stdout.decode().splitlines())
    return {int(row[0]): (int(row[1]), [float(value) for value in row[2:]]) for row in rows}


def test_there_is_no_python_among_what_the_program_links(deployed):
    linked = subprocess.run(
        ["ldd", deployed[0] / "cpp" / "predict"], capture_output=True, text=True, check=True
    ).stdout
    libraries = [line.split()[0] for line in linked.splitlines()]
    assert "libtorch_cpu.so" in libraries
    assert [name for name in libraries if "python" in name] == []


def test_a_thousand_rows_get_the_classes_and_probabilities_of_predict(deployed, model):
    rows = torch.randn(1000, 4, generator=torch.Generator().manual_seed(3))
    done = predict(deployed, deploy.as_csv(rows))
    assert (done.returncode, done.stderr) == (0, b"")
    classes, probabilities = lesson.predict(model, rows)
    given = answers(done)
    assert list(given) == list(range(1, 1001))
    assert [label for label, _ in given.values()] == classes.tolist()
    expected = torch.tensor([shares for _, shares in given.values()])
    torch.testing.assert_close(expected, probabilities, rtol=0, atol=1e-6)


PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
"""  # run by a small process: a child's peak counts what it had of its parent's before it started


def test_a_million_rows_take_no_more_memory_than_ten_thousand(deployed, tmp_path):
    folder, _ = deployed
    few = deploy.as_csv(torch.randn(10_000, 4))
    command = [sys.executable, "-c", PEAK, folder / "cpp" / "predict", folder / "lesson.pt2"]
    peaks = []
    for times in (1, 100):
        (tmp_path / "rows.csv").write_text(few * times)
        with (tmp_path / "rows.csv").open() as rows, (tmp_path / "answers.csv").open("w") as output:
            done = subprocess.run(
                command, stdin=rows, stdout=output, stderr=subprocess.PIPE, check=True
            )
        peaks.append(int(done.stderr) / 1024)  # megabytes; the kernel counts kilobytes
    with (tmp_path / "answers.csv").open() as output:
        assert sum(1 for _ in output) == 1_000_000
    assert peaks[1] - peaks[0] < 4


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("1,2,3", "has 3 values, the network takes 4"),
        ("1,2,3,4,5", "has 5 values, the network takes 4"),
        ("1,2,3,", "has '', which is not a number"),
        ("", "is empty"),
        ("   ", "is empty"),
        ("a,b,c,d", "has 'a', which is not a number"),
        ("1,2,3,4x", "has '4x', which is not a number"),
        ("1;2;3;4", "has '1;2;3;4', which is not a number"),
        ("0x10,2,3,4", "has '0x10', which is not a number"),
        ("+-1,2,3,4", "has '+-1', which is not a number"),
        ("1,\x1b[31m,3,4", "has '?[31m', which is not a number"),
        ("1,nan,3,4", "has nan, the network takes values up to 1e30"),
        ("1,2,-inf,4", "has -inf, the network takes values up to 1e30"),
        ("1,2,3,1e31", "has 1e31, the network takes values up to 1e30"),
        ("1,2,3,1e999", "has 1e999, the network takes values up to 1e30"),
        ("1" * 70_000, "is longer than 65536 bytes"),
        ("1" * 300_000, "is longer than 65536 bytes"),
    ],
)
def test_a_bad_row_gets_a_sentence_with_its_line_and_no_answer(deployed, row, complaint):
    good = "0.5,-1.2,0.3,0.8"
    done = predict(deployed, f"{good}\n{row}\n{good}\n")
    assert done.returncode == 1
    assert done.stderr.decode() == f"predict: line 2 {complaint}\n"
    given = answers(done)
    assert list(given) == [1, 3]
    assert given[1] == given[3]


def test_spaces_signs_line_ends_and_tiny_values_are_understood(deployed):
    plain = answers(predict(deployed, "1,-2,0.5,0\n"))[1]
    for row in ("+1, -2 ,\t.5,0", "1e0,-2.0,5e-1,1e-999", "1.,-2,0.5,0\r"):
        done = predict(deployed, row)  # without a line end, too
        assert (done.returncode, answers(done)) == (0, {1: plain}), done.stderr


FIELD = st.one_of(
    st.floats(-1e30, 1e30).map(repr),
    st.floats().map(repr),
    st.integers(-10, 10).map(str),
    st.text(alphabet="0123456789.eE+-nai x", max_size=6),
)
NUMBER = re.compile(r"\+?(?!(?<=\+)-)-?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def acceptable(line: str) -> bool:
    """Tell whether the program should answer `line`; decided without its code."""
    fields = [field.strip(" \t\r") for field in line.split(",")]
    numbers = [field for field in fields if NUMBER.fullmatch(field)]
    return len(fields) == len(numbers) == 4 and all(abs(float(n)) <= 1e30 for n in numbers)


@settings(max_examples=100, deadline=None)
@given(lines=st.lists(st.lists(FIELD, min_size=3, max_size=5).map(",".join), max_size=30))
def test_whatever_is_read_is_answered_right_or_refused(deployed, model, lines):
    done = predict(deployed, "".join(line + "\n" for line in lines))
    good = {number: line for number, line in enumerate(lines, 1) if acceptable(line)}
    complaints = re.findall(r"^predict: line (\d+) .+$", done.stderr.decode(), re.MULTILINE)
    assert done.returncode == (len(good) < len(lines))
    assert sorted([*map(int, complaints), *good]) == list(range(1, len(lines) + 1))
    given = answers(done)
    assert given.keys() == good.keys()
    if good:
        rows = torch.tensor([[float(field) for field in line.split(",")] for line in good.values()])
        probabilities = torch.tensor([shares for _, shares in given.values()])
        expected = lesson.predict(model, rows)[1]
        torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-6)


def test_an_answer_does_not_wait_for_the_end_of_the_input(deployed):
    folder, _ = deployed
    command = [folder / "cpp" / "predict", folder / "lesson.pt2"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen(command, **pipes) as program:
        for line in (1, 2, 3):
            program.stdin.write("0.5,-1.2,0.3,0.8\n")
            assert program.stdout.readline().startswith(f"{line},")


@pytest.mark.parametrize(
    "content", [None, b"", b"no package", b"PK\x03\x04 no package", "cut short", "no network"]
)
def test_a_file_that_is_no_package_gets_one_sentence(deployed, tmp_path, content):
    folder, _ = deployed
    path = tmp_path / "a package.pt2"
    if content == "cut short":
        path.write_bytes((folder / "lesson.pt2").read_bytes()[:-1000])
    elif content == "no network":
        path.write_bytes((folder / "lesson.ts").read_bytes())
    elif content is not None:
        path.write_bytes(content)
    done = subprocess.run([folder / "cpp" / "predict", path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    expected = (
        f"there is no file {path}" if content is None else f"{path} is no AOTInductor package"
    )
    assert done.stderr.startswith(f"predict: {expected}")
    assert done.stderr.endswith("; 'python -m real_world.deploy' makes one\n")
    assert done.stderr.count("\n") == 1


def test_without_a_package_it_says_how_it_is_used(deployed):
    done = subprocess.run([deployed[0] / "cpp" / "predict"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "predict: usage: predict PACKAGE.pt2 < rows.csv\n"


def test_a_full_disk_and_a_reader_that_leaves_end_it(deployed, tmp_path, monkeypatch):
    folder, _ = deployed
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    rows = ("0.5,-1.2,0.3,0.8\n" * 100_000).encode()
    command = [folder / "cpp" / "predict", folder / "lesson.pt2"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, input=rows, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == b"predict: cannot write the answers: No space left on device\n"
    script = f"'{command[0]}' '{command[1]}' | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], input=rows, capture_output=True)
    assert (done.returncode, done.stderr) == (141, b"")
    assert done.stdout.startswith(b"1,")
    assert list(tmp_path.iterdir()) == [], "the package that it unpacked is gone"
