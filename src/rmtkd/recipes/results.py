"""What was measured with each recipe: told by `rmtkd ls`, and held by a test against the records of the repository."""

from rmtkd.recipes.recipe import Measured

_CURVE = "rmtkd bench curve run --teacher TEACHER --data DIR"
_VISION = "rmtkd bench vision run --data DIR"

MEASURED = {
    "digits": Measured(
        network="a BERT of three layers",
        remains=24.8,
        cost="parameters",
        accuracy=96.0,
        spread=0.9,
        teacher=96.4,
        rows=450,
        epochs=5.0,
        command="rmtkd compress digits --out runs/digits --control",
        records=("recipes/digits.json",),
    ),
    "digits_cnn": Measured(
        network="a residual network",
        remains=39.0,
        cost="operations",
        accuracy=98.9,
        spread=0.5,
        teacher=99.3,
        rows=450,
        epochs=3.0,
        command="rmtkd compress digits_cnn --out runs/digits-images",
        records=("recipes/digits_cnn.json",),
    ),
    "sst2": Measured(
        network="MiniLM-L6",
        remains=10.0,
        cost="parameters",
        accuracy=86.6,
        spread=1.3,
        teacher=89.3,
        rows=872,
        epochs=1.0,
        command=f"{_CURVE} --task sst2 --methods guarded --sizes 0.1",
        records=tuple(f"curve/sst2-guarded-0.1-seed{seed}-0.0002.json" for seed in range(3)),
        teacher_record="final/sst2.json",
    ),
    "ag_news": Measured(
        network="MiniLM-L6",
        remains=10.0,
        cost="parameters",
        accuracy=92.4,
        spread=0.3,
        teacher=92.3,
        rows=7600,
        epochs=4.0,
        command=f"{_CURVE} --task ag_news --methods guarded --sizes 0.1 --seeds 0 --epochs 4",
        records=("curve/ag_news-guarded-0.1-seed0-0.0002-epochs4.json",),
        teacher_record="final/ag_news.json",
    ),
    "cifar10": Measured(
        network="ResNet-56, in low-rank pairs,",
        remains=39.0,
        cost="operations",
        accuracy=92.7,
        spread=0.3,
        teacher=93.4,
        rows=10_000,
        epochs=15.0,
        command=f"{_VISION} --model resnet56 --methods pairs --optimizer sgd --lr 0.05 --epochs 15",
        records=("vision/resnet56-pairs-0.39-15epochs-seed0-sgd-0.05.json",),
    ),
}
"""By the name of the recipe. A recipe that is not here was not measured."""
