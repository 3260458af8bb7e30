"""The tensors of a checkpoint folder on this machine, read one at a time.

The index is not believed: what each file's header holds is what there is. Imports torch and safetensors when opened.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgen.errors import InputError

if TYPE_CHECKING:
    import torch


class TensorFolder:
    """Names and tensors. Raises InputError for a broken file, and for a name that isn't there."""

    def __init__(self, folder: Path, files: dict[str, Any], *, device: str) -> None:
        self._folder, self._files, self._device = folder, files, device

    @property
    def names(self) -> list[str]:
        return sorted(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str) -> "torch.Tensor":
        """Whole, on the folder's device, in its own type."""
        try:
            tensor = self._files[name].get_tensor(name)
        except KeyError:
            raise InputError(f"{self._folder}: has no tensor {name}; copy the checkpoint there again") from None
        return tensor.to(self._device)


@contextmanager
def open_folder(folder: Path, *, device: str = "cpu") -> Iterator[TensorFolder]:
    from safetensors import SafetensorError, safe_open

    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise InputError(f"{folder}: has no safetensors files; give the folder of a checkpoint")
    files: dict[str, Any] = {}
    with ExitStack() as stack:
        for path in paths:
            try:
                file = stack.enter_context(safe_open(path, "pt"))
            except (SafetensorError, OSError) as error:
                reason = str(error).splitlines()[0]
                raise InputError(f"{path}: can't be read ({reason}); copy the checkpoint there again") from error
            files.update(dict.fromkeys(file.keys(), file))
        yield TensorFolder(folder, files, device=device)
