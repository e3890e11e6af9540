"""Files are written whole or not at all, and read without running anything of them."""

import pytest
import torch

from engine.errors import UserError
from engine.files import save_atomically


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "models" / "model.tar"
    with pytest.raises(UserError, match="cannot be written.*another folder") as error:
        save_atomically(path, torch.zeros(3))
    assert str(path) in str(error.value)
