"""A compressed model on its way through other hands: another environment, ONNX, `Trainer`, and `rmtkd` again, on SST-2.

    python benchmarks/round_trip.py --model RUN/model --data DIR --python OTHER_PYTHON --out SCRATCH

OTHER_PYTHON, repeatable, is the interpreter of an environment with torch and transformers, and without rmtkd. All
figures are of the 872 dev rows. Records are files in `benchmarks/results/round_trip/`; what has its record is not run
again.
"""

import argparse
import json
import os
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import transformers
from torch import Tensor

import rmtkd
from records import cell
from rmtkd import batches as batching
from rmtkd import recipes
from rmtkd.artifact import read_manifest
from rmtkd.exports import FORMATS, formats, tracing
from rmtkd.measurement import evaluation, predict, quality, relative_difference

RESULTS = Path(__file__).parent / "results" / "round_trip"
TRAINER = {"max_steps": 100, "learning_rate": 2e-5, "per_device_train_batch_size": 32}
AGAIN: dict[str, Any] = {"target": "80%params", "epochs": 0.1}
ELSEWHERE = """
import importlib.util, json, sys
import torch, transformers
assert importlib.util.find_spec("rmtkd") is None
folder, texts, scores = sys.argv[1:]
model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
answers = []
with torch.no_grad():
    for text in json.load(open(texts)):
        inputs = tokenizer(text, truncation=True, max_length=128, return_tensors="pt")
        answers.append(model(**inputs).logits[0].tolist())
json.dump(answers, open(scores, "w"))
print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__, "class": type(model).__name__}))
"""
"""What somebody does who has never heard of rmtkd: row by row, from texts, with the tokenizer of the folder."""


def difference(got: Tensor, expected: Tensor) -> dict[str, Any]:
    """Of class scores: relative to the largest, and in the answers."""
    return {
        "rows": len(expected),
        "difference": relative_difference(got, expected),
        "same_answers": float((got.argmax(-1) == expected.argmax(-1)).double().mean()),
    }


def scores_elsewhere(python: str, folder: Path, texts: list[str], scratch: Path) -> tuple[Tensor, dict[str, str]]:
    """Class scores of texts in another environment, and what is installed there."""
    (scratch / "texts.json").write_text(json.dumps(texts))
    files = [str(folder), str(scratch / "texts.json"), str(scratch / "scores.json")]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "-c", ELSEWHERE, *files], capture_output=True, text=True, check=True, env=clean)
    return torch.tensor(json.loads((scratch / "scores.json").read_text())), json.loads(done.stdout.splitlines()[-1])


def train_further(folder: Path, data: Path, out: Path) -> None:
    """A hundred steps of transformers' Trainer on the first training rows."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    table = pq.read_table(data / "sst2_train.parquet").slice(0, 3200).to_pydict()
    made = tokenizer(table["text"], truncation=True, max_length=128)
    rows = [{**{name: made[name][i] for name in made}, "labels": label} for i, label in enumerate(table["label"])]
    arguments = transformers.TrainingArguments(
        output_dir=str(out), save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, **TRAINER
    )
    collator = transformers.DataCollatorWithPadding(tokenizer)
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)  # type: ignore[arg-type]
    trainer.train()
    trainer.save_model(str(out))
    tokenizer.save_pretrained(out)


def main() -> None:
    """Run what has no record yet, and print all of it."""
    parser = argparse.ArgumentParser(description="A compressed model on its way through other hands.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--python", action="append", default=[])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    task = recipes.get("sst2")
    source = task.load(str(given.model))
    rows = task.rows(given.data, source, 0)
    texts = pq.read_table(given.data / "sst2_dev.parquet").to_pydict()["text"]
    name = f"sst2-{read_manifest(given.model)['checksum'][:8]}"

    def elsewhere(python: str) -> dict[str, Any]:
        tokenizer, alone = source.tokenizer, []
        with evaluation(source.model):
            for text in texts:
                batch = tokenizer(text, truncation=True, max_length=128, return_tensors="pt")
                alone.append(batching.logits(source.model, dict(batch))[0])
        got, found = scores_elsewhere(python, given.model, texts, given.out)
        return {"environment": found, **difference(got, torch.stack(alone))}

    def onnx() -> dict[str, Any]:
        shutil.rmtree(given.out / "onnx", ignore_errors=True)
        rmtkd.export(source.model, given.out / "onnx", rows=rows.report, repeats=1)
        runner = formats.start(FORMATS["onnx"], given.out / "onnx" / FORMATS["onnx"].file)
        names = tracing.input_names(source.model)
        report = [tracing.complete(batch, names) for batch in rows.report]
        return difference(predict(runner, report)[0], predict(source.model, report)[0])

    def trained() -> dict[str, Any]:
        shutil.rmtree(given.out / "trainer", ignore_errors=True)
        train_further(given.model, given.data, given.out / "trainer")
        after = task.load(str(given.out / "trainer")).model
        return {
            "options": TRAINER,
            "before": asdict(quality(source.model, rows.report)["accuracy"]),
            "accuracy": asdict(quality(after, rows.report)["accuracy"]),
        }

    def again() -> dict[str, Any]:
        shutil.rmtree(given.out / "again", ignore_errors=True)
        teacher = task.load(str(given.out / "trainer")).model
        small = rmtkd.compress(
            teacher, train=rows.train, selection=rows.selection, report=rows.report, **{**task.options, **AGAIN}
        )
        small.save(given.out / "again")
        loaded = rmtkd.load(given.out / "again")
        return {
            "options": AGAIN,
            "parameters": [small.record["baseline"]["parameters"], small.record["compressed"]["parameters"]],
            "before": small.record["baseline"]["accuracy"],
            "accuracy": asdict(quality(loaded, rows.report)["accuracy"]),
        }

    records = {}
    for python in given.python:
        version = subprocess.run(
            [python, "-c", "import transformers; print(transformers.__version__)"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()[-1]
        records[f"elsewhere, transformers {version}"] = cell(
            RESULTS / f"{name}-elsewhere-{version}.json", lambda python=python: elsewhere(python)
        )
    for step in (onnx, trained, again):
        records[step.__name__] = cell(RESULTS / f"{name}-{step.__name__}.json", step)
    for step, record in records.items():
        facts = {k: v for k, v in record.items() if k not in ("machine", "versions", "seconds", "options")}
        print(f"- {step}: {facts}")


if __name__ == "__main__":
    main()
