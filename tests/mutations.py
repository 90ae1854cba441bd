"""Ways to spoil a file of a model folder, as an accident or an attacker would."""

import hashlib
import json
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rmtkd.artifact.manifest import MANIFEST

Dice = random.Random

# ---------------------------------------------------------------------- of bytes


def truncate(content: bytes, dice: Dice) -> bytes:
    return content[: dice.choice([dice.randrange(len(content)), len(content) - 1, min(8, len(content) - 1)])]


def extend(content: bytes, dice: Dice) -> bytes:
    return content + dice.choice([b"\0", b" ", b"\n", dice.randbytes(dice.randint(1, 999)), content])


def flip_bits(content: bytes, dice: Dice) -> bytes:
    changed = bytearray(content)
    for place in dice.sample(range(len(content)), min(len(content), dice.choice([1, 1, 1, 9]))):
        changed[place] ^= 1 << dice.randrange(8)
    return bytes(changed)


def flip_early_bit(content: bytes, dice: Dice) -> bytes:
    """Where headers are."""
    return flip_bits(content[:200], dice) + content[200:]


def swap_ranges(content: bytes, dice: Dice) -> bytes:
    a, b, c, d = sorted(dice.randrange(len(content) + 1) for _ in range(4))
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def zero_range(content: bytes, dice: Dice) -> bytes:
    a, b = sorted(dice.randrange(len(content) + 1) for _ in range(2))
    return content[:a] + bytes(b - a) + content[b:]


def repeat_range(content: bytes, dice: Dice) -> bytes:
    a = dice.randrange(len(content))
    b = a + dice.randint(1, 64)
    return content[:b] + content[a:b] + content[b:]


def drop_range(content: bytes, dice: Dice) -> bytes:
    a = dice.randrange(len(content))
    return content[:a] + content[a + dice.randint(1, 64) :]


def other_bytes(content: bytes, dice: Dice) -> bytes:
    return dice.randbytes(len(content))


BYTES: Mapping[str, Callable[[bytes, Dice], bytes]] = {
    "truncate": truncate,
    "empty": lambda content, dice: b"",
    "extend": extend,
    "flip bits": flip_bits,
    "flip an early bit": flip_early_bit,
    "swap ranges": swap_ranges,
    "zero a range": zero_range,
    "repeat a range": repeat_range,
    "drop a range": drop_range,
    "other bytes": other_bytes,
    "pickle": lambda content, dice: b"\x80\x04cposix\nsystem\n(S'touch executed'\ntR.",
    "script": lambda content, dice: b"open('executed', 'w')\n",
    "byte order mark": lambda content, dice: b"\xef\xbb\xbf" + content,
    "sixteen bits a letter": lambda content, dice: content[:999].decode("latin-1").encode("utf-16"),
    "other line ends": lambda content, dice: content.replace(b"\n", b"\r\n") + b"\r\n",
}

# ---------------------------------------------------------------------- of files


def link_to(target: str) -> Callable[[Path, Dice], None]:
    def link(file: Path, dice: Dice) -> None:
        file.unlink()
        file.symlink_to(target)

    return link


def link_to_itself(file: Path, dice: Dice) -> None:
    file.unlink()
    file.symlink_to(file.name)


def link_to_fifo(file: Path, dice: Dice) -> None:
    os.mkfifo(file.with_name("fifo"))
    link_to("fifo")(file, dice)


def become_fifo(file: Path, dice: Dice) -> None:
    file.unlink()
    os.mkfifo(file)


def become_folder(file: Path, dice: Dice) -> None:
    file.unlink()
    file.mkdir()


def become_terabyte(file: Path, dice: Dice) -> None:
    """Without taking any place on the disk."""
    os.truncate(file, 10**12)


def other_file(file: Path, dice: Dice) -> None:
    others = [path for path in file.parent.iterdir() if path.is_file() and path.read_bytes() != file.read_bytes()]
    file.write_bytes(dice.choice(sorted(others)).read_bytes())


def other_name(file: Path, dice: Dice) -> None:
    file.rename(file.with_name(dice.choice([file.name.upper(), f"{file.name} ", f"./{file.name}.bak"])))


FILES: Mapping[str, Callable[[Path, Dice], None]] = {
    "delete": lambda file, dice: file.unlink(),
    "other name": other_name,
    "other file of the folder": other_file,
    "folder": become_folder,
    "fifo": become_fifo,
    "link to a fifo": link_to_fifo,
    "link elsewhere": link_to("/etc/hostname"),
    "link to a folder": link_to("/etc"),
    "dangling link": link_to("/nowhere"),
    "link to itself": link_to_itself,
    "endless link": link_to("/dev/zero"),
    "link to the process": link_to("/proc/self/environ"),
    "a terabyte": become_terabyte,
}

