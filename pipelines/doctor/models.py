"""Checks of machine, layer map and tokenizer."""

from __future__ import annotations

import accelerate
import psutil
import torch
import transformers

from distill.initialization import BUILT_IN
from distill.teachers import vocabulary_hash
from pipelines import vocabulary
from pipelines.doctor.finding import Finding, Level
from pipelines.doctor.preflight import Preflight
from pipelines.estimate import parameters
from pipelines.run import measured_precision


def check_environment(preflight: Preflight) -> list[Finding]:
    """Versions and device; whether training uses the precision that is measured faster here."""
    run = preflight.run
    used, faster = run.config.runtime.precision, measured_precision(run.device)
    threads = f", {torch.get_num_threads()} threads" if run.device.type == "cpu" else ""
    measured = "bf16 is measured faster here" if faster == "bf16" else "bf16 is measured no faster here"
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, accelerate {accelerate.__version__}"
    )
    message = f"{versions}; {run.device.type}{threads}, precision {used} ({measured})"
    if used == faster:
        return [Finding(Level.OK, "environment", message)]
    return [
        Finding(Level.NOTE, "environment", message, f"Set runtime.precision={faster}, where the other is not meant.")
    ]


def check_memory(preflight: Preflight) -> list[Finding]:
    """Weights, gradients and AdamW's two values against the free memory of the device."""
    run = preflight.run
    teacher, student = parameters(run.checkpoint.config), parameters(run.student_config())
    trains_teacher = run.config.task is not None and not preflight.teacher_is_ready
    needed = max(4 * teacher + 16 * student, 16 * teacher if trains_teacher else 0) / 1e6
    if run.device.type == "cuda":
        free = torch.cuda.mem_get_info(run.device)[0] / 1e6
    else:
        free = psutil.virtual_memory().available / 1e6 / run.accelerator.num_processes
    message = (
        f"{needed:,.0f} MB a process for weights, gradients and optimizer, {free:,.0f} MB free; activations come on top"
    )
    if needed < free * 0.8:
        return [Finding(Level.OK, "memory", message)]
    remedy = "Free memory, start fewer processes, or take a smaller teacher or student (student.layers, student.width)."
    return [Finding(Level.WARNING, "memory", message, remedy)]


def check_layer_map(preflight: Preflight) -> list[Finding]:
    """The map; whether the last teacher layer, which the logits come from, teaches anyone."""
    run = preflight.run
    layers = run.layer_map
    message = f"{layers.describe()} (of {layers.teacher_layers})"
    if layers.teacher_layers in {teacher for _, teacher in layers.hidden}:
        return [Finding(Level.OK, "layer map", message)]
    return [
        Finding(
            Level.NOTE,
            "layer map",
            f"{message}: the teacher's last layer, which its logits come from, teaches no student layer",
            "Where that is not meant, set layer_map.strategy to uniform or top, or add "
            f"[{layers.student_layers}, {layers.teacher_layers}] to layer_map.pairs.",
        )
    ]


def check_tokenizer(preflight: Preflight) -> list[Finding]:
    """One vocabulary for the teacher and the checkpoint that the student starts from; one embedding a piece."""
    run = preflight.run
    pieces, embeddings = len(run.tokenizer), run.student_source.config.vocab_size
    own = vocabulary_hash(run.tokenizer)
    message = f"vocabulary {own[:12]}, {pieces:,} pieces for {embeddings:,} embeddings"
    spare = embeddings - pieces > max(64, embeddings // 100)
    findings = [
        Finding(
            Level.NOTE if spare else Level.OK,
            "tokenizer",
            message,
            "Make sure that this tokenizer was saved with this model: many embeddings are never used." if spare else "",
        )
    ]
    if run.cut is not None:
        findings.append(Finding(Level.OK, "tokenizer", f"cut to {vocabulary.sentence(vocabulary.describe(run))}"))
    if not run.pieces_correspond:
        findings.append(
            Finding(
                Level.NOTE,
                "tokenizer",
                f"the student reads the pieces of {run.config.student.tokenizer}, the teacher its own: only logits are "
                "distilled, and their loss is not measured here",
                "Leave student.tokenizer out where the student may read the teacher's pieces: hidden states and "
                "attention teach it more.",
            )
        )
    source = run.config.student.initialization
    other = None if source in BUILT_IN else vocabulary.own_tokenizer(source)
    if other is None:
        return findings
    if vocabulary_hash(other) == own:
        return [*findings, Finding(Level.OK, "tokenizer", f"{source} has the same vocabulary")]
    if run.cut is not None:  # others than the teacher's are refused before
        return [
            *findings,
            Finding(Level.OK, "tokenizer", f"{source} has the vocabulary that the student's is cut from"),
        ]
    mine, others = run.tokenizer.get_vocab(), other.get_vocab()
    differing = sorted(piece for piece in mine if others.get(piece) != mine[piece])
    example = (
        f", for instance {differing[0]!r} is {mine[differing[0]]} and {others.get(differing[0])}" if differing else ""
    )
    compares_features = run.config.general is not None or (
        run.config.task is not None and run.config.task.compares_layers
    )
    return [
        *findings,
        Finding(
            Level.ERROR if compares_features else Level.WARNING,
            "tokenizer",
            f"student.initialization: the tokenizer of {source} is not the student's: {len(differing):,} of "
            f"{len(mine):,} pieces have another number there{example}. The student's embeddings would stand for other "
            "words",
            "Give a checkpoint with the student's tokenizer (the teacher's, unless student.tokenizer is another), or "
            "set student.initialization to teacher or random.",
        ),
    ]
