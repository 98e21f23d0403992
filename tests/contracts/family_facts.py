"""Facts that the inventory has to find in each family's tiny checkpoint, written by hand from the families' code."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from mc_cli.parts import Role

ALL, MOE, PLAIN = "all layers", "layers with experts", "layers without"
Where = str | tuple[int, ...]


@dataclass(frozen=True)
class ExpectedFamily:
    """roles: role -> (layers, names below a decoder layer); braces list alternatives."""

    roles: dict[Role, list[tuple[Where, str]]]
    num_layers: int = 2
    moe_layers: tuple[int, ...] = (0, 1)
    top_k: int = 2
    experts: str = "mlp.experts"
    router: str = "mlp.gate"
    up: tuple[int, int] = (96, 32)  # gate_up_proj, upright
    down: tuple[int, int] = (32, 48)
    outside: tuple[tuple[Role, str], ...] = (
        (Role.EMBEDDING, "model.embed_tokens.weight"),
        (Role.HEAD, "lm_head.weight"),
        (Role.OTHER, "model.norm.weight"),
    )
    float32: str = "(?!)"  # tensors that stay in float32 in a bfloat16 checkpoint
    tied_head: bool = False

    def role_by_name(self) -> dict[str, Role]:
        """Every tensor name of the model and its role."""
        found = {name: role for role, name in self.outside}
        for role, entries in self.roles.items():
            for where, names in entries:
                for layer, name in itertools.product(self._layers(where), _alternatives(names)):
                    full = f"model.layers.{layer}.{name}"
                    assert full not in found, f"{full} is listed twice"
                    found[full] = role
        return found

    def _layers(self, where: Where) -> tuple[int, ...]:
        every = tuple(range(self.num_layers))
        if isinstance(where, tuple):
            return where
        return {ALL: every, MOE: self.moe_layers, PLAIN: tuple(sorted({*every} - {*self.moe_layers}))}[where]


def _alternatives(names: str) -> list[str]:
    pieces = [piece.split("|") for piece in re.split(r"[{}]", names)]
    return ["".join(choice) for choice in itertools.product(*pieces)]


NORMS = (ALL, "{input|post_attention}_layernorm.weight")
QK_NORMS = (ALL, "self_attn.{q|k}_norm.weight")
ATTENTION = {Role.ATTENTION: [(ALL, "self_attn.{q|k|v|o}_proj.weight")]}
EXPERTS = {Role.EXPERT: [(MOE, "mlp.experts.{gate_up|down}_proj")]}
ROUTER = {Role.ROUTER: [(MOE, "mlp.gate.weight")]}
DENSE = {Role.DENSE: [(PLAIN, "mlp.{gate|up|down}_proj.weight")]}
SHARED = {Role.SHARED: [(MOE, "mlp.shared_experts.{gate|up|down}_proj.weight")]}
CORRECTED_ROUTER = {Role.ROUTER: [(MOE, "mlp.gate.{weight|e_score_correction_bias}")]}
GATED_SHARED = {
    Role.SHARED: [(MOE, "mlp.shared_expert.{gate|up|down}_proj.weight")],
    Role.ROUTER: [(MOE, "mlp.gate.weight"), (MOE, "mlp.shared_expert_gate.weight")],
}
MLA = {
    Role.ATTENTION: [(ALL, "self_attn.{q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj}.weight")],
    Role.OTHER: [NORMS, (ALL, "self_attn.{q|kv}_a_layernorm.weight")],
}
SMALL = {"up": (48, 32), "down": (32, 24)}
LEADING_DENSE = {"num_layers": 3, "moe_layers": (1, 2), **SMALL}

FAMILIES: dict[str, ExpectedFamily] = {
    "mixtral": ExpectedFamily(ATTENTION | EXPERTS | ROUTER | {Role.OTHER: [NORMS]}),
    "qwen2_moe": ExpectedFamily(
        ATTENTION | EXPERTS | GATED_SHARED | DENSE | {Role.OTHER: [NORMS, (ALL, "self_attn.{q|k|v}_proj.bias")]},
        num_layers=3,
        moe_layers=(0, 2),
        **SMALL,
    ),
    "qwen3_moe": ExpectedFamily(ATTENTION | EXPERTS | ROUTER | {Role.OTHER: [NORMS, QK_NORMS]}, top_k=3, **SMALL),
    "qwen3_next": ExpectedFamily(
        EXPERTS
        | GATED_SHARED
        | {
            Role.ATTENTION: [
                ((0, 2), "linear_attn.{in_proj_qkvz|out_proj}.weight"),
                ((1,), "self_attn.{q|k|v|o}_proj.weight"),
            ],
            Role.OTHER: [
                NORMS,
                ((0, 2), "linear_attn.{dt_bias|A_log|conv1d.weight|in_proj_ba.weight|norm.weight}"),
                ((1,), "self_attn.{q|k}_norm.weight"),
            ],
        },
        num_layers=3,
        moe_layers=(0, 1, 2),
        **SMALL,
    ),
    "deepseek_v2": ExpectedFamily(MLA | EXPERTS | ROUTER | SHARED | DENSE, top_k=3, **LEADING_DENSE),
    "deepseek_v3": ExpectedFamily(
        MLA | EXPERTS | CORRECTED_ROUTER | SHARED | DENSE,
        top_k=3,
        float32="e_score_correction_bias$",
        **LEADING_DENSE,
    ),
    "olmoe": ExpectedFamily(
        ATTENTION | EXPERTS | ROUTER | {Role.OTHER: [NORMS, QK_NORMS]}, top_k=3, up=(48, 48), down=(48, 24)
    ),
    "gpt_oss": ExpectedFamily(
        ATTENTION
        | EXPERTS
        | {
            Role.EXPERT_BIAS: [(ALL, "mlp.experts.{gate_up|down}_proj_bias")],
            Role.ROUTER: [(ALL, "mlp.router.{weight|bias}")],
            Role.OTHER: [NORMS, (ALL, "self_attn.{sinks|q_proj.bias|k_proj.bias|v_proj.bias|o_proj.bias}")],
        },
        router="mlp.router",
    ),
    "phimoe": ExpectedFamily(
        ATTENTION
        | EXPERTS
        | {
            Role.ROUTER: [(ALL, "mlp.router.weight")],
            Role.OTHER: [(ALL, "{input|post_attention}_layernorm.{weight|bias}")],
        },
        router="mlp.router",
        outside=(*ExpectedFamily.outside, (Role.OTHER, "model.norm.bias")),
    ),
    "granitemoe": ExpectedFamily(
        ATTENTION
        | {
            Role.EXPERT: [(ALL, "block_sparse_moe.experts.{gate_up|down}_proj")],
            Role.ROUTER: [(ALL, "block_sparse_moe.router.weight")],
            Role.OTHER: [NORMS],
        },
        experts="block_sparse_moe.experts",
        router="block_sparse_moe.router",
    ),
    "jamba": ExpectedFamily(
        {
            Role.EXPERT: [(MOE, "feed_forward.experts.{gate_up|down}_proj")],
            Role.ROUTER: [(MOE, "feed_forward.router.weight")],
            Role.DENSE: [(PLAIN, "feed_forward.{gate|up|down}_proj.weight")],
            Role.ATTENTION: [
                ((0, 2), "mamba.{in|out}_proj.weight"),
                ((1, 3), "self_attn.{q|k|v|o}_proj.weight"),
            ],
            Role.OTHER: [
                (ALL, "{input|pre_ff}_layernorm.weight"),
                ((0, 2), "mamba.{A_log|D|conv1d.weight|conv1d.bias|x_proj.weight|dt_proj.weight|dt_proj.bias}"),
                ((0, 2), "mamba.{dt|b|c}_layernorm.weight"),
            ],
        },
        num_layers=4,
        moe_layers=(1, 3),
        experts="feed_forward.experts",
        router="feed_forward.router",
        outside=(*ExpectedFamily.outside[:2], (Role.OTHER, "model.final_layernorm.weight")),
    ),
    "glm4_moe": ExpectedFamily(
        ATTENTION | EXPERTS | CORRECTED_ROUTER | SHARED | DENSE | {Role.OTHER: [NORMS, QK_NORMS]},
        float32="e_score_correction_bias$",
        **LEADING_DENSE,
    ),
    "ernie4_5_moe": ExpectedFamily(
        ATTENTION
        | EXPERTS
        | SHARED
        | DENSE
        | {
            Role.ROUTER: [(MOE, "mlp.gate.{weight|moe_statics.e_score_correction_bias}")],
            Role.OTHER: [NORMS],
        },
        outside=(ExpectedFamily.outside[0], ExpectedFamily.outside[2]),
        tied_head=True,
        float32=r"\.gate\.",
        **LEADING_DENSE,
    ),
    "minimax": ExpectedFamily(
        EXPERTS
        | ROUTER
        | {
            Role.ATTENTION: [
                ((0,), "self_attn.{qkv_proj|out_proj|output_gate}.weight"),
                ((1,), "self_attn.{q|k|v|o}_proj.weight"),
            ],
            Role.OTHER: [
                NORMS,
                ((0,), "self_attn.{norm.weight|slope_rate|query_decay|key_decay|diagonal_decay}"),
            ],
        }
    ),
    "hunyuan_v1_moe": ExpectedFamily(
        ATTENTION
        | EXPERTS
        | {
            Role.SHARED: [(ALL, "mlp.shared_mlp.{gate|up|down}_proj.weight")],
            Role.ROUTER: [(ALL, "mlp.gate.wg.weight")],
            Role.OTHER: [NORMS, (ALL, "self_attn.{query|key}_layernorm.weight")],
        },
        float32=r"\.gate\.wg\.",
    ),
}
