"""TRL's own tests of its trainers, without a patch and with a patched model: what passes without must pass with.

    git clone --depth 1 --branch v1.16.0 https://github.com/huggingface/trl
    python tests/huggingface/trl_suite.py --trl trl --trainer dpo kto grpo

takes TRL's tests (of the release that is installed, which is the one tested: `trl_hub.py` makes the models, tokenizers
and data sets that they look for on the model hub) and runs them twice, in processes of their own. In the second run
every causal language model that a trainer is given is patched with cross-entropy:

- a model: before the trainer is made, by `fl.patch(model, fl.CrossEntropyLoss())`, with an adapter or without;
- a name of a model: the trainer makes the model, and `fl.patch(trainer.model, ...)` is called once it is made.

Reference models, teachers and reward models stay as they are; with `--reference` those that the trainer keeps as
`ref_model` or `teacher_model` are patched as well. Loss, gradient and metrics of the first batch of each training, and
what evaluations before it return, are compared too; with `--float32`, no autocast where a test does not say otherwise,
to three digits. `--quick` runs without the patch only what fails with it, and compares no numbers.

It ends with a table, and with status 1 where a test passes without the patch and fails with it, or a number differs.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
OPTIONS = "FUSED_LOSSES_TRL_SUITE"
CORE = ("dpo", "kto", "grpo", "rloo", "sft")
TOLERANCE = {"float32": 5e-4, "bf16": 0.05}  # relative; some tests have bf16 models without autocast
# Accuracies and parts that are exactly zero: at the start policy and reference are one model, up to rounding errors.
NOT_COMPARED = ("time", "per_second", "runtime", "flos", "epoch", "learning_rate", "step", "accurac", "zero_std")
SMALL = {"float32": 0.5, "bf16": 0.1}  # differences of smaller numbers are taken as parts of this


# --- in the tests' processes


class Run:
    """What the plug-in does to TRL: `patched`, `reference`, `float32`, `steps`, `timeout`, `home` of the hub."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.making: list[Any] = []  # trainers whose __init__ runs
        self.notes: list[Any] = []  # of the test that runs

    def install(self) -> None:
        """Before TRL is imported."""
        import datasets
        import transformers

        data, load = Path(self.options["home"]) / "data", datasets.load_dataset

        def load_dataset(path: str, name: Any = None, *args: Any, **kwargs: Any) -> Any:
            files = (data / str(path).replace("/", "--") / str(name)).glob("*.parquet")
            splits = {file.stem: str(file) for file in files}
            if not splits:
                return load(path, name, *args, **kwargs)
            return load("parquet", *args, data_files=splits, **kwargs)

        datasets.load_dataset = datasets.load.load_dataset = load_dataset
        run, inherited = self, transformers.Trainer.__init_subclass__

        def init_subclass(cls: type, **kwargs: Any) -> None:
            inherited(**kwargs)
            if "__init__" in vars(cls):
                cls.__init__ = run.around(cls.__init__)  # type: ignore[misc]

        transformers.Trainer.__init_subclass__ = classmethod(init_subclass)
        transformers.Trainer.evaluate = self.noted_evaluation(transformers.Trainer.evaluate)
        self.note_steps(transformers.Trainer)
        imports: Any = importlib.import_module("trl.import_utils")

        self.missing_names("trl.trainer.sft_trainer")

        def asked(name: str) -> Any:
            """Tests of an older TRL ask for packages that a newer one no longer takes."""
            package = re.fullmatch(r"is_(\w+)_available", name)
            if package is None:
                raise AttributeError(f"module {imports.__name__!r} has no attribute {name!r}")
            return lambda: importlib.util.find_spec(package[1]) is not None

        imports.__getattr__ = asked
        self.set_arguments()

    def missing_names(self, module: str) -> None:
        """Functions that tests of an older TRL import: None, so that only the tests of these fail."""

        def missing(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(f"module {module!r} has no attribute {name!r}")

        importlib.import_module(module).__getattr__ = missing  # type: ignore[method-assign]

    def set_arguments(self) -> None:
        """Of every trainer, where the test leaves them at their defaults."""
        from trl.trainer.base_config import _BaseConfig

        own = _BaseConfig.__post_init__

        def post_init(config: Any) -> None:
            if self.options["float32"] and config.bf16 is None:
                config.bf16 = False
            if config.max_steps == -1 and config.num_train_epochs == 3.0 and self.options["steps"]:
                config.max_steps = self.options["steps"]
            own(config)

        _BaseConfig.__post_init__ = post_init

    def around(self, init: Any) -> Any:
        """A trainer's __init__ that patches the model it is given."""

        @functools.wraps(init)
        def wrapper(trainer: Any, *args: Any, **kwargs: Any) -> None:
            if not self.options["patched"] or any(t is trainer for t in self.making):
                return init(trainer, *args, **kwargs)
            given = inspect.signature(init).bind(trainer, *args, **kwargs).arguments
            self.patch(given.get("model"), "given")
            self.making.append(trainer)
            try:
                init(trainer, *args, **kwargs)
            finally:
                self.making.pop()
            self.patch(getattr(trainer, "model", None), "made")
            if self.options["reference"]:
                for name in ("ref_model", "teacher_model"):
                    self.patch(getattr(trainer, name, None), name)

        return wrapper

    def patch(self, model: Any, when: str) -> None:
        import fused_losses as fl

        if not is_causal(model):
            return
        base = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
        if hasattr(type(base), "_fused_losses_original"):  # it is patched
            return
        fl.patch(model, fl.CrossEntropyLoss())
        self.notes.append({"patched": type(base).__name__, "when": when})

    def noted_evaluation(self, method: Any) -> Any:
        @functools.wraps(method)
        def evaluate(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            found = method(trainer, *args, **kwargs)
            if not trainer.state.global_step:  # optimisers enlarge what differs by rounding
                self.note(found)
            return found

        return evaluate

    def note_steps(self, cls: Any) -> None:
        """Loss, gradient and metrics of the first batch of each training, whatever class makes its loss."""
        import torch

        train, backward = cls._inner_training_loop, cls.training_step

        @functools.wraps(train)
        def inner_training_loop(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            trainer._first_batch = True
            return train(trainer, *args, **kwargs)

        @functools.wraps(backward)
        def training_step(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            loss = backward(trainer, *args, **kwargs)
            if vars(trainer).pop("_first_batch", False):
                gradients = [p.grad.float().norm() for p in trainer.model.parameters() if p.grad is not None]
                metrics = getattr(trainer, "_metrics", {}).get("train", {})
                found = {name: values[-1] for name, values in metrics.items() if values}
                self.note({**found, "loss": loss.item(), "gradient": torch.stack(gradients).norm().item()})
            return loss

        cls._inner_training_loop, cls.training_step = inner_training_loop, training_step

    def note(self, numbers: dict[str, Any]) -> None:
        numbers = {k: float(v) for k, v in numbers.items() if isinstance(v, (int, float))}
        self.notes.append({"logged": {k: v for k, v in numbers.items() if not any(n in k for n in NOT_COMPARED)}})


def is_causal(model: Any) -> bool:
    """A transformers model, PEFT's or not, with a head that predicts the next token."""
    import torch

    if not isinstance(model, torch.nn.Module):
        return False
    base = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
    if not hasattr(base, "config") or getattr(base.config, "is_encoder_decoder", False):
        return False
    return type(base).__name__.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))


RUN = Run(json.loads(os.environ[OPTIONS])) if OPTIONS in os.environ else None


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if RUN is not None:
        RUN.install()


def pytest_collection_finish(session: pytest.Session) -> None:
    """TRL collects garbage after each test, which takes longer than most of them where it goes through the imports."""
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    import random

    import numpy
    import torch

    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(0)
    if RUN is not None:
        RUN.notes.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """No longer than the time limit."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"over {RUN.options['timeout']} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(RUN.options["timeout"])
    try:
        return (yield)
    finally:
        signal.alarm(0)
        item.user_properties.append(("notes", list(RUN.notes)))


class Results:
    """Of the process that hears of all tests: a line for each."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and not (report.when == "setup" and report.outcome != "passed"):
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = crash.message if crash else (report.longrepr or "")
        reason = reason[2] if isinstance(reason, tuple) else str(reason)
        outcome = "expected" if hasattr(report, "wasxfail") else report.outcome
        notes = dict(report.user_properties).get("notes", [])
        line = {"test": report.nodeid, "outcome": outcome, "seconds": report.duration, "reason": reason, "notes": notes}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            line = {"test": report.nodeid, "outcome": "failed", "seconds": 0, "reason": str(report.longrepr)[-300:]}
            with self.path.open("a") as file:
                file.write(json.dumps({**line, "notes": []}) + "\n")


def pytest_sessionstart(session: pytest.Session) -> None:
    if RUN is not None and not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(Results(Path(RUN.options["results"])))


# --- the command


def files_of(tests: Path, trainers: list[str]) -> list[str]:
    """test_<trainer>_trainer.py, of TRL's trainers and its experimental ones."""
    found = {p.stem.removeprefix("test_").removesuffix("_trainer"): p for p in tests.glob("test_*_trainer.py")}
    for path in (tests / "experimental").glob("test_*_trainer*.py"):
        found.setdefault(path.stem.removeprefix("test_").removesuffix("_trainer"), path)
    if trainers == ["all"]:
        trainers = [name for name in found if name not in ("reward", "prm", "ppo")]
    unknown = [name for name in trainers if name not in found]
    if unknown:
        raise SystemExit(f"--trainer: no tests of {', '.join(unknown)}; there are {', '.join(sorted(found))}")
    return [str(found[name].relative_to(tests.parent)) for name in trainers]


def run_tests(work: Path, name: str, arguments: argparse.Namespace, files: list[str]) -> dict[str, dict]:
    """The tests in processes of their own -> their results by name."""
    results = work / f"{name}.jsonl"
    results.unlink(missing_ok=True)
    options = {
        "patched": name == "with", "reference": arguments.reference, "float32": arguments.float32,
        "steps": arguments.steps, "timeout": arguments.timeout, "home": str(work / "home"),
        "results": str(results),
    }  # fmt: skip
    environment = {
        **os.environ, OPTIONS: json.dumps(options), "HF_HOME": str(work / "home"), "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]),
        "TRL_EXPERIMENTAL_SILENCE": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "trl_suite", "-p", "no:cacheprovider"]
    command += ["-p", "no:warnings", "-m", "not slow and not invariant", *files]
    command += ["-n", str(arguments.jobs), *(["-k", arguments.k] if arguments.k else [])]
    with (work / f"{name}.log").open("w") as log:
        subprocess.run(command, cwd=work / "trl", env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    if not results.exists():
        raise SystemExit(f"pytest did not run; see {work / f'{name}.log'}")
    found = [json.loads(line) for line in results.read_text().splitlines()]
    return {line["test"]: line for line in found}


def differences(without: dict, with_patch: dict, small: float) -> list[tuple[float, str, float, float]]:
    """Of the numbers of each training and evaluation of a test: relative difference, name, both."""
    pairs = zip(
        (n["logged"] for n in without["notes"] if "logged" in n),
        (n["logged"] for n in with_patch["notes"] if "logged" in n),
        strict=False,
    )
    found = []
    for a, b in pairs:
        for name in a.keys() | b.keys():
            x, y = a.get(name), b.get(name)
            if x is None or y is None:
                found.append((float("inf"), name, x, y))
            elif x == x or y == y:  # not both NaN
                found.append(
                    (abs(x - y) / max(abs(x), abs(y), small) if x == x and y == y else float("inf"), name, x, y)
                )
    return sorted(found, key=lambda one: -one[0])


def short(reason: str) -> str:
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    return (lines[0] if lines else "")[:230]


def report(without: dict[str, dict], with_patch: dict[str, dict], precision: str) -> bool:
    """Prints the table -> whether all that passes without the patch passes with it, with the same numbers."""
    if any(line.get("not_run") for line in without.values()):
        print("What passes with the patch was not run without it, and is counted as passed there.")
    columns = ("passed without", "passed with", "fails only with", "failed or skipped both")
    print(f"{'':34s}" + "".join(f"{c:>25s}" for c in columns))
    files = sorted({test.split("::")[0] for test in without})
    total: Counter = Counter()
    for file in files:
        counts: Counter = Counter()
        for test in (t for t in without if t.startswith(file)):
            a, b = (found.get(test, {}).get("outcome", "missing") == "passed" for found in (without, with_patch))
            counts[columns[0]] += a
            counts[columns[1]] += b
            counts[columns[2]] += a and not b
            counts[columns[3]] += not a and not b
        total += counts
        print(f"{file.split('/')[-1]:34s}" + "".join(f"{counts[c]:25d}" for c in columns))
    print(f"{'all':34s}" + "".join(f"{total[c]:25d}" for c in columns))

    good, trained = True, 0
    print("\nFails only with the patch:")
    for test, line in without.items():
        after = with_patch.get(test, {"test": test, "outcome": "missing", "reason": "", "notes": []})
        if line["outcome"] == "passed" != after["outcome"]:
            good = False
            print(f"  {test}\n    {short(after['reason'])}")
    print("\nNumbers that differ:")
    largest = (0.0, "", "", 0.0, 0.0)
    for test, line in without.items():
        after = with_patch.get(test)
        if after is None or not line["outcome"] == after["outcome"] == "passed":
            continue
        trained += any("logged" in n for n in after["notes"]) and any("patched" in n for n in after["notes"])
        for difference, name, x, y in differences(line, after, SMALL[precision])[:1]:
            if difference > TOLERANCE[precision]:
                good = False
                print(f"  {test}: {name} {x} without, {y} with")
            elif largest[0] < difference <= TOLERANCE[precision]:
                largest = (difference, test, name, x, y)
    print(f"\n{trained} tests that pass both times have trained or evaluated a patched model.")
    if largest[1]:
        print("The largest difference of a number that is allowed: {:.1e} ({}: {}, {} and {})".format(*largest))
    kinds = Counter(n["patched"] for line in with_patch.values() for n in line["notes"] if "patched" in n)
    print("Patched: " + ", ".join(f"{name} {count}" for name, count in kinds.most_common()))
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, required=True, help="a folder with TRL's sources: tests, scripts")
    parser.add_argument("--trainer", nargs="+", default=list(CORE), help="dpo kto ...; all (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("build/trl-suite"), help="where models and results are kept")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=int, default=300, help="seconds for a test")
    parser.add_argument(
        "--steps", type=int, default=0, help="of a training, where a test leaves the default (3 epochs)"
    )
    parser.add_argument("--float32", action="store_true", help="without autocast, to compare numbers closely")
    parser.add_argument("--reference", action="store_true", help="patch reference and teacher models as well")
    parser.add_argument("--quick", action="store_true", help="without the patch only what fails with it")
    parser.add_argument("-k", help="as pytest's")
    arguments = parser.parse_args()
    work: Path = arguments.work.resolve()
    for name in ("tests", "scripts", "pyproject.toml"):
        if not (arguments.trl / name).exists():
            raise SystemExit(f"--trl: no {name} in {arguments.trl}; give TRL's repository")
    # A copy, beside which there is no package trl: what is installed is tested.
    shutil.rmtree(work / "trl", ignore_errors=True)
    for name in ("tests", "scripts"):
        shutil.copytree(arguments.trl / name, work / "trl" / name)
    shutil.copy(arguments.trl / "pyproject.toml", work / "trl")
    if not (work / "home").exists():
        print("making models and data ...", flush=True)
        command = [sys.executable, str(HERE / "trl_hub.py"), str(work / "home"), str(work / "trl")]
        offline = {**os.environ, "HF_HOME": str(work / "home.unfinished"), "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, env=offline, stdout=subprocess.DEVNULL, check=True)
    for missing in json.loads((work / "home" / "missing.json").read_text()):
        print(f"not made: {missing}")
    files = files_of(work / "trl" / "tests", arguments.trainer)
    from importlib.metadata import version

    of = (arguments.trl / "VERSION").read_text().strip() if (arguments.trl / "VERSION").exists() else "?"
    print(f"tests of TRL {of}, installed TRL {version('trl')}, transformers {version('transformers')}", flush=True)
    if arguments.quick:
        with_patch = run_tests(work, "with", arguments, files)
        failed = [test for test, line in with_patch.items() if line["outcome"] == "failed"]
        without = {test: {**line, "not_run": True} for test, line in with_patch.items() if test not in failed}
        if failed:
            without |= run_tests(work, "without", arguments, failed)
    else:
        without = run_tests(work, "without", arguments, files)
        with_patch = run_tests(work, "with", arguments, files)
    return not report(without, with_patch, "float32" if arguments.float32 else "bf16")


if __name__ == "__main__":
    sys.exit(main())
