"""The lesson's checkpoint in four formats that run without eager PyTorch, or without Python.

    python -m real_world.deploy          export four formats, load and verify each
    python -m real_world.deploy --cpp    then build and check a C++ program that uses one of them

The article's "Component Architecture" names TorchScript and torch.compile. TorchScript is now
deprecated; its successors are AOTInductor, for C++ services, and ExecuTorch, for phones.
"""

import argparse
import logging
from pathlib import Path

import torch
from tqdm import tqdm

from real_world.common import OUTPUT, CheckFailed, load_lesson_model, print_heading, run_cli, show
from real_world.deploy.cpp import build_cpp, check_cpp, measure_cpp
from real_world.deploy.formats import FORMATS, MAX_BATCH, export_and_verify
from real_world.deploy.scratch import scratch_dir


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m real_world.deploy", description="The lesson's checkpoint in four formats."
    )
    add = parser.add_argument
    add("--output", metavar="DIR", type=Path, default=OUTPUT, help="default: checkpoints/")
    add("--cpp", action="store_true", help="also build and check the C++ program")
    args = parser.parse_args(argv)
    print_heading(
        "Deploy: one checkpoint, four formats",
        "TorchScript mode compiles models into a portable intermediate representation",
    )
    args.output.mkdir(parents=True, exist_ok=True)
    with scratch_dir(args.output):
        deploy(args.output, args.cpp)


def deploy(output: Path, cpp: bool) -> None:
    """Export and verify all formats; build and check the C++ program if `cpp`."""
    torch.set_num_threads(1)  # a batch is too small for more threads
    torch._inductor.config.compile_threads = 1  # do not start a pool of compiler processes
    logging.disable(logging.WARNING)  # of the libraries that ExecuTorch imports

    model = load_lesson_model(output / "lesson.pt").requires_grad_(False).eval()
    X = torch.randn(MAX_BATCH, model.fc1.in_features, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), tqdm(FORMATS, leave=False, disable=None) as progress:
        for fmt in progress:
            progress.set_description(f"exporting {fmt.name}")
            with progress.external_write_mode():
                export_and_verify(fmt, model, X, output)

    if cpp:
        print()
        package = output / "lesson.pt2"
        if not package.exists():
            raise CheckFailed("the C++ program needs AOTInductor, see above")
        program = build_cpp(output)
        show("C++ program", program)
        check_cpp(program, package, model)
        measure_cpp(program, package, model)


if __name__ == "__main__":
    run_cli(main)
