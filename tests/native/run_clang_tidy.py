# SPDX-License-Identifier: Apache-2.0
"""Run clang-tidy on the C++ of csrc/ that CMake compiles; `make native` first."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATABASE = ROOT / "build/native/compile_commands.json"


def check(folder: str, source: str) -> str:
    """Return what clang-tidy has to say of a file; nothing if it is content."""
    clang_tidy = Path(sysconfig.get_path("scripts"), "clang-tidy")
    command = [str(clang_tidy), "--quiet", f"-p={folder}", source]
    done = subprocess.run(command, capture_output=True, text=True)
    return "" if done.returncode == 0 else f"{done.stdout}{done.stderr}"


def main() -> int:
    if not DATABASE.exists():
        print(f"no {DATABASE.relative_to(ROOT)}; type: make native", file=sys.stderr)
        return 1
    # Files are compiled once per instruction set and sanitizer: the first, plain one will do.
    entries: dict[str, dict[str, str]] = {}
    for entry in json.loads(DATABASE.read_text()):
        source = Path(entry["file"])
        if source.is_relative_to(ROOT / "csrc") and source.suffix == ".cpp":
            entries.setdefault(entry["file"], entry)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        Path(folder, "compile_commands.json").write_text(json.dumps(list(entries.values())))
        findings = [text for text in pool.map(partial(check, folder), sorted(entries)) if text]
    print("".join(findings) or f"clang-tidy: {len(entries)} files, no findings")
    return 1 if findings or not entries else 0


if __name__ == "__main__":
    sys.exit(main())
