"""A later set-up installs what was tested: every package that `--all` brings is pinned."""

from importlib.metadata import distribution, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def requirements(lines: list[str], extra: str = "") -> list[Requirement]:
    """Return the requirements among some lines that apply on this computer."""
    found = [Requirement(line) for line in lines if line[:1].isalpha()]
    return [each for each in found if not each.marker or each.marker.evaluate({"extra": extra})]


def lines_of(file: str) -> list[str]:
    return (ROOT / file).read_text().splitlines()


def test_every_installed_package_is_pinned():
    pins = requirements(lines_of("real_world/constraints.txt"))
    pinned = {canonicalize_name(pin.name): str(pin.specifier) for pin in pins}
    pending = requirements(lines_of("requirements.txt") + lines_of("real_world/requirements.txt"))
    seen = set()
    while pending:
        package = pending.pop()
        name = canonicalize_name(package.name)
        if name.startswith(("cuda-", "nvidia-", "triton")):  # PyTorch itself pins these
            continue
        assert name == "torch" or pinned.get(name) == f"=={version(name)}", f"{name} is not pinned"
        for extra in {"", *package.extras} - {seen_extra for of, seen_extra in seen if of == name}:
            seen.add((name, extra))
            pending += requirements(distribution(name).requires or [], extra)
    assert len(seen) > 100
