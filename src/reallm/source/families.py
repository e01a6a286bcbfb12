"""Model families as data: the role of a matrix in a block, from the last components of its module path."""

from __future__ import annotations

# Last component of the path, or the last two if one is ambiguous; the longer match wins.
# The comment names a family that uses the name.
ROLES: dict[str, str] = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "qkv_proj": "qkv",  # Phi-3
    "gate_up_proj": "gate_up",  # Phi-3, and fused experts
    "out_proj": "o",  # OPT, GPT-Neo, GPT-J
    "self_attn.dense": "o",  # Phi, Persimmon
    "fc1": "fc1",  # OPT, Phi
    "fc2": "fc2",
    "fc_in": "fc1",  # GPT-J, CodeGen
    "fc_out": "fc2",
    "c_attn": "qkv",  # GPT-2, GPT-BigCode
    "attn.c_proj": "o",
    "c_fc": "fc1",
    "mlp.c_proj": "fc2",
    "query_key_value": "qkv",  # NeoX, Falcon, BLOOM
    "attention.dense": "o",  # NeoX
    "self_attention.dense": "o",  # Falcon, BLOOM
    "dense_h_to_4h": "fc1",
    "dense_4h_to_h": "fc2",
    "Wqkv": "qkv",  # MPT, DBRX
    "ffn.up_proj": "fc1",  # MPT has no gate
    "ffn.down_proj": "fc2",
    "w1": "gate",  # InternLM, Mixtral before fusing
    "w3": "up",
    "w2": "down",
}

# A linear of one of these names with one output per expert (or a single output) is a router.
ROUTER_NAMES = frozenset({"gate", "router", "wg", "shared_expert_gate", "expert_gate"})
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

# Modules of fused experts outside the experts interface of transformers: whether slices are stored (in, out).
# Their forward uses the weights one by one, or all at once in a batched product.
FUSED_EXPERTS: dict[str, bool] = {
    "Llama4TextExperts": True,
    "InklingSharedExperts": False,
    "JetMoeParallelExperts": False,
    "LongcatFlashExperts": False,
    "Step3p7Experts": False,
}
READ_HIDDEN, WRITE_HIDDEN = (
    frozenset({"gate", "up", "gate_up", "fc1"}),
    frozenset({"down", "fc2"}),
)  # roles of expert matrices

POSITION_WORDS = ("position", "wpe", "embed_pos")


def matrix_role(path: str) -> str:
    """Return the role of the matrix at a module path; trailing numbers (experts, blocks) are ignored."""
    parts = path.split(".")
    while parts and parts[-1].isdigit():
        parts.pop()
    return ROLES.get(".".join(parts[-2:])) or ROLES.get(parts[-1] if parts else "", "other")


def is_router(path: str, out_features: int, config: object) -> bool:
    """Return whether a linear is a router: by its name, and by having one output per expert."""
    counts = {1} | {n for key in EXPERT_COUNTS if isinstance(n := getattr(config, key, None), int)}
    return path.rpartition(".")[2] in ROUTER_NAMES and out_features in counts
