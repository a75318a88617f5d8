"""The C++ program: its answers, and what it says to input and packages that are wrong."""

import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import finish, run, start, wait_until
from readmes import REAL_WORLD

import lesson_code as lesson
from real_world.common import load_lesson_model
from real_world.deploy.formats import export_aotinductor

SAMPLE = "0.5,-1.2,0.3,0.8\n"
BUILD = """
import pathlib, sys
from real_world.deploy.cpp import build_cpp
build_cpp(pathlib.Path(sys.argv[1]), sys.argv[2])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with a checkpoint, its package, and two programs that are built at once."""
    folder = tmp_path_factory.mktemp("deployed")
    build = [sys.executable, "-c", BUILD, folder]
    with start(*build, "predict") as predict, start(*build, "latency") as latency:
        model = load_lesson_model(folder / "lesson.pt").requires_grad_(False)
        export_aotinductor(model, folder / "lesson.pt2")
        for process in (predict, latency):
            assert finish(process) == (0, "")
    return folder


@pytest.fixture(scope="module")
def model(folder) -> lesson.SimpleClassifier:
    return load_lesson_model(folder / "lesson.pt")


@pytest.fixture(scope="module")
def predict(folder) -> list[Path]:
    """Return the command of the C++ program."""
    return [folder / "cpp" / "predict", folder / "lesson.pt2"]


def assert_refused(
    done: subprocess.CompletedProcess[str], package: Path, message: str = ".+"
) -> None:
    """Assert that the program ended without an answer, and with one line: a regular expression."""
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"predict: cannot use {package}: {message}\n", done.stderr), done.stderr


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\b0\.\d{6,}", text)]


def test_builds_leave_the_programs_only(folder):
    assert {path.name for path in folder.iterdir()} == {"lesson.pt", "lesson.pt2", "cpp"}
    assert {path.name for path in (folder / "cpp").iterdir()} == {"predict", "latency"}


def test_from_training_to_an_answer(folder):
    """The lines of the index: C++ and HTTP give the same answer, the one that it shows."""
    index = (REAL_WORLD / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```console\n(.*?)```", index, re.DOTALL)
    lines = re.findall(r"^\$ (?:\./setup\.sh )?(?:--all )?(.+)$", "".join(blocks), re.MULTILINE)
    lesson_line, deploy, predict, serve, curl = lines
    assert lesson_line == "python lesson_code.py"  # its checkpoint is the one that deploy trains
    assert deploy == "python -m real_world.deploy --cpp"
    answer = run("sh", "-c", predict.replace("checkpoints", str(folder))).stdout
    assert numbers(answer) == pytest.approx(numbers(blocks[0]), abs=1e-5)

    assert serve == "python -m real_world.serve"
    options = ["--port", "0", "--metrics-port", "0", "--checkpoint", folder / "lesson.pt"]
    with start(sys.executable, "-m", "real_world.serve", *options) as server:
        printed = iter(server.stdout.readline, "")
        address = next(re.search(r"//([\d.:]+)", line) for line in printed if "//" in line)
        response = run("sh", "-c", curl.replace("localhost:8000", address[1])).stdout
    assert numbers(response) == pytest.approx(numbers(blocks[1]), abs=1e-5)
    assert numbers(response) == pytest.approx(numbers(answer), abs=1e-5)


def answers(text: str) -> dict[int, tuple[int, list[float]]]:
    """Return the class and the probabilities by line number."""
    rows = csv.reader(text.splitlines())
    return {int(row[0]): (int(row[1]), [float(value) for value in row[2:]]) for row in rows}


def test_cpp_program_links_no_python(predict):
    libraries = [line.split()[0] for line in run("ldd", predict[0]).stdout.splitlines()]
    assert "libtorch_cpu.so" in libraries
    assert [name for name in libraries if "python" in name] == []


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
        ("1,2,3,-1e400", "has '-1e400', which is not a finite number"),
        ("1;2;3;4", "has semicolons, use commas"),
        ("3e38,3e38,3e38,3e38", "has values so large that the result is not finite"),
    ],
)
def test_invalid_line_gets_a_message_and_no_answer(predict, line, message):
    done = run(*predict, input=f"{SAMPLE}{line}\n{SAMPLE}")
    assert (done.returncode, done.stderr) == (1, f"predict: line 2 {message}\n")
    given = answers(done.stdout)
    assert list(given) == [1, 3]
    assert given[1] == given[3]


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("\ufeff" + SAMPLE.replace("\n", "\r\n"), SAMPLE),  # as Windows writes it
        (f"1e-400,-1e-400,2e-324,0.{'0' * 400}1\n", "0,0,0,0\n"),  # too small for a double
    ],
)
def test_other_ways_to_write_a_sample(predict, text, same):
    done = run(*predict, input=text)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == run(*predict, input=same).stdout


def test_header_is_named(predict):
    done = run(*predict, input=f"a,b,c,d\n{SAMPLE}")
    message = "line 1 has 'a', which is not a finite number (the file must have no header)"
    assert (done.returncode, done.stderr) == (1, f"predict: {message}\n")


FIELD = st.one_of(
    st.floats(-1e30, 1e30).map(repr),
    st.sampled_from(
        ["nan", "inf", "-inf", "1e300", "1E5", "1e-60", "+1.5", "+-1", " 2.\t", "0x1", "1e"]
    ),
    st.text(alphabet="0123456789.- x", max_size=6),
)
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def is_sample(line: str) -> bool:
    fields = [field.strip() for field in line.split(",")]
    numbers = [field for field in fields if NUMBER.fullmatch(field)]
    return len(fields) == len(numbers) == 4 and all(abs(float(n)) <= 1e30 for n in numbers)


