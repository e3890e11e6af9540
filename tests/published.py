"""Files as the published code wrote them, and objects that call a function where the standard unpickler reads them."""

import io
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from models import build_head
from persistence.checkpoints import create_backbone

PUBLISHED_MODULE = "methods.transferLearning_clfHeads"


class arcMax(nn.Module):
    """A head as the published code pickles it: the class is not ours, and holds another object."""

    __module__ = PUBLISHED_MODULE

    def __init__(self, **parameters):
        super().__init__()
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))
        self.criterion = nn.CrossEntropyLoss()
        self.s, self.margin = 20, 0.01


class cosMax(arcMax):
    __module__ = PUBLISHED_MODULE


class softMax(arcMax):
    __module__ = PUBLISHED_MODULE


@pytest.fixture(autouse=True)
def published_module(monkeypatch):
    """The module of the published code, from which torch.save takes the names and, in old files, the sources."""
    module = types.ModuleType(PUBLISHED_MODULE)
    module.__file__ = __file__
    for head in (arcMax, cosMax, softMax):
        setattr(module, head.__name__, head)
    monkeypatch.setitem(sys.modules, PUBLISHED_MODULE, module)


def published_content(seed=0, n_class=3, head=arcMax):
    """What a published file of a 16-pixel Conv4 holds."""
    net = create_backbone("Conv4", 16, seed)
    state = OrderedDict()
    for name, value in net.state_dict().items():
        _, block, layer, rest = name.split(".")
        state[f"nConvBlock.{block}.convBlock.{0 if layer == 'conv' else 1}.{rest}"] = value
    generator = torch.Generator().manual_seed(seed)
    head = head(**build_head(head.__name__, net.feature_dim, n_class, 20.0, 0.01, generator).state_dict())
    optimizer = torch.optim.Adam([*net.parameters(), *head.parameters()])
    sum(p.sum() for p in optimizer.param_groups[0]["params"]).backward()
    optimizer.step()
    content = {"epoch": 3, "state": state, "max_acc": np.float64(61.5), "base_clf": head, "optimizer": optimizer}
    return content, net, head


class Calls:
    """Unpickled by the standard unpickler, it calls a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def saved(change=None, new_format=True):
    """A published file of a changed content."""
    content = published_content()[0]
    del content["optimizer"]
    if change:
        change(content)
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=new_format)
    return file.getvalue()
