"""Whether a phase that compares layers reads its teacher's states from disk, and making them.
How they are kept is left to distill/teacher_states.py."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedModel

from distill.activations import Needs
from distill.objective import Objective
from distill.teacher_states import TeacherStates, state_layout, teacher_states
from distill.training import TrainingOptions, total_steps
from pipelines.run import Run


def states_for(
    run: Run, teacher: PreTrainedModel, rows: Dataset, needs: Needs, objective: Objective, options: TrainingOptions
) -> TeacherStates | None:
    """The teacher's states of the rows, as far as `needs` goes, where the run keeps them; None where the teacher must
    run in every step, and where its logits are all that is compared.

    It must where `runtime.states_cache_gb` is 0 or too little, where the teacher has dropout or a loss counts padded
    positions, whose states are not kept, and where no row comes twice and no other run can read them.
    """
    limit = run.config.runtime.states_cache_gb
    layers_needed = dataclasses.replace(needs, logits=False) != Needs()
    if limit == 0 or not layers_needed or not asked_again(run, options, len(rows)):
        return None
    if any(getattr(term, "padding", "masked") == "included" for term in objective.terms.values()):
        run.say("teacher states are not kept: a loss counts padded positions (padding: included)")
        return None
    collator = run.paired_encoded.collator
    layout = state_layout(teacher, rows, collator, needs)
    size = sum(rows["length"][:]) * layout.token_bytes / 1e9
    folder = states_folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free / 1e9
    if size > limit or size > free - 1:
        run.say(
            f"teacher states are not kept: they would take {size:.1f} GB, runtime.states_cache_gb is {limit:g} and "
            f"{free:.1f} GB are free; the teacher runs in every step"
        )
        return None
    bar = tqdm(
        total=len(rows), desc=f"teacher states, {size:.1f} GB", unit="row", dynamic_ncols=True, disable=not run.is_main
    )
    with bar:
        return teacher_states(
            teacher,
            rows,
            collator,
            run.accelerator,
            needs,
            layout,
            folder=folder,
            progress=bar.update,
        )


def asked_again(run: Run, options: TrainingOptions, rows: int) -> bool:
    """Whether the teacher would be asked about a row that it has answered, by this phase or by another run that shares
    its answers. With dropout it says something else each time."""
    if run.config.teacher.dropout:
        return False
    steps_per_epoch = -(-rows // options.batch_size)
    return total_steps(options, steps_per_epoch) > steps_per_epoch or run.config.runtime.logits_cache is not None


def states_folder(run: Run) -> Path:
    """Beside the teacher's logits where runs share these; else in the run folder, where they go with the stage."""
    shared = run.config.runtime.logits_cache
    return Path(shared) if shared else own_states(run)


def own_states(run: Run) -> Path:
    return run.folder / "task" / "teacher_states"
