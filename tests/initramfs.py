"""User space for kernels that tests boot: busybox and a script, as a cpio archive.

The archive is the "newc" format, written here and the same for the same arguments.
Source: Linux 6.1 Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

MAGIC = b"070701"
TRAILER = "TRAILER!!!"
BLOCK = 512

COMMANDS = """
[ ash awk base64 basename cat chmod cmp cp cttyhack cut date dd df dirname dmesg echo
env expr false find free grep gunzip gzip halt head hexdump hostname id kill ln ls
md5sum mkdir mknod mount mv nproc od poweroff printf ps pwd readlink reboot rm sed seq
setsid sh sha256sum sleep sort stat stty sync tail tee test time top touch tr true
umount uname uniq uptime vi wc which xxd yes zcat
"""
APPLETS = tuple(COMMANDS.split())
"""Commands that are links to /bin/busybox; Debian's busybox-static has them all."""

FOLDERS = ("bin", "dev", "proc", "root", "sys", "tmp")

DEVICES = {
    "console": (5, 1),
    "null": (1, 3),
    "random": (1, 8),
    "tty": (5, 0),
    "ttyS0": (4, 64),
    "urandom": (1, 9),
    "zero": (1, 5),
}
"""Character devices in /dev, major and minor. Source: Linux admin-guide/devices.txt."""

GREETING = "cbit: user space"
"""What both scripts print first."""

PROLOGUE = f"""\
#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
echo '{GREETING}'
"""

INTERACTIVE = f"""\
{PROLOGUE}setsid cttyhack sh
poweroff -f
"""
"""An init script: a shell on the console; the machine goes off when it ends."""


def batch(commands: Sequence[str]) -> str:
    """Return an init script that runs commands, whatever they return, then goes off."""
    return "\n".join([PROLOGUE.rstrip("\n"), *commands, "poweroff -f", ""])


@dataclass(frozen=True)
class Node:
    """One entry of an archive.

    Attributes:
        name: path from the root, without a slash in front.
        mode: kind and rights, as `stat` has them.
        data: contents of a file, target of a link.
        device: major and minor of a device.
    """

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)

    def build(self, inode: int) -> bytes:
        """Return header, name and data, each padded to 4 bytes."""
        name = self.name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(self.mode) else 1
        numbers = (
            *(inode, self.mode, 0, 0, links, 0),  # uid, gid and mtime are 0
            *(len(self.data), 0, 0, *self.device, len(name), 0),
        )
        head = MAGIC + b"".join(b"%08X" % number for number in numbers)
        return _padded(head + name, 4) + _padded(self.data, 4)


def initramfs(
    busybox: bytes, init: str, files: Mapping[str, bytes] | None = None
) -> bytes:
    """Return an initramfs with busybox, its commands and an init script.

    Args:
        busybox: a static x86-64 busybox.
        init: text of /init.
        files: more files by path, without a slash in front; they can be executed.
            Their folders must be among `FOLDERS`.
    """
    nodes = [Node(name, stat.S_IFDIR | 0o755) for name in FOLDERS]
    nodes += [
        Node(f"dev/{name}", stat.S_IFCHR | 0o600, device=device)
        for name, device in DEVICES.items()
    ]
    nodes.append(Node("bin/busybox", stat.S_IFREG | 0o755, busybox))
    nodes += [Node(f"bin/{a}", stat.S_IFLNK | 0o777, b"busybox") for a in APPLETS]
    nodes.append(Node("init", stat.S_IFREG | 0o755, init.encode()))
    nodes += [
        Node(name, stat.S_IFREG | 0o755, data) for name, data in (files or {}).items()
    ]
    return cpio(nodes)


def cpio(nodes: Iterable[Node]) -> bytes:
    """Return an archive of nodes, in their order; a folder before what is in it."""
    archive = bytearray()
    for inode, node in enumerate([*nodes, Node(TRAILER, 0)], start=1):
        archive += node.build(inode)
    return _padded(bytes(archive), BLOCK)


def _padded(data: bytes, size: int) -> bytes:
    return data + bytes(-len(data) % size)
