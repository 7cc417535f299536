"""The stages of a demo: each is a command, run as a user would run it, and run once.

What is finished is written to stages.json in the demo's folder: the command, its configuration and
the seconds that it took. A stage whose command, configuration and predecessors are the same is
"already there"; any other runs, and its command continues or refuses what it finds.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from core.files import fingerprint, read_json, write_json

ROOT = Path(__file__).resolve().parent.parent


def run_stage(module: str, config: Path, *flags: object) -> None:
    """Run one command as a user would; stop where it fails."""
    command = [sys.executable, "-m", module, "--config", str(config), *map(str, flags)]
    print(f"\n$ python {' '.join(command[1:])}", flush=True)
    code = subprocess.run(command, cwd=ROOT).returncode
    if code:
        sys.exit(code)


class Stages:
    """Runs stages in order.

    out: the demo's folder. configs: the folder of its YAML files.
    """

    def __init__(self, out: Path, configs: Path) -> None:
        self.out, self.configs, self.started = out, configs, time.monotonic()
        self.record_path = out / "stages.json"
        self.record = read_json(self.record_path) if self.record_path.exists() else {}
        self.changed = False  # a stage ran, so those that follow run too

    def command(self, module: str, config: str, out: Path, *flags: object) -> None:
        """Run a command that writes `out`, unless it is already there; stop where it fails."""
        path = self.configs / config
        flags = (*flags, "--out", out)
        settings = fingerprint([module, [str(flag) for flag in flags], (ROOT / path).read_text()])
        self.step(out, settings, lambda: run_stage(module, path, *flags))

    def step(self, out: Path, settings: str, run: Callable[[], object]) -> None:
        """Call `run`, which writes `out`, unless it was written before with the same settings."""
        name = str(out.relative_to(self.out))
        before = self.record.get(name, {"seconds": 0.0, "settings": None})
        finished = before["settings"] == settings and out.exists()
        if finished and not self.changed:
            print(f"\nalready there: {out} ({before['seconds']:.0f} s)", flush=True)
            return
        self.changed = True
        # A stage that was interrupted goes on, so its seconds add up; a new one starts at zero.
        spent = before["seconds"] if before["settings"] is None else 0.0
        started = time.monotonic()
        try:
            run()
        except BaseException:
            self._write(name, spent + time.monotonic() - started, None)
            raise
        self._write(name, spent + time.monotonic() - started, settings)

    def _write(self, name: str, seconds: float, settings: str | None) -> None:
        self.record[name] = {"seconds": seconds, "settings": settings}
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.record_path, self.record)

    def times(self) -> list[tuple[str, str]]:
        """Two rows of a table: the time behind the results, and that of this run."""
        total = sum(stage["seconds"] for stage in self.record.values())
        return [
            ("time of all stages", f"{total:.0f} s"),
            ("time of this run", f"{time.monotonic() - self.started:.0f} s"),
        ]
