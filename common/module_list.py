"""A list of modules of one kind."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

from torch import nn

Kind = TypeVar("Kind", bound=nn.Module)


class ModuleList(nn.ModuleList, Generic[Kind]):
    """torch's, which tells a type checker what kind its modules are of."""

    if TYPE_CHECKING:

        def __getitem__(self, index: int) -> Kind: ...  # type: ignore[override]  # no slices

        def __iter__(self) -> Iterator[Kind]: ...
