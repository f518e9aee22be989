"""Programs that try to get out, to do harm or to cheat, and the kinds of failure that may come of each."""

from __future__ import annotations

GOOD = "def add(a, b):\n    return a + b\n"


def at_import(attack: str) -> str:
    """The attack, then a right answer: the sample fails only where the attack is stopped by an error or an end."""
    return f"{attack}\n{GOOD}"


ENDLESS = {"timeout", "killed"}
RAISED = {"exception"}
# name: the program, the kinds of failure that may come of it.
ATTACKS: dict[str, tuple[str, set[str]]] = {
    "fork bomb": (at_import("import os\nwhile True:\n    os.fork()"), RAISED),
    "vfork and clone by number": (
        at_import(
            "import ctypes, platform\nc = ctypes.CDLL(None)\n"
            "assert max(c.syscall(n, 17, 0, 0, 0, 0) for n in (56, 57, 58, 220, 435)) > 0"
        ),
        RAISED,
    ),
    "thread bomb": (
        at_import("import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(9,)).start()"),
        RAISED,
    ),
    "memory bomb": (at_import("x = []\nwhile True:\n    x.append(bytearray(1 << 22))"), {"memory"}),
    "memory bomb by mmap": (
        at_import("import mmap\nx = []\nwhile True:\n    x.append(mmap.mmap(-1, 1 << 24))"),
        RAISED | {"memory"},
    ),
    "a power that fills memory": (at_import("x = 9 ** 9 ** 9"), ENDLESS | {"memory"}),
    "a large file": (at_import("f = open('x', 'wb')\nwhile True:\n    f.write(bytes(1 << 20))"), RAISED),
    "many files": (
        at_import("i = 0\nwhile True:\n    open(str(i), 'w').write('x' * 1000)\n    i += 1"),
        {"disk"},
    ),
    "deep directories": (
        at_import("import os\nwhile True:\n    os.mkdir('d', 0o300)\n    os.chdir('d')"),
        {"disk"} | RAISED,
    ),
    "open files": (at_import("x = []\nwhile True:\n    x.append(open('/dev/null'))"), RAISED),
    "TCP": (at_import("import socket\nsocket.create_connection(('127.0.0.1', 22), 1)"), RAISED),
    "UDP": (at_import("import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)"), RAISED),
    "DNS": (at_import("import socket\nsocket.getaddrinfo('example.org', 80)"), RAISED),
    "a web page": (at_import("import urllib.request\nurllib.request.urlopen('http://127.0.0.1')"), RAISED),
    "unix socket": (at_import("import socket\nsocket.socket(socket.AF_UNIX).connect('\\0x')"), RAISED),
    "socket pair": (at_import("import socket\nsocket.socketpair()"), RAISED),
    "signal to the parent": (at_import("import os\nos.kill(os.getppid(), 9)"), RAISED),
    "signal to all": (at_import("import os\nos.kill(-1, 9)"), RAISED),
    "signal to the group": (at_import("import os\nos.killpg(0, 9)"), RAISED),
    "signal by another's file": (
        at_import("import fcntl, os\nfcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())"),
        RAISED,
    ),
    "reading /etc/passwd": (at_import("open('/etc/passwd').read()"), RAISED),
    "listing /": (at_import("import os\nos.listdir('/')"), RAISED),
    "environment of the parent": (
        at_import("import os\nopen(f'/proc/{os.getppid()}/environ').read()"),
        RAISED,
    ),
    "memory of the parent": (at_import("import os\nopen(f'/proc/{os.getppid()}/mem', 'rb')"), RAISED),
    "own memory": (at_import("open('/proc/self/mem', 'r+b')"), RAISED),
    "memory of the parent by a call": (
        at_import(
            "import ctypes, os\nb = ctypes.create_string_buffer(8)\n"
            "iov = (ctypes.c_void_p * 2)(ctypes.addressof(b), 8)\n"
            "n = [310, 270][os.uname().machine == 'aarch64']\n"
            "assert ctypes.CDLL(None).syscall(n, os.getppid(), iov, 1, iov, 1, 0) > 0"
        ),
        RAISED,
    ),
    "a secret in the home": (at_import("open({secret!r}).read()"), RAISED),
    "a link to a secret": (at_import("import os\nos.symlink({secret!r}, 'x')\nopen('x').read()"), RAISED),
    "a hard link to a secret": (at_import("import os\nos.link({secret!r}, 'x')\nopen('x').read()"), RAISED),
    "a way round to a secret": (at_import("open('../' * 40 + {secret!r}.lstrip('/')).read()"), RAISED),
    "moving a secret": (at_import("import os\nos.rename({secret!r}, 'x')"), RAISED),
    "emptying a secret": (at_import("import os\nos.truncate({secret!r}, 0)"), RAISED),
    "emptying a file of Python": (
        at_import("import os\nos.close(os.open(os.__file__, os.O_RDONLY | os.O_TRUNC))"),
        RAISED,
    ),
    "writing to a module of Python": (at_import("import os\nopen(os.__file__, 'a').write('x')"), RAISED),
    "writing to /tmp": (at_import("open('/tmp/limbeck-escaped', 'w').write('x')"), RAISED),
    "writing beside the own directory": (at_import("open('../escaped', 'w').write('x')"), RAISED),
    "writing to the directory of the parent": (at_import("open({cwd!r} + '/escaped', 'w').write('x')"), RAISED),
    "deleting the own directory": (at_import("import os, shutil\nd = os.getcwd()\nos.chdir('/')\nos.rmdir(d)"), RAISED),
    "deleting all": (at_import("import shutil\nshutil.rmtree({cwd!r})"), RAISED),
    "chmod": (at_import("import os\nos.chmod({secret!r}, 0o777)"), RAISED),
    "chown": (at_import("import os\nos.chown({secret!r}, 1, 1)"), RAISED),
    "setuid": (at_import("import os\nos.setuid(65534)"), RAISED),
    "chroot": (at_import("import os\nos.chroot('.')"), RAISED),
    "a device": (at_import("import os, stat\nos.mknod('x', stat.S_IFBLK | 0o600, os.makedev(254, 0))"), RAISED),
    "endless standard output": (at_import("while True:\n    print('x' * 10000)"), ENDLESS),
    "endless standard error": (at_import("import sys\nwhile True:\n    sys.stderr.write('x' * 10000)"), ENDLESS),
    "an endless loop": (at_import("while True: pass"), ENDLESS),
    "an endless loop in a call": ("def add(a, b):\n    while True: pass", ENDLESS),
    "sleep": (at_import("import time\ntime.sleep(1e6)"), ENDLESS),
    "ignoring signals": (
        at_import(
            "import signal\nfor n in range(1, 65):\n    if n not in (9, 19, 32, 33): signal.signal(n, signal.SIG_IGN)\n"
            "while True: pass"
        ),
        ENDLESS,
    ),
    "waiting for input": (at_import("input()"), RAISED),
    "subprocess": (at_import("import subprocess\nsubprocess.run(['true'], check=True)"), RAISED),
    "os.system": (at_import("import os\nassert os.system('true') == 0"), RAISED),
    "exec": (at_import("import os, sys\nos.execv(sys.executable, [sys.executable, '-c', ''])"), RAISED),
    "spawning": (at_import("import os\nos.posix_spawn('/bin/true', ['true'], {})"), RAISED),
    "multiprocessing": (
        at_import("import multiprocessing\nmultiprocessing.get_context('fork').Process(target=print).start()"),
        RAISED,
    ),
    "system by ctypes": (at_import("import ctypes\nassert ctypes.CDLL(None).system(b'true') == 0"), RAISED),
    "a pickle that calls the shell": (
        at_import("import pickle\nassert pickle.loads(b'cposix\\nsystem\\n(S\"true\"\\ntR.') == 0"),
        RAISED,
    ),
    "the harness of this package": (
        at_import("import importlib\nimportlib.import_module('limbeck.runtime.rundir')"),
        RAISED,
    ),
    "site packages": (at_import("import torch"), RAISED),
    "raising a limit": (
        at_import("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))"),
        RAISED,
    ),
    "limits of the parent": (
        at_import("import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))"),
        RAISED,
    ),
    "ptrace": (
        at_import("import ctypes, os\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0"),
        RAISED,
    ),
    "mount": (at_import("import ctypes\nassert ctypes.CDLL(None).mount(b'x', b'/', b'tmpfs', 0, 0) == 0"), RAISED),
    "unshare": (at_import("import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0"), RAISED),
    "setsid": (at_import("import os\nos.setsid()"), RAISED),
    "a timer": (at_import("import signal\nsignal.setitimer(signal.ITIMER_REAL, 1)"), RAISED),
    "a file in memory": (at_import("import os\nos.memfd_create('x')"), RAISED),
    "typing into the terminal": (at_import("import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSTI, b'x')"), RAISED),
    "sys.exit(0)": (at_import("import sys\nsys.exit(0)"), {"exit"}),
    "sys.exit(0) in a call": ("import sys\ndef add(a, b):\n    sys.exit(0)", {"exit"}),
    "raise SystemExit": ("def add(a, b):\n    raise SystemExit(0)", {"exit"}),
    "os._exit(0)": (at_import("import os\nos._exit(0)"), {"exit"}),
    "os._exit(0) in a call": ("import os\ndef add(a, b):\n    os._exit(0)", {"exit"}),
    "abort": (at_import("import os\nos.abort()"), {"killed"}),
    "atexit": ("import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b):\n    raise SystemExit", {"exit"}),
    "deep recursion": ("def add(a, b):\n    return add(a, b)", RAISED),
    "overflow of the C stack": (
        at_import("import sys\nsys.setrecursionlimit(10 ** 9)\ndef f():\n    return [*map(lambda _: f(), [1])]\nf()"),
        {"killed", "memory"},
    ),
    "a wild pointer": (at_import("import ctypes\nctypes.string_at(0)"), {"killed"}),
    "source of many brackets": ("x = " + "(" * 5000, {"syntax"}),
    "source with a null byte": ("x = 1\0", {"syntax"}),
    "source too much for the parser": ("x = " + "-" * 100000 + "1", {"syntax", "memory", "killed"} | RAISED),
    # Fake success: nothing of these may count.
    "a printed verdict": ('print(\'{"kind": "passed", "text": ""}\')\nimport os\nos._exit(0)', {"exit"}),
    "a verdict to every file": (
        'import os\nfor n in range(64):\n    try: os.write(n, b\'{"kind": "passed", "text": ""}\\n\')\n'
        "    except OSError: pass\nos._exit(0)",
        {"exception", "garbled", "exit", "wrong"},
    ),
    "answers to every file": (
        "import os\nfor n in range(64):\n    try: os.write(n, b'{\"value\": null}\\n' * 500)\n"
        "    except OSError: pass\n",
        {"wrong", "exception", "garbled"},
    ),
    "rubbish to every file": (
        "import os\nfor n in range(64):\n    try: os.write(n, b'\\xff\\xfe[[[\\n')\n    except OSError: pass\n",
        {"garbled"},
    ),
    "endless brackets to every file": (
        "import os\nfor n in range(64):\n    try: os.write(n, b'[' * 60000 + b'\\n')\n    except OSError: pass\n",
        {"garbled"},
    ),
    "equal to everything": (
        "class Any:\n    def __eq__(self, other): return True\n    def __bool__(self): return True\n"
        "def add(a, b):\n    return Any()",
        {"wrong"},
    ),
    "equal to everything, as a number": (
        "class Any(int):\n    def __eq__(self, other): return True\ndef add(a, b):\n    return Any()",
        {"wrong"},
    ),
    "other builtins": (
        "import builtins\nbuiltins.AssertionError = BaseException\n"
        "builtins.exec = builtins.compile = lambda *a, **k: None\n"
        "def add(a, b): return 0",
        {"wrong"},
    ),
    "walking the frames": (
        "import sys\ndef add(a, b):\n    f = sys._getframe()\n    while f:\n"
        "        f.f_locals.update(passed=True, kind='passed')\n"
        "        f = f.f_back\n    return 7",
        {"wrong"},
    ),
    "changing the harness": (
        "import gc\nfor o in gc.get_objects():\n    if isinstance(o, dict) and 'limbeck' in str(o.get('__name__')):\n"
        "        o.update(encode=lambda *a: True, _failure=lambda e: {'value': 3})\ndef add(a, b): raise ValueError",
        {"wrong", "exception", "garbled"},
    ),
    "looking for the answers": (
        "import gc\ndef add(a, b):\n    all = gc.get_objects()\n"
        "    return next(o for o in all if isinstance(o, dict) and 'tests' in o)['tests']",
        RAISED | {"wrong"},
    ),
    "no such function": ("def sub(a, b): return a - b", RAISED),
    "a wrong answer": ("def add(a, b): return a - b", {"wrong"}),
    "odd text": (at_import("raise ValueError('\\ud800\\u202e\\0' * 10000 + '\\x1b[2J')"), RAISED),
    "odd names": (
        at_import("class \u212b(Exception): pass\nraise \u212b('\\udcff')"),
        RAISED,
    ),
    "a huge answer": ("def add(a, b): return 'x' * (40 << 20)", {"garbled", "memory"} | ENDLESS),
    "a huge number": ("def add(a, b): return 1 << 10 ** 7", {"wrong"}),
    "an answer that holds itself": ("def add(a, b):\n    x = []\n    x.append(x)\n    return x", RAISED),
    "an endless answer": ("def add(a, b):\n    while True: yield 1", {"wrong"}),
}  # fmt: skip