# ---------------------------------------------------------------------- of JSON

NUMBERS = (0, -1, 1, 2, 3, 7, 1000, 10**5, 10**7, 10**9, 10**12, 2**31, 2**63, 2**64 + 1, 10**400, 10**5000)
TEXTS = ("", "7", "1e99", "nan", "os.system", "__import__('os').system('touch executed')", "../" * 40 + "etc/passwd")
ODD = (None, True, False, 0.5, 1e9, 1e308, float("inf"), float("nan"), "x" * 10_000, "\ud800", "\0", [], {})
COMPOUND = ([1, 2], [[]], ["full_attention"] * 9, {"0": "a"}, {"1000000000": {"head_dim": 8}}, {"rope_type": "yarn"})
ROPE = tuple(
    {"rope_type": kind, "rope_theta": 10000.0, "factor": factor, "partial_rotary_factor": factor}
    for kind in ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "os.system")
    for factor in (0, -1.0, 2.0, 1e7, 1e12, "x")
)
NAMES = ("", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "a\0b", "\ud800", "x" * 300, "rmtkd.json\u200b", "con")
"""File names that are none, lie elsewhere, are too long, or look like one of ours."""
FULL_WIDTH = "".join(chr(ord(letter) + 0xFEE0) if letter > " " else letter for letter in MANIFEST)


def nested(depth: int, leaf: Any = 0) -> Any:
    for level in range(depth):
        leaf = [leaf] if level % 2 else {"a": leaf}
    return leaf


