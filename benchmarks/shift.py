"""What a compressed model loses when rows are not those that it was made with, beside what its teacher loses.

    rmtkd bench shift --scale tiny                    # digits; a test
    rmtkd bench shift --scale cpu --data DIR --teachers sst2=TEACHER ag_news=TEACHER cifar10=resnet56
    rmtkd bench shift --table

| part | question |
|---|---|
| domains | a model for one task, cut on texts of another, or on half of each: what is lost against its own texts? |
| noise | report rows with typing mistakes |
| tokens | report rows by the share of their tokens that calibration did not hold, for an embedding in 1 and 3 levels |
| corruptions | test images, spoiled; is a model cut on spoiled images better prepared? |

*Seen* is where calibration and the selection rows that divide the budget come from: the task's *own* rows, the *other*
domain (AG News for SST-2 and the reverse; spoiled images), or *mixed*, batches of both in turns, as many in all. Each
cut is measured in *closed form*; after recovery on the task's own rows, *own rows*; and after as many steps on rows of
the domain seen by the teacher's answers alone, *seen rows*. Answers of teacher and student are compared on the same
rows, row by row: a loss has the standard error of paired differences. How images and texts are spoiled, and where that
differs from the published corruptions, is in `corruptions.py`.
"""

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from corruptions import TYPOS, corrupted, mistyped
from domains import IMAGES, RECOVERED, SCALES, SEEN, Work
from records import arguments, percent, publish, read_largest_scale, spread, tried
from rmtkd import batches as batching
from rmtkd import recipes
from rmtkd.levels import count_tokens
from rmtkd.measurement import count_parameters, predict, proportion
from rmtkd.recipes.cifar import SMALL
from rmtkd.recipes.published import TASKS
from rmtkd.recipes.rows import TokenRows
from rmtkd.recipes.text import HELD_BATCH, Examples, encode, fetch_examples, find_file, read_examples
from rmtkd.sites import find_family

RESULTS = Path(__file__).parent / "results" / "shift"
PARTS = ("domains", "noise", "tokens", "corruptions")
RATES = (0.05, 0.1)
LEVELS = (1, 3)
SHARES = (0.0, 0.05, 0.15, 1.0)
"""Shares of unseen tokens at which groups of rows end."""


def scored(model: nn.Module, rows: Any) -> tuple[Tensor, Tensor]:
    """Log-probabilities and labels in the order of the rows."""
    place = torch.cat([batching.row_ids(batch) for batch in rows]).argsort()  # type: ignore[arg-type]
    scores, labels = predict(model, rows)
    return scores[place].double().log_softmax(-1), labels[place]


def hits(scores: Tensor, labels: Tensor) -> Tensor:
    """1 for every row that is right."""
    return (scores.argmax(-1) == labels).double()


def mean(values: Tensor) -> dict[str, float]:
    """The mean over rows, and its standard error."""
    return {"value": float(values.mean()), "stderr": float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0}


def beside(teacher: Tensor, student: Tensor, labels: Tensor) -> dict[str, Any]:
    """How well a student does on some rows, and how near to its teacher."""
    right = hits(student, labels)
    return {
        "accuracy": asdict(proportion(int(right.sum()), len(right))),
        "against_teacher": mean(right - hits(teacher, labels)),
        "divergence": mean((teacher.exp() * (teacher - student)).sum(-1)),
        "agreement": mean((teacher.argmax(-1) == student.argmax(-1)).double()),
    }


def domains(work: Work, which: str) -> dict[str, Any]:
    """A cut on rows of one domain, in closed form and recovered, on the task's own report rows."""
    teacher, labels = scored(work.source.model, work.own.report)
    found: dict[str, Any] = {"accuracy": asdict(proportion(int(hits(teacher, labels).sum()), len(labels)))}
    for recovered in RECOVERED[: 2 if work.task in IMAGES else 3]:
        student = work.student(which, recovered)
        found[recovered] = beside(teacher, scored(student, work.own.report)[0], labels)
        found[recovered]["parameters"] = count_parameters(student) / count_parameters(work.source.model)
    return {"seen": which, **found}


