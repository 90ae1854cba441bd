"""Load model folders that were spoiled in a thousand ways; print what became of each as a line of JSON.

In a process of its own, so that a hang ends it and its memory can be told. Memory is what a load adds: the highest
resident size from its start to its end, less the resident size when it starts (Linux counts anew on request). An
honest load is that of the same folder before it was spoiled.

    python tests/fuzzed_loads.py FOLDER SEED ROUNDS
"""

import gc
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

import mutations
import rmtkd
from conftest import FAMILY_NAMES, make_tokenizer, random_rows, tiny
from rmtkd import artifact
from rmtkd.artifact.files import WEIGHTS
from rmtkd.artifact.manifest import MANIFEST
from rmtkd.artifact.self_test import SELF_TEST, TOLERANCE
from rmtkd.cutting import cut_in_order
from rmtkd.errors import ArtifactError
from rmtkd.sites import embedding_site, feed_forward_site, find_sites, linear_site

HANG_S = 10
PEAK = Path("/proc/self/clear_refs")
MEASURES = PEAK.exists()
WORDS = 40_000
"""So many that a model is of several MB, against which overhead can be seen."""


class Own(nn.Module):
    """A model of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 32)
        self.up, self.down, self.out = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(self.down(torch.relu(self.up(self.words(input_ids).mean(1)))))


def own_sites(model: nn.Module) -> list[Any]:
    return [
        embedding_site(model, "words", name="words"),
        feed_forward_site(model, "inner", writers=["up"], reader="down"),
        linear_site(model, "bottleneck", writer="down", reader="out"),
    ]


def write_folders(root: Path) -> dict[str, Path]:
    """The honest folders by name: BERT in four forms, and every other family."""
    tokenizer = root / "tokenizer"
    make_tokenizer().save_pretrained(tokenizer)
    rows = list(random_rows(200))

    def write_folder(
        name: str, model: nn.Module, sites: list[Any], widths: dict[str, int], rows: Any = rows, **options: Any
    ) -> None:
        small, _ = cut_in_order(model, [site for site in sites if site.name in widths], widths, rows)
        if "example" in options:
            options["sites"] = own_sites(small)
        artifact.save(small, root / name, card="# A card", extra_files=sorted(tokenizer.iterdir()), **options)

    bert = tiny("bert", vocab_size=WORDS)
    sites = list(find_sites(bert))
    write_folder("layers", bert, sites, {site.name: site.width // 2 for site in sites})
    write_folder("stock", bert, sites, {site.name: 24 for site in sites if site.setting})
    write_folder("embedding", bert, sites, {site.name: 16 for site in sites if site.factorizes})
    own = Own()
    words = [{"input_ids": batch["input_ids"]} for batch in rows]
    write_folder("own", own, own_sites(own), {"words": 16, "inner": 32, "bottleneck": 16}, rows=words, example=words[0])
    for family in FAMILY_NAMES:
        if family != "bert":
            model = tiny(family, vocab_size=WORDS)
            sites = list(find_sites(model))
            write_folder(family, model, sites, {site.name: site.width // 2 for site in sites})
    shutil.rmtree(tokenizer)
    return {path.name: path for path in sorted(root.iterdir())}


READ = (rmtkd.load, rmtkd.inspect)
FORMS = ("layers", "stock", "own", "embedding")
Mutation = tuple[str, str, Callable[[Path, random.Random], None]]
"""A folder's name, what is done, and what does it to a copy of the folder."""


def of_content(name: str, change: Callable[[bytes, random.Random], bytes], sealed: bool) -> Callable[..., None]:
    def spoil(folder: Path, dice: random.Random) -> None:
        file = folder / name
        before = file.read_bytes()
        for _ in range(9):  # until something is changed
            after = change(before, dice)
            if after != before:
                break
        file.unlink()  # a second name of the honest file
        file.write_bytes(after)
        if sealed:
            mutations.reseal(folder)

    return spoil


