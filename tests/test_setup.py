"""setup.sh: once, again, changed, interrupted, moved, twice at a time, and where it cannot work.

One small package stands in for the requirements, so that each case takes seconds.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = "basename bash cat cmp cp dirname env grep mkdir readlink rm sed timeout uname"


@pytest.fixture
def project(tmp_path) -> Path:
    """Return a folder, with a space in its name, that holds setup.sh and small requirements."""
    folder = tmp_path / "a lesson"
    folder.mkdir()
    shutil.copy(ROOT / "setup.sh", folder)
    (folder / "requirements.txt").write_text("iniconfig==2.3.1\n")
    return folder


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


def test_changed_requirements_and_all_are_noticed(project):
    assert run(project).returncode == 0
    add_examples(project)
    assert run(project, "python", "-c", "import pluggy").returncode == 1
    for version in ("1.5.0", "1.6.0"):
        (project / "real_world" / "constraints.txt").write_text(f"pluggy=={version}\n")
        script = "import importlib.metadata as m; print(m.version('pluggy'))"
        assert run(project, "--all", "python", "-c", script).stdout == f"{version}\n"
    with (project / "requirements.txt").open("a") as file:
        file.write("packaging==26.3\n")
    assert run(project, "python", "-c", "import packaging, pluggy").returncode == 0


def test_a_python_too_old_for_the_examples_is_named(project):
    assert run(project).returncode == 0
    add_examples(project)
    python = project / ".venv" / "bin" / "python"
    python.rename(python.with_name("real"))
    python.write_text(
        '#!/bin/sh\ncase "$2" in *"(3, 11)"*) exit 1 ;; esac\nexec "${0%python}real" "$@"\n'
    )
    python.chmod(0o755)
    refused = run(project, "--all", "true")
    assert refused.returncode == 1
    assert "real_world/ needs Python 3.11 to 3.14: delete .venv" in refused.stderr
    assert run(project, "true").returncode == 0, "the lesson goes on"


def test_an_interrupted_set_up_is_repaired_and_a_moved_folder_too(project):
    with subprocess.Popen(
        [project / "setup.sh"], start_new_session=True, stderr=subprocess.DEVNULL
    ) as interrupted:
        while not (project / ".venv" / "bin" / "python").exists():
            assert interrupted.poll() is None
            time.sleep(0.01)
        os.killpg(interrupted.pid, signal.SIGKILL)
    repaired = run(project, "python", "-c", "import iniconfig, pip")
    assert repaired.returncode == 0
    assert "an earlier set-up was interrupted" in repaired.stderr
    assert run(project, "true").stderr == ""
    moved = project.rename(project.parent / "moved")
    assert run(moved, "pip", "--version").stdout.count(f"{moved}/.venv/") == 1


def test_two_at_a_time_wait_for_each_other(project):
    both = [
        subprocess.Popen([project / "setup.sh", "python", "-c", "import iniconfig"])
        for _ in range(2)
    ]
    assert [process.wait(300) for process in both] == [0, 0]


def test_an_activated_environment_is_not_made_again_with_its_own_python(project):
    """After an interrupted set-up: it would delete the Python that makes the new one."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", project / ".venv"], check=True)
    (project / ".venv" / ".installed").mkdir()
    activated = f"{project}/.venv/bin:{os.environ['PATH']}"
    named = run(project, "true", PYTHON=str(project / ".venv" / "bin" / "python"))
    assert named.returncode == 1
    assert "install one outside of .venv, or name it" in named.stderr
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


