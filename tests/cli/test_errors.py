"""What the command line refuses: one message, exit code 2 (or 3, the budget's), and nothing is made or charged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dpsyngen.distributed import ALONE
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.training.run import Run
from tests.conftest import tiny_arrays

TRAIN = ("train", "--data", "{run}/../d.npz", "--out", "{new}/r")
SAMPLE = ("sample", "{run}", "--out", "{new}/s")
EVALUATE = ("evaluate", "{run}", "-n", "20")
MEMORISATION = ("memorisation", "{run}")
BUDGET = ("budget", "new", "{new}/b")

REFUSED: dict[tuple[str, ...], list[tuple[str, str]]] = {
    TRAIN: [
        ("", "--epsilon is missing"),
        ("--epsilon 0", "privacy.epsilon is 0"),
        ("--epsilon -1", "privacy.epsilon is -1"),
        ("--epsilon lots", "must be a positive number, or inf"),
        ("--epsilon nan", "privacy.epsilon is nan"),
        ("--epsilon 1 --delta 0.5", "privacy.delta is 0.5, but must be below 1/records"),
        ("--epsilon 1 --delta 0", "privacy.delta is 0"),
        ("--epsilon 1 --batch 61", "private.batch is 61, but must be at most 60, as there are only 60 records"),
        ("--epsilon 1 --variant sideways", "'both', 'gaussian', 'instant' or 'residual'"),
        ("--epsilon 1 --tau-cleaning 2 --tau-coarse 1", "must be below tau_coarse = 1"),
        ("--epsilon 1 --variant residual --tau-cleaning 2", "must be below tau_coarse = 1.5"),
        ("--epsilon 1 --networks one", "'experts' or 'shared'"),
        ("--epsilon 1 --network gigantic", "nano, tiny, small"),
        ("--epsilon 1 --preset fast", "preset is 'fast'"),
        ("--epsilon 1 --preset=", "preset is ''"),
        ("--epsilon 1 --preset cpu --set preset=demo", "must be cpu, as beside it"),
        ("--epsilon 1 --set data.labels=3", "data.labels is 3"),
        ("--epsilon 1 --config missing.yaml", "cannot be read"),
        ("--epsilon 1 --program leaves", "dead-leaves"),
        ("--epsilon 1 --steps 0", "private.steps is 0"),
        ("--epsilon 1 --steps many", "given: 'many'"),
        ("--epsilon 1 --labels {new}/none.csv --unconditional", "must be left out with --unconditional"),
        ("--epsilon 1 --label-column kind --unconditional", "must be left out with --unconditional"),
        ("--epsilon 1 --budget {new}/none", "none cannot be read"),
        ("--epsilon 1 --window 1", "such as 40,400"),
        ("--epsilon 1 --value-range 1", "such as 0,4095"),
        ("--epsilon 1 --public-steps 0", "public.steps is 0"),
        ("--epsilon 1 -k 0", "private.copies is 0"),
        ("--epsilon 1 --clip 0", "privacy.clipping_norm is 0"),
        ("--epsilon 1 --lr -1", "private.learning_rate is -1"),
        ("--epsilon 1 --physical-batch 0", "private.physical_batch is 0"),
        ("--epsilon 1 --resolution 7", "data.resolution is 7"),
        ("--epsilon 1 --resolution 9 --network tiny", "multiple of 4"),
        ("--epsilon 1 --channels blue", "'auto', 'grey' or 'rgb'"),
        ("--epsilon 1 --records 0", "data.records is 0"),
        ("--epsilon 1 --group-size 1001", "privacy.group_size is 1001"),
        ("--epsilon 1 --value-range 5", "two numbers are needed, with a comma between"),
        ("--epsilon 1 --value-range 5,5", "values of black and white"),
        ("--epsilon 1 --window 40", "two numbers are needed, with a comma between"),
        ("--epsilon 1 --window 40,0", "the width, which is above 0"),
        ("--epsilon 1 --fit squeeze", "'crop' or 'pad'"),
        ("--epsilon 1 --frames some", "'first' or 'all'"),
        ("--epsilon 1 --frames all", "how many images of one person there are"),
        ("--epsilon 1 --labels {new}/none.csv", "none.csv"),
        ("--epsilon 1 --instant --variant dpdm", "left out, or instant"),
        ("--epsilon 1 --groups {new}/none.csv", "have no file names"),
        ("--epsilon 1 --most-per-person 0", "privacy.most_per_person is 0"),
        ("--epsilon 1 --most-per-person 2", "need to know whose image each is"),
        ("--epsilon 1 --most-per-person 2 --group-size 3", "is not privacy.most_per_person"),
        ("--epsilon 1 --set private.beta3=1", "did you mean beta"),
        ("--epsilon 1 --set private=3", "private is 3: input should be a mapping of settings"),
        ("--epsilon 1 --set privacy.epsilon=3", "an option says 1.0 already"),
        ("--epsilon 1 --set data.source={two}", "--set data.source is"),
        ("--epsilon 1 --instant --set stages.variant=dpdm", "an option says 'instant' already"),
        ("--epsilon 1e-9 --instant", "(ε = 1e-09 is below 0.001: so little"),
        ("--epsilon 1 --set nonsense", "section.name=value"),
        ("--epsilon 1 --device abacus", "must be auto or cpu"),
        ("--epsilon 1 --device cpu --set compute.precision=tf32", "the CPU has fp32, bf16 only"),
        ("--epsilon 1 --variant finetune --no-pretrain", "choose 'dpdm'"),
        ("--epsilon 1 --log-format xml", "xml"),
    ],
    ("train", "--out", "{new}/r"): [
        ("--epsilon 1", "--data is missing"),
        ("--data {two}", "--epsilon is missing"),
        ("--data {two} --config {stages}", "--epsilon is missing"),
        ("--data {two} --set privacy.delta=1e-4", "--epsilon is missing"),
        ("--epsilon 1 --data {new}/nowhere", "nowhere"),
        ("--resume", "does not exist"),
    ],
    ("train", "--out", "{new}"): [
        ("--resume --epsilon 3", "continues with the settings"),
        ("--resume --set data.source={two}", "continues with the settings"),
        ("--resume --set private=5", "continues with the settings"),
    ],
    SAMPLE: [
        ("-n 0", "-n is 0"),
        ("-n 1000000000000", "at most 100,000,000 at a time"),
        ("--sampler magic", "'ddim', 'heun' or 'dpmpp'"),
        ("--steps 0", "steps is 0"),
        ("--guidance -1", "guidance is -1"),
        ("--churn 5", "churn needs the sampler 'heun'"),
        ("--classes 9", "no class '9'"),
        ("--batch-size 0", "--batch-size is 0"),
        ("--out {new}/s.zip", "a file that ends in .npz or .parquet"),
        ("--out {two}/s", "two.npz is not a folder"),
        ("--out {two}/s.npz", "two.npz is not a folder"),
        ("--device abacus", "must be auto or cpu"),
    ],
    EVALUATE: [
        ("--features vibes", "pixels-pca, efficientnet-lite0, inception"),
        ("--classifiers oracle", "is 'oracle': input should be 'logreg', 'mlp', 'cnn'"),
        ("--metrics fid", "dpsyngen: metrics is 'fid'"),
        ("--metrics= --test {two} --classifiers=", "nothing would be measured"),
        ("--metrics=", "nothing would be measured"),
        ("--seed -1", "seed is -1"),
        ("--inception-weights {two}", "left out without the features inception"),
        ("--test {four}", "not among them: '3'"),
        ("--data {new}/gone", "gone"),
        ("--data=", "the images' source is empty"),
        ("--data {new}/gone --steps 0", "steps is 0"),
        ("-n 1", "at least 2"),
        ("-n 1000000000000", "at most 100,000,000 at a time"),
        ("--features inception --inception-weights {two}", "does not hold the weights"),
        ("--bootstrap 5", "at least 40"),
        ("--max-images 1", "max_images is 1"),
    ],
    MEMORISATION: [
        ("--data {other}", "not those that"),
        ("--held-out {four}", "not among them: '3'"),
        ("--held-out {new}/gone", "gone"),
        ("--held-out=", "the images' source is empty"),
        ("--seed -1", "seed is -1"),
        ("-n 0", "at least 1"),
        ("--features vibes", "pixels, pixels-pca"),
        ("--device abacus", "must be auto or cpu"),
    ],
    ("plan", "--records", "1000"): [
        ("", "give one of --epsilon"),
        ("--epsilon 1 --noise 1", "give one of --epsilon"),
    ],
    ("plan", "--records", "100", "--batch", "10"): [
        ("--epsilon -1", "from 0.001 to 10000"),
        ("--epsilon lots", "valid number, unable to parse string as a number; given: 'lots'"),
        ("--epsilon 1 --delta 0.5", "below 1/records"),
        ("--noise 0", "a number from 1e-06"),
        ("--epsilon 1 --steps 10000000", "from 1 to a million"),
        ("--epsilon 1 --group-size 1000000", "from 1 to 1000"),
    ],
    ("plan", "--epsilon", "1"): [
        ("--records 0", "records is 0, but must be from 1 to a million million"),
        (f"--records {10**21}", "must be from 1 to a million million"),
        ("--records 100 --batch 101", "the 100 records"),
    ],
    ("ledger", "{run}"): [
        ("--delta 1e-3,", "must be numbers between 0 and 1, comma-separated"),
        ("--delta 2", "between 0 and 1"),
        ("--delta x", "numbers between 0 and 1"),
        ("--group-size 0", "--group-size is 0"),
        ("--group-size 1.5", "whole numbers"),
    ],
    (*BUDGET, "--delta", "1e-3"): [
        ("--epsilon 0", "must be from 0.001 to 10000"),
        ("--epsilon inf", "more protects nobody"),
        ("--epsilon 1 --group-size 0", "group_size"),
    ],
    (*BUDGET, "--epsilon", "1"): [("--delta 0.1", "at most 0.01")],
    ("budget",): [
        ("new {new}/none/b --epsilon 1 --delta 1e-3", "must be an existing one"),
        ("show {new}/b", "cannot be read"),
        ("show {two}", "unless two.npz is no budget file at all"),
        ("new {two} --epsilon 1 --delta 1e-3", "exists already"),
        ("settle {new}/b {new}", "not a run directory"),
    ],
    ("release", "{run}"): [
        ("{new}/b.tar", "ends in .zip"),
        ("{new}/none/b.zip", "not a folder"),
        ("{new}/b.zip --samples -1", "0 or more"),
        ("{new}/b.zip --seed 3", "left out without --samples"),
        ("{new}/b.zip --sign {new}/none", "cannot be read"),
    ],
    ("release",): [("{new} {new}/b.zip", "not a run directory")],
    ("compare", "digits"): [
        ("--out {two} --data {new}/gone", "two.npz exists already"),
        ("--out {two}/x --data {new}/gone", "two.npz is not a folder"),
        ("--out {two} --dry-run", "two.npz exists already"),
    ],
    ("export", "{run}"): [("--out {two}/e", "two.npz is not a folder")],
    ("programs", "save", "strokes", "-n", "2"): [("--out {two}/p", "two.npz is not a folder")],
    ("verify",): [
        ("{two} --public-key {new}/none", "cannot be read"),
        ("{new}/b.zip", "a file, made by `dpsyngen release"),
        ("{run}", "a file, made by `dpsyngen release"),
    ],
    ("prior", "train", "--out", "{new}/p"): [("--steps 1000000000000", "from 1 to 100,000,000")],
    ("doctor",): [("{new}", "not a run directory")],
    ("studio", "--no-browser"): [
        ("--runs {two}", "a folder, or one that is to be made"),
        ("--runs {two}/x", "two.npz is not a folder"),
        ("--tls-cert {two}", "left out without --allow-remote"),
    ],
}


@pytest.fixture(scope="module")
def places(finished: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run, its images with two and with four classes, and other images."""
    folder = tmp_path_factory.mktemp("other")
    images, labels = tiny_arrays()
    np.savez(folder / "two.npz", images=images, labels=labels % 2)
    np.savez(folder / "four.npz", images=images, labels=np.arange(len(images)) % 4)
    np.savez(folder / "other.npz", images=tiny_arrays(seed=3)[0], labels=labels)
    (folder / "stages.yaml").write_text("stages: {variant: dpdm}\n")
    sets = {name: folder / f"{name}.npz" for name in ("two", "four", "other")}
    return {"run": finished.path, "stages": folder / "stages.yaml", **sets}


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        pytest.param(command, options, message, id=f"{' '.join(command[: 1 + (command[0] == 'budget')])} {options}")
        for command, cases in REFUSED.items()
        for options, message in cases
    ],
)
def test_refused(call, places, tmp_path, command, options, message) -> None:
    ledger = Ledger(Run(places["run"]).ledger_path)
    words = [word.format(new=tmp_path, **places) for word in (*command, *options.split())]
    code, _, err = call(*words)
    assert code in (2, 3)
    assert message in err
    assert [line.startswith("dpsyngen: ") for line in err.splitlines()].count(True) == 1, err
    assert list(tmp_path.iterdir()) == []
    assert Ledger(Run(places["run"]).ledger_path).entries == ledger.entries


