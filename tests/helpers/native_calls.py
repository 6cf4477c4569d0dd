"""Random calls of the library of ``native`` through its C function, and what they must give: NumPy alone.

It imports no JAX, so it also runs where the interpreter was started with a sanitizer:
python tests/helpers/native_calls.py LIBRARY COUNT SEED
"""

import ctypes
import dataclasses
import sys

import ml_dtypes
import numpy as np

POINTERS = (
    *("q", "keys", "values", "key_scales", "value_scales", "text_keys", "text_values"),
    *("visual_seen", "text_seen", "features", "descriptors", "budget", "visible", "order"),
    *("indices", "scores", "out", "lse"),
)
"""Array fields of ``gaze::Call`` in decode.h, in its order."""

SIZES = ("batch", "kv_heads", "group", "regions", "slots", "text", "dim", "capacity", "width", "layer")
FLAGS = ("query_kind", "visual_kind", "text_kind", "descriptor_kind", "dense", "per_head", "route")
KINDS = (np.dtype("float32"), np.dtype(ml_dtypes.bfloat16), np.dtype("int8"))
KERNELS = ("plain", "avx2", "avx512")
LAYERS = 2


class Call(ctypes.Structure):
    """``gaze::Call`` of decode.h."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in SIZES]
        + [("scale", ctypes.c_float)]
        + [(name, ctypes.c_int32) for name in FLAGS]
        + [(name, ctypes.c_void_p) for name in POINTERS]
    )


def load(path):
    library = ctypes.CDLL(str(path))
    library.gaze_call.restype = ctypes.c_int64
    library.gaze_call.argtypes = (ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p)
    return library


@dataclasses.dataclass
class Case:
    """One call: sizes and flags of :class:`Call`, and its arrays by their names there."""

    sizes: dict
    flags: dict
    scale: float
    arrays: dict

    def run(self, library, threads, kernel):
        """Fill the results; the bytes that were read, or None if this processor has no such kernel."""
        # Arrays of exactly their size on the heap, so that a sanitizer sees a step beyond them.
        call = Call(scale=self.scale, **self.sizes, **self.flags)
        for name, array in self.arrays.items():
            assert array.flags.c_contiguous
            setattr(call, name, array.ctypes.data)
        read = library.gaze_call(ctypes.byref(call), threads, kernel.encode())
        return None if read < 0 else read


def _floats(rng, kind, *shape):
    return rng.normal(size=shape).astype(np.float32).astype(kind)


def random_case(rng):
    """Odd sizes, empty ones, ties, NaN in what is not read, any mixture of dtypes."""

    def pick(*values):
        return values[rng.integers(len(values))]

    s = {
        "batch": pick(1, 1, 2),
        "kv_heads": pick(1, 2, 3),
        "group": pick(1, 2, 3, 4, 5, 7, 8, 9) if rng.random() < 0.97 else pick(32, 33, 40),
        "regions": pick(0, 1, 2, 5, 9, 17) if rng.random() < 0.95 else 300,
        "slots": pick(1, 2, 3, 5, 9) if rng.random() < 0.95 else 70,
        "text": pick(0, 1, 7, 40) if rng.random() < 0.9 else 1300,
        "dim": pick(1, 3, 4, 8, 13, 16, 20, 32, 33, 64, 100, 128, 160),
        "width": pick(1, 4, 20, 64, 128),
        "layer": pick(*range(LAYERS)),
    }
    s["capacity"] = pick(0, 1, 2, 4, s["regions"], s["regions"] + 2)
    kind, text_kind, query = pick(*KINDS), pick(*KINDS[:2]), pick(*KINDS[:2])
    described = pick(*KINDS[:2])
    mode = pick("dense", "listed", "routed", "routed")
    per_head = s["group"] > 1 and rng.random() < 0.6
    b, k, r, p, d = (s[name] for name in ("batch", "kv_heads", "regions", "slots", "dim"))
    heads = k * s["group"]
    shared = heads if per_head else k
    a = {
        "q": _floats(rng, query, b, heads, d),
        "text_keys": _floats(rng, text_kind, LAYERS, b, k, s["text"], d),
        "text_values": _floats(rng, text_kind, LAYERS, b, k, s["text"], d),
        "visual_seen": (rng.random((b, r, p)) < pick(0.0, 0.6, 1.0)).astype(np.uint8),
        "text_seen": (rng.random((b, s["text"])) < pick(0.0, 0.6, 1.0)).astype(np.uint8),
        "indices": rng.integers(-2, r + 2, size=(b, shared, s["capacity"])).astype(np.int32),
        "out": np.full((b, heads, d), 7, query),
        "lse": np.full((b, heads), 7, np.float32),
    }
    cache = (LAYERS, b, k, r, p)
    if kind == np.int8:
        for side in ("key", "value"):
            a[f"{side}s"] = rng.integers(-127, 128, size=(*cache, d)).astype(np.int8)
            a[f"{side}_scales"] = (rng.random(cache) / 64).astype(np.float32)
    else:
        a |= {"keys": _floats(rng, kind, *cache, d), "values": _floats(rng, kind, *cache, d)}
    if mode == "routed":
        # Whole numbers: their sums are exact, so equal scores are equal in any order of summing.
        features = rng.integers(-3, 4, size=(b, heads, s["width"])).astype(np.float32)
        descriptors = rng.integers(-3, 4, size=(LAYERS, b, k, r, s["width"])).astype(np.float32)
        descriptors[rng.random(descriptors.shape[:-1]) < 0.05] = np.nan
        a |= {
            "features": features.astype(query),
            "descriptors": descriptors.astype(described),
            "budget": rng.integers(-1, r + 3, size=b).astype(np.int32),
            "visible": (rng.random((b, r)) < 0.8).astype(np.uint8),
            "order": np.stack([rng.permutation(r) for _ in range(b)]).astype(np.int32).reshape(b, r),
            "scores": np.full((b, shared, r), 7, np.float32),
            "indices": np.full_like(a["indices"], 7),
        }
    names = {kind: at for at, kind in enumerate(KINDS)}
    flags = {
        "query_kind": names[query],
        "visual_kind": names[kind],
        "text_kind": names[text_kind],
        "descriptor_kind": names[described],
        "dense": int(mode == "dense"),
        "per_head": int(per_head),
        "route": int(mode == "routed"),
    }
    return Case(s, flags, float(rng.choice([0.3, 1.0])), a)


def chosen(case):
    """The scores and the indices of a routed call, float64 [B, Hs, R] and int32 [B, Hs, J]."""
    a, s = case.arrays, case.sizes
    b, k, group = s["batch"], s["kv_heads"], s["group"]
    features = a["features"].astype(np.float64).reshape(b, k, group, -1)
    if not case.flags["per_head"]:
        features = features.sum(2, keepdims=True)
    scores = np.einsum("bkge,bkre->bkgr", features, a["descriptors"][s["layer"]].astype(np.float64))
    scores = scores.reshape(a["scores"].shape)
    indices = np.full(a["indices"].shape, -1, np.int32)
    for row in range(b):
        order = [region for region in a["order"][row] if a["visible"][row, region]]
        for at in range(scores.shape[1]):
            # Python's sort is stable: ties stay in this order. A NaN is below all numbers.
            best = sorted(order, key=lambda region: _falling(scores[row, at, region]))
            best = best[: max(0, min(int(a["budget"][row]), s["capacity"]))]
            indices[row, at, : len(best)] = best
    return scores, indices


def _falling(score):
    return (1, 0.0) if np.isnan(score) else (0, -score)


def expected(case, indices):
    """Output float64 [B, H, D] and log-sum-exp [B, H] by the definition."""
    a, s, f = case.arrays, case.sizes, case.flags
    b, k, group, layer = s["batch"], s["kv_heads"], s["group"], s["layer"]
    keys, values = (a[name][layer].astype(np.float64) for name in ("keys", "values"))
    if "key_scales" in a:
        keys = keys * a["key_scales"][layer][..., None]
        values = values * a["value_scales"][layer][..., None]
    out = np.zeros((b, k * group, s["dim"]))
    lse = np.full((b, k * group), -np.inf)
    text_seen = a["text_seen"].astype(bool)
    for row, head in np.ndindex(b, k * group):
        kv = head // group
        seen = a["visual_seen"][row].astype(bool)
        if not f["dense"]:
            listed = np.isin(np.arange(s["regions"]), indices[row, head if f["per_head"] else kv])
            seen = seen & listed[:, None]
        rows = [keys[row, kv][seen], a["text_keys"][layer, row, kv][text_seen[row]].astype(np.float64)]
        logits = np.concatenate(rows) @ a["q"][row, head].astype(np.float64) * np.float32(case.scale)
        if not len(logits):
            continue
        top = logits.max()
        weights = np.exp(logits - top)
        lse[row, head] = top + np.log(weights.sum())
        rows = [values[row, kv][seen], a["text_values"][layer, row, kv][text_seen[row]].astype(np.float64)]
        out[row, head] = (weights / weights.sum()) @ np.concatenate(rows)
    return out, lse


def poison(case, indices):
    """NaN wherever nothing may be read: other layers, unseen slots, regions that no head of a group lists."""
    a, s, f = case.arrays, case.sizes, case.flags
    b, k, r = s["batch"], s["kv_heads"], s["regions"]
    listed = np.ones((b, k, r), bool)
    if not f["dense"]:
        listed = (indices[..., None] == np.arange(r)).any(2).reshape(b, k, indices.shape[1] // k, r).any(2)
    unread = np.ones((LAYERS, b, k, r, s["slots"]), bool)
    unread[s["layer"]] = ~(listed[..., None] & a["visual_seen"].astype(bool)[:, None])
    scaled = "key_scales" in a
    for name in ("key_scales", "value_scales") if scaled else ("keys", "values"):
        a[name][unread] = np.nan
    unread = np.ones((LAYERS, b, k, s["text"]), bool)
    unread[s["layer"]] = ~a["text_seen"].astype(bool)[:, None]
    for name in ("text_keys", "text_values"):
        a[name][unread] = np.nan


def check(library, seed, kernels=KERNELS, threads=(1, 2, 4)):
    """One random call on every kernel and number of threads: right, and the same bits on any number."""
    case = random_case(np.random.default_rng(seed))
    indices = case.arrays["indices"]
    if case.flags["route"]:
        scores, indices = chosen(case)
    out, lse = expected(case, indices)
    poison(case, indices)
    where = f"seed {seed}: {case.sizes} {case.flags}"
    for kernel in kernels:
        bits = None
        for count in threads:
            if case.run(library, count, kernel) is None:
                break
            got = {name: case.arrays[name] for name in ("out", "lse", "indices")}
            if bits is None:
                narrow = 1 / 128 if case.arrays["out"].dtype != np.float32 else 2e-5
                scale = max(np.abs(out).max(initial=0), 1e-3)
                wide = got["out"].astype(np.float64)
                np.testing.assert_allclose(wide, out, rtol=narrow, atol=2e-5 * scale, err_msg=where)
                np.testing.assert_allclose(got["lse"], lse, rtol=2e-5, atol=2e-5, err_msg=where)
                if case.flags["route"]:
                    np.testing.assert_array_equal(got["indices"], indices, err_msg=where)
                    np.testing.assert_array_equal(case.arrays["scores"], scores, err_msg=where)
                bits = {name: a.tobytes() for name, a in got.items()}
            assert bits == {name: a.tobytes() for name, a in got.items()}, f"{where}: {count} threads"


def main():
    path, count, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    library = load(path)
    for i in range(count):
        check(library, seed + i)
    print(f"{count} calls")


if __name__ == "__main__":
    main()
