"""The four formats, builds that fail, and runs that are interrupted."""

import io
import re
import signal
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import run, start
from readmes import assert_transcript
from torch._dynamo.utils import counters

import lesson_code as lesson
from real_world.common import CheckFailed
from real_world.deploy import cpp
from real_world.deploy.cpp import check_cpp, measure_cpp, predict_in_python, run_build, to_csv
from real_world.deploy.formats import (
    FORMATS,
    ExportFormat,
    export_and_verify,
    first_error,
    load_aotinductor,
    max_abs_error,
)

WITH_A_SHORT_BENCHMARK = """
from real_world.deploy import __main__, cpp
cpp.REPEATS = 12
__main__.run_cli(__main__.main)
"""


@pytest.fixture(scope="module")
def deployed(tmp_path_factory) -> tuple[Path, str]:
    """Run the example with --cpp; return its output folder and what it printed."""
    folder = tmp_path_factory.mktemp("deployed")
    done = run(sys.executable, "-c", WITH_A_SHORT_BENCHMARK, "--cpp", "--output", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"(\[cpuinfo.*\n)*", done.stderr), "more than ExecuTorch's log"
    return folder, done.stdout


@pytest.fixture(scope="module")
def model(deployed) -> lesson.SimpleClassifier:
    return lesson.load_checkpoint(deployed[0] / "lesson.pt")[0].requires_grad_(False)


def test_readme(deployed):
    folder, printed = deployed
    printed = re.sub(r"  no checkpoint yet.*\n", "", printed)  # the README begins with one
    # Sizes and times depend on the compiler and the machine, errors on rounding.
    assert_transcript("deploy", printed, r"bytes|max error|C\+\+ +\d|eager +\d|as fast")
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


def test_damaged_package_is_not_loaded(deployed, model, tmp_path):
    content = bytearray((deployed[0] / "lesson.pt2").read_bytes())
    content[1000] ^= 1  # in the first record, a C++ source: PyTorch would load the package
    path = tmp_path / "damaged.pt2"
    path.write_bytes(content)
    with pytest.raises(zipfile.BadZipFile, match=rf"{path}: the record .+\.cpp is damaged"):
        load_aotinductor(path, model)


