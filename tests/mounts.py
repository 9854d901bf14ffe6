"""Disks of a test's own, full or read-only: Linux only, and only where a process may have mounts of its own."""

import ctypes
import os
import subprocess
from pathlib import Path

_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000  # of <linux/sched.h>


def private_mounts() -> None:
    """Gives this process mounts of its own, which end with it; one that is not root becomes root of itself."""
    user, group = os.geteuid(), os.getegid()
    if ctypes.CDLL(None, use_errno=True).unshare(_NEW_MOUNTS | (_NEW_USER if user else 0)) != 0:
        raise OSError(ctypes.get_errno(), "this process may not have mounts of its own")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _mount("--make-rprivate", "/")


def small_disk(folder: str, size: int) -> None:
    """Puts an empty disk of `size` bytes at `folder`."""
    private_mounts()
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)


def read_only(folder: str) -> None:
    """Makes `folder` read-only, also to root."""
    private_mounts()
    _mount("--bind", folder, folder)
    _mount("-o", "remount,bind,ro", folder)


def fill(disk: str, left: int) -> None:
    """Fills a disk up to the last `left` bytes."""
    path = Path(disk) / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)) == 4096:
                pass
        except OSError:
            pass
    os.truncate(path, path.stat().st_size - left)


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"mount {' '.join(arguments)}: {done.stderr.strip()}")
