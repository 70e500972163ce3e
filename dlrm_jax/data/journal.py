"""What an interrupted conversion has finished already: a file of JSON lines, one for each finished step."""

import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """Finished steps and their outcomes.

    A step is recorded once what it made is in place, so a step that is not on record is done again from its start. A
    last line that was cut off is ignored. Records survive the death of the process, but not always that of the machine.

    Args:
        path: The file; read if it exists.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._path = Path(path)
        self._outcomes: dict[str, Any] = {}
        complete = 0
        if self._path.exists():
            for line in self._path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                entry = json.loads(line)
                self._outcomes[entry["step"]] = entry["outcome"]
                complete += len(line)
            os.truncate(self._path, complete)

    def __contains__(self, step: str) -> bool:
        return step in self._outcomes

    def __getitem__(self, step: str) -> Any:
        return self._outcomes[step]

    def record(self, step: str, outcome: Any) -> None:
        """Records a finished step with what later steps need of it, as JSON has it."""
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "outcome": outcome}) + "\n")
        self._outcomes[step] = outcome
