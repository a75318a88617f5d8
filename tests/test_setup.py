"""setup.sh: once, again, changed, interrupted, moved, twice at a time, and where it cannot work.

One small package stands in for the requirements, so that each case takes seconds.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NO_NETWORK = {
    "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
    "PIP_RETRIES": "0",
    "PIP_NO_CACHE_DIR": "1",
    "PIP_CONFIG_FILE": os.devnull,
    "https_proxy": "http://127.0.0.1:9",
}
TOOLS = "basename bash cat cmp cp dirname env grep mkdir readlink rm sed timeout uname"


def make_project(parent: Path) -> Path:
    """Return a folder, with a space in its name, that holds setup.sh and small requirements."""
    folder = parent / "a lesson"
    folder.mkdir()
    shutil.copy(ROOT / "setup.sh", folder)
    (folder / "requirements.txt").write_text("iniconfig==2.3.1\n")
    return folder


@pytest.fixture
def project(tmp_path) -> Path:
    return make_project(tmp_path)


@pytest.fixture(scope="module")
def made_once(tmp_path_factory) -> Path:
    folder = make_project(tmp_path_factory.mktemp("made once"))
    assert run(folder).returncode == 0
    return folder


@pytest.fixture
def installed(made_once, tmp_path) -> Iterator[Path]:
    """Return a project that is set up, always at the same path: what a test changes is undone."""
    shutil.copytree(made_once, tmp_path / "backup", symlinks=True)
    yield made_once
    shutil.rmtree(made_once)
    shutil.move(tmp_path / "backup", made_once)


def add_examples(project: Path) -> None:
    """Write the requirements of real_world/, with a constraint on what they need."""
    (project / "real_world").mkdir()
    (project / "real_world" / "requirements.txt").write_text("-c constraints.txt\npluggy\n")
    (project / "real_world" / "constraints.txt").write_text("pluggy==1.5.0\n")


def run(project: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    """Run setup.sh with `command` from another folder than its own."""
    return subprocess.run(
        [project / "setup.sh", *command],
        cwd=project.parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def assert_fails(project: Path, message: str, *arguments: str, **environment: str) -> None:
    """Run setup.sh, which must fail with a message."""
    failed = run(project, *arguments, "true", **environment)
    assert failed.returncode == 1
    assert message in failed.stderr


def replace_python(project: Path, script: str) -> None:
    """Replace the Python of .venv by a shell script, in which $real is the one that was there."""
    python = project / ".venv" / "bin" / "python"
    python.rename(python.with_name("real"))
    python.write_text(f'#!/bin/sh\nreal="${{0%python}}real"\n{script}\n')
    python.chmod(0o755)


def tools_and(folder: Path, **scripts: str) -> dict[str, str]:
    """Return an environment whose PATH has the shell's tools and these scripts, and no more."""
    folder.mkdir()
    for tool in set(TOOLS.split()) - scripts.keys():  # never write through a link to a real tool
        (folder / tool).symlink_to(str(shutil.which(tool)))
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (folder / name).chmod(0o755)
    return {"PATH": str(folder)}


def test_it_installs_once_runs_the_command_and_returns_its_status(project):
    code = "import iniconfig, os, sys; print(sys.prefix, os.getcwd(), *sys.argv[1:]); sys.exit(7)"
    first = run(project, "python", "-c", code, "two words", "--all")
    assert first.returncode == 7
    assert first.stdout == f"{project}/.venv {project.parent} two words --all\n"
    again = run(project, "python", "-c", code)
    assert (again.returncode, again.stderr) == (7, ""), "pip did not run"
    assert run(project, "no-such-command").returncode == 127


def test_changed_requirements_and_all_are_noticed(installed):
    add_examples(installed)
    assert run(installed, "python", "-c", "import pluggy").returncode == 1
    for version in ("1.5.0", "1.6.0"):
        (installed / "real_world" / "constraints.txt").write_text(f"pluggy=={version}\n")
        script = "import importlib.metadata as m; print(m.version('pluggy'))"
        assert run(installed, "--all", "python", "-c", script).stdout == f"{version}\n"
    with (installed / "requirements.txt").open("a") as file:
        file.write("packaging==26.3\n")
    assert run(installed, "python", "-c", "import packaging, pluggy").returncode == 0


def test_a_python_too_old_for_the_examples_is_named(installed):
    add_examples(installed)
    replace_python(installed, 'case "$2" in *"(3, 11)"*) exit 1 ;; esac\nexec "$real" "$@"')
    assert_fails(installed, "real_world/ needs Python 3.11 to 3.14: delete .venv", "--all")
    assert run(installed, "true").returncode == 0, "the lesson goes on"