@settings(max_examples=20, deadline=None)
@given(lines=st.lists(st.lists(FIELD, min_size=3, max_size=5).map(",".join), max_size=100))
def test_every_line_is_answered_correctly_or_refused(predict, model, lines):
    done = run(*predict, input="\n".join(lines))
    lines = "\n".join(lines).splitlines()  # an empty last line does not count
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


def altered(package: Path, path: Path, **changes: str) -> Path:
    """Copy a package to `path`, with other metadata; a value "" removes the entry."""
    with zipfile.ZipFile(package) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            if info.filename.endswith("_metadata.json"):
                metadata = json.loads(content) | changes
                content = json.dumps({k: v for k, v in metadata.items() if v}).encode()
            new.writestr(info, content)
    return path


def test_file_that_is_not_a_package_of_the_lesson(predict, tmp_path):
    path = tmp_path / "a package.pt2"
    other_model = altered(predict[1], path, in_features="").read_bytes()
    for content in (b"not a package", predict[1].read_bytes()[:-1000], other_model):
        path.write_bytes(content)
        assert_refused(run(predict[0], path), path)
    altered(predict[1], path, in_features="5")
    done = run(predict[0], path, input="1,2,3,4,5\n")
    done.stderr = done.stderr[done.stderr.index("predict:") :]  # PyTorch also reports the shapes
    assert_refused(done, path)


@pytest.mark.parametrize(
    ("create", "message"),
    [(None, "no such file"), (os.mkdir, "is a folder"), (os.mkfifo, "not a regular file")],
)
def test_path_that_is_not_a_file(predict, tmp_path, create, message):
    if create:
        create(tmp_path / "lesson.pt2")
    assert_refused(run(predict[0], tmp_path / "lesson.pt2"), tmp_path / "lesson.pt2", message)


def test_package_with_a_flipped_bit(predict, tmp_path):
    content = predict[1].read_bytes()
    with zipfile.ZipFile(predict[1]) as archive:
        library = archive.read(next(n for n in archive.namelist() if n.endswith(".so")))
    start = content.index(library)
    end = start + len(library)
    expected = run(*predict, input=SAMPLE).stdout
    rng = random.Random(1)
    in_library = rng.sample(range(start, end), 15)
    elsewhere = rng.sample([*range(start), *range(end, len(content))], 15)
    damaged = tmp_path / "damaged.pt2"
    for position in in_library + elsewhere:
        flipped = content[position] ^ 1 << rng.randrange(8)
        damaged.write_bytes(content[:position] + bytes([flipped]) + content[position + 1 :])
        done = run(predict[0], damaged, input=SAMPLE)
        if position in in_library or done.stdout != expected:  # the same if in a timestamp
            assert_refused(done, damaged)


def test_package_runs_on_processors_with_avx2(predict, tmp_path):
    with zipfile.ZipFile(predict[1]) as archive:
        names = archive.namelist()
        metadata = json.loads(archive.read(next(n for n in names if n.endswith("metadata.json"))))
        library = archive.extract(next(n for n in names if n.endswith(".so")), tmp_path)
    assert metadata["AOTI_CPU_ISA"] == "AVX2"
    assert "%zmm" not in run("objdump", "--disassemble", library).stdout, "no AVX-512"
    newer = altered(predict[1], tmp_path / "newer.pt2", AOTI_CPU_ISA="AVX512 AVX512_4VNNIW")
    message = "it needs a processor with AVX512 AVX512_4VNNIW"
    assert_refused(run(predict[0], newer), newer, message)


@pytest.mark.parametrize(
    ("mount", "message"),
    [("noexec", "is mounted noexec"), ("size=100k", "is full"), ("ro", "Read-only file system")],
)
def test_temporary_folder_that_cannot_be_used(predict, tmp_path, mount, message):
    script = f"mount -t tmpfs -o {mount} none {tmp_path} && {predict[0]} {predict[1]}"
    unshare = ("unshare", "--map-root-user", "--mount", "sh", "-c", script)
    done = run(*unshare, TMPDIR=str(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr
    assert str(tmp_path) in done.stderr


def test_signal_while_the_package_is_loaded_leaves_no_files(predict, tmp_path):
    package = altered(predict[1], tmp_path / "large.pt2")
    with zipfile.ZipFile(package, "a", zipfile.ZIP_DEFLATED) as archive:  # takes long to unpack
        archive.writestr("lesson/data/aotinductor/model/zeros", bytes(100_000_000))
    folder = tmp_path / "tmp"
    folder.mkdir()
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        with start(predict[0], package, TMPDIR=str(folder)) as program:
            wait_until(lambda: list(folder.iterdir()))
            program.send_signal(signum)
            assert program.wait() == -signum
        assert list(folder.iterdir()) == []


def test_full_disk_closed_pipe_and_endless_line(predict, tmp_path):
    program = f"'{predict[0]}' '{predict[1]}'"
    for script, status, message in (
        (f"echo {SAMPLE.strip()} | {program} > /dev/full", 1, "cannot write the answers: No space"),
        (f"yes {SAMPLE.strip()} | {program} | head -n 1", 0, ""),
        (f"yes | tr -d '\\n' | {program}", 1, "a line is longer than 65536 bytes"),
    ):
        done = run("bash", "-c", script, TMPDIR=str(tmp_path))
        assert done.returncode == status
        assert done.stderr.startswith(f"predict: {message}" if message else message)
    assert list(tmp_path.iterdir()) == [], "the unpacked package is deleted"
