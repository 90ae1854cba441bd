"""The published text tasks, as data. Test rows of GLUE have no labels, so that its validation rows are reported on."""

from rmtkd.recipes.groups import by_sentence
from rmtkd.recipes.text import TextTask

TASKS = {
    "sst2": (
        "SST-2, sentiment of film reviews: 67,349 phrases; reported on the 872 dev sentences",
        TextTask(
            train_files=("sst2_train.parquet",),
            report_files=("sst2_dev.parquet",),
            columns=("text",),
            hub="stanfordnlp/sst2",
            hub_columns=("sentence",),
            labels=("negative", "positive"),
            grouping=by_sentence,
            length=32,
        ),
    ),
    "ag_news": (
        "AG News, topic of a news item: 120,000 items, 4 classes; reported on the 7,600 test items",
        TextTask(
            train_files=("ag_news_train.parquet", "ag_news_train_partial.parquet"),
            report_files=("ag_news_test.parquet",),
            columns=("text",),
            hub="fancyzhx/ag_news",
            hub_report="test",
            labels=("World", "Sports", "Business", "Sci/Tech"),
        ),
    ),
    "qnli": (
        "QNLI, does a sentence answer a question: 104,743 pairs; reported on the 5,463 dev pairs, or on a fifth of "
        "them where there are no training pairs",
        TextTask(
            train_files=("qnli_train.parquet",),
            report_files=("qnli_dev.parquet",),
            columns=("question", "sentence"),
            hub="nyu-mll/glue",
            hub_config="qnli",
            labels=("entailment", "not_entailment"),
            divides_report=True,
        ),
    ),
    "qqp": (
        "QQP, do two questions ask the same: 363,846 pairs; reported on the 40,430 dev pairs, accuracy and F1",
        TextTask(
            train_files=("qqp_train.parquet", "qqp_partial_train.parquet"),
            report_files=("qqp_dev.parquet", "qqp_partial_dev.parquet"),
            columns=("question1", "question2"),
            hub="nyu-mll/glue",
            hub_config="qqp",
            labels=("not_duplicate", "duplicate"),
            length=32,
        ),
    ),
}
"""What each task is and reports on, and where its rows are."""
