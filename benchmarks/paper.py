"""What the tables of the published evaluation share: train a model as published, compress it, measure both, resume.

A table is a list of entries (network, task, start) and of settings. Of every entry the teacher is trained once, epoch
by epoch until selection rows pass its threshold; of every setting one run of `rmtkd.compress` is made, which goes on
where it was left; and every measurement is one JSON file in `benchmarks/results/NAME/`. Folders of models and runs are
in `--cache`.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rmtkd
from packed import unpack
from paper_table import Reported, table
from records import arguments, identity, print_event, publish, tried
from rmtkd import batches as batching
from rmtkd import recipes
from rmtkd.checkpoint import checksum
from rmtkd.distillation import Recovery, Teacher
from rmtkd.energy import Counter, Metered, measure_energy
from rmtkd.environment import precision_on
from rmtkd.interruption import interruptible
from rmtkd.measurement import evaluation, measure, quality, time_forward
from rmtkd.memory import held_bytes
from rmtkd.modules import randomize
from rmtkd.recipes.checkpoints import save_classifier
from rmtkd.recipes.recipe import Source
from rmtkd.sites import encoder_of
from rmtkd.storage import tensors_of
from rmtkd.teaching import SAVE_EVERY, TrainingFile
from rmtkd.training import Phase
from rmtkd.writing import new_folder

RESULTS = Path(__file__).parent / "results"
BATCH = 32
"""Rows at which throughput, memory and energy are measured, beside latency at one."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A network and a task.

    Attributes:
        name: of the network.
        task: a recipe.
        start: makes it, untrained, from the data folder; None where `pretrained` names a checkpoint to fine-tune.
        threshold: selection accuracy at which the teacher is trained enough.
        epochs: of its training, at most.
        training: how; with a checkpoint, the recipe's own way.
        recovery: epochs after the cut.
        options: of all its runs.
        passes: at which latency is measured.
        files: of the data folder, which the start reads there.
    """

    name: str
    task: str
    start: Callable[[Path | None, int], Source] | None = None
    threshold: float = 1.0
    epochs: int = 5
    training: Recovery | None = None
    recovery: float = 3.0
    options: Mapping[str, Any] = field(default_factory=dict)
    passes: int = 1000
    files: Sequence[str] = ()

    @property
    def key(self) -> str:
        """Its name among files."""
        return f"{self.name}-{self.task}"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One table at one scale.

    Attributes:
        name: of the table.
        settings: options of `rmtkd.compress` by name, which may depend on the entry; with None the teacher is not
            cut, and learns on.
        prepared: folder of packed rows (`parts.py`), in place of the data's.
    """

    name: str
    scale: str
    settings: Mapping[str, Callable[[Entry], Mapping[str, Any]] | None]
    data: Path | None
    cache: Path
    results: Path
    seed: int
    device: str
    pretrained: str | None = None
    meter: Counter | None = None
    prepared: Path | None = None

    def command(self, entry: Entry, part: str) -> str:
        """What makes this cell, and its teacher where that is not there yet; folders and files by what they are."""
        only, setting = f"--only {entry.key}", "" if part == "teacher" else f" --settings {part}"
        where = f"--seeds {self.seed} --device {self.device}"
        data = "" if self.data is None else " --data DIR"
        if self.prepared is not None:
            first = f"rmtkd bench parts prepare {self.name} --scale {self.scale}{data} {only} --out PARTS"
            return f"{first} && rmtkd bench parts run PARTS{setting} {where}"
        checkpoint = "" if entry.start else " --pretrained CHECKPOINT"
        meter = "" if self.meter is None else " --meter FILE"
        return f"rmtkd bench {self.name} --scale {self.scale}{data}{checkpoint} {only}{setting} {where}{meter}"

    def run(self, entry: Entry) -> None:
        """All cells of an entry; without its teacher none."""
        work = Work(bench=self, entry=entry)
        if (teacher := self._cell(entry, "teacher", partial(train, work))) is not None:
            for setting, options in self.settings.items():
                make = partial(compress, work, setting, options) if options else partial(go_on, work)
                self._cell(entry, setting, make, teacher["teacher_id"])

    def _cell(
        self, entry: Entry, part: str, run: Callable[[], dict[str, Any]], teacher_id: str | None = None
    ) -> dict[str, Any] | None:
        def described() -> dict[str, Any]:
            facts = {"network": entry.name, "task": entry.task, "part": part, "scale": self.scale, "seed": self.seed}
            return {**facts, "command": self.command(entry, part), **run()}

        path = self.results / f"{self.scale}-{entry.key}-{part}-seed{self.seed}.json"
        return tried(path, described, teacher_id=teacher_id)


@dataclass(frozen=True, kw_only=True)
class Work:
    """An entry with its rows and folders."""

    bench: Bench
    entry: Entry

    @property
    def recipe(self) -> Any:
        """The task."""
        return recipes.get(self.entry.task)

    @property
    def folder(self) -> Path:
        """Where its models are."""
        return self.bench.cache / f"{self.bench.scale}-{self.entry.key}-seed{self.bench.seed}"

    @cached_property
    def teacher(self) -> Source:
        """The trained network."""
        return self.recipe.load(str(self.folder / "teacher"), self.bench.data)

    def rows(self, source: Source) -> Any:
        """The rows by role."""
        if self.bench.prepared is not None:
            return unpack(self.bench.prepared / self.entry.key, self.bench.seed)
        return self.recipe.rows(self.bench.data, source, self.bench.seed)


