"""Programs that try to hold more on disk than they may, or to have a wrong answer pass; the failures that may come."""

from __future__ import annotations

from tests.evaluation.sandbox_attacks import ENDLESS, RAISED, at_import

FULL = {"disk"}
REFUSED = RAISED
_NATIVE = (
    "import ctypes, os\nc = ctypes.CDLL(None, use_errno=True)\nc.mmap.restype = ctypes.c_void_p\n"
    "c.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]\n"
    "def new(n, size=1 << 20):\n    fd = os.open(str(n), os.O_RDWR | os.O_CREAT)\n"
    "    while size: size -= os.write(fd, bytes(min(size, 1 << 16)))\n    return fd\n"
    "def held(fd, size=4096):\n    return c.mmap(None, size, 3, 1, fd, 0)\n"
)
_BY_NUMBER = "import ctypes, os\nc = ctypes.CDLL(None, use_errno=True)\nn = [{}, {}][os.uname().machine == 'aarch64']\n"


def native(body: str) -> str:
    return at_import(_NATIVE + body)


def by_number(x86: int, arm: int, body: str) -> str:
    return at_import(_BY_NUMBER.format(x86, arm) + body)


# Names with * are the classes of an outside audit, by which 64 MiB became 3,010.
DISK: dict[str, tuple[str, set[str]]] = {
    "unlinked files held by descriptors *": (
        native("x = 0\nwhile True:\n    new(x)\n    os.unlink(str(x))\n    x += 1"),
        FULL,
    ),
    "unlinked files held by a native page *": (
        native(
            "x = 0\nwhile True:\n    fd = new(x)\n    held(fd)\n    os.close(fd)\n    os.unlink(str(x))\n    x += 1"
        ),
        FULL,
    ),
    "unlinked files held by Python's mmap *": (
        native(
            "import mmap\nk = []\nwhile True:\n    fd = new(len(k))\n    k.append(mmap.mmap(fd, 4096))\n"
            "    os.close(fd)\n    os.unlink(str(len(k) - 1))"
        ),
        FULL,
    ),
    "directories renamed without end *": (
        native(
            "os.mkdir('a')\ni = 0\nwhile True:\n    os.chdir(['a', 'b'][i % 2])\n    os.close(new(i))\n"
            "    os.chdir('..')\n    os.rename(['a', 'b'][i % 2], ['b', 'a'][i % 2])\n    i += 1"
        ),
        FULL,
    ),
    "1,500 nested directories *": (
        at_import("import os\nfor _ in range(1500):\n    os.mkdir('d')\n    os.chdir('d')"),
        FULL,
    ),
    "nameless files (O_TMPFILE)": (
        native(
            "k = []\nwhile True:\n    fd = os.open('.', os.O_TMPFILE | os.O_RDWR)\n"
            "    for _ in range(16): os.write(fd, bytes(1 << 16))\n    held(fd)\n    os.close(fd)"
        ),
        FULL,
    ),
    "a file renamed over one that is held": (
        native("x = 0\nwhile True:\n    fd = new('new')\n    held(fd)\n    os.close(fd)\n    os.rename('new', 'old')"),
        FULL,
    ),
    "holes that are filled through a mapping": (
        native(
            "x = 0\nwhile True:\n    fd = os.open(str(x), os.O_RDWR | os.O_CREAT)\n    os.ftruncate(fd, 1 << 20)\n"
            "    ctypes.memset(held(fd, 1 << 20), 1, 1 << 20)\n    os.close(fd)\n    os.unlink(str(x))\n    x += 1"
        ),
        {"killed"},
    ),
    "a page at a time, far apart": (
        native(
            "x = 0\nwhile True:\n    fd = os.open(str(x), os.O_RDWR | os.O_CREAT)\n"
            "    for at in range(0, 1 << 20, 8192): os.pwrite(fd, b'x', at)\n    held(fd)\n    os.close(fd)\n    x += 1"
        ),
        FULL,
    ),
    "emptied and filled again under a mapping": (
        native(
            "x = 0\nwhile True:\n    fd = new(x)\n    held(fd, 1 << 20)\n    os.ftruncate(fd, 0)\n"
            "    for _ in range(16): os.pwrite(fd, bytes(1 << 16), _ << 16)\n    os.close(fd)\n    x += 1"
        ),
        FULL,
    ),
    "empty files with long names": (
        at_import("i = 0\nwhile True:\n    open(f'{i:0250}', 'w').close()\n    i += 1"),
        FULL,
    ),
    "empty files, unlinked and held": (
        native(
            "x = 0\nwhile True:\n    fd = new(x, 1)\n    held(fd)\n    os.close(fd)\n    os.unlink(str(x))\n    x += 1"
        ),
        FULL,
    ),
    "removed directories that are held": (
        at_import("import os\nwhile True:\n    os.mkdir('d')\n    fd = os.open('d', os.O_RDONLY)\n    os.rmdir('d')"),
        REFUSED,
    ),
    "files of the largest size": (
        native(
            "x = 0\nwhile True:\n    try:\n        fd = new(x, 1 << 30)\n    except OSError as e:\n"
            "        if e.errno != 27: raise\n    x += 1"
        ),
        FULL,
    ),
    "a file past its limit": (native("new('x', 2 << 20)"), REFUSED),
    "a file past its limit, its signal ignored": (
        native(
            "import signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nfd = new('x')\nos.pwrite(fd, b'x', 1 << 40)"
        ),
        REFUSED,
    ),
    "room set aside (fallocate)": (
        by_number(
            285,
            47,
            "fd = os.open('x', os.O_RDWR | os.O_CREAT)\n"
            "assert c.syscall(n, fd, 0, ctypes.c_long(0), ctypes.c_long(1 << 30)) == 0",
        ),
        REFUSED,
    ),
    "extended attributes": (
        by_number(
            188,
            5,
            "open('x', 'w').close()\nassert c.syscall(n, b'x', b'user.x', bytes(60000), ctypes.c_long(60000), 0) == 0",
        ),
        REFUSED,
    ),
    "symbolic links": (
        at_import("import os\ni = 0\nwhile True:\n    os.symlink('x' * 4000, str(i))\n    i += 1"),
        REFUSED,
    ),
    "hard links": (at_import("import os\nopen('x', 'w').close()\nos.link('x', 'y')"), REFUSED),
    "a file in memory by number": (by_number(319, 279, "assert c.syscall(n, b'x', 0) > 0"), REFUSED),
    "shared memory of System V": (
        by_number(29, 194, "assert c.syscall(n, 0, ctypes.c_long(1 << 30), 0o1600) > 0"),
        REFUSED,
    ),
    "a message queue": (by_number(240, 180, "assert c.syscall(n, b'x', 66, 0o600, None) > 0"), REFUSED),
    "a larger pipe": (
        at_import(
            "import fcntl\nfor n in range(3, 64):\n    try: fcntl.fcntl(n, 1031, 1 << 20)\n"
            "    except OSError as e:\n        if e.errno not in (1, 9): raise\n    else: raise SystemExit\n"
            "raise PermissionError"
        ),
        REFUSED,
    ),
    "a copy inside the kernel": (
        by_number(
            326,
            285,
            "a = os.open('a', os.O_RDWR | os.O_CREAT)\nassert c.syscall(n, a, None, a, None, ctypes.c_long(1), 0) >= 0",
        ),
        REFUSED,
    ),
    "another limit for itself": (
        by_number(302, 261, "assert c.syscall(n, 0, 1, (ctypes.c_long * 2)(-1, -1), None) == 0"),
        REFUSED,
    ),
    "below the mount": (
        at_import("import os\nd = os.path.basename(os.getcwd())\nos.chdir('..')\nopen(d + '/x', 'w')\nopen('x', 'w')"),
        REFUSED,
    ),
    "beside the mount, by descriptor": (
        at_import("import os\nfd = os.open('..', os.O_PATH)\nos.open('x', os.O_CREAT | os.O_WRONLY, dir_fd=fd)"),
        REFUSED,
    ),
    "taking the mount away": (
        by_number(166, 39, "os.chdir('/')\nassert c.syscall(n, {cwd!r}.encode(), 2) == 0"),
        REFUSED,
    ),
    "a larger mount": (
        by_number(165, 40, "assert c.syscall(n, b'x', os.getcwd().encode(), b'', 32, b'size=4g') == 0"),
        REFUSED,
    ),
    "the mounts of others (setns)": (by_number(308, 268, "assert c.syscall(n, 0, 0) == 0"), REFUSED),
    "memory and disk together": (
        native(
            "k = []\nx = 0\nwhile True:\n    try:\n        os.close(new(x))\n        x += 1\n    except OSError:\n"
            "        k.append(bytearray(b'x' * (1 << 20)))"
        ),
        {"memory"},
    ),
    "bytecode of its own modules": (
        at_import(
            "import sys\nsys.dont_write_bytecode = False\nsys.path.insert(0, '.')\ni = 0\nwhile True:\n"
            "    open(f'm{i}.py', 'w').write('x = ' + repr('y' * 200000))\n    __import__(f'm{i}')\n    i += 1"
        ),
        FULL,
    ),
    "a library of its own": (
        native(
            "fd = os.open('x', os.O_RDWR | os.O_CREAT)\nos.write(fd, bytes(4096))\n"
            "assert c.mmap(None, 4096, 5, 1, fd, 0) not in (None, 2 ** 64 - 1)"
        ),
        REFUSED,
    ),
}

