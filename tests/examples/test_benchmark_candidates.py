"""The benchmark example: that it compares equal work."""

import json
import os
import subprocess

import pytest
import torch
from starlette.testclient import TestClient
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lesson_code as lesson
from real_world.benchmark import (
    cuda,
    fastapi_app,
    harness,
    inference,
    litserve_app,
    llama_cuda,
    serve,
)
from real_world.benchmark.frameworks import FRAMEWORKS, Size, build_training
from real_world.common import CheckFailed
from real_world.llama import parity

TINY = Size(samples=60, in_features=7, hidden_size=12, num_classes=4)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_frameworks_have_equal_losses(framework):
    losses = [float(loss) for loss in build_training(framework, TINY)(6)]
    expected = build_training("PyTorch, train()", TINY)(6)
    if framework.startswith("scikit-learn"):  # draws its own initial weights
        assert losses[-1] < losses[0]
    elif framework.endswith("1 epoch"):  # returns the mean loss of the epoch
        assert losses == [pytest.approx(sum(expected) / 6, abs=1e-5)]
    else:
        assert losses == pytest.approx(expected, abs=1e-5)


GPU = torch.cuda.is_available()


@pytest.mark.parametrize("name", cuda.VARIANTS if GPU else ["PyTorch, train()", "bfloat16"])
def test_cuda_variants_have_equal_losses(name):
    variant = cuda.VARIANTS[name]
    device = torch.device("cuda" if GPU else "cpu")
    losses = cuda.build_training(variant, TINY, device)(6)
    expected = build_training("PyTorch, train()", TINY)(6)
    is_float32 = variant.dtype == torch.float32
    assert losses == pytest.approx(expected, abs=1e-5 if is_float32 else 0.01)
    assert (losses == pytest.approx(expected, abs=1e-5)) == is_float32


def test_speeds_of_a_gpu(monkeypatch):
    monkeypatch.setattr(harness, "time_call", lambda function: function() or 2.0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    x, y = torch.ones(8, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.bfloat16)
    assert llama_cuda.copy_bandwidth(x, y) == 160, "10 copies read and write 16 bytes each"
    assert y.equal(x)
    assert cuda.matmul_speed(torch.ones(3, 3)) == 270, "10 products of 27 multiply-adds"


def test_llama_candidates_do_the_same(monkeypatch):
    """Those that are compiled have tests of their own."""
    monkeypatch.setattr(harness, "time_call", lambda train: 0 * len(train()) + 2.0)
    torch.manual_seed(0)
    model = llama_cuda.build(parity.BASE, torch.device("cpu")).float()
    reference = parity.to_transformers(model)
    prompt = torch.randint(model.config.vocab_size, (1, 9))
    generation = llama_cuda.generation_candidates(model, reference, prompt)
    new = torch.tensor(generation["this example"](5)).T  # (1, 5)
    assert torch.cat((prompt, new), dim=1).tolist() == generation["transformers"](5)
    training = llama_cuda.training_candidates(model, reference, prompt)
    assert training["this example"]() == 20, "5 steps of 8 tokens in 2 seconds"
    assert training["transformers"]() == 20
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(parameter, model.get_parameter(name), atol=1e-5, rtol=0)


def test_llama_efficiencies():
    weights, flops = 2 * 1_235_746_816, 3 * (2 * 1_235_746_816 + 4 * 16 * 2048 * 2048)
    results = {
        "gpu": "A GPU",
        "peaks": {"bandwidth": {"median": 100 * weights}, "matmul": {"median": 1000 * flops}},
        "generation": {"1B": {"compiled": {"first": {"median": 1}, "next": {"median": 0.02}}}},
        "training": {"eager": {"median": 250}},
    }
    table = llama_cuda.table(results)
    assert "| 1B, compiled | 1,000 | 50.0 | 50% |" in table
    assert "| eager | 250 | 25% |" in table


def test_flops_are_those_that_pytorch_counts():
    X, y = lesson.make_synthetic_data(TINY.samples, TINY.in_features, TINY.num_classes)
    model = lesson.SimpleClassifier(*TINY[1:])
    optimizer = torch.optim.Adam(model.parameters())
    with FlopCounterMode(display=False) as counter:
        lesson.train(model, [(X, y)], nn.CrossEntropyLoss(), optimizer, epochs=1)
    assert counter.get_total_flops() == TINY.flops


def test_other_servers_answer_like_predict(tmp_path, monkeypatch):
    model = lesson.SimpleClassifier()
    optimizer = torch.optim.Adam(model.parameters())
    lesson.save_checkpoint(tmp_path / "lesson.pt", model, optimizer, [])
    monkeypatch.setattr(fastapi_app, "OUTPUT", tmp_path)
    monkeypatch.setattr(litserve_app, "OUTPUT", tmp_path)
    request = json.loads(serve.BODY)
    answers = [TestClient(fastapi_app.create_app()).post("/predict", json=request).json()]
    api = litserve_app.Predict(max_batch_size=2, batch_timeout=1)
    api.setup("cpu")
    other = {"features": [[1, 2, 3, 4], [5, 6, 7, 8]]}
    batch = api.batch([api.decode_request(other), api.decode_request(request)])
    answers.append(api.encode_response(api.unbatch(api.predict(batch))[1]))
    classes, probabilities = lesson.predict(model, torch.tensor(request["features"]))
    for answer in answers:
        assert answer["classes"] == classes.tolist()
        torch.testing.assert_close(torch.tensor(answer["probabilities"]), probabilities)


def test_format_that_cannot_be_built_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(inference, "export_and_verify", lambda *_: None)
    with pytest.raises(CheckFailed, match=f"{inference.FORMATS[0].name} cannot be built here"):
        inference.load_formats(lesson.SimpleClassifier(), torch.zeros(1, 4), tmp_path)


def test_failed_requests_of_wrk_fail(monkeypatch, tmp_path):
    def write_script(result: str) -> None:
        (tmp_path / "wrk").write_text(f"#!/bin/sh\necho 'Running' '{result}'\n")
        (tmp_path / "wrk").chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        server = serve.Server("http://server", process.pid)
        try:
            write_script('{"rate": 5.5, "errors": 0}')
            assert serve.generate_load(server, 1, 1) == {"rate": 5.5}
            write_script('{"rate": 5.5, "errors": 3}')
            with pytest.raises(CheckFailed, match="3 of wrk's requests to http://server failed"):
                serve.generate_load(server, 1, 1)
        finally:
            process.kill()
