"""`make kernel`, tools/fetch-kernel: with an apt that does as the test says."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tools" / "fetch-kernel"
NEEDED = ["sh", "dirname", "head", "ls", "mkdir", "mv", "rm", "sed", "touch"]

APT_CACHE = """
case "$*" in *"$KNOWN"*) ;; *) exit 100;; esac
case "$*" in
*linux-image-cloud-amd64) echo "  Depends: linux-image-9.8.7-cloud-amd64";;
*linux-image-amd64) echo " |Depends: linux-image-9.8.7-amd64";;
esac
"""
APT_GET = """
echo "$*" >> "$LOG"
for last; do :; done
case "$*" in
*update) exit 0;;
*"$KNOWN"*download*) echo "$last" > image.deb;;
*) exit 100;;
esac
case "$last" in *"${APT_FAILS:-nothing}"*) exit 100;; esac
"""
DPKG_DEB = """
read package < "$2"
case $package in
busybox-static) mkdir -p "$3${BIN_IN:-}/bin" && touch "$3${BIN_IN:-}/bin/busybox";;
*)  version=${package#linux-image-}
    mkdir -p "$3/boot" "$3/lib/modules/$version"
    [ -n "${NO_IMAGE:-}" ] || touch "$3/boot/vmlinuz-$version"
    touch "$3/boot/System.map-$version" "$3/lib/modules/$version/a.ko";;
esac
"""

CLOUD, GENERIC, BUSYBOX = (
    "linux-image-9.8.7-cloud-amd64",
    "linux-image-9.8.7-amd64",
    "busybox-static",
)
CLOUD_FILES = [
    "kernel/boot/System.map-9.8.7-cloud-amd64",
    "kernel/boot/vmlinuz-9.8.7-cloud-amd64",
]
GENERIC_FILES = [
    "kernel-generic/boot/System.map-9.8.7-amd64",
    "kernel-generic/boot/vmlinuz-9.8.7-amd64",
]
BUSYBOX_FILE = "busybox/bin/busybox"


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
        variables = {"PATH": str(self.bin), "LOG": str(self.log), "KNOWN": ""}
        return subprocess.run(
            [self.root / "tools" / SCRIPT.name],
            env=variables | environment,
            cwd=self.root.parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def put(self, name: str) -> None:
        """Make a file below build/."""
        file = self.root / "build" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()

    def asked(self) -> list[str]:
        """Return what apt-get was called for, in order."""
        return [call.split()[-1] for call in self.log.read_text().splitlines()]

    def files(self) -> list[str]:
        build = self.root / "build"
        return sorted(
            str(f.relative_to(build)) for f in build.rglob("*") if f.is_file()
        )


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    return Trial(tmp_path)


def test_it_brings_the_versions_that_apt_names_without_their_modules(
    trial: Trial,
) -> None:
    trial.install_apt()
    result = trial.run()
    assert result.returncode == 0
    assert result.stdout.splitlines() == [
        "build/kernel/boot/vmlinuz-9.8.7-cloud-amd64",
        "build/kernel-generic/boot/vmlinuz-9.8.7-amd64",
        "build/busybox/bin/busybox",
    ]
    assert trial.files() == sorted([*CLOUD_FILES, *GENERIC_FILES, BUSYBOX_FILE])
    assert trial.asked() == [CLOUD, GENERIC, BUSYBOX]


def test_what_is_there_is_not_fetched_again(trial: Trial) -> None:
    trial.install_apt()
    for name in ("kernel/boot/vmlinuz-mine", GENERIC_FILES[1], BUSYBOX_FILE):
        trial.put(name)
    assert trial.run().returncode == 0
    assert trial.log.read_text() == ""


def test_what_is_missing_is_fetched_alone(trial: Trial) -> None:
    trial.install_apt()
    trial.put("kernel/boot/vmlinuz-mine")
    trial.put(BUSYBOX_FILE)
    result = trial.run()
    assert result.stdout == "build/kernel-generic/boot/vmlinuz-9.8.7-amd64\n"
    assert trial.asked() == [GENERIC]
    assert "kernel/boot/vmlinuz-mine" in trial.files()


def test_with_an_image_of_the_user_no_kernel_is_fetched(
    trial: Trial, tmp_path: Path
) -> None:
    image = tmp_path / "bzImage"
    image.touch()
    trial.install_apt()
    assert trial.run(CBIT_KERNEL=str(image)).returncode == 0
    assert trial.files() == [BUSYBOX_FILE]


def test_with_an_image_and_a_busybox_of_the_user_apt_is_not_needed(
    trial: Trial, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    result = trial.run(CBIT_KERNEL=str(file), CBIT_BUSYBOX=str(file))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert trial.files() == []


@pytest.mark.parametrize("name", ["CBIT_KERNEL", "CBIT_BUSYBOX"])
def test_a_file_of_the_user_that_is_not_there_is_an_error(
    trial: Trial, name: str
) -> None:
    trial.install_apt()
    for file in (CLOUD_FILES[1], GENERIC_FILES[1]):
        trial.put(file)
    result = trial.run(**{name: "/nowhere/file"})
    assert result.returncode == 2
    assert result.stderr.startswith(f"Error: {name}=/nowhere/file cannot be read")
    assert trial.log.read_text() == ""


@pytest.mark.parametrize(
    ("there", "place", "variable"),
    [
        ([], "build/kernel/boot/vmlinuz-NAME", "CBIT_KERNEL"),
        (CLOUD_FILES, "build/kernel-generic/boot/vmlinuz-NAME", "CBIT_KERNEL"),
        (
            [*CLOUD_FILES, *GENERIC_FILES],
            "build/busybox/bin/busybox",
            "CBIT_BUSYBOX",
        ),
    ],
)
def test_without_apt_it_says_which_file_goes_where(
    trial: Trial, there: list[str], place: str, variable: str
) -> None:
    for name in there:
        trial.put(name)
    result = trial.run()
    assert result.returncode == 2
    assert f"{place}, or set {variable} to its path" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_lists_that_are_empty_are_read_into_the_build_folder_once(
    trial: Trial,
) -> None:
    trial.install_apt()
    own = f"Dir::State::Lists={os.fspath(trial.root)}/build/apt/lists"
    assert trial.run(KNOWN=own).returncode == 0
    assert trial.files() == sorted([*CLOUD_FILES, *GENERIC_FILES, BUSYBOX_FILE])
    assert trial.asked() == ["update", CLOUD, GENERIC, BUSYBOX]
    assert all(own in call for call in trial.log.read_text().splitlines())


@pytest.mark.parametrize(
    ("fails", "package", "left"),
    [
        ("cloud", "linux-image-cloud-amd64", []),
        ("7-amd64", "linux-image-amd64", CLOUD_FILES),
        ("busybox", BUSYBOX, [*GENERIC_FILES, *CLOUD_FILES]),
    ],
)
def test_a_download_that_fails_leaves_nothing_behind_that_looks_whole(
    trial: Trial, fails: str, package: str, left: list[str]
) -> None:
    trial.install_apt()
    result = trial.run(APT_FAILS=fails)
    assert result.returncode == 2
    assert f"Error: apt could not bring {package};" in result.stderr
    whole = [name for name in trial.files() if "partial" not in name]
    assert whole == sorted(left)


def test_a_package_without_what_it_should_hold_is_no_success(trial: Trial) -> None:
    trial.install_apt()
    result = trial.run(NO_IMAGE="yes")
    assert result.returncode == 2
    assert "Error: linux-image-cloud-amd64 has no boot/vmlinuz-*;" in result.stderr
    assert not (trial.root / "build" / "kernel").exists()


def test_a_busybox_in_usr_comes_to_the_same_place(trial: Trial) -> None:
    trial.install_apt()
    assert trial.run(BIN_IN="/usr").returncode == 0
    assert BUSYBOX_FILE in trial.files()