def hostile_value(dice: Dice) -> Any:
    kind = dice.choice([NUMBERS, NUMBERS, TEXTS, ODD, COMPOUND, ROPE, "nested"])
    return nested(dice.choice([90, 300, 480, 600, 980])) if kind == "nested" else dice.choice(kind)


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a tree with each of its keys or indices."""
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, dict | list):
            for key in list(node) if isinstance(node, dict) else range(len(node)):
                yield node, key
                stack.append(node[key])


def spoil_value(tree: Any, dice: Dice) -> None:
    node, key = dice.choice(list(places(tree)))
    node[key] = hostile_value(dice)


def spoil_entry(tree: Any, dice: Dice) -> None:
    """One of the first level, where most of what is read lies."""
    tree[dice.choice(list(tree))] = hostile_value(dice)


def drop_key(tree: Any, dice: Dice) -> None:
    node, key = dice.choice(list(places(tree)))
    del node[key]


def rename_key(tree: Any, dice: Dice) -> None:
    node, key = dice.choice([(node, key) for node, key in places(tree) if isinstance(node, dict)])
    node[dice.choice([*NAMES, FULL_WIDTH, key + " ", key.upper(), "__class__"])] = node.pop(key)


def swap_values(tree: Any, dice: Dice) -> None:
    (a, i), (b, j) = (dice.choice([(n, k) for n, k in places(tree) if not isinstance(n[k], dict)]) for _ in range(2))
    a[i], b[j] = b[j], a[i]


def repeat_value(tree: Any, dice: Dice) -> None:
    """A list that goes on, a dictionary with another entry."""
    nodes = [tree, *(node[key] for node, key in places(tree) if isinstance(node[key], dict | list))]
    node = dice.choice(nodes)
    if isinstance(node, list):
        node.extend(node[:3] * dice.choice([1, 1000]) or [0])
    else:
        node[dice.choice(NAMES)] = next(iter(node.values()), hostile_value(dice))


TREES: Mapping[str, Callable[[Any, Dice], None]] = {
    "hostile value": spoil_value,
    "hostile entry": spoil_entry,
    "key dropped": drop_key,
    "key renamed": rename_key,
    "values swapped": swap_values,
    "one more": repeat_value,
}


def dumps(tree: Any, **options: Any) -> str:
    """JSON of any depth, with whole numbers of any length."""
    limits = sys.getrecursionlimit(), sys.get_int_max_str_digits()
    sys.setrecursionlimit(10_000)
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(tree, **options)
    finally:
        sys.setrecursionlimit(limits[0])
        sys.set_int_max_str_digits(limits[1])


def of_tree(change: Callable[[Any, Dice], None]) -> Callable[[bytes, Dice], bytes]:
    def changed(content: bytes, dice: Dice) -> bytes:
        tree = json.loads(content)
        change(tree, dice)
        return dumps(tree, indent=1).encode()

    return changed


ENTRIES = (
    *("_attn_implementation", "attn_implementation", "auto_map", "base_model_pp_plan", "base_model_tp_plan"),
    *("_commit_hash", "custom_pipelines", "head_dim", "num_labels", "pruned_heads", "quantization_config"),
    *("rope_scaling", "sub_configs", "attribute_map", "torch_dtype", "transformers_weights", "trust_remote_code"),
    *("__class__", "from_dict", "to_dict"),
)
"""What a configuration is not known to say, but could try."""


def rotary(tree: Any, dice: Dice) -> None:
    """Rotary positions with frequencies by the billion, for all layers or for each kind of them."""
    rope = {"rope_theta": 10000.0, "factor": 2.0, "partial_rotary_factor": dice.choice([1e6, 1e7, 1e9, 1e12])}
    rope["rope_type"] = dice.choice(["linear", "dynamic", "yarn", "longrope", "llama3", "proportional"])
    tree["rope_parameters"] = dice.choice([rope, {"full_attention": rope, "sliding_attention": rope}])


def of_entry(key: str) -> Callable[[bytes, Dice], bytes]:
    def spoil(tree: Any, dice: Dice) -> None:
        tree[key] = hostile_value(dice)

    return of_tree(spoil)


def duplicate_key(content: bytes, dice: Dice) -> bytes:
    text = content.decode()
    key = dice.choice(list(json.loads(text)))
    return f"{{{json.dumps(key)}: {dumps(hostile_value(dice))}, {text.strip()[1:]}".encode()


def deep(content: bytes, dice: Dice) -> bytes:
    """So deep that it may be read, but not written."""
    depth = sys.getrecursionlimit() - dice.randint(0, 40)
    return content.rstrip()[:-1] + b', "more": ' + b"[" * depth + b"]" * depth + b"}"


def many_nothings(content: bytes, dice: Dice) -> bytes:
    """Text that takes twenty times as much memory when it is read: 4 MB of empty lists."""
    return content.rstrip()[:-1] + b', "more": [' + b"[]," * 1_400_000 + b"0]}"


JSON: Mapping[str, Callable[[bytes, Dice], bytes]] = {
    **{name: of_tree(change) for name, change in TREES.items()},
    "duplicate key": duplicate_key,
    "nested without end": lambda content, dice: b'{"a":' * 100_000,
    "as deep as can be read": deep,
    "many nothings": many_nothings,
    "another value": lambda content, dice: dumps(hostile_value(dice)).encode(),
    "number beyond floats": lambda content, dice: content.replace(b"0", b"1e999", 1),
    "number without end": lambda content, dice: content.replace(b"0", b"9" * 10**5, 1),
}

# ---------------------------------------------------------------------- of tensors


def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined(header: str, data: bytes) -> bytes:
    padded = header.encode() + b" " * (-len(header.encode()) % 8)
    return len(padded).to_bytes(8, "little") + padded + data


def of_header(change: Callable[[dict[str, Any], Dice], None]) -> Callable[[bytes, Dice], bytes]:
    def changed(content: bytes, dice: Dice) -> bytes:
        header, data = parts(content)
        change(header, dice)
        return joined(dumps(header), data)

    return changed


def tensor(header: dict[str, Any], dice: Dice) -> dict[str, Any]:
    return header[dice.choice([name for name in header if name != "__metadata__"])]


def move_offsets(header: dict[str, Any], dice: Dice) -> None:
    entry = tensor(header, dice)
    begin, end = entry["data_offsets"]
    entry["data_offsets"] = dice.choice(
        [
            [end, begin],
            [begin - 4, end - 4],
            [begin, end + 4],
            [0, end - begin],
            [begin, 2**62],
            [2**64 - 1, 1],
            [-1, 3],
        ]
    )


def another_dtype(header: dict[str, Any], dice: Dice) -> None:
    entry = tensor(header, dice)
    kinds = ["F64", "F32", "I32", "U32", "F16", "BF16", "I64", "BOOL", "C64", "F8_E4M3", "F4", "U8", "Q4", "", None, 7]
    entry["dtype"] = dice.choice(kinds)


def another_dtype_that_fits(header: dict[str, Any], dice: Dice) -> None:
    entry = tensor(header, dice)
    entry["dtype"] = {"I64": "F64"}.get(entry["dtype"], dice.choice(["I32", "U32"]))


def swapped_shape(header: dict[str, Any], dice: Dice) -> None:
    entry = dice.choice([e for n, e in header.items() if n != "__metadata__" and len(set(e["shape"])) > 1])
    entry["shape"].reverse()


def another_shape(header: dict[str, Any], dice: Dice) -> None:
    entry = tensor(header, dice)
    shape, count = entry["shape"], 1
    for side in shape:
        count *= side
    entry["shape"] = dice.choice([[count], [1, *shape], [2**63, 0], [2**32, 2**32], [-1, count], [], [0], [1.5], "5"])


def swapped_tensors(header: dict[str, Any], dice: Dice) -> None:
    names = [name for name in header if name != "__metadata__"]
    a, b = dice.sample(names, 2)
    header[a], header[b] = header[b], header[a]


def renamed_tensor(header: dict[str, Any], dice: Dice) -> None:
    name = dice.choice([name for name in header if name != "__metadata__"])
    header[dice.choice([f"{name}.x", "", "__metadata__", "..", "inputs.labels", "inputs.\0"])] = header.pop(name)


def many_empty_tensors(header: dict[str, Any], dice: Dice) -> None:
    """Each takes fifty bytes here and a thousand as a tensor."""
    header |= {f"more.{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(60_000)}


def duplicate_tensor(content: bytes, dice: Dice) -> bytes:
    header, data = parts(content)
    name, entry = dice.choice([(n, e) for n, e in header.items() if n != "__metadata__"])
    odd = dice.choice([entry, {**entry, "shape": [0], "data_offsets": [0, 0]}, {**entry, "dtype": "I32"}])
    return joined(f"{{{json.dumps(name)}: {json.dumps(odd)}, {json.dumps(header)[1:]}", data)


def header_length(content: bytes, dice: Dice) -> bytes:
    size = int.from_bytes(content[:8], "little")
    odd = dice.choice([0, 1, size - 1, size + 1, size + 8, len(content), 10**8, 2**31, 2**63, 2**64 - 1])
    return odd.to_bytes(8, "little") + content[8:]


def long_input(content: bytes, dice: Dice) -> bytes:
    """Tokens of which attention makes a matrix: 60,000 of them need 14 GB a head."""
    header, data = parts(content)
    length = dice.choice([30, 2000, 60_000])
    header = {"logits": {**header["logits"], "data_offsets": [0, 24]}}
    for name in ("inputs.input_ids", "inputs.attention_mask"):
        begin = 24 + (name == "inputs.attention_mask") * 16 * length
        header[name] = {"dtype": "I64", "shape": [2, length], "data_offsets": [begin, begin + 16 * length]}
    return joined(json.dumps(header), data[:24] + (1).to_bytes(8, "little") * 4 * length)


def more_input(content: bytes, dice: Dice) -> bytes:
    """Another argument of the model's: a flag, labels, what else a tensor can be taken for."""
    header, data = parts(content)
    names = ["labels", "token_type_ids", "position_ids", "inputs_embeds", "output_hidden_states", "output_attentions"]
    name, end = dice.choice([*names, "past_key_values", "return_dict", "self"]), len(data)
    header[f"inputs.{name}"] = {"dtype": "I64", "shape": [2], "data_offsets": [end, end + 16]}
    return joined(json.dumps(header), data + (dice.choice([0, 1, 10**12])).to_bytes(8, "little") * 2)


