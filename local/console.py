"""What the user sees of a local run: one line per step; everything else is in a log file."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


class Failure(Exception):
    """A step failed; the message is the cause, for the user."""


class Console:
    """One line per step with its seconds. All other output of this process goes to the log file."""

    def __init__(self, log: Path) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        self.out: TextIO = os.fdopen(os.dup(1), "w", buffering=1)
        with log.open("wb") as file:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)

    def say(self, text: str = "") -> None:
        print(text, file=self.out, flush=True)

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        if self.out.isatty():
            print(f"  {what} ...", end="", file=self.out, flush=True)
        try:
            yield
        except BaseException:
            self.say(("\r" if self.out.isatty() else "") + f"  {what}: failed")
            raise
        done = f"  {what:<58}{time.monotonic() - started:6.1f} s"
        self.say(("\r" if self.out.isatty() else "") + done)