def shifts(work: Work, clean: Any, shifted: Mapping[str, Any], students: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """What teacher and students lose from clean to shifted rows, which are the same rows in the same order.

    Args:
        clean, shifted: rows; the latter by name.
        students: what each has seen, and how it recovered.
    """
    models = {f"{which}, {recovered}": work.student(which, recovered) for which, recovered in students}
    models = {"teacher": work.source.model, **models}
    before = {name: scored(model, clean) for name, model in models.items()}
    labels = before["teacher"][1]
    right = {name: hits(scores, labels) for name, (scores, _) in before.items()}
    found = []
    for shift, rows in {"none": clean, **shifted}.items():
        after = {name: scored(model, rows)[0] for name, model in models.items()}
        lost = {name: right[name] - hits(scores, labels) for name, scores in after.items()}
        measures = {
            name: {
                **beside(after["teacher"], after[name], labels),
                "loss": mean(lost[name]),
                "beyond": mean(lost[name] - lost["teacher"]),
            }
            for name in models
        }
        found.append({"shift": shift, "models": measures})
    return {"shifts": found}


def noise(work: Work) -> dict[str, Any]:
    """Report rows of a text task with typing mistakes."""
    task = TASKS[work.task][1]
    if work.data is None:
        report = fetch_examples(task)[1]
    else:
        report = read_examples(find_file(work.data, task.report_files), task.columns, "label", task.labels)

    def rows(texts: Sequence[str]) -> TokenRows:
        examples = Examples(texts=[(text,) for text in texts], labels=report.labels)
        return encode(work.source, examples, task.max_length, batch_size=HELD_BATCH)

    texts = [text for (text,) in report.texts]
    kinds = {"all": TYPOS, **{kind: (kind,) for kind in TYPOS}}
    shifted = {
        f"{name}, {rate:.0%}": rows(mistyped(texts, rate, work.seed, chosen))
        for name, chosen in kinds.items()
        for rate in RATES
    }
    return shifts(work, rows(texts), shifted, [("own", "closed form"), ("own", "own rows")])


def corruption(work: Work, kind: str) -> dict[str, Any]:
    """Test images with one corruption."""
    clean = copy.copy(work.own.report)
    step = max(1, len(clean.images) // work.scale.images)
    clean.images, clean.labels = clean.images[::step], clean.labels[::step]
    shifted = {}
    for severity in work.scale.corruptions[1]:
        shifted[f"{kind}, {severity}"] = rows = copy.copy(clean)
        rows.images = corrupted(clean.images, kind, severity, work.seed)
    students = [(which, recovered) for which in ("own", "mixed") for recovered in RECOVERED[:2]]
    return shifts(work, clean, shifted, students)


def tokens(work: Work, levels: int) -> dict[str, Any]:
    """Report rows by the share of their tokens that calibration did not hold."""
    model, report = work.source.model, work.own.report
    path = find_family(model).word_embeddings
    known = count_tokens(model, path, work.seen("own", "calibration")) > 0
    unseen = torch.tensor([1 - float(known[torch.as_tensor(row)].double().mean()) for row in report.ids])
    group = torch.bucketize(unseen, torch.tensor(SHARES))
    teacher, labels = scored(model, report)
    found: dict[str, Any] = {"levels": levels, "groups": [f"up to {most:.0%}" if most else "none" for most in SHARES]}
    found["rows"] = group.bincount(minlength=len(SHARES)).tolist()
    right = [hits(teacher, labels)[group == i] for i in range(len(SHARES))]
    found["teacher"] = [mean(part) if len(part) else None for part in right]
    for recovered in RECOVERED[:2]:
        scores = scored(work.student("own", recovered, levels), report)[0]
        found[recovered] = [
            beside(teacher[group == i], scores[group == i], labels[group == i]) if found["rows"][i] else None
            for i in range(len(SHARES))
        ]
    return found


def cells(work: Work) -> dict[str, tuple[str, Callable[[Work], dict[str, Any]]]]:
    """What is measured of a task: part and function, by name among files."""
    images = work.task in IMAGES
    kinds = work.scale.corruptions[0]
    found: dict[str, tuple[str, Callable[[Work], dict[str, Any]]]] = {
        which: ("domains", partial(domains, which=which)) for which in SEEN
    }
    if images:
        return found | {k.replace(" ", "_"): ("corruptions", partial(corruption, kind=k)) for k in kinds}
    if work.task in TASKS:
        found["noise"] = ("noise", noise)
    return found | {f"{n}levels": ("tokens", partial(tokens, levels=n)) for n in LEVELS}


def table(results: Path) -> str:
    """The records as Markdown, a table a part."""
    found = read_largest_scale(results)
    made = {"domains": _domains, "noise": _shifts, "corruptions": _corruptions, "tokens": _tokens}
    texts = [write([r for r in found if r["part"] == part]) for part, write in made.items()]
    return "\n\n".join(text for text in texts if text)


def _groups(records: Sequence[Mapping[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    """Records that differ in the seed alone."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(tuple(record.get(key) for key in keys), []).append(record)
    return groups


def _paired(cells: Sequence[Mapping[str, Any]], key: str, form: str = "+.2f") -> str:
    """Percent over seeds, and in brackets the standard error over rows."""
    return f"{spread(percent(cells, key), form)} ({100 * statistics.mean(r[key]['stderr'] for r in cells):.2f})"


def _near(cells: Sequence[Mapping[str, Any]]) -> str:
    """Divergence and agreement."""
    return f"{spread([r['divergence']['value'] for r in cells], '.3f')} | {spread(percent(cells, 'agreement'))}"


def _domains(records: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| task | cut on | recovered | seeds | parameters | accuracy | against teacher (rows) | divergence "
        "| same answers |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for (task, seen), cells in _groups(records, "task", "seen").items():
        for recovered in RECOVERED:
            if mine := [r[recovered] for r in cells if recovered in r]:
                numbers = f"{spread(percent(mine, 'parameters'), '.1f')} % | {spread(percent(mine, 'accuracy'))}"
                against = _paired(mine, "against_teacher")
                lines.append(f"| {task} | {seen} | {recovered} | {len(mine)} | {numbers} | {against} | {_near(mine)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _shifts(records: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| task | shift | model | seeds | accuracy | loss by the shift (rows) | beyond the teacher's | divergence "
        "| same answers |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    told: set[str] = set()
    for (task, _), cells in _groups(records, "task", "file").items():
        for i, first in enumerate(cells[0]["shifts"]):
            if first["shift"] == "none" and task in told:  # the clean rows are those of every corruption
                continue
            told.add(task)
            for name in first["models"]:
                mine = [r["shifts"][i]["models"][name] for r in cells]
                losses = [_paired(mine, key) for key in ("loss", "beyond")]
                if first["shift"] == "none":
                    losses = ["", ""]
                if name == "teacher":
                    losses[1] = ""
                near = "|" if name == "teacher" else _near(mine)
                numbers = [f"{len(mine)}", spread(percent(mine, "accuracy")), *losses]
                lines.append(f"| {task} | {first['shift']} | {name} | " + " | ".join([*numbers, near]) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _corruptions(records: Sequence[Mapping[str, Any]]) -> str:
    """Means over kinds and seeds, a line a severity; in brackets the least and the most of any kind."""
    lines = [
        "| task | severity | model | kinds | accuracy | loss by the shift | beyond the teacher's | divergence "
        "| same answers |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    found: dict[tuple[str, str, str], dict[str, list[Mapping[str, Any]]]] = {}
    for record in records:
        for shift in record["shifts"]:
            kind, _, severity = shift["shift"].rpartition(", ")
            for name, measures in shift["models"].items():
                kinds = found.setdefault((record["task"], severity, name), {})
                kinds.setdefault(kind or "clean", []).append(measures)
    for (task, severity, name), kinds in sorted(found.items(), key=_clean_first):
        clean, cells = severity == "none", [cell for cells in kinds.values() for cell in cells]

        def over_kinds(key: str, kinds: Mapping[str, list[Mapping[str, Any]]] = kinds) -> str:
            means = [statistics.mean(percent(cells, key)) for cells in kinds.values()]
            return f"{statistics.mean(means):+.1f} ({min(means):+.1f} to {max(means):+.1f})"

        losses = ["", ""] if clean else [over_kinds("loss"), "" if name == "teacher" else over_kinds("beyond")]
        near = "| " if name == "teacher" else f"{statistics.mean(c['divergence']['value'] for c in cells):.2f} | "
        near += "" if name == "teacher" else f"{statistics.mean(percent(cells, 'agreement')):.1f}"
        numbers = [str(len(kinds)), f"{statistics.mean(percent(cells, 'accuracy')):.1f}", *losses, near]
        lines.append(f"| {task} | {'clean' if clean else severity} | {name} | " + " | ".join(numbers) + " |")
    return "\n".join(lines) if found else ""


def _clean_first(item: tuple[tuple[str, str, str], Any]) -> tuple[Any, ...]:
    (task, severity, _), _ = item
    return task, severity != "none", severity


def _tokens(records: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| task | unseen tokens of a row | rows | teacher | levels | recovered | accuracy | against teacher (rows) "
        "| divergence | same answers |",
        "|---|---|--:|--:|--:|---|--:|--:|--:|--:|",
    ]
    for (task, levels), cells in _groups(records, "task", "levels").items():
        for i, group in enumerate(cells[0]["groups"]):
            for recovered in RECOVERED[:2]:
                mine = [r[recovered][i] for r in cells if r[recovered][i] is not None]
                if not mine:
                    continue
                teacher = spread([100 * r["teacher"][i]["value"] for r in cells if r["teacher"][i] is not None])
                facts = f"{task} | {group} | {cells[0]['rows'][i]:,} | {teacher} | {levels} | {recovered}"
                numbers = f"{spread(percent(mine, 'accuracy'))} | {_paired(mine, 'against_teacher')} | {_near(mine)}"
                lines.append(f"| {facts} | {numbers} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def main() -> None:
    """Run cells, and write the tables."""
    parser = arguments("shift", __doc__)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--tasks", nargs="+", default=list(SCALES["tiny"].targets), help="At the smallest scale.")
    parser.add_argument("--teachers", nargs="+", default=[], metavar="TASK=TEACHER")
    given = parser.parse_args()
    results, is_tiny = given.results or RESULTS, given.scale == "tiny"
    teachers = dict(words.split("=", 1) for words in given.teachers)
    if is_tiny and not given.table:
        teachers = {task: taught(task, given.cache) for task in given.tasks}
    for seed in () if given.table else given.seeds or ([0] if is_tiny else [0, 1, 2]):
        for task, teacher in teachers.items():
            work = Work(
                task=task, teacher=teacher, data=given.data, seed=seed, cache=given.cache, scale=SCALES[given.scale]
            )
            named = (task, teacher) if SMALL.fullmatch(teacher) else (task,)
            for name, (part, act) in cells(work).items():
                if part in given.parts:
                    file = f"{given.scale}-{'-'.join(named)}-{part}-{name}"
                    facts = {"file": file, "task": ", ".join(named), "part": part, "scale": given.scale, "seed": seed}
                    facts["command"] = command(given.scale, task, teacher, part, seed)
                    of = None if is_tiny else work.teacher_id  # at the smallest scale it is made anew
                    tried(results / f"{file}-seed{seed}.json", partial(_described, facts, act, work), teacher_id=of)
    made = table(results)
    publish("shift", made, given.results)


def command(scale: str, task: str, teacher: str, part: str, seed: int) -> str:
    """What makes a cell."""
    name = teacher if SMALL.fullmatch(teacher) else "TEACHER"
    rows = f"--tasks {task}" if scale == "tiny" else f"--data DIR --teachers {task}={name}"
    return f"rmtkd bench shift --scale {scale} {rows} --parts {part} --seeds {seed}"


def taught(task: str, cache: Path) -> str:
    """A teacher for digits, trained once."""
    from rmtkd.teaching import train_teacher

    folder = cache / f"teacher-{task}"
    if not folder.exists():
        train_teacher(recipes.get(task), out=folder, epochs=3.0)
    return str(folder)


def _described(facts: Mapping[str, Any], act: Callable[[Work], dict[str, Any]], work: Work) -> dict[str, Any]:
    return {**facts, **act(work)}


if __name__ == "__main__":
    main()
