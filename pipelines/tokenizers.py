"""What a student of another vocabulary than its teacher's cannot learn from it, refused before any work.
Pieces do not stand for each other then: of all that a teacher shows, only its logits of whole sequences mean the same
to both."""

from __future__ import annotations

from collections.abc import Iterator

from distill.losses import Logits
from distill.settings import UserError
from pipelines.run import Run


def check_tokenizers(run: Run) -> None:
    """Raises UserError where the vocabularies differ and something compares pieces, naming all that does."""
    if not run.pieces_correspond and (clashes := list(_clashes(run))):
        raise UserError(
            f"student.tokenizer: the pieces of {run.config.student.tokenizer} are not the teacher's, so only logits of "
            f"whole sequences can be compared. {' '.join(clashes)}"
        )


def _clashes(run: Run) -> Iterator[str]:
    config = run.config
    if config.general is not None:
        yield "General distillation compares hidden states: set general=null."
    if config.student.initialization in ("teacher", "layers"):
        yield "The teacher's embeddings are of other pieces: set student.initialization=random, or to a checkpoint."
    if config.task is None:
        return
    if config.task.intermediate is not None:
        yield "The intermediate phase compares hidden states: set task.intermediate=null."
    if config.task.joint and config.task.logits is not None:
        yield "A joint phase compares hidden states: set task.joint=false and task.intermediate=null."
    if run.task.logits in (Logits.TOKEN_CLASSES, Logits.SPAN):
        yield f"A {run.task.name} has logits for each piece: leave student.tokenizer out."
    if config.teacher.dropout:
        yield "The teacher is asked once for each row, without dropout: set teacher.dropout=false."
