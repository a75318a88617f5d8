"""The four formats, builds that fail, and runs that are interrupted."""

import os
import re
import sys

import pytest
import torch
from deploy_run import COMMAND, run
from torch._dynamo.utils import counters

import lesson_code as lesson
from real_world.deploy.formats import FORMATS, ExportFormat, export_and_verify


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
