"""Tiny random models of the supported families, a second or less each."""

import torch
import transformers

_LLAMA_LIKE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_NEOX_LIKE = {key: value for key, value in _LLAMA_LIKE.items() if key != "num_key_value_heads"}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

_CONFIGS = {
    "llama": ("LlamaConfig", _LLAMA_LIKE),
    "mistral": ("MistralConfig", _LLAMA_LIKE),
    "qwen2": ("Qwen2Config", _LLAMA_LIKE),
    "qwen3": ("Qwen3Config", {**_LLAMA_LIKE, "head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", {**_LLAMA_LIKE, "head_dim": 8, "sliding_window": 8}),
    "phi3": ("Phi3Config", _LLAMA_LIKE),
    "opt": ("OPTConfig", {**_NEOX_LIKE, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt_neox": ("GPTNeoXConfig", _NEOX_LIKE),
    "gpt2": ("GPT2Config", {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "mixtral": ("MixtralConfig", {**_LLAMA_LIKE, "num_local_experts": 2, "num_experts_per_tok": 1}),
}
FAMILIES = [family for family in _CONFIGS if family != "mixtral"]
VOCABULARY = 96


def tiny_model(family="llama", tied=False, dtype=torch.float32, **overrides):
    """Return a tiny causal language model with random weights, the same ones each time."""
    torch.manual_seed(1)
    name, fields = _CONFIGS[family]
    config = getattr(transformers, name)(**{**fields, **_SPECIAL, "tie_word_embeddings": tied, **overrides})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def token_batch(rows=2, length=12, seed=2):
    """Return random token ids (rows, length)."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def train(model, steps, lr):
    """Train on one fixed batch, leave the model in eval mode, and return the losses; the last gradients stay."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=token_batch(), labels=token_batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def logits(model):
    """Return the logits of one fixed batch."""
    return model(token_batch()).logits