@pytest.mark.parametrize("error", [1e-3, float("nan")])
@pytest.mark.parametrize("batch_size", [1, 64, 1000, 1024])
def test_one_wrong_logit_at_one_batch_size_fails_the_check(model, tmp_path, batch_size, error):
    def wrong(batch):
        logits = model(batch)
        logits[-1, -1] += error if len(batch) == batch_size else 0
        return logits

    fmt = ExportFormat("wrong", "", "wrong", lambda _, path: path.touch(), lambda *_: wrong)
    with pytest.raises(CheckFailed, match="max error"):
        export_and_verify(fmt, model, torch.randn(1024, 4), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_error_is_divided_by_the_largest_logit():
    X = torch.tensor([[-200.0], [1.0]])
    assert max_abs_error(lambda X: X + 2, lambda X: X, X) == pytest.approx(2 / 200)
    assert max_abs_error(lambda X: X + 2, lambda X: X / 400, X / X) == pytest.approx(2 + 399 / 400)


def answering_program(folder: Path, model: lesson.SimpleClassifier, old: str, new: str) -> Path:
    """Return a program that answers as the C++ program, but with one replacement in line 700."""
    X = torch.randn(1000, 4, generator=torch.Generator().manual_seed(2))
    with (folder / "answers").open("w") as output:
        predict_in_python(model, io.StringIO(to_csv(X)), output)
    lines = (folder / "answers").read_text().splitlines()
    lines[699] = re.sub(old, new, lines[699])
    (folder / "answers").write_text("\n".join(lines))
    (folder / "program").write_text(f"#!/bin/sh\ncat > /dev/null\ncat {folder}/answers\n")
    (folder / "program").chmod(0o755)
    return folder / "program"


def test_one_wrong_answer_of_the_cpp_program_fails_the_check(model, tmp_path, capsys):
    check_cpp(answering_program(tmp_path, model, "", ""), tmp_path, model)
    assert capsys.readouterr().out.endswith(" ok\n")
    for old, new in (
        (r"^700,\d", "700,3"),  # the class
        (r"[^,]+$", "nan"),
        (r"[^,]+$", lambda number: str(float(number[0]) + 2e-6)),
    ):
        with pytest.raises(CheckFailed, match="1,000 samples"):
            check_cpp(answering_program(tmp_path, model, old, new), tmp_path, model)


def test_medians_of_the_times_are_compared(model, tmp_path, monkeypatch, capsys):
    """The C++ program takes 1, 2, 4, 8 or 16 seconds, Python takes 10 times as long."""
    times = [t for seconds in (8, 2, 16, 1, 4) for t in (3, 3 + seconds, 3, 3 + 10 * seconds)]
    monkeypatch.setattr(cpp, "time", SimpleNamespace(perf_counter=iter(times).__next__))
    monkeypatch.setattr(cpp, "REPEATS", 1)
    measure_cpp(answering_program(tmp_path, model, "", ""), tmp_path, model)
    figures = re.findall(r"(?:C\+\+|eager|Python) +([\d.]+)", capsys.readouterr().out)
    assert figures == ["250", "25", "10.0"], "1,000 samples"


FAILING_COMPILER = """#!/bin/sh
case "$*" in *-version*) echo g++ 12.2.0; exit ;; esac
echo "a.cpp:7: fatal error: disk full"
exit 1
"""


def test_formats_that_are_not_available_are_one_line_each(deployed, tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text(FAILING_COMPILER)
    compiler.chmod(0o755)
    (tmp_path / "executorch.py").touch()
    output = tmp_path / "output"
    output.mkdir()
    (output / "lesson.pt").write_bytes((deployed[0] / "lesson.pt").read_bytes())
    (output / "lesson.pt2").write_text("exported from an earlier model")
    path = {"PATH": f"{tmp_path}:/bin", "CXX": str(compiler), "PYTHONPATH": str(tmp_path)}
    done = run(sys.executable, "-m", "real_world.deploy", "--cpp", "--output", output, **path)
    assert done.returncode == 1
    assert done.stderr.endswith("error: the C++ program needs AOTInductor, see above\n")
    assert done.stdout.count("not available: a.cpp:7: fatal error: disk full\n") == 2
    assert done.stdout.count("not available: No module named 'executorch.") == 1
    assert {path.name for path in output.iterdir()} == {"lesson.pt", "lesson.ts"}


def test_first_error_of_a_build():
    script = "echo 1/2; echo 'a.cpp:7: error: no such type'; echo 'b.cpp:1: error: other'; exit 1"
    with pytest.raises(CheckFailed, match=r": a.cpp:7: error: no such type$"):
        run_build(["sh", "-c", script])
    assert first_error("CMake Error at x:\n\n  No compiler") == "CMake Error at x: No compiler"


@pytest.mark.parametrize("place", ["sys.prefix", "sys.base_prefix", "tempfile.tempdir"])
@pytest.mark.parametrize("fmt", FORMATS[1:3], ids=lambda fmt: fmt.name)
def test_path_with_a_space_is_one_line(model, tmp_path, monkeypatch, capsys, place, fmt):
    folder = tmp_path / "with space"
    folder.mkdir()
    monkeypatch.setattr(place, str(folder))
    export_and_verify(fmt, model, torch.randn(1024, 4), tmp_path)
    message = f"the compiler needs paths without spaces, rename a folder of {folder}\n"
    assert capsys.readouterr().out.endswith(f"not available: {message}")


# %% Interrupted runs, and two at a time
SCRATCH = """
import pathlib, sys, tempfile, time
from real_world.deploy.scratch import scratch_dir
with scratch_dir(pathlib.Path(sys.argv[1])):
    print(tempfile.mkdtemp(), flush=True)
    while True:  # signal.pause() would miss a signal that comes just before it
        time.sleep(0.01)
"""


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_killed_run_leaves_no_temporary_files_to_the_next(tmp_path, stop):
    command = [sys.executable, "-c", SCRATCH, tmp_path]
    with start(*command) as run:
        folder = Path(run.stdout.readline().strip())
        assert folder.is_relative_to(tmp_path)
        with start(*command) as other:
            assert other.stdout.readline() == f"waiting for another run in {tmp_path}\n"
            run.send_signal(stop)
            assert run.wait() != 0
            other_folder = Path(other.stdout.readline().strip())
            assert (folder.exists(), other_folder.exists()) == (False, True)
            other.terminate()
            other.wait()
    assert list(tmp_path.iterdir()) == []