def of_file(name: str, change: Callable[[Path, random.Random], None], sealed: bool) -> Callable[..., None]:
    def spoil(folder: Path, dice: random.Random) -> None:
        file = folder / name
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content)
        change(file, dice)
        if sealed:
            mutations.reseal(folder)

    return spoil


def of_other_folder(name: str, other: Path, sealed: bool) -> Callable[..., None]:
    return of_file(name, lambda file, dice: file.write_bytes((other / name).read_bytes()), sealed)  # type: ignore


def of_manifest(change: Callable[[Any, random.Random], None]) -> Callable[..., None]:
    def spoil(folder: Path, dice: random.Random) -> None:
        mutations.reseal(folder, lambda manifest: change(manifest, dice))

    return spoil


def unsealed(folders: dict[str, Path]) -> Iterator[Mutation]:
    """Every file of the four forms in every way."""
    for form in FORMS:
        for path in sorted(folders[form].iterdir()):
            for what, change in mutations.mutations_of(path).items():
                yield form, f"{path.name}: {what}", of_content(path.name, change, False)
            for what, alter in mutations.FILES.items():
                yield form, f"{path.name}: {what}", of_file(path.name, alter, False)
            for other in FORMS:
                there = folders[other] / path.name
                if there.is_file() and there.read_bytes() != path.read_bytes():
                    yield form, f"{path.name}: of {other}", of_other_folder(path.name, folders[other], False)


def resealed(folders: dict[str, Path]) -> Iterator[Mutation]:
    """The same with all checksums made right again; and every entry of every family's configuration."""
    read = ("config.json", WEIGHTS, SELF_TEST)  # all others are only compared with their checksums
    for form in FORMS:
        for path in sorted(folders[form].iterdir()):
            if path.name == MANIFEST or (form != "layers" and path.name not in read):
                continue
            for what, change in mutations.mutations_of(path).items():
                yield form, f"{path.name}: {what}", of_content(path.name, change, True)
            for what, alter in mutations.FILES.items():
                if what != "a terabyte":
                    yield form, f"{path.name}: {what}", of_file(path.name, alter, True)
            for other in FORMS:
                there = folders[other] / path.name
                if there.is_file() and there.read_bytes() != path.read_bytes():
                    yield form, f"{path.name}: of {other}", of_other_folder(path.name, folders[other], True)
        for what, tree in mutations.TREES.items():
            for _ in range(8):
                yield form, f"{MANIFEST}: {what}", of_manifest(tree)
    for name, folder in folders.items():
        if name != "own":
            config = json.loads((folder / "config.json").read_bytes())
            stock = CONFIG_MAPPING[config["model_type"].removeprefix("rmtkd_")]
            beyond = mutations.ENTRIES if name in ("layers", "stock", "eurobert") else ()
            for key in sorted({*config, *stock().to_dict(), *beyond}):
                yield name, f"config.json: {key}", of_content("config.json", mutations.of_entry(key), True)
    for name in [name for name in ("modernbert", "eurobert") if name in folders] * 12:
        yield name, "config.json: rotary", of_content("config.json", mutations.of_tree(mutations.rotary), True)


TABLES = {"unsealed": unsealed, "resealed": resealed}

# ---------------------------------------------------------------------- loading


def status(field: str) -> int:
    """A size of this process in bytes: VmRSS, or VmHWM, the highest that it was; 0 where the system does not say."""
    if not MEASURES:
        return 0
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


class Watch:
    """Whatever Python itself does that loading has no business with: an audit hook, which can not be taken off."""

    FORBIDDEN = re.compile(
        r"os\.(system|exec|spawn|posix_spawn|fork|remove|rename|mkdir|rmdir|link|symlink|chmod|truncate)|"
        r"(shutil|subprocess|socket|urllib|pickle|ctypes)\."
    )

    def __init__(self) -> None:
        self.on, self.seen, self.folder = False, [], ""
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if self.FORBIDDEN.match(event):
            self.seen.append(f"{event} {str(arguments)[:80]}")
        elif event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.seen.append(f"open to write {path!r}")
        elif event in ("exec", "compile"):
            code = arguments[0] if event == "exec" else arguments[1]
            name = str(getattr(code, "co_filename", code))
            if name.startswith(self.folder) or not name.startswith((sys.prefix, sys.base_prefix, "<")):
                self.seen.append(f"{event} {name}")


