"""Weights of other programs: damaged files, wrong headers, missing and misshapen tensors, pickles with code, codecs."""

import json
import struct

import numpy as np

from bad_items.case import ACCEPTED, EITHER, Case, Source, kind

MODEL = "diffusion_pytorch_model.safetensors"


def _tensors(data: bytes) -> tuple[dict, bytes]:
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _packed(header: dict | bytes, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _without_config(header: dict) -> dict:
    """Without what the library itself wrote of the architecture, as other programs write it."""
    return {name: value for name, value in header.items() if name != "__metadata__"}


def _spoilt(source: Source, data: bytes) -> tuple[bytes, str]:
    """(a file that cannot be used, what its refusal must name)."""
    rng, (header, body) = source.rng, _tensors(data)
    names = sorted(name for name in header if name != "__metadata__")
    name = rng.choice(names)
    form = rng.randrange(14)
    if form == 0:
        return source.cut(data), MODEL
    if form == 1:
        size = rng.choice((0, 1, 2, rng.randint(3, 10**6), 2**63, 2**64 - 1, len(data), 10**8 + 1))
        return struct.pack("<Q", size) + data[8:], MODEL
    if form == 2:
        return rng.choice(
            (b"", bytes(rng.randint(1, 999)), b"text\n" * 9, rng.randbytes(99), b"{}", b"PK\x03\x04" + data)
        ), MODEL
    if form == 3:
        return _packed(
            rng.choice((b"[]", b"null", b"{", b"{}", b'{"a": 1}', b"\xff\xfe", b'{"a": {}}', b'""')), body
        ), MODEL
    if form <= 5:
        header = {key: value for key, value in header.items() if key != name}
        kept = {key: value for key, value in header.items()}
        return _repacked(kept, body), name
    if form == 6:
        header[name] = {**header[name], "dtype": rng.choice(("I8", "U8", "BOOL", "I32", "F9", "F8_E4M3"))}
        return _packed(header, body), name if header[name]["dtype"] != "F9" else MODEL
    if form == 7:
        begin, end = header[name]["data_offsets"]
        header[name] = {
            **header[name],
            "data_offsets": rng.choice(([end, begin], [begin, end + 4], [begin, 10**12], [-1, 3], "x")),
        }
        return _packed(header, body), MODEL
    if form <= 10:
        shape = header[name]["shape"]
        other = [shape[-1] * 2, *shape[1:]] if len(shape) == 1 else [shape[1], shape[0], *shape[2:]]
        other = [1, *shape] if other == shape or source.chance(0.3) else other
        header[name] = {**header[name], "shape": other}
        if np.prod(other) != np.prod(shape):
            return _packed(header, body), MODEL
        return _packed(header, body), name
    if form == 11:
        new = source.misspelt(name)
        while new in header:
            new += "x"
        return _packed({new if key == name else key: value for key, value in header.items()}, body), (name, new)
    if form == 12:
        renamed = {f"{source.word()}.{key}": value for key, value in _without_config(header).items()}
        return _packed({f"other_{i}": value for i, value in enumerate(renamed.values())}, body), "other_"
    return _packed({**header, "__metadata__": {"greedy_distill_jax": source.junk()}}, body), MODEL


def _repacked(header: dict, body: bytes) -> bytes:
    """The named tensors, one after the other."""
    out, parts, at = {}, [], 0
    for name, value in header.items():
        if name == "__metadata__":
            out[name] = value
            continue
        begin, end = value["data_offsets"]
        parts.append(body[begin:end])
        out[name] = {**value, "data_offsets": [at, at + end - begin]}
        at += end - begin
    return _packed(out, b"".join(parts))


@kind("safetensors", 11)
def safetensors(source: Source) -> Case:
    """Cut off, with wrong headers, without some tensors, with others, of shapes that do not fit."""
    form, word = source.pick("wan", "diffusers"), source.word()
    folder = "" if form == "wan" else "transformer/" if (source.made / form / "transformer").is_dir() else ""
    held = source.folder(form, word)
    path = f"{word}/{folder}{MODEL}"
    if source.chance(0.08):
        return Case("convert", ("import", f"{{here}}/{word}", "{here}/out"), ACCEPTED, files=held)
    if source.chance(0.15):  # numbers alone may have changed, and no format has sums of them
        held[path] = source.damaged(held[path])
        return Case("convert", ("import", f"{{here}}/{word}", "{here}/out"), EITHER, files=held, needs=((word,),))
    held[path], needed = _spoilt(source, held[path])
    needed = needed if isinstance(needed, tuple) else (needed,)
    argv = source.pick(
        ("import", f"{{here}}/{word}", "{here}/out"),
        ("import", f"{{here}}/{path}", "{here}/out"),
        ("export", f"{{here}}/{word}", "{here}/out", "--format=causal-pt"),
        ("export", f"{{here}}/{word}", "{here}/out", "--format=diffusers"),
        ("verify", f"{{here}}/{word}", "{made}/wan"),
    )
    return Case("convert", argv, files=held, needs=((*needed, MODEL, "metadata 'greedy"),))


BAD_JSON = (b"", b"{", b"[]", b"null", b"3", b'"a"', b"\xff", b"\0", b'{"a": }', b"{}x", b"[" * 5000, b"NaN")


@kind("files beside weights", 5)
def beside_weights(source: Source) -> Case:
    """config.json and index.json that are none, say other sizes, or name files that are not there."""
    rng, word = source.rng, source.word()
    form = rng.randrange(4)
    if form == 0:
        held = source.folder("torch_student", word)
        config = json.loads(held[f"{word}/config.json"])
        key = rng.choice(sorted(config["architecture"]))
        values = (-1, 0, "x", None, [], {}, 1e9, "1")
        config["architecture"][key] = rng.choice([v for v in values if v != config["architecture"][key]])
        other = rng.choice(
            (rng.choice(BAD_JSON), b'{"format": "x"}', json.dumps({**config, "architecture": 3}).encode())
        )
        held[f"{word}/config.json"] = rng.choice((json.dumps(config).encode(), other))
        return Case("convert", ("import", f"{{here}}/{word}", "{here}/out"), EITHER, files=held, needs=((word,),))
    held = source.folder("wan", word)
    if form == 1:
        held[f"{word}/config.json"] = rng.choice(BAD_JSON)
        return Case("convert", ("inspect", f"{{here}}/{word}"), EITHER, files=held, needs=((word,),))
    index = {"weight_map": {"a": f"{source.word()}.safetensors"}}
    bad = rng.choice(
        (
            *BAD_JSON,
            json.dumps(index).encode(),
            b'{"weight_map": 3}',
            b'{"weight_map": {"a": 3}}',
            b'{"weight_map": {"a": "../x"}}',
        )
    )
    bad = rng.choice(
        (
            bad,
            b'{"weight_map": {"a": null}}',
            b'{"weight_map": {}}',
            b'{"weight_map": {"a": "."}}',
            b'{"weight_map": {"a": ["b"]}}',
        )
    )
    if form == 2:
        held[f"{word}/{MODEL}.index.json"] = bad
        return Case("convert", ("inspect", f"{{here}}/{word}"), files=held, needs=((word,),))
    held[f"{word}/{source.word()}.safetensors"] = held[f"{word}/{MODEL}"]
    return Case("convert", ("import", f"{{here}}/{word}", "{here}/out"), files=held, needs=((word,),))


def pickle_with_code(source: Source) -> bytes:
    """A pickle that would write a file named "executed" in the folder of the case."""
    call = source.pick(
        "posix system", "os system", "builtins eval", "builtins exec", "subprocess call", "torch.hub load"
    )
    module, name = call.split()
    text = {"system": "touch executed", "eval": "open('executed', 'w')", "exec": "open('executed', 'w')"}.get(
        name, "executed"
    )
    return f"c{module}\n{name}\n(V{text}\ntR.".encode()


@kind("files of PyTorch", 5)
def torch_files(source: Source) -> Case:
    """Cut off, changed, of another kind, or with code in them, which must not run."""
    rng, good = source.rng, (source.made / "wan.pt").read_bytes()
    name = f"{source.word()}{source.pick('.pt', '.pth')}"
    argv = source.pick(("inspect", f"{{here}}/{name}"), ("import", f"{{here}}/{name}", "{here}/out"))
    if source.chance(0.1):
        return Case("convert", argv, ACCEPTED, files={name: good})
    form = rng.randrange(5)
    if form == 0:
        return Case("convert", argv, files={name: pickle_with_code(source)}, needs=((name,),))
    if form == 1:
        return Case("convert", argv, EITHER, files={name: source.damaged(good)}, needs=((name,),))
    if form == 2:
        part = source.pick("generator", "generator_ema", source.word(), "critic")
        return Case("convert", (*argv, f"--part={part}x"), files={name: good}, needs=((part,),))
    other = rng.choice(
        (b"", b"text", rng.randbytes(200), b"\x80\x02}q\x00.", b"\x80\x02K\x01.", b"PK\x05\x06" + bytes(18), None)
    )
    data = source.cut(good) if form == 3 else other
    return Case("convert", argv, files={name: data}, needs=((name,),))


@kind("codecs", 3)
def codecs(source: Source) -> Case:
    """codec.npz that is cut off, changed or something else."""
    rng, good = source.rng, (source.made / "student/codec.npz").read_bytes()
    name = f"{source.word()}.npz"
    argv = (
        "--checkpoint={made}/student",
        "--prompt=a",
        "--frames=2",
        f"--codec={{here}}/{name}",
        "--output={here}/o.gif",
    )
    if source.chance(0.1):
        return Case("sample", argv, ACCEPTED, files={name: good})
    if source.chance(0.4):
        return Case("sample", argv, EITHER, files={name: source.damaged(good)}, needs=((name,), ("--codec",)))
    data = rng.choice((b"", source.cut(good), source.cut(good), rng.randbytes(99), b"text", None, "@{here}/nowhere"))
    return Case("sample", argv, files={name: data}, needs=((name,), ("--codec",)))
