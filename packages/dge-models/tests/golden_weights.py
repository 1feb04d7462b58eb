"""Deterministic weights and inputs for the golden files (numpy + torch only).

from_keys(path)             an empty state dict with the reference's keys, shapes and dtypes, from a keys_*.txt
fill(state_dict, seed)      fills every floating tensor in place from its key, shape and the seed
image(seed, batch, size)    a float32 [batch, 3, H, W] tensor, roughly N(0, 1) per image
labels(seed, batch, n)      fixed class labels
checksum(state_dict)        sha256 over the filled state dict, recorded in the golden files

Only numpy's legacy RandomState is used: its streams are frozen by numpy's compatibility policy.
"""

import hashlib

import numpy as np
import torch


def _rng(tag):
    words = np.frombuffer(hashlib.sha256(tag.encode()).digest(), dtype="<u4")
    return np.random.RandomState(words)


def _scale(key, shape):
    """(mean, std) of the normal distribution that the tensor `key` is drawn from."""
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 1
    if key.endswith("router.gate.weight"):
        return 0.0, 1.5 / np.sqrt(fan_in)
    if key.endswith("router.gate.bias"):
        return 0.0, 0.1
    if key.endswith("offsets.bias"):  # DPVT: spread the sampling points
        return 0.0, 2.0
    if "pos_embed" in key or key.endswith(("cls_token", "dist_token")):
        return 0.0, 0.1
    if key.endswith(("attn.proj.weight", "mlp.fc2.weight")):  # residual branches
        return 0.0, 0.5 / np.sqrt(fan_in)
    if key.startswith("patch_embed.") and len(shape) == 4:  # DeiT patch embedding (no norm after it)
        return 0.0, 0.3 / np.sqrt(fan_in)
    if len(shape) == 4:  # PVT patch embeddings and spatial reduction: a LayerNorm with
        return 0.0, 0.05 / np.sqrt(fan_in)  # eps 1e-5 follows; small values make its eps visible
    if len(shape) >= 2:
        return 0.0, 1.0 / np.sqrt(fan_in)
    if key.endswith("weight"):  # norms
        return 1.0, 0.1
    return 0.0, 0.02  # biases


def _blocks(rng, shape):
    """A component of pos_embed that is constant over 4x4 blocks of tokens, so that regions differ."""
    extra_and_grid, c = shape[1], shape[2]
    g = int(np.sqrt(extra_and_grid))
    n = -(-g // 4)
    coarse = 0.6 * rng.standard_normal((n, n, c))
    fine = np.repeat(np.repeat(coarse, 4, 0), 4, 1)[:g, :g].reshape(1, g * g, c)
    return np.concatenate([np.zeros((1, extra_and_grid - g * g, c)), fine], 1)


def from_keys(path, splits=(4, 2, 1)):
    """State dict in the reference's layout: zeros of the listed shapes, `splits` filled in."""
    state_dict = {}
    with open(path) as lines:
        for line in lines:
            if not line.strip() or line.startswith("#"):
                continue
            key, rest = line.split(" ", 1)
            shape, dtype = rest.strip().rsplit(" ", 1)
            shape = tuple(int(n) for n in shape.strip("[]").split(",") if n.strip())
            state_dict[key] = torch.zeros(shape, dtype=getattr(torch, dtype))
            if key.endswith("dge.splits"):
                state_dict[key] = torch.tensor(splits)
    return state_dict


def fill(state_dict, seed):
    """Overwrite every floating tensor of state_dict in place; integer tensors stay. Returns state_dict."""
    for key, value in state_dict.items():
        if not value.is_floating_point():
            continue
        shape = tuple(value.shape)
        mean, std = _scale(key, shape)
        rng = _rng(f"{seed}:{key}")
        data = mean + std * rng.standard_normal(int(np.prod(shape))).reshape(shape)
        if "pos_embed" in key:
            data += _blocks(rng, shape)
        data = data.astype(np.float32)
        with torch.no_grad():
            value.copy_(torch.from_numpy(data))
    return state_dict


def image(seed, batch, size):
    """Smooth low-frequency waves plus pixel noise; size is an int or (height, width)."""
    h, w = (size, size) if isinstance(size, int) else size
    yy, xx = np.meshgrid((np.arange(h) + 0.5) / h, (np.arange(w) + 0.5) / w, indexing="ij")
    out = np.empty((batch, 3, h, w), dtype=np.float32)
    for b in range(batch):
        rng = _rng(f"image:{seed}:{b}")
        img = np.zeros((3, h, w))
        for i in range(12):
            top = 1.2 if i % 2 else 5.0
            fy, fx = rng.uniform(-top, top, 2)
            phase = rng.uniform(0.0, 2.0 * np.pi)
            colour = rng.standard_normal(3)
            img += colour[:, None, None] * np.cos(2.0 * np.pi * (fy * yy + fx * xx) + phase)
        img = (img - img.mean()) / img.std()
        # local contrast: noise whose strength varies over the image
        fy, fx = rng.uniform(-1.5, 1.5, 2)
        env = 0.5 + 0.5 * np.cos(2.0 * np.pi * (fy * yy + fx * xx) + rng.uniform(0.0, 2.0 * np.pi))
        img += (0.1 + 0.6 * env) * rng.standard_normal((3, h, w))
        out[b] = (img - img.mean()) / img.std()
    return torch.from_numpy(out)


def labels(seed, batch, num_classes=1000):
    return torch.from_numpy(_rng(f"labels:{seed}").randint(0, num_classes, batch).astype(np.int64))


def checksum(state_dict):
    """sha256 over sorted keys, shapes and little-endian bytes (float32 or int64)."""
    h = hashlib.sha256()
    for key in sorted(state_dict):
        v = state_dict[key].detach().cpu()
        v = v.to(torch.float32 if v.is_floating_point() else torch.int64).contiguous().numpy()
        h.update(f"{key}|{tuple(v.shape)}|{v.dtype.str}|".encode())
        h.update(v.tobytes())
    return h.hexdigest()