def attempt(read: Callable[..., Any], folder: Path, watch: Watch) -> tuple[Any, dict[str, Any]]:
    """What reading a folder gives, and the facts of it."""
    build = Own if folder.stem == "own" else None
    if MEASURES:
        PEAK.write_text("5")  # the highest size is counted from here on
    base, began = status("VmRSS"), time.monotonic()
    watch.seen, watch.on = [], True
    result, outcome = None, "accepted"
    signal.setitimer(signal.ITIMER_REAL, HANG_S)  # of which the process dies
    try:
        result = read(folder, build)
        if isinstance(result, nn.Module):
            sum(float(parameter.sum()) for parameter in result.parameters())  # weights are read when they are used
    except ArtifactError as error:
        outcome = "refused"
        if len(str(error)) > 2000:
            outcome = f"a message of {len(str(error))} letters"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        watch.on = False
    seconds = time.monotonic() - began
    return result, {"outcome": outcome, "extra": status("VmHWM") - base, "seconds": seconds, "seen": watch.seen}


def differs(model: nn.Module, folder: Path) -> float:
    """By how much a loaded model's answers differ from those stored, relatively."""
    tensors = load_file(folder / SELF_TEST)
    expected = tensors.pop("logits")
    with torch.no_grad():
        output = model(**{name.removeprefix("inputs."): value for name, value in tensors.items()})
    got = output if isinstance(output, Tensor) else output.logits
    return float((got - expected).abs().max() / expected.abs().max())


def write(what: str, **facts: Any) -> None:
    print(json.dumps({"what": what, **facts}), flush=True)


def main(root: Path, seed: int, rounds: int) -> None:
    """Every mutation of both tables, with as many throws of the dice as there are rounds."""
    torch.set_num_threads(1)
    folders = write_folders(root / "honest")
    watch = Watch()
    for folder in [*folders.values()] * 2:
        for read in READ:
            attempt(read, folder, watch)  # which imports what is imported once
    gc.collect()
    gc.freeze()
    honest = {}
    for name, folder in folders.items():
        facts = [attempt(read, folder, watch)[1] for read in READ]
        honest[name] = max(fact["extra"] for fact in facts)
        for read, fact in zip(READ, facts, strict=True):
            write("nothing", table="honest", folder=name, call=read.__name__, number=0, share=1.0, **fact)
    for table, make in TABLES.items():
        for number, (name, what, spoil) in enumerate(list(make(folders)) * rounds):
            dice = random.Random(f"{seed} {number}")
            facts = {"table": table, "folder": name, "number": number}
            copy = root / f"{name}.copy"
            shutil.copytree(folders[name], copy, copy_function=os.link)
            (copy / MANIFEST).unlink()
            shutil.copyfile(folders[name] / MANIFEST, copy / MANIFEST)
            spoil(copy, dice)
            write(what, call="begun", **facts)
            for read in READ if table == "unsealed" or number % 8 == 0 else READ[:1]:
                watch.folder = str(copy)
                result, fact = attempt(read, copy, watch)
                if fact["extra"] > honest[name]:  # what is imported once, on the way to a new error, does not count
                    result, again = attempt(read, copy, watch)
                    fact["extra"] = min(fact["extra"], again["extra"])
                if isinstance(result, nn.Module) and not differs(result, copy) <= TOLERANCE:
                    fact["outcome"] = "other answers"
                write(what, call=read.__name__, share=fact["extra"] / max(1, honest[name]), **facts, **fact)
                del result
            shutil.rmtree(copy)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
