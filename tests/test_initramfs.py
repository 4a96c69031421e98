"""tests/initramfs.py: read back by a reader of its own, and by cpio where it is."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from .initramfs import APPLETS, GREETING, INTERACTIVE, Node, batch, cpio, initramfs

EXPECTED = "sh cat grep mount poweroff reboot echo ls dmesg sleep md5sum ps"
QEMU = "qemu-system-x86_64"
BUSYBOX = b"\x7fELF" + bytes(1001)


def read_back(archive: bytes) -> dict[str, tuple[dict[str, int], bytes]]:
    """Return header fields and data by name; checks magic, padding and the trailer."""
    fields = "ino mode uid gid nlink mtime size maj min rmaj rmin namesize check"
    found: dict[str, tuple[dict[str, int], bytes]] = {}
    at = 0
    while True:
        assert at % 4 == 0
        assert archive[at : at + 6] == b"070701"
        head = archive[at + 6 : at + 110].decode()
        numbers = {
            name: int(head[8 * i : 8 * i + 8], 16)
            for i, name in enumerate(fields.split())
        }
        name, zero = archive[at + 110 : at + 110 + numbers["namesize"]].split(b"\0")
        assert zero == b""
        at = (at + 110 + numbers["namesize"] + 3) // 4 * 4
        data = archive[at : at + numbers["size"]]
        assert len(data) == numbers["size"]
        at = (at + numbers["size"] + 3) // 4 * 4
        if name == b"TRAILER!!!":
            assert not any(archive[at:])
            return found
        assert name.decode() not in found
        found[name.decode()] = numbers, data


def test_it_holds_busybox_its_commands_and_the_script() -> None:
    found = read_back(initramfs(BUSYBOX, INTERACTIVE))
    busybox, data = found["bin/busybox"]
    assert (busybox["mode"], data) == (0o100755, BUSYBOX)
    for name in EXPECTED.split():
        assert found[f"bin/{name}"][1] == b"busybox"
        assert found[f"bin/{name}"][0]["mode"] == 0o120777
    init, text = found["init"]
    assert (init["mode"], text) == (0o100755, INTERACTIVE.encode())


def test_a_console_and_the_places_to_mount_at_are_there() -> None:
    found = read_back(initramfs(BUSYBOX, ""))
    for name in ("proc", "sys", "dev", "bin", "tmp"):
        assert found[name][0]["mode"] == 0o040755
    console = found["dev/console"][0]
    assert stat.S_ISCHR(console["mode"])
    assert (console["rmaj"], console["rmin"]) == (5, 1)
    serial = found["dev/ttyS0"][0]
    assert (serial["rmaj"], serial["rmin"]) == (4, 64)


def test_a_folder_comes_before_what_is_in_it() -> None:
    files = {"root/program": b"1", "tmp/a": b"2"}
    names = list(read_back(initramfs(BUSYBOX, "", files)))
    for name in names:
        if "/" in name:
            assert names.index(name.rpartition("/")[0]) < names.index(name)
    assert {"root/program", "tmp/a"} <= set(names)


def test_it_is_the_same_every_time_and_nobodys() -> None:
    archive = initramfs(BUSYBOX, INTERACTIVE)
    assert archive == initramfs(BUSYBOX, INTERACTIVE)
    assert len(archive) % 512 == 0
    for numbers, _ in read_back(archive).values():
        assert numbers["uid"] == numbers["gid"] == numbers["mtime"] == 0
        assert numbers["check"] == 0
    inodes = [numbers["ino"] for numbers, _ in read_back(archive).values()]
    assert len(set(inodes)) == len(inodes)


@pytest.mark.parametrize("length", range(9))
def test_law_names_and_data_of_every_length_come_back(length: int) -> None:
    nodes = [
        Node("x" * n + str(length), stat.S_IFREG | 0o644, b"y" * length)
        for n in range(9)
    ]
    found = read_back(cpio(nodes))
    assert [data for _, data in found.values()] == [b"y" * length] * 9
    assert list(found) == [node.name for node in nodes]


def test_both_scripts_greet_and_end_with_the_power_off() -> None:
    for script in (INTERACTIVE, batch(["ls /", "false"]), batch([])):
        rows = script.splitlines()
        assert rows[0] == "#!/bin/sh"
        assert f"echo '{GREETING}'" in rows
        assert rows[-1] == "poweroff -f"
        assert script.endswith("\n")
    assert batch(["ls /", "false"]).splitlines()[-3:-1] == ["ls /", "false"]


def test_the_busybox_that_was_fetched_has_every_command(busybox_path: Path) -> None:
    done = subprocess.run(
        [busybox_path, "--list"], capture_output=True, text=True, check=True
    )
    assert set(APPLETS) - set(done.stdout.split()) == set()


@pytest.mark.skipif(not shutil.which("cpio"), reason="a second witness where installed")
def test_cpio_lists_the_same(tmp_path: Path) -> None:
    archive = initramfs(BUSYBOX, INTERACTIVE)
    command = ["cpio", "-t", "--quiet"]
    done = subprocess.run(command, input=archive, capture_output=True, check=True)
    listed = os.fsdecode(done.stdout).split("\n")[:-1]
    assert listed == list(read_back(archive))


@pytest.mark.skipif(not shutil.which(QEMU), reason="a kernel runs it where QEMU is")
def test_a_kernel_runs_the_script_and_switches_off(
    real_kernel_path: Path, busybox_path: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "initramfs"
    script = batch(["echo $((6 * 7))", "test -c /dev/null && md5sum /init"])
    archive.write_bytes(initramfs(busybox_path.read_bytes(), script))
    command = [QEMU, "-accel", "tcg", "-m", "256", "-nographic", "-no-reboot"]
    command += ["-kernel", str(real_kernel_path), "-initrd", str(archive)]
    command += ["-append", "console=ttyS0 quiet"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, timeout=300, check=True
    )
    said = done.stdout.decode(errors="replace").replace("\r", "")
    digest = hashlib.md5(script.encode()).hexdigest()
    assert f"{GREETING}\n42\n{digest}  /init\n" in said
    assert "reboot: Power down" in said
