"""Stage export: the deployable student, checked after reading it back; ONNX and int8 are left to artefacts.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from distill.activations import model_inputs, read_logits
from distill.checkpoint import remove_folder, write_folder
from distill.config import Config, to_plain
from distill.export.options import OPENVINO, require_packages
from distill.settings import UserError
from pipelines import general, task
from pipelines.card.facts import origins
from pipelines.run import Run
from pipelines.stage import Stage, Work


def artefacts_folder(run: Run) -> Path:
    """One folder in it for each format, each with the tokenizer and metadata.json."""
    return run.folder / "artefacts"


class ExportStage(Stage):
    name = "export"
    after = ("general", "task")

    def is_on(self, config: Config) -> bool:
        return config.task is not None or config.general is not None

    def depends_on(self, run: Run) -> Mapping[str, Any]:
        options = run.config.export
        # Only where there are artefacts: a run that has none need not know of them.
        artefacts = {"export": to_plain(options), "task.metric": run.metric} if options.to else {}
        return {"task": run.config.task is not None, **artefacts}

    def check(self, run: Run) -> None:
        if not run.config.export.to:
            return
        if run.config.task is None:
            raise UserError(
                "export.to: an artefact is checked on validation rows, and without a task there are none. Leave "
                "export.to empty, or set task."
            )
        require_packages("export.to")
        if "openvino" in run.config.export.to:
            require_packages("export.to: openvino", OPENVINO, extra="openvino")

    def plan(self, run: Run) -> list[Work]:
        return [Work(self.name, f"{', '.join(['safetensors', *run.config.export.to])}, read back and compared")]

    def run(self, run: Run) -> dict[str, Any]:
        source = task.student_folder(run) if run.config.task is not None else general.student_folder(run)
        auto_class = run.task.auto_class if run.config.task is not None else AutoModel
        target = run.folder / "student"
        if run.is_main:
            model = auto_class.from_pretrained(source)
            tokenizer = AutoTokenizer.from_pretrained(source)

            def save(folder: Path) -> None:
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
                self._require_equal(run, model, auto_class.from_pretrained(folder))
                # Before this student takes its place: they are of the one that was there.
                remove_folder(artefacts_folder(run))

            write_folder(target, save)
        run.accelerator.wait_for_everyone()
        files = sorted(target.iterdir())
        figures = {"files": [file.name for file in files], "bytes": sum(file.stat().st_size for file in files)}
        if run.is_main and run.config.export.to:
            # Imported where it is asked for: without the extra `export` there is no ONNX to import.
            from pipelines.artefacts import write_artefacts

            figures["artefacts"] = write_artefacts(run, target)
        run.accelerator.wait_for_everyone()
        return {**figures, "origins": origins(run)}

    def _require_equal(self, run: Run, model: PreTrainedModel, read_back: PreTrainedModel) -> None:
        text = run.tokenizer("The student that is read back says the same.", return_tensors="pt")
        inputs = model_inputs(model, text)
        with torch.inference_mode():
            before, after = (self._output(one.eval(), inputs) for one in (model, read_back))
        if not torch.equal(before, after):
            raise RuntimeError("the exported student differs from the trained one after reading it back")

    def _output(self, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        output = model(**inputs)
        return output["last_hidden_state"] if "last_hidden_state" in output else read_logits(output)
