"""What somebody without dpsyngen does with a release and with samples; run as a program, with a JSON file of tasks.

Started with the interpreter of an environment that has diffusers, datasets and PyTorch.  With "block" in the tasks,
importing dpsyngen fails as it does where that is not installed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main(tasks_file: str) -> None:
    tasks = json.loads(Path(tasks_file).read_text())
    os.environ |= {"HF_HOME": tasks["cache"], "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    if tasks.get("block"):
        sys.modules["dpsyngen"] = None  # type: ignore[assignment]
    try:
        import dpsyngen  # noqa: F401
    except ImportError:
        pass
    else:
        raise SystemExit("dpsyngen is there, so nothing is shown by this")
    result = {}
    if "pipelines" in tasks:
        result["pipelines"] = [draw(t) for t in tasks["pipelines"]]
    if "sets" in tasks:
        result["sets"] = [look(t) for t in tasks["sets"]]
    Path(tasks["result"]).write_text(json.dumps(result))


def draw(task: dict) -> dict:
    import numpy as np
    import torch
    from diffusers import DiffusionPipeline

    torch.set_num_threads(1)
    options = {"custom_pipeline": task["release"]} if task.get("custom") else {}
    pipeline = DiffusionPipeline.from_pretrained(task["release"], trust_remote_code=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(**task["call"]).images
    np.save(task["out"], np.stack([np.asarray(p) for p in pictures]))
    about = {"class": type(pipeline).__name__, "classes": list(pipeline.class_names), "device": str(pipeline.device)}
    if "save" in task:
        pipeline.save_pretrained(task["save"])
        again = DiffusionPipeline.from_pretrained(task["save"], trust_remote_code=True)
        again.set_progress_bar_config(disable=True)
        arrays = again(**task["call"], output_type="np", return_dict=False)[0]
        tensors = again(**task["call"], output_type="pt").images
        raw = again(**task["call"], output_type="uint8").images
        about["same"] = {
            "np": bool((np.round(arrays[..., 0] * 255) == np.stack(pictures)).all()),
            "pt": bool((torch.round(tensors[:, 0] * 255).numpy() == np.stack(pictures)).all()),
            "uint8": bool((raw[:, 0] == np.stack(pictures)).all()),
        }
        about["asked"] = asked_for(again)
        about["errors"] = [raised(pipeline, **wrong) for wrong in task["wrong"]]
        about["errors"].append(raised(lambda: pipeline.save_pretrained(task["save"])))
        half = {"torch_dtype": torch.float16, "trust_remote_code": True}
        about["errors"].append(raised(lambda: DiffusionPipeline.from_pretrained(task["release"], **half)))
        about["errors"].append(raised(lambda: DiffusionPipeline.from_pretrained(task["release"])))
    return about


def asked_for(pipeline) -> dict:  # type: ignore[no-untyped-def]
    """Classes and generators in the forms that users of diffusers have; whether each draws what it should."""
    import numpy as np
    import torch

    def drawn(**call) -> bytes:  # type: ignore[no-untyped-def]
        return pipeline(**call, num_inference_steps=2, output_type="uint8").images.tobytes()

    def seeded(*seeds):  # type: ignore[no-untyped-def]
        return [torch.Generator().manual_seed(s) for s in seeds]

    last = len(pipeline.class_names) - 1
    name, one = pipeline.class_names[last], seeded(5)[0]
    first, second = (drawn(generator=one, batch_size=2) for _ in range(2))
    torch.manual_seed(8)
    free = [drawn(), drawn()]
    torch.manual_seed(8)
    same = [drawn(), drawn()]
    by_list = drawn(batch_size=2, class_labels=[last], seed=1)
    forms = (last, name, str(last), (name,), np.array([last]), np.int64(last), torch.tensor([last]), torch.tensor(last))
    wrong = ({"class_labels": name * 2}, {"class_labels": -1}, {"class_labels": []}, {"class_labels": True})
    return {
        "forms": [drawn(batch_size=2, class_labels=form, seed=1) == by_list for form in forms],
        "as many": [len(pipeline(class_labels=[0, 0, 0]).images), len(pipeline(generator=seeded(1, 2)).images)],
        "again": first == drawn(generator=seeded(5)[0], batch_size=2) != second,
        "each": drawn(generator=seeded(3, 4), class_labels=0)
        == drawn(generator=seeded(3)[0], class_labels=0) + drawn(generator=seeded(4)[0], class_labels=0),
        "free": [free[0] != free[1], free == same],
        "wrong": [raised(pipeline, **call) for call in wrong],
        "generators": raised(pipeline, batch_size=3, generator=seeded(1, 2)),
        "both": raised(pipeline, seed=1, generator=one),
    }


def raised(call, **options) -> str:  # type: ignore[no-untyped-def]
    try:
        call(**options)
    except ValueError as error:
        return str(error)
    return "nothing"


def look(task: dict) -> dict:
    import datasets
    import numpy as np

    rows = datasets.load_dataset(*task["load"], split="train", **task.get("options", {}))
    if "names" in task:
        rows = rows.cast_column("label", datasets.ClassLabel(names=task["names"]))
    np.save(task["out"], np.stack([np.asarray(x) for x in rows["image"]]))
    label = rows.features.get("label")
    return {
        "image": type(rows.features["image"]).__name__,
        "names": getattr(label, "names", None),
        "labels": list(rows["label"]) if label else None,
        "class_names": list(rows["class_name"]) if "class_name" in rows.features else None,
    }


if __name__ == "__main__":
    main(sys.argv[1])
