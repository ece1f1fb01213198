"""Import this first in a script, so that Ctrl-C leaves no traceback, even during the other imports.

`accelerate launch` waits for the process that it starts. Ctrl-C reaches both, and the launcher would print a traceback
of its own within 0.25 s. It is terminated before that.
"""

import os
import signal
import socket
import sys
import threading

import psutil

from .interrupts import command, is_elastic, say_goodbye


def _hook(kind, error, traceback, before=sys.excepthook) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        before(kind, error, traceback)
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun forwards the signal of the terminal
    say_goodbye()
    os._exit(128 + signal.SIGINT)


def _silence_launcher() -> None:
    parent = psutil.Process().parent()
    if parent is None or is_elastic():  # torchrun waits until all processes have ended
        return
    if not any("accelerate" in part for part in parent.cmdline()[:3]):
        return
    # Python delays signal handlers until the main thread finishes an instruction. The wakeup socket has no delay.
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def listen(kept=writer) -> None:
        while number := reader.recv(1):
            if number[0] == signal.SIGINT and parent.is_running():
                parent.terminate()
                return

    threading.Thread(target=listen, daemon=True).start()


command()  # caches the launcher's command line while it is running
sys.excepthook = _hook
_silence_launcher()
