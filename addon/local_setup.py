"""An environment of its own for this computer's server: made, taken up again after an interruption, and removed.

The work is done by this same file, run as a script in a process of its own: it goes on when Blender is closed, and tells where
it is by a small file beside the environment. Nothing here touches bpy.

    python local_setup.py install HOME --python PYTHON --package WHEEL [--no-index] --path FOLDER
    python local_setup.py remove HOME --path FOLDER
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ENVIRONMENT, STATUS, LOG, LOCK = "environment", "setup.json", "setup.log", "setup.lock"
STEPS = ("Making the environment", "Installing the server", "Trying it out")
NO_NETWORK = ("1", "true", "yes", "on")
WHEELS = "server_wheel"  # folder of the extension with the server itself, as tools/build_extension.py knows it
CHECK = "import track4d.pipeline, track4d.service, track4d_protocol; print(track4d_protocol.__version__)"
_FOREIGN = ("PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP", "VIRTUAL_ENV", "PIP_TARGET", "PIP_PREFIX", "PIP_USER")


@dataclass(frozen=True)
class Status:
    """Where the set-up of a home stands.

    Attributes:
        state: "absent", "installing", "removing", "interrupted", "failed" or "ready".
        text: what is being done, or what went wrong, as a sentence for the user.
        step: of `total` steps.
        fraction: of the file that is being downloaded, 0..1.
        version: of the server that was installed.
    """

    state: str = "absent"
    text: str = ""
    step: int = 0
    total: int = len(STEPS)
    fraction: float = 0.0
    version: str = ""

    @property
    def busy(self) -> bool:
        return self.state in ("installing", "removing")


def environment_python(home: Path) -> Path:
    """The interpreter of the environment, whether it exists or not."""
    place = ("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")
    return home.joinpath(ENVIRONMENT, *place)


def read_status(home: Path) -> Status:
    """Where the set-up stands, also of one that an earlier Blender began."""
    from track4d_protocol.filelock import holder

    try:
        status = Status(**json.loads((home / STATUS).read_text("utf-8")))
    except FileNotFoundError:
        return Status()
    except (OSError, ValueError, TypeError) as error:
        return Status("failed", f"'{home / STATUS}' can't be read: {error}.")
    if status.busy and holder(home / LOCK) is None and not _starting(home):
        return Status("interrupted", "The set-up was interrupted.", status.step)
    if status.state == "ready" and not environment_python(home).exists():
        return Status("interrupted", "The environment is not there any more.")
    return status


def bundled_server() -> Path | None:
    """The server's wheel that came with the extension; None where the add-on runs from its source."""
    return next((Path(__file__).parent / WHEELS).glob("track4d-*.whl"), None)


def start(home: Path, action: str, python: str = "", package: str = "", online: bool = True) -> None:
    """Begins to "install" or to "remove"; returns at once.

    Args:
        home: the server's folder; the environment is made in it.
        python: interpreter to make the environment with; Blender's own when empty.
        package: what pip shall install, such as a wheel or a folder with the source; the bundled server when empty.
        online: whether Blender allows traffic beyond this computer; without it, pip gets no index.

    Raises:
        TransportError: `offline`, `no_server_wheel`, `home_unwritable`, or `setup_running` when one is at work.
    """
    import track4d_protocol
    from track4d_protocol.errors import TransportError

    local = os.environ.get("PIP_NO_INDEX", "").lower() in NO_NETWORK
    if action == "install" and not online and not local:
        raise TransportError(
            "offline",
            "What the server needs must be downloaded, and Blender's online access is switched off.",
            "Allow online access in Preferences > System, or set PIP_NO_INDEX=1 and PIP_FIND_LINKS to a folder of wheels.",
        )
    if read_status(home).busy:
        raise TransportError("setup_running", f"A set-up in '{home}' is at work already.", "Wait until it is done, or stop it.")
    package = package or str(bundled_server() or "")
    if action == "install" and not package:
        raise TransportError(
            "no_server_wheel",
            "This copy of the extension carries no server.",
            "Install the extension from its zip, or name the source's folder as Package in the preferences.",
        )
    path = Path(track4d_protocol.__file__).parents[1]
    line = [sys.executable, str(Path(__file__).resolve()), action, str(home), "--path", str(path)]
    if action == "install":
        line += ["--python", python or sys.executable, "--package", package, *([] if online else ["--no-index"])]
    flags = sum(getattr(subprocess, name, 0) for name in ("CREATE_NO_WINDOW", "CREATE_NEW_PROCESS_GROUP"))  # Windows
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write_status(home, Status("installing" if action == "install" else "removing", "Starting"))
        with open(home / LOG, "ab") as log:
            _processes[home] = subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_clean_environment(),
                start_new_session=os.name == "posix",
                creationflags=flags,
            )
    except OSError as error:
        message = f"The folder '{home}' can't be written: {error.strerror}."
        raise TransportError("home_unwritable", message, "Choose another folder, or free disk space.") from error


def stop(home: Path) -> None:
    """Ends a set-up that is at work; what it has made so far stays, and the next one begins with it."""
    from track4d_protocol.filelock import holder

    process = _processes.pop(home, None)
    process_id = holder(home / LOCK) or (process.pid if process is not None and process.poll() is None else None)
    if process_id:
        if os.name == "nt":
            subprocess.run(["taskkill", "/T", "/F", "/PID", str(process_id)], capture_output=True)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process_id, signal.SIGTERM)  # with pip, which it started
    if process is not None:
        process.wait()


