"""One rule for what is in memory whole and what in pieces, where a limit is set; predictions follow it too."""

from __future__ import annotations

from dataclasses import dataclass

_SHARE_OF_EXPERTS = 4  # experts of a layer may take this part of the limit, and are read one by one beyond


@dataclass(frozen=True)
class Pieces:
    """The limit of a stage's memory in bytes; None where there is none.

    With a limit hidden states, gradients and what was coded lie in scratch files. Results do not depend on it.
    """

    limit: int | None = None

    @property
    def scratch(self) -> bool:
        """Whether what is not needed all the time lies in scratch files."""
        return self.limit is not None

    def experts_apart(self, size: int) -> bool:
        """Whether the experts of a layer, `size` bytes as they are computed with, are read one by one."""
        return self.limit is not None and size > self.limit // _SHARE_OF_EXPERTS


WHOLE = Pieces()
