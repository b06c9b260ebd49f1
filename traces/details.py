"""Tables that a result may hold beside requests and steps: what an engine's leases had to do, and what a model says of them.

They exist so that a latency model can be held against an engine step by step; nobody needs them to read a result.
"""

DETAIL_COLUMNS = {
    "leases": ("server", "start_ns", "first_ns", "lora_tokens", "lora_adapters", "rank", "lora_ranks", "switch_rank",
               "outputs", "loads", "loading", "largest"),
    "chunks": ("server", "start_ns", "tokens", "context"),
    "predicted": ("server", "start_ns", "free_ns", "known", "boundary_ns", "model_first_ns", "model_rest_ns",
                  "model_linear_ns", "model_attention_ns", "model_vision_ns", "model_lora_ns", "model_host_ns",
                  "model_switch_ns"),
}  # fmt: skip
"""What an engine adds to its steps, so that a latency model can be held against each: one row per lease, and one per chunk
of a prompt, named by the lease's server and start; and what a simulator's tables say of an engine's leases; int64.

first_ns: until the end of the lease's first step | rows, adapters, largest rank and sum of ranks of its LoRA branches |
switch_rank: of the adapter folded in or out, 0 for none | outputs: rows of the LM head | loads: copies of adapters begun
with it | loading: 1 while a copy was under way | largest: rows of the adapter that has most, in steps with prompts |
free_ns: when the GPU was free before it, known: 1 if that is certain | boundary_ns, model_first_ns, model_rest_ns: the
model's boundary, first step and other steps.
"""
