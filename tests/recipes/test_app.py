"""The page of recipes/app.py in headless Chromium."""

import itertools
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from operator import ne
from urllib.request import urlopen

import pytest
from launching import ROOT
from tiny import SCENES
from tiny_run import make_run

from nli_sft.classifier import NLIClassifier
from nli_sft.labels import LABELS

pytest.importorskip("gradio", reason="needs the extra app")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """Chromium's DevTools protocol over a pipe: JSON messages with a zero byte after each."""

    def __init__(self, profile):
        (theirs_in, self._out), (self._in, theirs_out) = os.pipe(), os.pipe()
        flags = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --remote-debugging-pipe"
        command = f"exec {CHROMIUM} {flags} --user-data-dir={profile} 3<&{theirs_in} 4>&{theirs_out}"
        # bash, because dash does not support descriptors of two digits
        self.process = subprocess.Popen(
            ["bash", "-c", command], pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._numbers, self._buffer, self._session = itertools.count(1), b"", None

    def open(self, url):
        target = self.send("Target.createTarget", url=url)["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def send(self, method, **params):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                part = os.read(self._in, 1 << 16)
                assert part, "Chromium has ended"
                self._buffer += part
            answer, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(answer)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def evaluate(self, expression):
        return self.send("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait_for(self, expression, accept=bool, seconds=60):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            value = self.evaluate(expression)
            if accept(value):
                return value
            time.sleep(0.2)
        raise AssertionError(f"timed out waiting for {expression}; the page shows {self.text()!r}")

    def text(self):
        return self.evaluate("document.body.innerText")

    def type(self, selector, text):
        self.evaluate(f"document.querySelector({selector!r}).focus()")
        self.evaluate(f"document.querySelector({selector!r}).select()")
        self.send("Input.insertText", text=text)

    def close(self):
        self._session = None
        self.send("Browser.close")
        self.process.wait(timeout=20)
        os.close(self._in)
        os.close(self._out)


@pytest.fixture(scope="module")
def run(workspace, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("app") / "run", workspace / "base")


@contextmanager
def serving(*arguments, **environment):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "recipes" / "app.py"), "--device", "cpu", "--port", str(port), *arguments]
    process = subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 120
        while True:
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < until, "the page has not started"
            try:
                urlopen(url, timeout=5).close()
                break
            except OSError:
                time.sleep(0.3)
        yield url
    finally:
        process.terminate()
        process.communicate(timeout=30)


READ_BARS = """
["before", "after"].map(id => Object.fromEntries(
  [...document.querySelectorAll(`#${id} [data-testid$="-confidence-set"]`)].map(
    row => row.innerText.split("\\n").map(part => part.trim()).filter(Boolean))))
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_predicts_before_and_after_tuning(run, tmp_path):
    tuned = NLIClassifier.from_pretrained(run, device="cpu")
    base = tuned.before_tuning()
    with serving("--model", str(run)) as url:
        browser = Browser(tmp_path / "profile")
        try:
            browser.open(url)
            browser.wait_for("!!document.querySelector('#hypothesis textarea')")
            browser.wait_for("document.body.innerText.includes('Not corrected')")
            previous = [{}, {}]
            for premise, hypothesis, _ in (SCENES[0], SCENES[5]):
                browser.type("#premise textarea", premise)
                browser.type("#hypothesis textarea", hypothesis)
                browser.evaluate("document.querySelector('#predict').click()")
                bars = browser.wait_for(READ_BARS, accept=lambda bars: all(map(ne, bars, previous)))  # noqa: B023
                for shown, classifier in zip(bars, (base, tuned), strict=True):
                    expected = classifier(premise, hypothesis).probabilities
                    shares = {label: float(shown[label].rstrip("%")) / 100 for label in LABELS}
                    assert shares == pytest.approx(expected, abs=0.0051)
                previous = bars
            browser.type("#hypothesis textarea", "<|im_end|>")
            browser.evaluate("document.querySelector('#predict').click()")
            browser.wait_for("document.body.innerText.includes('a control token of this tokenizer')")
        finally:
            browser.close()


def test_a_missing_model_is_an_error(monkeypatch):
    monkeypatch.delenv("NLI_SFT_MODEL", raising=False)
    monkeypatch.setattr(sys, "argv", ["app.py"])
    with pytest.raises(SystemExit, match="model is missing; give it as --model, or in the environment variable"):
        runpy.run_path(str(ROOT / "recipes" / "app.py"), run_name="__main__")
