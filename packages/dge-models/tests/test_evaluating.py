from __future__ import annotations

import pytest
from torch import nn

from dge_models.evaluating import evaluating


def test_every_module_gets_its_own_mode_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
