"""fuzzytok.py: a trained model in Python, numpy alone: reads model.safetensors, gives latents and logits.

    python3 support/fuzzytok.py out/model.safetensors FILE      nats and bits per byte of FILE's start
    model = FuzzyTok("out/model.safetensors"); z, logits = model(list(b"The "))

Names and layouts in the file are PyTorch's (conv (O,C,K), the last tap is the current byte; linear
(O,C)), so the same twenty lines in PyTorch train on. One mixer is one entry of MIXERS.
"""
import json, struct, sys
import numpy as np


def read_safetensors(path):
    """The metadata and the tensors of a safetensors file, all of them float32."""
    with open(path, "rb") as f:
        header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
        data = f.read()
    metadata, at = header.pop("__metadata__"), lambda t: slice(*t["data_offsets"])
    return metadata, {name: np.frombuffer(data[at(t)], "<f4").reshape(t["shape"])
                      for name, t in header.items()}


def parse_units(text):
    """ "2x(conv:2:1 mlp:4)" as a list: [["conv", "2", "1"], ["mlp", "4"], ...]. """
    tokens = text.replace("(", " ( ").replace(")", " ) ").split()

    def stack(i):
        units = []
        while i < len(tokens) and tokens[i] != ")":
            number, times = tokens[i].rstrip("x"), 1
            if number.isdigit():
                times, i = int(number), i + (2 if tokens[i + 1] == "x" else 1)
            group = [tokens[i].split(":")]
            if tokens[i] == "(":
                group, i = stack(i + 1)
            units, i = units + group * times, i + 1
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
        for key, old in ("skips", "0"), ("norm_in", "yes"), ("norm_out", "yes"):
            self.config.setdefault(key, old)  # a file may be older than a key
        self.w = {name: t.astype(dtype) for name, t in w.items()}
        self.units = parse_units(self.config["units"])

    def norm(self, name, x):
        xhat = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return xhat * self.w[name + ".weight"] + self.w[name + ".bias"]

    def linear(self, name, x):
        return x @ self.w[name + ".weight"].T + self.w.get(name + ".bias", 0)

    def conv(self, name, x, dil):
        w, y = self.w[name + ".weight"], self.w.get(name + ".bias", 0) + np.zeros_like(x)
        for k in range(min(w.shape[2], (len(x) - 1) // dil + 1)):  # tap k looks k*dil back
            y[k * dil :] += x[: len(x) - k * dil] @ w[:, :, -1 - k].T
        return y

    def mix_conv(self, name, x, numbers, f):
        return f(self.conv(name + ".conv", self.norm(name + ".norm", x), (numbers + [1, 1])[1]))

    def mix_block(self, name, x, numbers, f):
        for i, dil in enumerate(numbers[1:] or [1]):
            x = f(self.conv(f"{name}.conv.{i}", x, dil))
        return x

    def mix_mlp(self, name, x, numbers, f):
        return self.linear(name + ".down", f(self.linear(name + ".up", self.norm(name + ".norm", x))))

    def mix_attn(self, name, x, numbers, f, **letters):
        H, W = (numbers + [4])[0], (numbers + [0, 0])[1] or int(self.config["window"]) or 512
        T, C = x.shape
        d, G = C // H, letters.get("kv", H)
        R, t = letters.get("r", d // 2 * 2), np.arange(T)
        y = self.linear(name + ".qkv", self.norm(name + ".norm", x)).reshape(T, H + 2 * G, d)
        qk, v = y[:, : H + G], y[:, H + G :]
        gain = np.ones(H)
        if letters.get("n", 1):
            qk = qk / np.sqrt((qk**2).mean(-1, keepdims=True) + 1e-5)
            gain = self.w[name + ".gain"]
        turn = np.exp(1j * np.outer(t, 1e4 ** (-2 * np.arange(R // 2) / max(R, 1))))[:, None]
        turned = (qk[..., : R // 2] + 1j * qk[..., R // 2 : R]) * turn
        qk = np.concatenate([turned.real, turned.imag, qk[..., R:]], -1)
        back, out = t[:, None] - t, np.empty((T, H, d))
        for h in range(H):
            a = qk[:, h] @ qk[:, H + h * G // H].T * gain[h] / np.sqrt(d)
            p = np.exp(np.where((back < 0) | (back >= W), -np.inf, a - a.max(-1, keepdims=True)))
            out[:, h] = p @ v[:, h * G // H] / p.sum(-1, keepdims=True)
        return self.linear(name + ".out", out.reshape(T, C))

    def mix_smear(self, name, x, numbers, f):
        before = np.concatenate([0 * x[:1], x[:-1]])
        return (before - x) / (1 + np.exp(-self.w[name + ".gate"]))

    def mix_bigrams(self, name, x, numbers, f):
        h = self.ids[:-1] * 256 + self.ids[1:]
        for by, times in (16, 0x7FEB352D), (15, 0x846CA68B), (16, 1):
            h = (h ^ h >> by) * times & 0xFFFFFFFF
        table, y = self.w[name + ".table.weight"], np.zeros_like(x)
        y[1:] = self.linear(name + ".map", table[h * len(table) >> 32])  # the first byte is no pair
        return y

    def mix_positions(self, name, x, numbers, f):
        c = np.arange(x.shape[1])
        angle = np.outer(np.arange(len(x)), 1e4 ** (-(c // 2 * 2) / len(c)))
        return np.where(c % 2, np.cos(angle), np.sin(angle))

    MIXERS = {"conv": mix_conv, "block": mix_block, "mlp": mix_mlp, "attn": mix_attn,
              "smear": mix_smear, "bigrams": mix_bigrams, "positions": mix_positions}

    def __call__(self, ids):
        """bytes (T) -> latents (T,D), logits (T,256); logits[t] is for the byte after ids[t]."""
        c, w, skips, kept = self.config, self.w, int(self.config["skips"]), []
        self.ids = np.asarray(ids, dtype=np.uint64)
        x = w["embedding.weight"][np.asarray(ids)]
        x = self.norm("norm_in", x) if c["norm_in"] == "yes" else x
        inputs = sum(unit[0] in ("smear", "bigrams", "positions") for unit in self.units)
        layers = (len(self.units) - inputs) // skips if skips else 0
        for u, (mixer, *arguments) in enumerate(self.units):
            layer = (u - inputs) // skips if skips and (u - inputs) % skips == 0 else -1
            if 0 <= layer < layers // 2:
                kept.append(x)
            elif layer >= (layers + 1) // 2:  # up comes what was before the mirrored layer
                mirrored = layers - 1 - layer
                x = x + w[f"skips.{mirrored}.weight"] * kept[mirrored]
            numbers = [int(a) for a in arguments if a.isdigit()]
            f = ACTIVATIONS[([a for a in arguments if a in ACTIVATIONS] + [c["activation"]])[0]]
            letters = {a.rstrip("0123456789"): int(a.lstrip("kvrn")) for a in arguments
                       if a[0] in "krn" and a[-1].isdigit()}
            x = x + self.MIXERS[mixer](self, f"units.{u}", x, numbers, f, **letters)
        z = self.norm("norm_out", x) if c["norm_out"] == "yes" else x
        tie, cap = c["tie"] == "yes", float(c["softcap"])
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
