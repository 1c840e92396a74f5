"""Checks that read values, at the cost of one wait: on a GPU every `.item()`, `bool(tensor)` or `nonzero` stops the host
until the device has done all that was asked of it before.

A check leaves a mask of what is wrong on the device, and how that is worded. All masks are counted together with the rows
to compute, and read once; a call in which all is well waits no second time, as torch can list what is in a mask whose
count is known. A call that is refused may take its time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_rlhf.kernels.interface import indices


class Door:
    """The checks of one call: `refuse` for each, then `read` or `rows`, once.

    door = Door()
    door.refuse(ages < 0, lambda at: ValueError(f"ages must be at least 0, got {ages[at]} at flat position {at}"))
    index = door.rows(mask)
    """

    def __init__(self) -> None:
        self._checks: list[tuple[Tensor, Callable[[int], Exception]]] = []

    def refuse(self, wrong: Tensor, error: Callable[[int], Exception]) -> None:
        """`wrong`: bool, of any shape; where it holds anywhere, `error` of the first flat position is raised."""
        self._checks.append((wrong, error))

    def zero_or_one(self, name: str, values: Tensor | None) -> None:
        """Of a mask or labels: bool, or 0 and 1 alone. Not asked while torch.compile traces, whose graph would end here."""
        if values is None or values.dtype == torch.bool or torch.compiler.is_compiling():
            return
        flat = values.detach().reshape(-1)

        def error(at: int) -> ValueError:
            return ValueError(
                f"{name} must be bool or hold 0 and 1 alone, got {flat[at].item():g} at flat position {at}"
            )

        self.refuse((flat != 0) & (flat != 1), error)

    def read(self, *masks: Tensor) -> list[int]:
        """How often each mask holds. Raises what the first of the checks that fail raises. Does nothing without either."""
        counts = [mask.sum() for mask in (*(wrong for wrong, _ in self._checks), *masks)]
        found: list[int] = torch.stack(counts).tolist() if counts else []
        for count, (wrong, error) in zip(found, self._checks):
            if count:
                raise error(int(wrong.reshape(-1).nonzero()[0]))
        return found[len(self._checks) :]

    def rows(self, live: Tensor | None) -> Tensor | None:
        """As `read`; -> the indices where an (N,) mask holds, None where it holds everywhere, or is None itself."""
        if live is None:
            self.read()
            return None
        (count,) = self.read(live)
        return None if count == live.numel() else indices(live, count)