class Passed(Exception):
    """Training ends here."""


def train(work: Work) -> dict[str, Any]:
    """The teacher: from its start until selection rows pass the threshold, or the epochs are over."""
    entry, bench = work.entry, work.bench
    if entry.start is None:
        source = work.recipe.start(bench.pretrained, bench.seed, bench.data)
    else:
        source = entry.start(bench.data, bench.seed)
    how = {"recovery": entry.training or work.recipe.training, "threshold": entry.threshold}
    trained = learn(work, source, "teacher", epochs=entry.epochs, **how)
    return {"start": "random" if entry.start else "pretrained", "teacher_id": identity(source.model), **trained}


def go_on(work: Work) -> dict[str, Any]:
    """The teacher, not cut, trained for as long as its students recover and at the whole rate of the recipe, which they
    take after deep cuts alone: what learning on may bring by itself."""
    source, beside = work.recipe.load(str(work.folder / "teacher"), work.bench.data), work.teacher.model
    recovery = work.recipe.options.get("recovery", Recovery())
    return learn(work, source, "uncut", epochs=work.entry.recovery, recovery=recovery, beside=beside)


def learn(
    work: Work,
    source: Source,
    part: str,
    *,
    epochs: float,
    recovery: Recovery,
    threshold: float = 1.0,
    beside: nn.Module | None = None,
) -> dict[str, Any]:
    """A training, and what came of it. After Ctrl-C the next call goes on at the same step.

    Args:
        work: its entry and folders.
        source: what learns; its model is changed in place.
        part: name among files.
        epochs: at most.
        recovery: how.
        threshold: selection accuracy, after a whole epoch, at which it ends.
        beside: teaches, and is what latency is measured beside; None where labels alone do.
    """
    bench, rows = work.bench, work.rows(source)
    student, passes = source.model.to(bench.device), len(rows.train)
    steps = round(epochs * passes)
    asked_for = json.dumps([part, steps, asdict(recovery), bench.seed, rows.note])
    left = TrainingFile(bench.cache / f"{work.folder.name}-{part}", checksum(tensors_of(student), asked_for))

    def between(phase: Phase) -> None:
        step = len(phase.losses)
        print_event({"event": "step", "step": step, "loss": phase.losses[-1]})
        if step % passes == 0 and step < phase.steps:
            with evaluation(student):
                seen.append(quality(student, rows.selection)["accuracy"].value)
            print(f"epoch {step // passes}: {seen[-1]:.4f} of selection rows", flush=True)
            student.train()
        is_passed = bool(seen) and seen[-1] >= threshold
        if asked.stop or is_passed or step == phase.steps or left.age() > SAVE_EVERY:
            left.save(phase, seen=seen)
        if asked.stop:
            raise KeyboardInterrupt
        if is_passed:
            raise Passed

    torch.manual_seed(bench.seed)
    phase = Phase(
        student,
        rows.train,
        steps=steps,
        teacher=None if beside is None else Teacher(beside.to(bench.device)),
        recovery=recovery,
        precision=precision_on(bench.device),
    )
    seen: list[float] = (left.restore(phase) or {"seen": []})["seen"]
    try:
        if seen and seen[-1] >= threshold:
            raise Passed
        with interruptible() as asked:
            phase.run(between)
    except Passed:
        if phase.average:
            with torch.no_grad():
                phase.average.apply()
    # What is there is half written, or of an earlier teacher, whose runs go with it.
    shutil.rmtree(work.folder if beside is None else work.folder / part, ignore_errors=True)
    work.folder.mkdir(parents=True, exist_ok=True)
    with new_folder(work.folder / part) as partial_folder:
        save_classifier(source, partial_folder)
    found = measures(work, source.model, rows, work.folder / part, beside=beside)
    left.drop()
    return {
        "training": asdict(recovery),
        "epochs": len(phase.losses) / passes,
        "threshold": threshold,
        "selection_by_epoch": seen,
        "rows": rows.note,
        "losses": phase.losses[:: max(1, len(phase.losses) // 200)],
        **found,
    }


def compress(work: Work, setting: str, options_of: Callable[[Entry], Mapping[str, Any]]) -> dict[str, Any]:
    """One run of the library, and what came of it."""
    bench, source = work.bench, work.teacher
    rows, out = work.rows(source), work.folder / setting
    asked = dict(options_of(work.entry))
    recovery = Recovery(**{**asdict(work.recipe.options.get("recovery", Recovery())), **asked.pop("recovery", {})})
    given = {"train": rows.train, "selection": rows.selection, "report": rows.report}
    given["example"] = work.recipe.example(source.model, rows)
    options = {"epochs": work.entry.recovery, "seed": bench.seed, "device": bench.device, "recovery": recovery}
    if (out / "config.json").exists():
        result = rmtkd.resume(out, source.model, **given, on_event=print_event)
    else:
        options |= {**work.entry.options, **asked}
        result = rmtkd.compress(source.model, **given, **options, out=out, on_event=print_event)
    record = result.record
    if not record["finished"]:
        raise KeyboardInterrupt  # the run goes on next time
    return {
        "options": record["config"],
        "stop_reason": record["stop_reason"],
        "rounds": len(record["rounds"]),
        "before_recovery": record["rounds"][0]["accuracy_cut"] if record["rounds"] else None,
        "baseline": record["baseline"],
        "widths": result.plan.widths,
        **measures(work, result.model.to(bench.device), rows, out / "model", beside=source.model.to(bench.device)),
    }


def measures(
    work: Work, model: nn.Module, rows: Any, folder: Path, *, beside: nn.Module | None = None
) -> dict[str, Any]:
    """What a model costs and how well it does, on report rows; latency in turns with the model `beside` it."""
    bench = work.bench
    example = batching.to(work.recipe.example(model, rows), bench.device)
    one, many = batching.head(example, 1), batching.head(example, BATCH)
    *others, single = time_forward([*([beside] if beside else []), model], one, repeats=work.entry.passes)
    (whole,) = time_forward([model], many, repeats=min(work.entry.passes, 50))
    calls = [partial(batching.logits, model, batch) for batch in (one, many)]
    with evaluation(model):
        energies = measure_energy(calls, torch.device(bench.device), counter=bench.meter)
    footprint = measure(model, example, encoder=encoder_of(model), latency=whole)
    held = quality(model, rows.report)
    return {
        "cost": footprint.to_dict(),
        "latency_at_1_ms": asdict(single),
        **({"teacher_latency_at_1_ms": asdict(others[0])} if others else {}),
        "rows_per_second": {
            "median": 1e3 * batching.rows(many) / whole.median,
            "iqr": 1e3 * batching.rows(many) / whole.median * whole.iqr / whole.median,
        },
        "energy_at_1": energies[0].to_dict(),
        f"energy_at_{batching.rows(many)}": energies[1].to_dict(),
        "memory_bytes": memory_of(work, folder),
        **{name: asdict(estimate) for name, estimate in held.items()},
    }


def memory_of(work: Work, folder: Path) -> int | None:
    """Weights, and the most memory that one batch takes beyond them, in a process of its own; None where the system
    does not say."""
    data = "" if work.bench.data is None else str(work.bench.data.resolve())
    code = "import sys, paper; paper.print_memory(*sys.argv[1:])"
    words = [sys.executable, "-c", code, str(folder.resolve()), work.entry.task, work.bench.device, data]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parent)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def print_memory(folder: str, task: str, device: str, data: str) -> None:
    recipe: Any = recipes.get(task)
    model = recipe.load(folder, Path(data) if data else None).model.to(device)
    for tensor in tensors_of(model).values():
        tensor.sum()  # a file that is mapped takes no memory before it is read
    example = batching.head(batching.to(recipe.example(model, None), device), BATCH)
    torch.nn.Linear(8, 8)(torch.ones(8, 8))  # what any first product takes
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        weights = before = 0
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew; Linux alone can
        weights, before = sum(tensor.nbytes for tensor in tensors_of(model).values()), held_bytes()
    with evaluation(model):
        batching.logits(model, example)
    print(weights + (_peak() if device == "cpu" else torch.cuda.max_memory_allocated()) - before)


def _peak() -> int:
    """The most memory that this process held since the peak began anew; what `getrusage` says includes its parent's."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


def main(
    name: str,
    describe: str | None,
    scales: Mapping[str, Sequence[Entry]],
    settings: Mapping[str, Any],
    reported: Reported,
) -> None:
    """The command line of a table."""
    parser = arguments(name, describe)
    parser.add_argument("--only", nargs="+", help="Names of entries, such as bert-tiny-sst2.")
    parser.add_argument("--settings", nargs="+", default=list(settings), choices=list(settings))
    parser.add_argument("--pretrained", help="A checkpoint to fine-tune, of the entries that start from one.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--meter", type=Path, help="CSV of a meter of power: columns seconds (Unix time) and watts.")
    chosen = parser.parse_args()
    results = chosen.results or RESULTS / name
    for seed in () if chosen.table else chosen.seeds or [0]:
        bench = Bench(
            name=name,
            scale=chosen.scale,
            settings={key: settings[key] for key in chosen.settings},
            data=chosen.data,
            cache=chosen.cache,
            results=results,
            seed=seed,
            device=chosen.device,
            pretrained=chosen.pretrained,
            meter=None if chosen.meter is None else Metered(chosen.meter),
        )
        for entry in scales[chosen.scale]:
            if chosen.only is None or entry.key in chosen.only:
                bench.run(entry)
    publish(name, table(results, reported), chosen.results)


def from_random(model: nn.Module, seed: int, **companions: Any) -> Source:
    """A network with the published start: Xavier."""
    randomize(model, seed=seed)
    return Source(model=model.eval(), **companions)
