"""Real clients, each in an environment of its own, headless and offline, against this checkout's server: `make test-clients`.

`python tests/clients/run.py [--envs FOLDER] [CLIENT …]` installs what is missing (pip and npm), runs each client, and prints a
line for each: its version, whether it did what it was asked to, and what the server answered. An unexpected 4xx or 5xx fails.
Nobody's home folder is touched: HOME and the working folder are temporary.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE.parent), str(ROOT)]

from servers import serving_demo  # noqa: E402

from workstation.cli.check_clients import CLIENTS as CONFIGS  # noqa: E402
from workstation.cli.check_clients import Facts  # noqa: E402

STATUS = re.compile(r'"(\w+) (\S+) HTTP/1\.1" (\d{3})')
SECONDS = 240
MADE = "made by a tool"
TOO_LONG = "xq " * 120_000  # 240,000 tokens, more than the window, which a client must understand


@dataclass(frozen=True, slots=True)
class Place:
    """Where a client runs: its environment, a temporary HOME and working folder, the server's root and window."""

    env: Path
    home: Path
    work: Path
    url: str
    window: int

    @property
    def facts(self) -> Facts:
        return Facts(self.url, "demo", self.window)

    def run(self, *command: str | Path, stdin: str = "", fails: bool = False, **variables: str) -> str:
        """A command's stdout and stderr. Raises AssertionError when it fails, or does not where it should."""
        keep = {name: os.environ[name] for name in ("PATH", "LANG", "SSL_CERT_FILE") if name in os.environ}
        environment = {**keep, "HOME": str(self.home), **variables}
        done = subprocess.run(list(map(str, command)), cwd=self.work, input=stdin, text=True, timeout=SECONDS, check=False,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
        assert (done.returncode != 0) is fails, f"exit code {done.returncode}: {done.stdout[-1500:]}"
        return done.stdout

    def python(self, script: str) -> str:
        return self.run(self.env / "bin" / "python", HERE / script, self.url, str(self.window))

    def shell(self, name: str) -> dict[str, str]:
        """The variables that `ws check` tells a client's owner to export."""
        text = next(text for where, text in CONFIGS[name].config(self.facts) if where == "shell")
        exports = [line.removeprefix("export ") for line in text.splitlines() if line.startswith("export ")]
        return dict(line.split("=", 1) for line in exports)


def call(tool: str, **extra: str) -> str:
    """What makes the scripted model call a shell tool that writes a file."""
    command = f"echo {MADE} > made.txt; echo wrote it"
    pairs = ", ".join(f'"{key}": "{command if value == "COMMAND" else value}"' for key, value in extra.items())
    return f'CALL {{"name": "{tool}", "arguments": {{{pairs}}}}}'


def check_made(place: Place, said: str) -> None:
    """The tool ran, and its result came back to the model and from there to the person."""
    assert (place.work / "made.txt").read_text().strip() == MADE, said[-1500:]
    assert "The tool said:" in said and "wrote it" in said, said[-1500:]


def codex(place: Place) -> None:
    where = place.home / ".codex"
    where.mkdir()
    (where / "config.toml").write_text(CONFIGS["codex"].config(place.facts)[0][1])
    command = [place.env / "node_modules/.bin/codex", "exec", "--skip-git-repo-check", "--sandbox", "danger-full-access"]
    assert "Hello from the scripted model" in place.run(*command, "Say hello.", CODEX_HOME=str(where))
    check_made(place, place.run(*command, call("exec_command", cmd="COMMAND"), CODEX_HOME=str(where)))
    said = place.run(*command, "-", stdin=TOO_LONG, fails=True, CODEX_HOME=str(where))
    assert "ran out of room in the model's context window" in said, said[-1500:]


def claude(place: Place) -> None:
    command = [place.env / "node_modules/.bin/claude", "-p"]
    variables = place.shell("claude")
    assert "Hello from the scripted model" in place.run(*command, "Say hello.", **variables)
    order = call("Bash", command="COMMAND", description="write a file")
    check_made(place, place.run(*command, "--allowedTools", "Bash", "--", order, **variables))
    said = place.run(*command, stdin=TOO_LONG, fails=True, **variables)
    assert "Prompt is too long" in said, said[-1500:]


def opencode(place: Place) -> None:
    (place.work / "opencode.json").write_text(CONFIGS["opencode"].config(place.facts)[0][1])
    command = [place.env / "node_modules/.bin/opencode", "run"]
    quiet = {"OPENCODE_DISABLE_AUTOUPDATE": "1", "OPENCODE_DISABLE_MODELS_FETCH": "1"}
    assert "Hello from the scripted model" in place.run(*command, "Say hello.", **quiet)
    check_made(place, place.run(*command, call("bash", command="COMMAND", description="write a file"), **quiet))


def aider(place: Place) -> None:
    (place.work / ".aider.model.metadata.json").write_text(CONFIGS["aider"].config(place.facts)[0][1])
    flags = ["--model", "openai/demo", "--edit-format", "whole", "--yes-always", "--no-git", "--no-check-update",
             "--analytics-disable", "--no-show-release-notes", "--no-auto-lint", "--no-show-model-warnings"]
    order = 'SAY "made.txt\\n```\\n' + MADE + '\\n```\\n"'
    said = place.run(place.env / "bin/aider", *flags, "--message", order, "made.txt", **place.shell("aider"))
    assert (place.work / "made.txt").read_text().strip() == MADE, said[-1500:]


@dataclass(frozen=True, slots=True)
class Client:
    """packages: of npm where `npm`, else of pip.  demo: it runs against the demo model itself, not the script.

    refusals: how many 400s its script provokes on purpose.
    """

    packages: tuple[str, ...]
    run: Callable[[Place], object]
    npm: bool = False
    demo: bool = False
    refusals: int = 0


CLIENTS = {
    "openai": Client(("openai",), lambda place: place.python("with_openai.py"), demo=True, refusals=1),
    "anthropic": Client(("anthropic",), lambda place: place.python("with_anthropic.py"), demo=True, refusals=1),
    "langchain": Client(("langchain-openai",), lambda place: place.python("with_langchain.py"), demo=True, refusals=1),
    "litellm": Client(("litellm",), lambda place: place.python("with_litellm.py"), demo=True, refusals=2),
    "aider": Client(("aider-chat",), aider),
    "codex": Client(("@openai/codex",), codex, npm=True),
    "claude": Client(("@anthropic-ai/claude-code",), claude, npm=True, refusals=1),
    "opencode": Client(("opencode-ai",), opencode, npm=True),
}


def install(name: str, client: Client, envs: Path) -> Path:
    """The client's environment, made when it is not there."""
    env = envs / name
    if not (env / ("node_modules" if client.npm else "bin")).exists():
        env.mkdir(parents=True, exist_ok=True)
        if client.npm:
            subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--prefix", str(env), *client.packages], check=True)
        else:
            subprocess.run([sys.executable, "-m", "venv", str(env)], check=True)
            subprocess.run([str(env / "bin/python"), "-m", "pip", "install", "-q", *client.packages], check=True)
    return env


def version(client: Client, env: Path) -> str:
    if client.npm:
        found = (env / "node_modules" / client.packages[0] / "package.json").read_text()
        return re.findall(r'"version": *"([^"]+)"', found)[0]
    code = f"from importlib.metadata import version; print(version('{client.packages[0]}'))"
    return subprocess.run([str(env / "bin/python"), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@contextmanager
def scripted(log: Path) -> Iterator[str]:
    """The scripted model's server; gives its URL."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, str(HERE / "scripted.py"), str(port)], stdout=file, stderr=file,
                                   env=environment)
    try:
        began = time.monotonic()
        while "is ready" not in log.read_text():
            assert process.poll() is None and time.monotonic() - began < 60, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def attempt(client: Client, env: Path, url: str, window: int, log: Path) -> tuple[bool, str]:
    """Run a client; whether all went well, and what the server answered."""
    before = log.stat().st_size
    with tempfile.TemporaryDirectory(prefix="ws-client-") as folder:
        home, work = Path(folder) / "home", Path(folder) / "work"
        home.mkdir()
        work.mkdir()
        try:
            client.run(Place(env, home, work, url, window))
            failure = ""
        except (AssertionError, subprocess.TimeoutExpired, OSError) as error:
            failure = f"\n    {error}"
    time.sleep(0.3)  # the last line of the log
    with log.open("rb") as file:
        file.seek(before)
        found = Counter(STATUS.findall(file.read().decode(errors="replace")))
    bad = {key: count for key, count in found.items() if int(key[2]) >= 400}
    if sum(bad.values()) != client.refusals or any(int(status) != 400 for _, _, status in bad):
        failure += f"\n    unexpected answers: {bad}"
    good = ", ".join(f"{count} × {method} {path.partition('?')[0]}" for (method, path, status), count in found.items()
                     if int(status) < 400)
    return not failure, (good + (f", {client.refusals} refused as provoked" if client.refusals else "")) + failure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=f"of {', '.join(CLIENTS)}; all unless given")
    parser.add_argument("--envs", type=Path, default=ROOT / ".clients", help="where environments are kept")
    given = parser.parse_args()
    names = given.clients or list(CLIENTS)
    environments = {name: install(name, CLIENTS[name], given.envs.resolve()) for name in names}
    failed = False
    with tempfile.TemporaryDirectory(prefix="ws-logs-") as logs:
        script_log, demo_log = Path(logs) / "scripted", Path(logs) / "demo"
        with scripted(script_log) as url, serving_demo(demo_log, "--access-log") as (_, demo):
            for name in names:
                client = CLIENTS[name]
                where = (demo.base_url, 8192, demo_log) if client.demo else (url, 200_000, script_log)
                good, says = attempt(client, environments[name], *where)
                failed |= not good
                print(f"{'ok' if good else 'FAILED':6}  {name:10} {version(client, environments[name]):10} {says}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
