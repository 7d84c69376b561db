"""One file per family of vision-language models: what is special about its image tokens, positions and parts."""

from medrl.policy.families.qwen2_vl import Qwen2VL

FAMILIES: dict[str, type[Qwen2VL]] = {"qwen2_vl": Qwen2VL}
"""transformers' ``model_type`` -> family."""
