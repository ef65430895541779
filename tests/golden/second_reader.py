"""A second reader of packs, written from FORMAT.md alone: no line of modelpress, no torch.

Only the standard library, numpy, zstandard, and for encrypted packs AES-GCM. What comes out are raw bytes with dtype
name and shape.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from math import prod
from pathlib import Path

import numpy as np
import zstandard
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

ITEMSIZE = {
    **dict.fromkeys(["BOOL", "U8", "I8", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ"], 1),
    **dict.fromkeys(["U16", "I16", "F16", "BF16"], 2),
    **dict.fromkeys(["U32", "I32", "F32"], 4),
    **dict.fromkeys(["U64", "I64", "F64"], 8),
}
FLOATS = {"F16", "BF16", "F32", "F64"}


class Refused(Exception):
    """The bytes are not a pack of format version 1 to 3."""


def need(condition, message):
    if not condition:
        raise Refused(message)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def strict_json(data):
    def unique(pairs):
        need(len(dict(pairs)) == len(pairs), "duplicate key")
        return dict(pairs)

    return json.loads(data, object_pairs_hook=unique)


def read_pack(store: Path, name: str, digest: str, key: bytes = b""):
    """Returns (manifest, {tensor: (dtype, shape, bytes)}, {file: bytes}); `key` wraps the secret of an encrypted pack."""
    data = (store / "packs" / name / f"{digest}.json").read_bytes()
    need(sha256(data) == digest, "manifest digest")
    manifest = strict_json(data)
    need(manifest["format_version"] in (1, 2, 3), "format version")
    base = read_base(store, name, manifest, key)
    how = manifest.get("encryption")
    secret = read_secret(store, name, how["secret"], key) if how else b""
    shards = [
        read_shard(opened(blob(store, shard["sha256"], shard["size_bytes"]), shard.get("plain"), how, secret))
        for shard in manifest["shards"]
    ]
    tensors = {entry["name"]: read_tensor(entry, shards, base) for entry in manifest["tensors"]}
    need(len(tensors) == len(manifest["tensors"]), "duplicate tensor")
    return manifest, tensors, {entry["name"]: read_file(store, entry, how, secret) for entry in manifest["files"]}


def read_base(store, name, manifest, key):
    """The tensors of the pack that this one is stored as the difference to, which stands alone; none without one."""
    if "base" not in manifest:
        need(all("base" not in entry for entry in manifest["tensors"]), "differences to no base")
        return {}
    need(manifest["format_version"] == 3, "a base before version 3")
    used = [entry["base"] for entry in manifest["tensors"] if "base" in entry]
    need(used and len(used) == len(set(used)), "one tensor of the base for each difference")
    base, tensors, _ = read_pack(store, name, manifest["base"], key)
    need("base" not in base and base["name"] == manifest["name"], "a base that does not stand alone")
    return tensors


def blob(store, digest, size):
    data = (store / "blobs" / "sha256" / digest).read_bytes()
    need(len(data) == size and sha256(data) == digest, f"blob {digest}")
    return data


def hkdf(secret, info, size):
    """RFC 5869 with SHA-256 and without salt, up to 32 bytes."""
    return hmac.digest(hmac.digest(bytes(32), secret, "sha256"), info + b"\1", "sha256")[:size]


def read_secret(store, name, wanted, key):
    """The secret with an id, from the newest entry that the key wrapped; see "Encryption" in FORMAT.md."""
    for path in sorted((store / "packs" / name / "secrets").glob("*.json"), reverse=True):
        entry = strict_json(path.read_bytes())
        if entry["key"] != hkdf(key, b"modelpress wrapping key id v1", 16).hex() or wanted not in entry["secrets"]:
            continue
        need(entry["algorithm"] == "AES-256-GCM" and entry["format_version"] == 1, "how secrets are wrapped")
        place = {field: entry[field] for field in ("format_version", "name", "number", "secrets")}
        context = {"modelpress:entry": sha256(compact(place)), "modelpress:name": name}
        wrapped = base64.b64decode(entry["wrapped"])
        found = AESGCM(key).decrypt(wrapped[:12], wrapped[12:], compact(context))
        position = entry["secrets"].index(wanted)
        secret = found[32 * position : 32 * position + 32]
        need(hkdf(secret, b"modelpress secret id v1" + name.encode(), 16).hex() == wanted, "id of the secret")
        return secret
    raise Refused(f"no entry with secret {wanted} for this key")


def compact(document):
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def opened(data, plain, how, secret):
    """A blob without its encryption; as it is where the pack has none."""
    need((plain is None) == (how is None), "a pack in which only some blobs are encrypted")
    if how is None:
        return data
    need(how["algorithm"] == "AES-256-GCM-STREAM", "algorithm")
    step, digest, out = how["segment_bytes"], bytes.fromhex(plain["sha256"]), b""
    key = hkdf(secret, b"modelpress blob v1" + step.to_bytes(8, "little") + digest, 32)
    count = max(1, -(-plain["size_bytes"] // step))
    for number in range(count):
        segment = data[number * (step + 16) :][: step + 16]
        nonce = number.to_bytes(11, "little") + bytes([number == count - 1])
        out += AESGCM(key).decrypt(nonce, segment, digest)
    need(len(data) == plain["size_bytes"] + 16 * count, "length of an encrypted blob")
    need(len(out) == plain["size_bytes"] and sha256(out) == plain["sha256"], "digest of a decrypted blob")
    return out


def read_file(store, entry, how, secret):
    data = blob(store, entry["stored_sha256"], entry["stored_bytes"])
    data = opened(data, entry.get("plain"), how, secret)
    if entry["codec"] == "zstd":
        data = frame(data, entry["size_bytes"], exact=True)
    need(len(data) == entry["size_bytes"] and sha256(data) == entry["sha256"], f"file {entry['name']}")
    return data


def frame(data, size, exact):
    claimed = zstandard.get_frame_parameters(data).content_size
    need(claimed == size if exact else claimed <= size, f"frame of {claimed}, not {size}")
    return zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)


def read_shard(data):
    """The safetensors layout: ({key: (dtype, shape, bytes)}, {tensor: piece})."""
    length = int.from_bytes(data[:8], "little")
    need(length <= min(len(data) - 8, 100_000_000), "header length")
    header, body = strict_json(data[8 : 8 + length]), data[8 + length :]
    metadata = header.pop("__metadata__", {})
    entries, position = {}, 0
    for key, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = info["data_offsets"]
        need(start == position <= end <= len(body), f"{key}: overlap or hole")
        need(end - start == prod(info["shape"]) * ITEMSIZE[info["dtype"]], f"{key}: length")
        entries[key], position = (info["dtype"], info["shape"], body[start:end]), end
    need(position == len(body), "bytes at the end")
    described = strict_json(metadata.get("modelpress", '{"format_version":1,"tensors":{}}'))
    need(described["format_version"] in (1, 2), "format version of the shard")
    return entries, described["tensors"]


def read_tensor(entry, shards, base):
    name, size = entry["name"], ITEMSIZE[entry["dtype"]]
    raw, coded, position = b"", b"", 0
    for number in entry["shards"]:
        entries, pieces = shards[number]
        if name in entries:
            dtype, shape, data = entries[name]
            need([dtype, shape, "raw"] == [entry["dtype"], entry["shape"], entry["codec"]], name)
            raw, coded, position = raw + data, coded + data, position + prod(shape)
            continue
        piece = pieces[name]
        need(all(piece[key] == entry[key] for key in ("dtype", "shape", "codec")), name)
        need(piece["start"] == position, f"{name}: piece from {piece['start']}, not {position}")
        for chunk, out in read_chunks(name, piece, entries, size):
            raw, coded = raw + out, coded + chunk
        position += piece["count"]
    if "base" in entry:
        dtype, shape, original = base[entry["base"]]
        need([dtype, shape] == [entry["dtype"], entry["shape"]], f"{name}: its base's dtype and shape")
        if entry["shards"]:
            words = np.frombuffer(original, f"<u{size}") + np.frombuffer(raw, f"<u{size}")
            original = words.tobytes()
        raw, position = original, prod(shape) if not entry["shards"] else position
    need(entry["shards"] or "base" in entry, f"{name}: in no shard")
    need(position == prod(entry["shape"]), f"{name}: {position} elements")
    need(len(coded) == entry["stored_bytes"] and sha256(coded) == entry["stored_sha256"], f"{name}: coded digest")
    need(sha256(raw) == entry["raw_sha256"], f"{name}: raw digest")
    return entry["dtype"], entry["shape"], raw


def read_chunks(name, piece, entries, size):
    """Yields (coded bytes of all streams, decoded elements) of each chunk."""
    codec, dtype, count = piece["codec"], piece["dtype"], piece["count"]
    step = count if codec == "raw" else piece["chunk_symbols"]
    width = {"raw": size, "zstd": size}.get(codec, 1)
    positions = [0] * len(piece["streams"])
    for index in range(-(-count // step)):
        symbols = min(step, count - index * step)
        coded, parts = b"", []
        for which, stream in enumerate(piece["streams"]):
            body = entries[f"{name}#{stream['name']}"][2]
            length = symbols * width if stream["coder"] == "raw" else stream["lengths"][index]
            chunk = body[positions[which] : positions[which] + length]
            positions[which] += length
            coded += chunk
            exact = codec not in ("rle-huffman", "mask-huffman")
            parts.append(CODERS[stream["coder"]](chunk, symbols * width, exact))
        yield coded, decode(codec, dtype, parts, symbols, size)


def huffman(chunk, size, exact):
    """Symbols, table, lengths of the segments of 4096 symbols, their bits; see "Coder huffman" in FORMAT.md."""
    symbols, first, last = int.from_bytes(chunk[:4], "little"), chunk[4], chunk[5]
    need(symbols == size if exact else symbols <= size, f"chunk of {symbols}, not {size}")
    if (first, last) == (1, 0):
        need(len(chunk) == 6 + symbols, "stored symbols")
        return chunk[6:]
    need(first <= last, "table")
    if first == last:
        need(len(chunk) == 6 + 2 * -(-symbols // 4096) and not any(chunk[6:]), "bits of a single symbol")
        return bytes([first]) * symbols
    table, at, length, lengths = int.from_bytes(chunk[6:200], "little"), 0, 11, {}
    for symbol in range(first, last + 1):
        step, at = table >> at & 3, at + 2
        if step == 3:
            length, at = table >> at & 15, at + 4
        else:
            length += (0, 1, -1)[step]
        lengths[symbol] = length
    after = 6 + -(-at // 8)
    codes, word, bits = {}, 0, 0
    for length, symbol in sorted((length, symbol) for symbol, length in lengths.items() if length):
        word, bits = word << (length - bits), length
        codes[format(word, f"0{bits}b")], word = symbol, word + 1
    need(bits <= 11 and word == 1 << bits, "an incomplete code")
    segments = -(-symbols // 4096)
    position, out = after + 2 * segments, bytearray()
    for number in range(segments):
        length = int.from_bytes(chunk[after + 2 * number :][:2], "little")
        data, word, until = chunk[position : position + length], "", min(symbols, 4096 * (number + 1))
        for bit in (byte >> i & 1 for byte in data for i in range(8)):
            word += "01"[bit]
            if word in codes and len(out) < until:
                out.append(codes[word])
                word = ""
        need(len(out) == until, "a segment that ends early")
        position += length
    need(position == len(chunk), "a chunk's length")
    return bytes(out)


CODERS = {"raw": lambda chunk, size, exact: chunk, "zstd": frame, "huffman": huffman}


def decode(codec, dtype, parts, symbols, size):
    if codec in ("raw", "zstd"):
        return parts[0]
    if codec == "planes-huffman":
        return join_planes(parts, dtype, size)
    need(codec in ("rle-huffman", "mask-huffman"), f"codec {codec}")
    values = np.frombuffer(join_planes(parts[1:], dtype, size), f"<u{size}")
    out, position, used = np.zeros(symbols, f"<u{size}"), 0, 0
    if codec == "mask-huffman":
        mask = np.unpackbits(np.frombuffer(parts[0], np.uint8), bitorder="little")
        need(len(parts[0]) == -(-symbols // 8) and not mask[symbols:].any(), "mask")
        need(mask.sum() == len(values), "values that do not match the mask")
        out[mask[:symbols] == 1] = values
        return out.tobytes()
    for gap in parts[0]:
        position += gap
        if gap < 255:
            out[position] = values[used]
            position, used = position + 1, used + 1
    need(used == len(values), "values without gaps")
    return out.tobytes()


def join_planes(planes, dtype, size):
    words = np.zeros(len(planes[0]), f"<u{size}")
    for plane in planes:
        words = (words << 8 if size > 1 else words) | np.frombuffer(plane, np.uint8)
    if dtype in FLOATS:
        words = words >> 1 | words << (8 * size - 1)
    return words.astype(f"<u{size}").tobytes()
