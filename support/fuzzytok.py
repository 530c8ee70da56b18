"""fuzzytok.py: a trained model in Python, numpy alone: reads model.safetensors, gives latents and logits.

    python3 support/fuzzytok.py out/model.safetensors FILE      nats and bits per byte of FILE's start
    model = FuzzyTok("out/model.safetensors"); z, logits = model(list(b"The "))

Names and layouts in the file are PyTorch's (conv (O,C,K), the last tap is the current byte; linear
(O,C)), so the same twenty lines in PyTorch train on. One mixer is one entry of MIXERS.
"""
import json
import struct
import sys

import numpy as np


def read_safetensors(path):
    """The metadata and the tensors of a safetensors file, all of them float32."""
    with open(path, "rb") as f:
        (n,) = struct.unpack("<Q", f.read(8))
        header = json.loads(f.read(n))
        data = f.read()
    metadata = header.pop("__metadata__")
    tensors = {}
    for name, t in header.items():
        begin, end = t["data_offsets"]
        tensors[name] = np.frombuffer(data[begin:end], "<f4").reshape(t["shape"])
    return metadata, tensors


def parse_units(text):
    """ "2x(conv:2:1 mlp:4)" as a list: [["conv", "2", "1"], ["mlp", "4"], ...]. """
    tokens = text.replace("(", " ( ").replace(")", " ) ").split()

    def stack(i):
        units = []
        while i < len(tokens) and tokens[i] != ")":
            times = 1
            if tokens[i].rstrip("x").isdigit():
                times = int(tokens[i].rstrip("x"))
                i += 2 if tokens[i + 1] == "x" else 1
            if tokens[i] == "(":
                group, i = stack(i + 1)
                units += group * times
            else:
                units.append(tokens[i].split(":"))
            i += 1
        return units, i

    return stack(0)[0]


ACTIVATIONS = {
    "none": lambda x: x,
    "gelu": lambda x: x / (1 + np.exp(-1.5957691216057308 * (x + 0.044715 * x**3))),
    "lrelu2": lambda x: np.where(x < 0, x * x / 4, x * x),
}


class FuzzyTok:
    def __init__(self, path, dtype=np.float64):
        self.config, w = read_safetensors(path)
        self.w = {name: t.astype(dtype) for name, t in w.items()}
        self.units = parse_units(self.config["units"])

    def norm(self, name, x):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        xhat = (x - mean) / np.sqrt(var + 1e-5)
        return xhat * self.w[name + ".weight"] + self.w[name + ".bias"]

    def linear(self, name, x):
        return x @ self.w[name + ".weight"].T + self.w[name + ".bias"]

    def conv(self, name, x, dil):
        w, y = self.w[name + ".weight"], self.w[name + ".bias"] + np.zeros_like(x)
        for k in range(min(w.shape[2], (len(x) - 1) // dil + 1)):  # tap k looks k*dil back
            y[k * dil :] += x[: len(x) - k * dil] @ w[:, :, -1 - k].T
        return y

    def mix_conv(self, name, x, numbers, f):
        dil = numbers[1] if len(numbers) > 1 else 1
        return f(self.conv(name + ".conv", self.norm(name + ".norm", x), dil))

    def mix_block(self, name, x, numbers, f):
        for i, dil in enumerate(numbers[1:] or [1]):
            x = f(self.conv(f"{name}.conv.{i}", x, dil))
        return x

    def mix_mlp(self, name, x, numbers, f):
        h = f(self.linear(name + ".up", self.norm(name + ".norm", x)))
        return self.linear(name + ".down", h)

    MIXERS = {"conv": mix_conv, "block": mix_block, "mlp": mix_mlp}

    def __call__(self, ids):
        """bytes (T) -> latents (T,D), logits (T,256); logits[t] is for the byte after ids[t]."""
        c, w = self.config, self.w
        x = self.norm("norm_in", w["embedding.weight"][np.asarray(ids)])
        for u, (mixer, *arguments) in enumerate(self.units):
            numbers = [int(a) for a in arguments if a.isdigit()]
            named = [a for a in arguments if not a.isdigit()]
            f = ACTIVATIONS[(named + [c["activation"]])[0]]
            x = x + self.MIXERS[mixer](self, f"units.{u}", x, numbers, f)
        z, tie, cap = self.norm("norm_out", x), c["tie"] == "yes", float(c["softcap"])
        z = z if tie else self.linear("proj", z)
        y = z @ w["embedding.weight"].T if tie else self.linear("head", z)
        return z, cap * np.tanh(y / cap) if cap else y


if __name__ == "__main__":
    text = list(open(sys.argv[2], "rb").read(4096))
    logits = FuzzyTok(sys.argv[1])(text)[1][:-1]
    logits = logits - logits.max(-1, keepdims=True)
    p = logits[np.arange(len(logits)), text[1:]] - np.log(np.exp(logits).sum(-1))
    nats = (np.log(256) - p.sum()) / len(text)
    print(f"{nats:.6f} nats/byte  {nats / np.log(2):.6f} bits/byte  {len(text)} bytes")