def test_a_killed_set_up_is_repaired_and_a_moved_folder_too(project):
    """In a container, the next setup.sh may have the process number of the killed one."""
    container = ["unshare", "--pid", "--fork", "--kill-child"]
    with socket.create_server(("127.0.0.1", 0)) as index:  # never answers
        index.settimeout(300)
        address = f"http://127.0.0.1:{index.getsockname()[1]}/simple"
        environment = {**os.environ, **NO_NETWORK, "PIP_INDEX_URL": address}
        with subprocess.Popen([*container, project / "setup.sh"], env=environment) as killed:
            index.accept()  # pip installs the requirements
            killed.kill()
    command = [*container, project / "setup.sh", "python", "-c", "import iniconfig, pip"]
    repaired = subprocess.run(command, capture_output=True, text=True)
    assert repaired.returncode == 0, repaired.stderr
    assert "an earlier set-up was interrupted" in repaired.stderr
    assert run(project, "true").stderr == ""
    moved = project.rename(project.parent / "moved")
    assert run(moved, "pip", "--version").stdout.count(f"{moved}/.venv/") == 1


def test_two_at_a_time_wait_for_each_other(project):
    command = [project / "setup.sh", "python", "-c", "import iniconfig"]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]


def test_an_activated_environment_is_not_made_again_with_its_own_python(project):
    """After an interrupted set-up: it would delete the Python that makes the new one."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", project / ".venv"], check=True)
    (project / ".venv" / ".installed").mkdir()
    activated = f"{project}/.venv/bin:{os.environ['PATH']}"
    python = str(project / ".venv" / "bin" / "python")
    assert_fails(project, "install one outside of .venv, or name it", PYTHON=python)
    repaired = run(project, "python", "-c", "import iniconfig, pip", PATH=activated)
    assert repaired.returncode == 0, repaired.stderr


@pytest.mark.parametrize("arguments", [["--al"], ["-x"], ["--all", "-c", "env"]])
def test_an_unknown_option_is_refused(project, arguments):
    option = arguments[-2] if len(arguments) > 1 else arguments[0]
    refused = run(project, *arguments)
    assert refused.returncode == 2
    assert refused.stderr == (
        f"setup.sh: unknown option {option}: use --all, --help or a command to run\n"
    )


def test_help_is_the_head_of_the_script(project):
    shown = run(project, "--help").stdout
    assert "./setup.sh python lesson_code.py" in shown
    assert "shellcheck" not in shown
    assert run(project, "--all", "--help").stdout == shown


@pytest.mark.parametrize("command", ["source ./setup.sh", "sh setup.sh"])
def test_sourced_or_run_by_another_shell(project, command):
    """One line, and the reader's shell goes on."""
    script = f"{command}; echo still here"
    done = subprocess.run(["bash", "-c", script], cwd=project, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("still here\n", "setup.sh: run it as ./setup.sh\n")


def test_a_link_to_the_script_uses_the_folder_of_the_script(installed, tmp_path):
    link = tmp_path / "setup.sh"
    link.symlink_to(installed / "setup.sh")
    command = [link, "python", "-c", "import sys; print(sys.prefix)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{installed}/.venv\n"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo Python 3.8.1", "needs Python 3.10 to 3.15, but finds Python 3.8.1"),
        (
            'case "$2" in *ensurepip*) exit 1 ;; esac; echo True',
            "no ctypes or no venv module; on Debian and Ubuntu: sudo apt install python3-venv",
        ),
    ],
)
def test_a_python_that_cannot_make_the_environment_is_named(project, script, message):
    assert_fails(project, message, **tools_and(project / "bin", python3=script))
    assert not (project / ".venv").exists()


def test_git_bash_is_refused(project):
    fake = tools_and(project / "bin", uname="echo MINGW64_NT-10.0-26100")
    assert_fails(project, "cannot run in Git Bash: use WSL, or the PowerShell", **fake)


def test_a_python_that_does_not_exist_is_not_replaced(project):
    assert_fails(project, "/no/such/python: No such file", PYTHON="/no/such/python")
    assert not (project / ".venv").exists()


def test_no_network_and_a_wrong_requirement_are_reported_and_lose_nothing(installed):
    requirements = installed / "requirements.txt"
    requirements.write_text("iniconfig==2.3.1\npackaging==26.3\n")
    assert_fails(installed, "check the network and the disk, and run this again\n", **NO_NETWORK)
    requirements.write_text("iniconfig==99\n")
    assert_fails(installed, "setup.sh: pip failed: see its message above")
    requirements.write_text("iniconfig==2.3.1\n")
    assert run(installed, "python", "-c", "import iniconfig").stderr == ""


