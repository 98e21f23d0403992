"""Whether our experts implementation is really what computes, whichever file a model's class is in.

In processes of their own: what transformers finds out of one class is kept, and inherited by classes of other models.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mc_cli.errors import FamilyError
from mc_cli.models.experts import IMPLEMENTATION, find_experts
from mc_cli.models.inventory import take_inventory
from mc_cli.models.own_experts import run_our_experts
from mc_cli.packed.packable import require_packable
from tests import tiny_models
from tests.conftest import TinyModel
from tests.stage_process import Said, run_script

_FRESH = """
import sys
from pathlib import Path
import torch
from mc_cli.models import experts
from mc_cli.models.checkpoint import Checkpoint, read_config
from mc_cli.models.inventory import take_inventory
from mc_cli.models.own_experts import run_our_experts
from mc_cli.packed.packable import require_packable

folder = Path(sys.argv[1])
config = read_config(folder, trust_remote_code=True)
checkpoint = Checkpoint(folder, config, dtype=torch.float32, device=torch.device("cpu"))
inventory = take_inventory(checkpoint.model, stored_dtypes=checkpoint.stored_dtypes)
checkpoint.model.set_experts_implementation(experts.IMPLEMENTATION)
print("by transformers alone:", checkpoint.model.config._experts_implementation)
run_our_experts(checkpoint.model)
require_packable(checkpoint.model, inventory)
for part in (-1, 0, 1):
    checkpoint.load(part)
seen = []
for _, module in experts.find_experts(checkpoint.model):
    module._mc_observer = lambda module, call: seen.append(call.expert)
checkpoint.model(torch.arange(3, 40)[None])
print("experts seen:", len(set(seen)))
"""


def fresh(folder: Path, tmp_path: Path) -> Said:
    return run_script(_FRESH, tmp_path, ["fresh", str(folder)])


def test_a_class_of_the_models_own_runs_our_experts(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_models.with_own_code(tiny_model("mixtral", torch.float32), tmp_path / "own")
    done = fresh(folder, tmp_path)
    assert done.status == 0, done.err
    assert f"by transformers alone: {IMPLEMENTATION}" not in done.out  # else this test shows nothing
    assert "experts seen: 8" in done.out


def test_experts_that_compute_by_themselves_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A class that looks as if it used the interface, and has a forward of its own."""
    folder = tiny_models.with_own_code(tiny_model("mixtral", torch.float32), tmp_path / "own")
    with (folder / "modeling_own.py").open("a") as code:
        code.write(
            "\n    def __init__(self, config):\n        super().__init__(config)\n"
            "        for layer in self.model.layers:\n"
            "            experts = layer.mlp.experts\n"
            "            experts.forward = lambda hidden, index, weights: hidden * 2\n"
        )
    done = fresh(folder, tmp_path)
    assert done.status == 1 and "FamilyError" in done.err
    assert "2 experts modules do not compute by the implementation" in done.err


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v3", "nemotron_h"])
def test_native_models_run_ours_and_can_be_packed(model_type: str, tiny_model: TinyModel) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_models.tiny_config(model_type))
    inventory = take_inventory(model, stored_dtypes={})
    run_our_experts(model)
    require_packable(model, inventory)
    assert all(module.config._experts_implementation == IMPLEMENTATION for _, module in find_experts(model))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any("_mc_packed" in module.__dict__ for module in model.modules())


def test_experts_of_other_shapes_are_not_packable() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_models.tiny_config("mixtral"))
        other = AutoModelForCausalLM.from_config(tiny_models.tiny_config("mixtral", num_local_experts=4))
    with pytest.raises(FamilyError, match="cannot be packed"):
        require_packable(model, take_inventory(other, stored_dtypes={}))