_processes: dict[Path, subprocess.Popen[bytes]] = {}  # that this Blender started


def _starting(home: Path) -> bool:
    """Whether a process that this Blender started hasn't taken its lock yet."""
    process = _processes.get(home)
    return process is not None and process.poll() is None


def _clean_environment() -> dict[str, str]:
    """What the user's programs get, with proxies and pip's settings, without what concerns Blender's own Python."""
    kept = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
    return kept | {"PYTHONUNBUFFERED": "1", "PYTHONNOUSERSITE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}


def _write_status(home: Path, status: Status) -> None:
    temporary = home / f"{STATUS}.tmp"
    temporary.write_text(json.dumps(asdict(status)), "utf-8")
    os.replace(temporary, home / STATUS)


# The script


def install(home: Path, python: str, package: str, no_index: bool) -> str:
    """Makes the environment from nothing, installs the server and tries it; the version that was installed.

    Whatever an interrupted set-up left is thrown away first. What it had downloaded is in pip's cache.

    Raises:
        SystemExit: with a sentence, when a step fails.
    """
    inside = str(environment_python(home))
    _tell(home, 1, STEPS[0])
    _run([python, "-m", "venv", "--clear", str(home / ENVIRONMENT)], "The environment can't be made")
    _tell(home, 2, STEPS[1])
    options = ["--progress-bar", "raw" if _pip_version(inside) >= (24, 1) else "off", *(["--no-index"] if no_index else [])]
    doing, said = STEPS[1], 0.0
    for line in _lines([inside, "-m", "pip", "install", *options, package], "The server can't be installed"):
        text, fraction = what_pip_does(line)
        if text or (fraction is not None and time.monotonic() - said > 0.5):
            doing = text or doing
            said = time.monotonic()
            _tell(home, 2, doing, fraction or 0.0)
    _tell(home, 3, STEPS[2])
    return _run([inside, "-c", CHECK], "The server was installed, but doesn't work")[-1].strip()


def remove(home: Path) -> None:
    """Stops the server that runs from the environment and deletes what `install` made; jobs and results stay."""
    from track4d_protocol.local import stop_server

    stop_server(home)
    doomed = home / f"{ENVIRONMENT}.removed"
    if (home / ENVIRONMENT).exists() and not doomed.exists():
        os.replace(home / ENVIRONMENT, doomed)
    for folder in (doomed, home / ENVIRONMENT):
        if folder.exists():
            shutil.rmtree(folder)
    (home / STATUS).unlink(missing_ok=True)


def what_pip_does(line: str) -> tuple[str, float | None]:
    """A line of pip's output as (text for the user or "", share of a download or None)."""
    if match := re.match(r"Progress (\d+) of (\d+)", line):
        return "", int(match[1]) / max(1, int(match[2]))
    if match := re.match(r"\s*(?:Downloading|Using cached) (\S+?)(?:\.metadata)? (\(.+\))", line):
        return f"Downloading {Path(match[1]).name.split('-')[0]} {match[2]}", None
    if match := re.match(r"Collecting ([\w.-]+)", line):
        return f"Looking for {match[1]}", None
    if match := re.match(r"Installing collected packages: (.+)", line):
        return f"Unpacking {match[1].count(',') + 1} packages", None
    return "", None


def _tell(home: Path, step: int, text: str, fraction: float = 0.0) -> None:
    _write_status(home, Status("installing", text, step, fraction=round(fraction, 3)))


def _pip_version(python: str) -> tuple[int, ...]:
    words = _run([python, "-m", "pip", "--version"], "pip doesn't work in the new environment")[-1].split()
    return tuple(int(part) for part in words[1].split(".")[:2])


def _run(line: list[str], complaint: str) -> list[str]:
    return list(_lines(line, complaint))


def _lines(line: list[str], complaint: str) -> Iterator[str]:
    """What a program prints, which also goes to the log; ends this one when the program fails."""
    print("$", *line, flush=True)  # noqa: T201 - the log
    last = ""
    try:
        with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as process:
            assert process.stdout is not None
            for text in process.stdout:
                if not text.startswith("Progress "):
                    print(text, end="", flush=True)  # noqa: T201 - the log
                    if text.strip() and not last.startswith("ERROR"):
                        last = text.strip()
                yield text.rstrip("\n")
    except OSError as error:
        raise SystemExit(f"{complaint}: '{line[0]}' can't be run: {error.strerror}.") from error
    if process.returncode:
        raise SystemExit(f"{complaint}: {last.removeprefix('ERROR: ')[:500] or f'code {process.returncode}'}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=("install", "remove"))
    parser.add_argument("home", type=Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--package", default="")
    parser.add_argument("--no-index", action="store_true")
    parser.add_argument("--path", required=True, help="folder of the package track4d_protocol")
    chosen = parser.parse_args()
    sys.path.append(chosen.path)
    from track4d_protocol.filelock import FileLock

    lock = FileLock(chosen.home / LOCK)
    if not lock.acquire():
        raise SystemExit("Another set-up is at work.")
    with lock:
        lock.note(str(os.getpid()))
        try:
            if chosen.action == "install":
                version = install(chosen.home, chosen.python, chosen.package, chosen.no_index)
                _write_status(chosen.home, Status("ready", "The server is installed.", len(STEPS), version=version))
            else:
                remove(chosen.home)
        except SystemExit as error:
            _write_status(chosen.home, Status("failed", str(error)))
            raise
        except Exception as error:
            _write_status(chosen.home, Status("failed", f"The set-up failed: {error}"))
            raise


if __name__ == "__main__":
    main()
