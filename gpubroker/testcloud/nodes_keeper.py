"""The keeper: one small process that holds the processes of all nodes (nodes_process.py starts and asks it).

    test cloud -> keeper -> an init for each node -> that node's commands

Run as `python -I -S nodes_keeper.py namespace|subreaper FD`; it imports a few modules of the standard library
and forks, so that a node costs milliseconds instead of the start of an interpreter.

namespace: the keeper and each init are process 1 of a PID namespace; when one ends, the kernel kills all
that ran under it. subreaper: orphans come back to their init, which kills its descendants until none is left.
Either way the end of a socket is the order to stop, so a test cloud killed with -9 takes everything along.

A full disk is a file system of one page, taken, mounted on the home where the init has mounts of its own;
what is in the home already stays as it is. Elsewhere the kernel refuses every write to a file as too large
(EFBIG). What a node connects to is told to the test cloud by a seccomp filter with a listener, which a
command can neither see nor leave, whatever it does to its environment.

Requests are datagrams with file descriptors. To the keeper: `node` (the init's socket, a pipe that closes
when the node is gone, JSON of `full`: the home whose disk is full or "", `connects`: whether they are told);
the init answers `up free|full|unwritable` and the listener where there is one. To an init: `run` (stdin,
stdout, stderr, JSON of argv, env, cwd and tty, a pipe for "pid N" and "exit STATUS"), `signal PID N` for that
command's process group, `all N` (a pipe to close when done).
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import json
import os
import platform
import resource
import select
import signal
import socket
import struct
import sys
import termios
import time
from collections.abc import Callable, Collection
from typing import Any, NoReturn

_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWPID = 0x00020000, 0x10000000, 0x20000000
_MS_REC, _MS_PRIVATE, _MS_NOSUID_NODEV_NOEXEC = 0x4000, 0x40000, 0x2 | 0x4 | 0x8
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_MS_NOSUID_NODEV, _MS_BIND = 0x2 | 0x4, 0x1000
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_NEW_LISTENER = 1, 8
_SECCOMP_RET_USER_NOTIF, _SECCOMP_RET_ALLOW = 0x7FC00000, 0x7FFF0000
_BPF_LOAD, _BPF_JUMP_IF_EQUAL, _BPF_RETURN = 0x20, 0x15, 0x06
# machine -> (AUDIT_ARCH, the number of seccomp, the number of connect)
_CALLS = {"x86_64": (0xC000003E, 317, 42), "aarch64": (0xC00000B7, 277, 203)}
_KILL_ROUNDS = 2_000  # of a millisecond or more
_HEARD = (signal.SIGCHLD, signal.SIGTERM)
_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Say `ready` or `refused` on the socket, then serve it to its end."""
    mode, hub = sys.argv[1], socket.socket(fileno=int(sys.argv[2]))
    try:
        if mode == "namespace":
            _enter_namespace()
        else:
            _check("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            _die_with_parent(signal.SIGTERM)
    except OSError as error:
        hub.send(f"refused {error}".encode())
        return
    hub.send(b"ready")
    _Keeper(mode, hub).serve()


class _Server:
    """A loop over one socket and the ends of children."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._wake, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in _HEARD:
            signal.signal(number, lambda *_: None)

    def serve(self) -> None:
        """Until the other end closes, or SIGTERM."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._wake in ready:
                if signal.SIGTERM in os.read(self._wake, 4096):
                    break
                self._reap()
            if self.sock.fileno() in ready:
                words, fds = _receive(self.sock)
                if not words:
                    break
                self.obey(words, fds)
        self.stop()

    def obey(self, words: list[str], fds: list[int]) -> None:
        """Do what a request says; its descriptors are now ours."""
        raise NotImplementedError

    def ended(self, pid: int, status: int) -> None:
        """A child has been reaped."""
        raise NotImplementedError

    def stop(self) -> None:
        """The order to end has come."""
        raise NotImplementedError

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                self.ended(pid, status)


class _Keeper(_Server):
    """Forks the inits and says when one is gone."""

    def __init__(self, mode: str, hub: socket.socket) -> None:
        super().__init__(hub)
        self._mode = mode
        self._gone: dict[int, int] = {}  # an init's pid -> the pipe that closes with it
        self._own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC) if mode == "namespace" else -1

    def obey(self, words: list[str], fds: list[int]) -> None:
        control, gone, wish = fds
        wanted = _read_json(wish)
        os.close(wish)
        try:
            pid = self._fork()
        except OSError as error:  # the pipe closes: the node never came
            sys.stderr.write(f"no init for a node: {error}\n")
            os.close(gone)
        else:
            if pid == 0:
                _run_init(self._mode, control, wanted)
            self._gone[pid] = gone
        os.close(control)

    def ended(self, pid: int, status: int) -> None:
        gone = self._gone.pop(pid, None)
        if gone is None:
            return
        if self._mode == "subreaper":  # an init that was killed leaves its orphans to us
            _kill_descendants(keep=self._gone)
        os.close(gone)

    def stop(self) -> None:
        if self._mode == "subreaper":
            _kill_descendants()

    def _fork(self) -> int:
        """A child; in a PID namespace of its own where that is the mode."""
        if self._mode == "subreaper":
            return _fork()
        _check("unshare", _CLONE_NEWPID)
        pid = -1
        try:
            pid = _fork()
        finally:
            if pid != 0:
                _check("setns", self._own, _CLONE_NEWPID)  # so that the next one may be unshared too
        return pid