def test_a_link_to_the_script_uses_the_folder_of_the_script(project, tmp_path):
    link = tmp_path / "elsewhere" / "setup.sh"
    link.parent.mkdir()
    link.symlink_to(project / "setup.sh")
    command = [link, "python", "-c", "import sys; print(sys.prefix)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{project}/.venv\n"


def test_a_python_too_old_is_named(project):
    old = tools_and(project / "bin", python3='[ "$1" = --version ] && echo Python 3.8.1')
    refused = run(project, "true", **old)
    assert refused.returncode == 1
    assert "needs Python 3.10 to 3.15, but finds Python 3.8.1" in refused.stderr
    assert not (project / ".venv").exists()


def test_a_python_without_venv_is_told_what_to_install(project):
    bare = 'case "$2" in *ensurepip*) exit 1 ;; esac; echo True'
    refused = run(project, "true", **tools_and(project / "bin", python3=bare))
    assert refused.returncode == 1
    assert "no ctypes or no venv module; " in refused.stderr
    assert "sudo apt install python3-venv" in refused.stderr


def test_no_network_and_a_wrong_requirement_get_a_sentence_and_lose_nothing(project):
    assert run(project).returncode == 0
    (project / "requirements.txt").write_text("iniconfig==2.3.1\npackaging==26.3\n")
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_CONFIG_FILE": os.devnull}
    refused = run(project, "true", **nowhere, PIP_RETRIES="0", PIP_NO_CACHE_DIR="1")
    assert refused.returncode == 1
    assert refused.stderr.endswith("check the network and the disk, and run this again\n")
    (project / "requirements.txt").write_text("iniconfig==99\n")
    refused = run(project, "true")
    assert refused.returncode == 1
    assert "setup.sh: pip failed: see its message above" in refused.stderr
    (project / "requirements.txt").write_text("iniconfig==2.3.1\n")
    assert run(project, "python", "-c", "import iniconfig").stderr == ""


def test_a_killed_set_up_does_not_lock_the_next_one(project):
    """In a container, the next setup.sh may have the process number of the killed one."""
    command = ["unshare", "--pid", "--fork", "--kill-child", project / "setup.sh"]
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL) as process:
        while not (project / ".venv" / "bin" / "python").exists():
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    done = subprocess.run([*command, "true"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_another_python_under_the_environment_is_noticed(project):
    """Such as after an upgrade of the system: the packages belong to the old version."""
    assert run(project).returncode == 0
    python = project / ".venv" / "bin" / "python"
    python.rename(python.with_name("real"))
    python.write_text('#!/bin/sh\ncase "$*" in *sys.version*) echo 3.99 ;; *) exit 1 ;; esac\n')
    python.chmod(0o755)
    repaired = run(project, "python", "-c", "import iniconfig")
    assert repaired.returncode == 0
    assert "making" in repaired.stderr


@pytest.mark.parametrize(
    "setting", ["PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_DRY_RUN", "PYTHONPATH", "PIP_USER"]
)
def test_settings_that_install_somewhere_else_are_ignored(project, tmp_path, setting):
    elsewhere = tmp_path / "elsewhere"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--target", elsewhere, "iniconfig==2.3.1"],
        check=True,
    )
    value = "1" if setting in ("PIP_DRY_RUN", "PIP_USER") else str(elsewhere)
    assert run(project, **{setting: value}).returncode == 0
    assert run(project, "python", "-Ic", "import iniconfig").returncode == 0


def test_requirements_of_requirements_are_installed(project):
    (project / "requirements.txt").write_text("anyio==4.16.0\n")
    assert run(project, "python", "-c", "import idna", PIP_NO_DEPS="1").returncode == 0


def test_pip_configured_to_install_somewhere_else_is_reported(project, tmp_path):
    config = tmp_path / "pip.conf"
    config.write_text(f"[install]\ntarget = {tmp_path}/elsewhere\n")
    for _ in range(2):
        refused = run(project, "true", PIP_CONFIG_FILE=str(config))
        assert refused.returncode == 1
        assert refused.stderr.endswith("shows a target or prefix, remove it\n")


def test_an_environment_of_somebody_else_is_kept(project):
    own = project / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", own], check=True)
    refused = run(project, "true")
    assert refused.returncode == 1
    assert refused.stderr.endswith(
        "was not made by setup.sh, or by another user: move or delete it, then run this again\n"
    )
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
        assert refused.stderr == (
            f"setup.sh: {project}/.venv was not made by setup.sh, or by another user: "
            "move or delete it, then run this again\n"
        )
        assert installed.exists()


@pytest.mark.parametrize(
    ("gpus", "chosen"), [(0, "CPU"), ("no driver", "CPU"), (1, ""), (2, ""), (10_000, "")]
)
def test_pytorch_for_the_cpu_is_chosen_without_a_gpu_only(project, gpus, chosen):
    """With many GPUs, a reader that stops after the first must not look like none."""
    (project / "requirements.txt").write_text("torch==0.0.0\n")
    lines = "NVIDIA-SMI has failed because it could not communicate with the driver"
    if gpus != "no driver":
        lines = "".join(f"GPU {number}: NVIDIA H100\\n" for number in range(gpus))
    fake = tools_and(project / "bin", **{"nvidia-smi": f"printf '{lines}'", "uname": "echo Linux"})
    fake["PATH"] += os.pathsep + str(Path(sys.executable).parent)
    nowhere = {
        "PIP_INDEX_URL": "http://127.0.0.1:9",
        "PIP_RETRIES": "0",
        "PIP_CONFIG_FILE": os.devnull,
    }
    refused = run(project, "true", **fake, **nowhere, https_proxy="http://127.0.0.1:9")
    assert refused.returncode == 1
    assert ("taking PyTorch from PyPI" in refused.stderr) == bool(chosen)


def test_variables_of_the_shell_do_no_harm(project):
    (project / "broken").mkdir()
    (project / "broken" / "iniconfig.py").write_text("1 / 0")
    settings = {"CDPATH": "/:/tmp", "PYTHONHOME": "/nowhere", "PYTHONPATH": f"{project}/broken"}
    done = run(project, "python", "-c", "import iniconfig, sys; print(sys.prefix)", **settings)
    assert (done.returncode, done.stdout) == (0, f"{project}/.venv\n")


@pytest.mark.parametrize("setting", [{"PYTHONHASHSEED": "abc"}, {"PYTHONINSPECT": "1"}])
def test_settings_of_python_are_for_the_command(project, setting):
    """Python itself says what is wrong with them, when the command runs."""
    assert run(project, "true", **setting).returncode == 0
    done = run(project, "python", "-c", "import iniconfig", **setting)
    assert ("PYTHONHASHSEED must be" in done.stderr) == ("PYTHONHASHSEED" in setting)


def test_a_python_that_does_not_exist_is_not_replaced(project):
    refused = run(project, "true", PYTHON="/no/such/python")
    assert refused.returncode == 1
    assert "needs Python 3.10 to 3.15, but finds" in refused.stderr
    assert "/no/such/python" in refused.stderr
    assert not (project / ".venv").exists()


def test_scripts_keep_unix_line_ends_in_a_clone_on_windows(tmp_path):
    clone = tmp_path / "clone"
    config = ["-c", "core.autocrlf=true"]
    subprocess.run(["git", *config, "clone", "-q", ROOT, clone], check=True)
    assert b"\r" not in (clone / "setup.sh").read_bytes()
    assert b"\r" not in (clone / ".ci" / "run").read_bytes()
