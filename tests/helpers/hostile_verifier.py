"""A verifier that does what the answer says, for the sandbox; any other answer must equal the truth."""

import ctypes
import os
import re
import signal
import sys
import threading
import time


def load():
    kept = []

    def recurse():
        return recurse()

    def overflow_the_c_stack():
        nested = ()
        for _ in range(1_000_000):
            nested = (nested,)
        hash(nested)

    def loop():
        while True:
            pass

    def sleep_deaf():
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(3600)

    def leave_threads():
        for _ in range(3):
            threading.Thread(target=time.sleep, args=(3600,)).start()
        time.sleep(3600)

    deeds = {
        "loop": loop,
        "sleep": lambda: time.sleep(3600),
        "sleep deaf": sleep_deaf,
        "threads": leave_threads,
        "regex": lambda: re.match(r"(a|a)*b", "a" * 60),
        "power": lambda: 9**9**9,
        "recurse": recurse,
        "overflow": overflow_the_c_stack,
        "segfault": lambda: ctypes.string_at(0),
        "exit": lambda: sys.exit(3),
        "exit at once": lambda: os._exit(0),
        "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "interrupt": lambda: (_ for _ in ()).throw(KeyboardInterrupt),
        "raise": lambda: 1 / 0,
        "memory": lambda: bytearray(1 << 33),
        "grow": lambda: kept.append(bytearray(600 << 20)),
        "print": lambda: os.write(1, b"\x00\xff" * 100_000),
    }

    def verify(answer, accepted):
        if answer in deeds:
            deeds[answer]()
        return answer in accepted

    return verify


def load_never():
    os._exit(7)
