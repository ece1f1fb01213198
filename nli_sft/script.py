"""Import this first in a script: Ctrl-C ends it without a traceback, even while the rest is being imported.

`accelerate launch` starts one process as its child and waits for it. Ctrl-C reaches both, and the launcher would
answer with a traceback of its own within a quarter of a second; it is ended before that.
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun passes it on, after the terminal has sent it
    say_goodbye()
    os._exit(128 + signal.SIGINT)


def _silence_launcher() -> None:
    parent = psutil.Process().parent()
    if parent is None or is_elastic():  # torchrun waits until all processes have ended
        return
    if not any("accelerate" in part for part in parent.cmdline()[:3]):
        return
    # Python runs signal handlers between two instructions of the main thread, which may be long in coming; the number
    # of the signal goes into a socket at once.
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def listen(kept=writer) -> None:
        while number := reader.recv(1):
            if number[0] == signal.SIGINT and parent.is_running():
                parent.terminate()
                return

    threading.Thread(target=listen, daemon=True).start()


command()  # while the launcher is there to be asked
sys.excepthook = _hook
_silence_launcher()