class _Init(_Server):
    """One node: starts its commands, reports their ends, reaps its orphans, ends them all."""

    def __init__(self, mode: str, control: socket.socket, disk: str) -> None:
        super().__init__(control)
        self._mode = mode
        self._disk = disk
        self._reports: dict[int, int] = {}  # a command's pid -> where its end is told

    def obey(self, words: list[str], fds: list[int]) -> None:
        if words[0] == "run":
            *stdio, wish, report = fds
            pid = _fork()
            if pid == 0:
                _become(stdio, wish, self._disk)
            self._reports[pid] = report
            _tell(report, f"pid {pid}\n")
            fds.remove(report)
        elif words[0] == "signal":
            pid, number = int(words[1]), int(words[2])
            if pid in self._reports:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, number)
        elif words[0] == "all":
            self._signal_all(int(words[1]))
        for fd in fds:
            os.close(fd)

    def ended(self, pid: int, status: int) -> None:
        report = self._reports.pop(pid, None)
        if report is not None:
            _tell(report, f"exit {status}\n")
            os.close(report)

    def stop(self) -> None:
        if self._mode == "subreaper":
            _kill_descendants()

    def _signal_all(self, number: int) -> None:
        if self._mode == "namespace":
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, number)  # everybody in the namespace but process 1
            return
        for pid in _descendants():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _fork() -> int:
    """A child that no longer hears signals in our name: its own end must not look like ours."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
    try:
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            for number in _HEARD:
                signal.signal(number, signal.SIG_DFL)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEARD)
    return pid


def _run_init(mode: str, control: int, wanted: dict[str, Any]) -> NoReturn:
    """In the child: keep the one descriptor that is ours, be an init, end."""
    try:
        os.closerange(3, control)
        os.closerange(control + 1, os.sysconf("SC_OPEN_MAX"))
        os.setsid()
        if mode == "namespace":
            _die_with_parent(signal.SIGKILL)
            _check("unshare", _CLONE_NEWNS)
            _mount_proc()
        else:
            _die_with_parent(signal.SIGTERM)
            _check("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        sock = socket.socket(fileno=control)
        disk = _fill_disk(mode, wanted["full"]) if wanted["full"] else "free"
        init = _Init(mode, sock, disk)
        listeners = _watch_connects() if wanted["connects"] else []
        socket.send_fds(sock, [f"up {disk}".encode()], listeners)
        for fd in listeners:
            os.close(fd)
        init.serve()
    except BaseException as error:  # the frames above belong to the keeper: never return into them
        sys.stderr.write(f"a node's init: {error!r}\n")
        os._exit(1)
    os._exit(0)


def _fill_disk(mode: str, home: str) -> str:
    """No file in the home can grow; full: ENOSPC, unwritable: EFBIG."""
    if mode == "namespace":  # elsewhere a mount would be seen by all of the machine, and outlive us
        with contextlib.suppress(OSError):
            _mount_full(home)
            return "full"
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    return "unwritable"


def _mount_full(home: str) -> None:
    """What lies in the home shows through. Raises OSError when nothing may be mounted."""
    below = os.open(home, os.O_PATH | os.O_DIRECTORY)
    before = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in os.scandir(home)]
    size = f"size={_PAGE_BYTES},mode=0755".encode()
    _check("mount", b"tmpfs", os.fsencode(home), b"tmpfs", _MS_NOSUID_NODEV, size)
    for name, is_folder in before:
        source, place = f"/proc/self/fd/{below}/{name}", os.path.join(home, name)
        if os.path.islink(source):
            os.symlink(os.readlink(source), place)
            continue
        if is_folder:
            os.mkdir(place)
        else:
            os.close(os.open(place, os.O_CREAT))
        _check("mount", os.fsencode(source), os.fsencode(place), None, _MS_BIND, None)
    os.close(below)
    taken = os.open(home, os.O_TMPFILE | os.O_WRONLY)  # stays open as long as the init lives
    os.write(taken, bytes(_PAGE_BYTES))


def _watch_connects() -> list[int]:
    """The listener of all connects from here on; none where the kernel has no such thing for us."""
    if platform.machine() not in _CALLS:
        return []
    machine, seccomp, connect = _CALLS[platform.machine()]
    steps = (
        (_BPF_LOAD, 0, 0, 4),  # the machine, else another one's numbers would be taken for ours
        (_BPF_JUMP_IF_EQUAL, 0, 3, machine),
        (_BPF_LOAD, 0, 0, 0),  # the number of the call
        (_BPF_JUMP_IF_EQUAL, 0, 1, connect),
        (_BPF_RETURN, 0, 0, _SECCOMP_RET_USER_NOTIF),
        (_BPF_RETURN, 0, 0, _SECCOMP_RET_ALLOW),
    )
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(code)))
    with contextlib.suppress(OSError):
        _check("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        _libc.syscall.restype = ctypes.c_long
        flags = _SECCOMP_FILTER_FLAG_NEW_LISTENER
        fd = _libc.syscall(ctypes.c_long(seccomp), _SECCOMP_SET_MODE_FILTER, flags, program)
        if fd >= 0:
            return [fd]
    return []


def _become(stdio: list[int], wish: int, disk: str) -> NoReturn:
    """In the child: turn into the command, in a session of its own."""
    try:
        asked = _read_json(wish)
        os.setsid()
        for target, fd in enumerate(stdio):
            os.dup2(fd, target)
        if asked["tty"]:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores these two, and that is inherited
        if disk != "unwritable":
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        os.chdir(asked["cwd"])
        os.execvpe(asked["argv"][0], asked["argv"], asked["env"])  # noqa: S606
    except FileNotFoundError as error:
        os.write(2, f"{error}\n".encode())
        os._exit(127)
    except BaseException as error:
        os.write(2, f"{error!r}\n".encode())
        os._exit(126)


def _enter_namespace() -> None:
    """Return as process 1 of a new PID namespace; the process that was called stays outside and waits."""
    try:
        _check("unshare", _CLONE_NEWPID | _CLONE_NEWNS)
    except PermissionError:
        _enter_user_namespace()
        _check("unshare", _CLONE_NEWPID | _CLONE_NEWNS)
    _die_with_parent(signal.SIGKILL)
    pid = os.fork()
    if pid:
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        os.waitpid(pid, 0)
        os._exit(0)
    _die_with_parent(signal.SIGKILL)
    _check("mount", None, b"/", None, _MS_REC | _MS_PRIVATE, None)
    _mount_proc()


def _enter_user_namespace() -> None:
    """Where an ordinary user may have namespaces; the user stays who it is."""
    uid, gid = os.getuid(), os.getgid()
    _check("unshare", _CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def _mount_proc() -> None:
    _check("mount", b"proc", b"/proc", b"proc", _MS_NOSUID_NODEV_NOEXEC, None)


def _die_with_parent(number: int) -> None:
    _check("prctl", _PR_SET_PDEATHSIG, number, 0, 0, 0)


def _kill_descendants(keep: Collection[int] = ()) -> None:
    """Kill and reap until none is left but the children to keep and theirs.

    Ours are found whatever they did to get away, because their orphans become our children. One that this
    user may not kill (a set-user-id program) is given up after a few seconds.
    """
    for _ in range(_KILL_ROUNDS):
        victims = _descendants(keep)
        if not victims:
            return
        for pid in victims:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for pid in victims:
            with contextlib.suppress(ChildProcessError):  # a grandchild: its parent's, or ours in a moment
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.001)


def _descendants(keep: Collection[int] = ()) -> list[int]:
    """Every process below this one, zombies too."""
    children = _children_lister()
    found: list[int] = []
    layer = [pid for pid in children(os.getpid()) if pid not in keep]
    while layer:
        found += layer
        layer = [child for pid in layer for child in children(pid)]
    return found


def _children_lister() -> Callable[[int], list[int]]:
    """The kernel's own list where it has one; else the parents of all processes, read once."""
    if os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
        return _children_of
    parents: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with (
            contextlib.suppress(OSError),
            open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as stat,
        ):
            parent = int(stat.read().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(name))
    return lambda pid: parents.get(pid, [])


def _children_of(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with (
                contextlib.suppress(OSError),
                open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file,
            ):
                found += map(int, file.read().split())
    return found


def _receive(sock: socket.socket) -> tuple[list[str], list[int]]:
    """One request and its descriptors, which commands never inherit; no words = the other end has closed."""
    try:
        data, ancillary, _, _ = sock.recvmsg(256, socket.CMSG_SPACE(32), socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        return [], []
    fds = array.array("i")
    for _, kind, content in ancillary:
        if kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data.decode().split(), list(fds)


def _read_json(fd: int) -> Any:
    return json.loads(os.pread(fd, os.fstat(fd).st_size, 0))


def _tell(fd: int, text: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(fd, text.encode())


def _check(function: str, *arguments: int | bytes | None) -> None:
    """Call a function of the C library. Raises OSError."""
    values = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    if getattr(_libc, function)(*values) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