@pytest.mark.parametrize("options", ["--program leaves", "--budget {new}/none"])
def test_what_needs_no_image_is_refused_before_any_is_read(call, places, tmp_path, options, monkeypatch) -> None:
    monkeypatch.setattr("dpsyngen.fit._read", lambda *_: pytest.fail("images were read"))
    words = [word.format(new=tmp_path, **places) for word in (*TRAIN, "--epsilon", "1", *options.split())]
    assert call(*words)[0] in (2, 3)


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        ("--instant --steps 5 --set moments.rank=4", "private.steps"),
        ("--program contours --network nano --set public.steps=3", "program.name, public.steps"),
        ("--variant dpdm --tau-coarse 1 --steps 5", "stages.tau_coarse"),
        ("--variant cleaning --tau-cleaning -2 --program contours", None),
        ("--variant gaussian --clip 2 --tensorboard", "privacy.clipping_norm, logging.tensorboard"),
        ("--instant --set logging.pictures=5 --delta 1e-4", "logging.pictures"),
        ("--clip 2 --set logging.pictures=5", None),
        ("--set network.sigma_data=1", "network.sigma_data"),
        ("--network tiny --tau-cleaning -2", "stages.tau_cleaning"),
    ],
)
def test_options_that_the_variant_does_not_look_at_are_told(call, places, tmp_path, options, idle, monkeypatch) -> None:
    monkeypatch.setattr("dpsyngen.fit.Training.start", lambda *_: None)
    monkeypatch.setattr("dpsyngen.fit.train_together", lambda begin, *_: begin(device="cpu", ranks=ALONE))
    words = [word.format(new=tmp_path, **places) for word in (*TRAIN, "--epsilon", "1", *options.split())]
    code, _, err = call(*words)
    assert code == 0
    warned = [line for line in err.splitlines() if "warning" in line]
    assert [line.split("looks at no ")[1].split(":")[0] for line in warned] == ([] if idle is None else [idle])