def test_another_python_under_the_environment_is_noticed(installed):
    """Such as after an upgrade of the system: the packages belong to the old version."""
    replace_python(installed, 'case "$*" in *sys.version*) echo 3.99 ;; *) exit 1 ;; esac')
    repaired = run(installed, "python", "-c", "import iniconfig")
    assert repaired.returncode == 0
    assert "making" in repaired.stderr


def test_settings_of_the_shell_and_of_pip_are_ignored(project, tmp_path):
    """Those that would install somewhere else or less, or import another package."""
    elsewhere = str(tmp_path / "elsewhere")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--target", elsewhere, "iniconfig==2.3.1"]
    subprocess.run(pip, check=True)
    (tmp_path / "elsewhere" / "iniconfig" / "__init__.py").write_text("1 / 0")
    (project / "requirements.txt").write_text("iniconfig==2.3.1\nanyio==4.16.0\n")
    settings = dict.fromkeys(("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PYTHONPATH"), elsewhere)
    settings |= dict.fromkeys(("PIP_DRY_RUN", "PIP_USER", "PIP_NO_DEPS"), "1")
    settings |= {"CDPATH": "/:/tmp", "PYTHONHOME": "/nowhere"}
    code = "import iniconfig, idna, sys; print(sys.prefix)"  # anyio needs idna
    done = run(project, "python", "-c", code, **settings)
    assert (done.returncode, done.stdout) == (0, f"{project}/.venv\n"), done.stderr


def test_pip_configured_to_install_somewhere_else_is_reported(installed, tmp_path):
    config = tmp_path / "pip.conf"
    config.write_text(f"[install]\ntarget = {tmp_path}/elsewhere\n")
    (installed / "requirements.txt").write_text("packaging==26.3\n")
    for _ in range(2):
        message = "shows a target or prefix, remove it\n"
        assert_fails(installed, message, PIP_CONFIG_FILE=str(config))


NOT_OURS = (
    "was not made by setup.sh, or belongs to another user: move or delete it, then run this again\n"
)


def test_an_environment_of_somebody_else_is_kept(project):
    own = project / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", own], check=True)
    assert_fails(project, NOT_OURS)
    assert (own / "bin" / "python").exists()


def test_an_environment_of_another_user_is_kept():
    """Root may write everywhere, so the user nobody runs the script then."""
    with tempfile.TemporaryDirectory() as name:
        project = Path(name)
        shutil.copy(ROOT / "setup.sh", project)
        (project / "requirements.txt").touch()
        installed = project / ".venv" / ".installed"
        installed.mkdir(parents=True)
        for folder in (project, installed.parent):
            folder.chmod(0o555)
        user = 65534 if os.geteuid() == 0 else None
        command = [project / "setup.sh", "true"]
        refused = subprocess.run(command, user=user, capture_output=True, text=True)
        for folder in (project, installed.parent):
            folder.chmod(0o755)
        assert refused.returncode == 1
        assert refused.stderr == f"setup.sh: {project}/.venv {NOT_OURS}"
        assert installed.exists()


@pytest.mark.parametrize(
    ("gpus", "chosen"), [(0, "CPU"), ("no driver", "CPU"), (1, ""), (10_000, "")]
)
def test_pytorch_for_the_cpu_is_chosen_without_a_gpu_only(installed, gpus, chosen):
    """With many GPUs, a reader that stops after the first must not look like none."""
    (installed / "requirements.txt").write_text("torch==0.0.0\n")
    lines = "NVIDIA-SMI has failed because it could not communicate with the driver"
    if gpus != "no driver":
        lines = "".join(f"GPU {number}: NVIDIA H100\\n" for number in range(gpus))
    scripts = {"nvidia-smi": f"printf '{lines}'", "uname": "echo Linux"}
    fake = tools_and(installed / "bin", **scripts)
    fake["PATH"] += os.pathsep + str(Path(sys.executable).parent)
    refused = run(installed, "true", **fake, **NO_NETWORK)
    assert refused.returncode == 1
    assert ("taking PyTorch from PyPI" in refused.stderr) == bool(chosen)


def test_settings_of_python_are_for_the_command(project):
    """Python itself says what is wrong with them, when the command runs."""
    settings = {"PYTHONHASHSEED": "abc", "PYTHONINSPECT": "1"}
    assert run(project, "true", **settings).returncode == 0
    assert "PYTHONHASHSEED must be" in run(project, "python", "-c", "", **settings).stderr


def test_scripts_keep_unix_line_ends_in_a_clone_on_windows(tmp_path):
    clone = tmp_path / "clone"
    config = ["-c", "core.autocrlf=true"]
    subprocess.run(["git", *config, "clone", "-q", ROOT, clone], check=True)
    assert b"\r" not in (clone / "setup.sh").read_bytes()
    assert b"\r" not in (clone / ".ci" / "run").read_bytes()
