"""What a task is made of: a prompt of some turns, and the text that a person wrote in answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """One example. No two parts of a split share a group, so that nothing leaks from training into scores."""

    turns: tuple[str, ...]  # the prompt, oldest first, its last turn the user's; before that they alternate
    reference: str  # what a person wrote
    group: str  # a conversation, a chapter, a module

    @property
    def source(self) -> str:
        """The whole prompt as one text."""
        return "\n".join(self.turns)

    def messages(self, instruction: str) -> list[dict[str, str]]:
        """The prompt as chat messages: the instruction is the system's, the last turn the user's."""
        roles = ("user", "assistant")
        turns = reversed(list(enumerate(reversed(self.turns))))
        return [{"role": "system", "content": instruction}] + [
            {"role": roles[age % 2], "content": text} for age, text in turns
        ]


@dataclass(frozen=True)
class Task:
    """Where the pairs come from, and how a model is asked."""

    name: str
    title: str  # for people
    instruction: str  # the system's message
    source: str  # what the data are, with package, version and licence
    load: Callable[[], list[Pair]]  # UserError with the command that installs what is missing
    prompt_tokens: int  # longer prompts are left out
    new_tokens: int  # references with more are left out, and generated texts are cut there
    faithful: bool = False  # whether content words of the answer ought to stand in the prompt