def low_bit(content: bytes, dice: Dice) -> bytes:
    """Of a weight: nobody would notice, but for the checksum."""
    _, data = parts(content)
    place = len(content) - len(data) + 4 * dice.randrange(len(data) // 4)
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


TENSORS: Mapping[str, Callable[[bytes, Dice], bytes]] = {
    "offsets moved": of_header(move_offsets),
    "another type": of_header(another_dtype),
    "another type of the same size": of_header(another_dtype_that_fits),
    "shape swapped": of_header(swapped_shape),
    "another shape": of_header(another_shape),
    "tensors swapped": of_header(swapped_tensors),
    "tensor renamed": of_header(renamed_tensor),
    "many empty tensors": of_header(many_empty_tensors),
    "hostile value in the header": of_header(spoil_value),
    "key dropped from the header": of_header(drop_key),
    "tensor twice": duplicate_tensor,
    "header length": header_length,
    "low bit": low_bit,
    "trailing bytes": lambda content, dice: content + bytes(dice.choice([1, 4, 4096])),
}
SELF_TESTS: Mapping[str, Callable[[bytes, Dice], bytes]] = {"long input": long_input, "more input": more_input}


def mutations_of(file: Path) -> dict[str, Callable[[bytes, Dice], bytes]]:
    """All changes of content that a file's kind allows."""
    more = {".json": JSON, ".safetensors": TENSORS}.get(file.suffix, {})
    return {**BYTES, **more, **(SELF_TESTS if file.name == "self-test.safetensors" else {})}


# ---------------------------------------------------------------------- checksums made right again


def reseal(folder: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
    """Make sizes, checksums and seal right, as somebody would who means it; then change the manifest, and seal that."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["checksum"]
    for name in manifest["files"]:
        content = (folder / name).read_bytes() if (folder / name).is_file() else b""
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change(manifest)
    body = dumps(manifest, indent=1)
    checksum = hashlib.sha256(body.encode()).hexdigest()
    (folder / MANIFEST).write_text(body[:-2] + f',\n "checksum": "{checksum}"\n}}\n')
