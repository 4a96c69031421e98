"""`make kernel`, tools/fetch-kernel: with an apt that does as the test says."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tools" / "fetch-kernel"
NEEDED = ["sh", "dirname", "head", "ls", "mkdir", "mv", "rm", "sed", "touch"]

APT_CACHE = """
case "$*" in *"$KNOWN"*) echo "  Depends: linux-image-9.8.7-cloud-amd64";; esac
"""
APT_GET = """
echo "$*" >> "$LOG"
case "$*" in *"download linux-image-9.8.7-cloud-amd64") touch image.deb;; *update);;
*) exit 100;; esac
[ -z "${APT_FAILS:-}" ]
"""
DPKG_DEB = 'mkdir -p "$3/boot" && touch "$3/boot/vmlinuz-9.8.7"'


class Trial:
    """A project folder that holds the script, and a PATH with nothing else on it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "project"
        self.bin = folder / "bin"
        self.log = folder / "apt.log"
        self.log.touch()
        self.bin.mkdir()
        for name in NEEDED:
            (self.bin / name).symlink_to(str(shutil.which(name)))
        (self.root / "tools").mkdir(parents=True)
        shutil.copy(SCRIPT, self.root / "tools")

    def install_apt(self) -> None:
        scripts = {"apt-cache": APT_CACHE, "apt-get": APT_GET, "dpkg-deb": DPKG_DEB}
        for name, text in scripts.items():
            (self.bin / name).write_text(f"#!/bin/sh\n{text}")
            (self.bin / name).chmod(0o755)

    def run(self, **environment: str) -> "subprocess.CompletedProcess[str]":
        variables = {"PATH": str(self.bin), "LOG": str(self.log), "KNOWN": "depends"}
        return subprocess.run(
            [self.root / "tools" / SCRIPT.name],
            env=variables | environment,
            cwd=self.root.parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def files(self) -> list[str]:
        build = self.root / "build"
        return sorted(
            str(f.relative_to(build)) for f in build.rglob("*") if f.is_file()
        )


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    return Trial(tmp_path)


def test_it_brings_the_version_that_apt_names(trial: Trial) -> None:
    trial.install_apt()
    result = trial.run()
    assert (result.returncode, result.stdout) == (
        0,
        "build/kernel/boot/vmlinuz-9.8.7\n",
    )
    assert trial.files() == ["kernel/boot/vmlinuz-9.8.7"]
    assert len(trial.log.read_text().splitlines()) == 1


def test_an_image_that_is_there_is_not_fetched_again(trial: Trial) -> None:
    trial.install_apt()
    image = trial.root / "build" / "kernel" / "boot" / "vmlinuz-mine"
    image.parent.mkdir(parents=True)
    image.touch()
    assert trial.run().returncode == 0
    assert trial.log.read_text() == ""


def test_an_image_of_the_user_is_taken_instead(trial: Trial, tmp_path: Path) -> None:
    image = tmp_path / "bzImage"
    image.touch()
    assert trial.run(CBIT_KERNEL=str(image)).returncode == 0
    assert trial.files() == []


def test_an_image_of_the_user_that_is_not_there_is_an_error(trial: Trial) -> None:
    trial.install_apt()
    result = trial.run(CBIT_KERNEL="/nowhere/bzImage")
    assert result.returncode == 2
    assert result.stderr.startswith(
        "Error: CBIT_KERNEL=/nowhere/bzImage cannot be read"
    )
    assert trial.log.read_text() == ""


def test_without_apt_it_says_which_file_goes_where(trial: Trial) -> None:
    result = trial.run()
    assert result.returncode == 2
    assert "build/kernel/boot/vmlinuz-NAME" in result.stderr
    assert "CBIT_KERNEL" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_lists_that_are_empty_are_read_into_the_build_folder(trial: Trial) -> None:
    trial.install_apt()
    own = f"Dir::State::Lists={os.fspath(trial.root)}/build/apt/lists"
    assert trial.run(KNOWN=own).returncode == 0
    assert trial.files() == ["kernel/boot/vmlinuz-9.8.7"]
    calls = trial.log.read_text().splitlines()
    assert [call.split()[-1] for call in calls] == [
        "update",
        "linux-image-9.8.7-cloud-amd64",
    ]
    assert all(own in call for call in calls)


def test_a_download_that_fails_leaves_no_image_behind(trial: Trial) -> None:
    trial.install_apt()
    result = trial.run(APT_FAILS="yes")
    assert result.returncode == 2
    assert "Error: apt could not bring linux-image-cloud-amd64;" in result.stderr
    assert not (trial.root / "build" / "kernel").exists()