# What a program can say over its pipes at will: it finds them among its open files.
_SAY = (
    "import os, json\ndef say(*lines):\n    for n in range(3, 64):\n        for x in lines:\n"
    "            try: os.write(n, json.dumps(x).encode() + b'\\n')\n            except OSError: break\n"
)


def says(lines: str, then: str = "") -> str:
    return f"{_SAY}say(*{lines})\n{then}\ndef add(a, b): return 0\n"


FORGED: dict[str, tuple[str, set[str]]] = {
    "failures that call themselves passed": (says("[{'error': 'x', 'text': 'x', 'kind': 'passed'}] * 99"), RAISED),
    "verdicts for messages": (says("[{'kind': 'passed', 'text': ''}] * 99"), {"wrong", "exception"}),
    "names that are not there": (says("[{}, {'absent': True}, {'value': 3}, {'value': 0}]"), RAISED),
    "objects for values": (says("[{}, {'value': ['kept', 0]}] + [{'value': ['kept', True]}] * 99"), {"wrong"}),
    "changes to what was never handed over": (
        says("[{}, {'value': ['kept', 0]}, {'value': 3, 'changed': {'-1': 3, '99': ['list', []], 'x': 1}}]"),
        RAISED,
    ),
    "the end before the first test": (
        says("[{}, {'value': ['kept', 0]}, {'error': 'SystemExit', 'kind': 'exit'}]"),
        {"exit"},
    ),
    "errors that no test can be waiting for": (
        says(
            "[{}, {'value': ['kept', 0]}] + [{'error': n, 'kind': 'exception'} for n in ('GeneratorExit', 'exit', 'X')]"
        ),
        RAISED,
    ),
    "confined a second time": (says("[{'ready': True}, {'unconfined': 'no'}] * 9"), {"wrong", "exception", "garbled"}),
    "numbers of five thousand digits": (
        "import os\nfor n in range(3, 64):\n    try: os.write(n, b'{\"value\": ' + b'1' * 5000 + b'}\\n')\n"
        "    except OSError: pass\n",
        {"garbled"},
    ),
    "a fraction without end": (
        says("[{}, {'value': ['kept', 0]}, {'value': ['made', 'fractions', 'Fraction', ['tuple', ['1e999999999']]]}]"),
        ENDLESS | {"memory"},
    ),
    "types of the protocol with other contents": (
        says("[{}, {'value': ['kept', 0]}, {'value': ['made', 'datetime', 'date', ['kept', 0]]}]"),
        {"garbled", "wrong", "exception"},
    ),
    "equality asked of the program": (
        "import gc\nfor o in gc.get_objects():\n    if isinstance(o, dict) and 'contains' in o and 'eq' in o:\n"
        "        o['eq'] = o['contains'] = o['bool'] = lambda *a: True\n"
        "class Any:\n    __eq__ = __ne__ = __contains__ = lambda *a: True\ndef add(a, b): return Any()",
        {"wrong"},
    ),
    "half a verdict": (
        "import os\nfor n in range(3, 64):\n    try: os.write(n, b'{\"value\": 3')\n    except OSError: pass\n"
        "import time\ntime.sleep(99)",
        ENDLESS,
    ),
    "text that compares as it likes": (
        "class T(str):\n    __eq__ = lambda *a: True\n    __hash__ = str.__hash__\ndef add(a, b): return T('3')",
        {"wrong"},
    ),
    "memory of the tests": (
        says("[{}, {'value': ['kept', 0]}] + [{'value': ['list', [[]] * 3000000]}]"),
        {"memory", "garbled"} | ENDLESS,
    ),
}
