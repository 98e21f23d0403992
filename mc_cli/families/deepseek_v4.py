"""DeepSeek-V4: published without the prefix that transformers puts before its names on the way back."""

from mc_cli.families import FamilyFacts

FAMILY = FamilyFacts(
    "deepseek_v4",
    names=(
        (r"model\.embed_tokens\.", "embed."),
        (r"model\.hc_head\.hc_", "hc_head_"),
        (r"model\.(layers\.\d+\.attn\.)norm\.", r"\1kv_norm."),
        (r"model\.(layers|norm)\.", r"\1."),
    ),
)
