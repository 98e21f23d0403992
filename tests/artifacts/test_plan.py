"""plan.yaml: the round trip, hand edits that are taken and hand edits that are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from mc_cli.artifacts.plan import BlockBits, Plan
from mc_cli.errors import PlanError
from mc_cli.parts import ExpertBlock, ModelInventory, Projection, Role, TensorPart

PROJECTIONS = (Projection("gate_up_proj", 64, 32), Projection("down_proj", 32, 32))


def plan_of(**changes) -> Plan:
    content = {
        "model_type": "mixtral",
        "method": "pmq",
        "expert_bits": {1: (1, 2, {"gate_up_proj": 2, "down_proj": 3}, 0), 3: (16, 8, 1, 1)},
        "role_bits": {Role.ATTENTION: 4, Role.HEAD: 16, Role.SHARED: 4},
        "group_size_limit": 64,
        "budget": {"kind": "code_bits", "asked": 2.5, "reached": 2.4999999999999996, "expert_bytes": 10**13},
        "objective": {"value": 1e-7, "unit": "nats per token"},
        "solver": {"name": "HiGHS", "status": "optimal", "gap": 1.23e-05},
        "warnings": ("a: colon, and # hash", "two"),
    }
    return Plan(**(content | changes))


def inventory_of(model_type: str = "mixtral", layers=(1, 3), experts: int = 4) -> ModelInventory:
    blocks = tuple(
        ExpertBlock(
            layer, f"model.layers.{layer}.mlp.experts", f"model.layers.{layer}.mlp.gate", experts, 2, PROJECTIONS
        )
        for layer in layers
    )
    return ModelInventory(model_type, num_layers=4, expert_blocks=blocks, tensors=(), tied_head=False)


def read_text(tmp_path: Path, text: str) -> Plan:
    (tmp_path / "plan.yaml").write_text(text, encoding="utf-8")
    return Plan.read(tmp_path / "plan.yaml")


def edited(tmp_path: Path, **changes) -> Plan:
    plan_of().write(tmp_path / "plan.yaml")
    content = yaml.safe_load((tmp_path / "plan.yaml").read_text()) | changes
    return read_text(tmp_path, yaml.safe_dump({name: value for name, value in content.items() if value != "REMOVED"}))


def test_what_is_written_is_read_back(tmp_path: Path):
    plan_of().write(tmp_path / "plan.yaml")
    again = Plan.read(tmp_path / "plan.yaml")
    assert again == plan_of()
    again.write(tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_bytes() == (tmp_path / "plan.yaml").read_bytes()


def test_the_file_reads_as_one_line_per_layer(tmp_path: Path):
    plan_of(expert_bits={0: (1, 2, 3), 1: (2, 2, 2)}).write(tmp_path / "plan.yaml")
    text = (tmp_path / "plan.yaml").read_text()
    assert "  0: [1, 2, 3]\n  1: [2, 2, 2]\n" in text
    assert "role_bits: {attention: 4, head: 16, shared: 4}\n" in text


def test_blocks_of_reads_the_short_and_the_long_form():
    plan = plan_of()

    def bits_of(layer: int, expert: int) -> list[float]:
        (block,) = plan.blocks_of(layer, expert, 32)
        assert block.channels == 32
        return [block.bits_of(name) for name in ("gate_up_proj", "down_proj")]

    assert bits_of(1, 2) == [2, 3]
    assert bits_of(1, 1) == [2, 2]
    assert bits_of(3, 0) == [16, 16]
    assert plan.blocks_of(1, 3, 32) == ()


def test_hand_edits_are_taken(tmp_path: Path):
    plan = edited(tmp_path, expert_bits={1: [4, 4, 0, {"down_proj": 8, "gate_up_proj": 1}]}, role_bits={"router": 8})
    assert plan.expert_bits == {1: (4, 4, 0, {"down_proj": 8, "gate_up_proj": 1})}
    assert plan.role_bits == {Role.ROUTER: 8}


def test_what_allocate_adds_may_be_left_out(tmp_path: Path):
    text = "schema: 1\nmodel_type: mixtral\nmethod: by hand\nrole_bits: {}\nexpert_bits:\n  0: [2, 2]\n"
    plan = read_text(tmp_path, text)
    assert plan == Plan("mixtral", "by hand", {0: (2, 2)}, {})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schema": 3}, ["has schema 3; this version reads schemas 1 and 2. Run allocate again."]),
        ({"method": "REMOVED", "expert_bits": "REMOVED"}, ["method is missing", "expert_bits is missing"]),
        ({"expert_bit": {}}, ["expert_bit is unknown"]),
        ({"expert_bits": [[1, 2]]}, ["expert_bits is [[1, 2]], not a dict"]),
        ({"group_size_limit": 12.5}, ["group_size_limit is 12.5, not a int"]),
        ({"group_size_limit": True}, ["group_size_limit is True, not a int"]),
        ({"group_size_limit": 0}, ["group_size_limit is 0, not positive"]),
        ({"role_bits": {"atention": 4}}, ["role_bits: 'atention' is not a role; the roles are expert, ", "attention"]),
        ({"role_bits": {"attention": 9, "head": "16"}}, ["role_bits: attention has width 9", "head has width '16'"]),
        ({"expert_bits": {1: 2}}, ["layer 1: 2 is not a list of widths"]),
        ({"expert_bits": {"one": [2], -1: [2]}}, ["'one' is not a layer number", "-1 is not a layer number"]),
        (
            {"expert_bits": {1: [1, 9, 2.25, 1.5], 2: [True, None, {"up_proj": -1}]}},
            [
                "layer 1 expert 1 has width 9\n",
                "layer 1 expert 2 has width 2.25\n",
                "layer 2 expert 0 has width True\n",
                "layer 2 expert 1 has width None\n",
                "layer 2 expert 2 up_proj has width -1\n",
                "A width is 0 (dropped), 1 to 8, a half step from 1.5 to 4.5, the stored bits of an IQ type of GGUF, "
                "or 16 (kept). Run allocate again, or correct the file.",
            ],
        ),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_hand_edits_that_are_no_plan_are_all_named(tmp_path: Path, changes, expected):
    with pytest.raises(PlanError) as caught:
        edited(tmp_path, **changes)
    assert str(caught.value).startswith(str(tmp_path / "plan.yaml"))
    for text in expected:
        assert text in str(caught.value)
    assert ("A width is" in str(caught.value)) == ("has width" in str(caught.value))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "should hold a mapping, but holds a NoneType"),
        ("- 1\n- 2\n", "should hold a mapping, but holds a list"),
        ("schema: 1\nexpert_bits:\n  0: [1, 2\n", "is not valid YAML"),
        ("schema: 1\nmethod: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
        ("schema: 1\nexpert_bits:\n  0: [1, 2]\n  1: [1, 2]\n  0: [2, 2]\n", "given twice: 0"),
        ("schema: 1\n? [1]\n: 2\n", "is not valid YAML"),
    ],
)
def test_files_that_are_no_mapping_are_named(tmp_path: Path, text, expected):
    with pytest.raises(PlanError) as caught:
        read_text(tmp_path, text)
    assert expected in str(caught.value)
    assert "Run allocate again, or correct the file." in str(caught.value)


def test_a_plan_of_the_model_passes():
    plan_of().check_against(inventory_of())


def test_a_plan_of_another_model_names_every_difference():
    entry = {"gate_proj": 2, "down_proj": 2}
    plan = plan_of(expert_bits={0: (1,) * 4, 1: (1, 2, 3), 2: (1, 1, 1, entry)})
    with pytest.raises(PlanError) as caught:
        plan.check_against(inventory_of("qwen3_moe", layers=(1, 2, 3)))
    assert str(caught.value) == (
        "The plan does not describe this model, 5 differences:\n"
        "  model_type: plan mixtral, model qwen3_moe\n"
        "  layer 0: the plan has experts, the model has none there\n"
        "  layer 1: plan has 3 experts, model 4\n"
        "  layer 2 expert 3: plan has projections ['down_proj', 'gate_proj'], model ['down_proj', 'gate_up_proj']\n"
        "  layer 3: the model has 4 experts, the plan none\n"
        "Run allocate for this model, or correct plan.yaml."
    )


def test_many_differences_are_counted():
    plan = plan_of(expert_bits=dict.fromkeys(range(40), (1,)))
    with pytest.raises(PlanError) as caught:
        plan.check_against(inventory_of(layers=range(40)))
    assert "40 differences" in str(caught.value)
    assert "... and 20 more" in str(caught.value)


def test_blocks_and_slots_are_written_and_read_back(tmp_path: Path):
    row = (2, (BlockBits(24, {"gate_up_proj": 1.5, "down_proj": 2}), BlockBits(8, 0)), 0, 0)
    plan = plan_of(expert_bits={1: row, 3: (1, 1, 1, 1)}, slots={1: (0, 1, 0, 3)})
    plan.write(tmp_path / "plan.yaml")
    again = Plan.read(tmp_path / "plan.yaml")
    assert again == plan
    assert again.slots_of(1) == (0, 1, 0, None) and again.slots_of(3) == (0, 1, 2, 3)
    assert again.dropped(1) == (3,)
    assert [block.cut for block in again.blocks_of(1, 1, 32)] == [False, True]
    again.check_against(inventory_of())
    text = (tmp_path / "plan.yaml").read_text()
    assert "slots:\n  1: [0, 1, 0, 3]\n" in text and "schema: 2\n" in text


def test_a_plan_of_schema_1_is_read(tmp_path: Path):
    assert edited(tmp_path, schema=1) == plan_of()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"expert_bits": {1: [[]]}}, "layer 1 expert 0 has 0 blocks"),
        ({"expert_bits": {1: [[{"channels": 0, "bits": 2}]]}}, "layer 1 expert 0 block 0 has 0 channels"),
        ({"expert_bits": {1: [[{"channels": True, "bits": 2}]]}}, "block 0 has True channels"),
        ({"expert_bits": {1: [[{"channels": 8}]]}}, "block 0 is {'channels': 8}, not a mapping of channels and bits"),
        ({"expert_bits": {1: [[{"channels": 8, "bits": 9}]]}}, "layer 1 expert 0 block 0 has width 9"),
        (
            {"expert_bits": {1: [[{"channels": 8, "bits": {"up_proj": 0, "down_proj": 2}}]]}},
            "channels are cut from all projections or none",
        ),
        ({"expert_bits": {1: [[[2]]]}}, "block 0 is [2], not a mapping"),
        ({"slots": {2: [0]}}, "slots of layer 2: expert_bits has no such layer"),
        ({"slots": {1: [0, 1]}}, "slots of layer 1: [0, 1], not one expert for each of 4 slots"),
        ({"slots": {1: [0, 1, 2, 9]}}, "[9], not experts of 0 to 3"),
        ({"slots": {1: [0, 1, 2, True]}}, "[True], not experts"),
        ({"slots": {1: [0, 1, 3, 3]}}, "slot 2 runs expert 3, which is dropped"),
        ({"slots": {1: [1, 1, 2, 0]}}, "slot 3 runs expert 0, whose own slot runs 1"),
        ({"slots": {1: [0, 0, 2, 3]}}, "layer 1 expert 1 has 2 bits, but no slot runs it: its width is 0"),
        ({"slots": [1]}, "slots is [1], not a dict"),
        ({"schema": 1, "slots": {1: [0, 1, 2, 3]}}, "slots are of schema 2"),
        ({"schema": 1, "expert_bits": {1: [[{"channels": 8, "bits": 2}]]}}, "blocks are of schema 2"),
    ],
)
def test_blocks_and_slots_that_cannot_be_are_named(tmp_path: Path, changes, expected):
    with pytest.raises(PlanError) as caught:
        edited(tmp_path, **changes)
    assert expected in str(caught.value)


def test_a_long_value_of_a_plan_is_told_by_its_beginning():
    with pytest.raises(PlanError, match="model_type: plan xxx") as caught:
        plan_of(model_type="x" * 100_000).check_against(inventory_of())
    assert len(str(caught.value)) < 1000


def test_blocks_and_slots_that_do_not_fit_the_model_are_named():
    divided = (BlockBits(16, 2), BlockBits(8, 0))
    plan = plan_of(expert_bits={1: (2, divided, (BlockBits(32, {"up": 2}),), 0), 3: (1,) * 4}, slots={1: (0, 1, 2, 0)})
    inventory = inventory_of()
    with pytest.raises(PlanError) as caught:
        plan.check_against(inventory)
    assert "layer 1 expert 1: the blocks have 24 channels, the expert 32" in str(caught.value)
    assert "layer 1 expert 2: plan has projections ['up'], model" in str(caught.value)
    bias = TensorPart("model.layers.1.mlp.experts.down_proj_bias", Role.EXPERT_BIAS, 1, (4, 32), "bfloat16", 256)
    with pytest.raises(PlanError, match=r"experts 1, 2 are in blocks of channels[\s\S]*slots 3 run experts of other"):
        plan.check_against(dataclasses.replace(inventory, tensors=(bias,)))
    grouped = tuple(dataclasses.replace(block, router_groups=2, groups_used=2) for block in inventory.expert_blocks)
    with pytest.raises(PlanError, match="slots 3 run experts of other slots, but its router chooses groups"):
        plan.check_against(dataclasses.replace(inventory, expert_blocks=grouped))
