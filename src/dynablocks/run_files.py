"""The names of what a run directory, a cell of ``reproduce`` and the folder of a fit hold; who writes each."""

from __future__ import annotations

CONFIG = "config.yaml"
"""Every setting, by ``train`` and ``fit``; ``report`` adds those that one of an older version left out. In a checkpoint
those that decide its training, with the network's."""
LOCK = ".lock"
"""Held by the one training of this directory, by the training loop; by ``fit`` where it cannot write beside it."""

CHECKPOINT = "checkpoint"
"""The folder of the newest checkpoint, by the training loop; of a fit that of its stages."""
PREVIOUS_CHECKPOINT = "checkpoint.previous"
"""The folder of the checkpoint before, by the training loop."""
DAMAGED_CHECKPOINT = "checkpoint.damaged"
"""How the name of a folder begins that was the newest checkpoint and was found damaged, by the training loop."""
UNFINISHED_CHECKPOINT = ".checkpoint.tmp-"
"""How the name of a folder begins in which the training loop writes the next one."""
WEIGHTS = "model.safetensors"
"""In a checkpoint and in the folder of a fit: the weights, by the training loop and by ``fit``."""
STATE = "state.pt"
"""In a checkpoint: the state of optimiser, plan and random numbers, by the training loop."""
MANIFEST = "manifest.json"
"""In a checkpoint: size and SHA-256 of its other files, by the training loop."""

HISTORY = "metrics.jsonl"
"""The training's metrics, a line of JSON an epoch, by the training loop."""
TEACHER_LABELS = "teacher.safetensors"
"""What the teacher of a training says of each of its images, by ``train``."""
TRAINING = "training.json"
"""What a finished training says of itself and of its images, by ``train``."""
CERTIFICATE = "certificate.json"
"""What was certified, for scripts, by ``certify``."""
CERTIFICATE_TENSORS = "certificate.safetensors"
"""Radius, prediction and label of every certified image, by ``certify`` and by a cell."""
ATTACK = "attack.json"
"""How images were attacked and how many survived, for scripts, by ``attack``."""
ATTACK_TENSORS = "attack.safetensors"
"""What broke each attacked image, and adversarial examples, by ``attack`` and by a cell."""
ATTACK_PARTIAL = "attack.partial.safetensors"
"""What an attack that is not finished has found, by ``attack`` and by a cell."""
AUTOATTACK = "autoattack.json"
"""How many images survived AutoAttack, by ``benchmarks/certified/attack.py``."""
METRICS = "metrics.json"
"""The figures under stable names, for scripts, by every command that measures one, and by ``fit``."""
REPORT = "report.html"
"""The page for people, by ``report`` and ``fit``."""

CELL = "cell.json"
"""The settings of a cell, by ``reproduce``."""
RESULT = "result.json"
"""The result of a cell, by ``reproduce``."""
FAILED = "FAILED.json"
"""Why a cell could not be built, by ``reproduce``."""

VERIFICATION = "verification.json"
"""The measured properties of a surrogate, by ``fit``."""
PREDICTIONS = "predictions.csv"
"""A surrogate's trajectories beside those of the test data, by ``fit``."""
EXAMPLE_DATA = "example.csv"
"""The trajectories that ``fit --example`` made, by ``fit``."""

RUN_FILES = (
    ATTACK,
    ATTACK_PARTIAL,
    ATTACK_TENSORS,
    AUTOATTACK,
    CELL,
    CERTIFICATE,
    CERTIFICATE_TENSORS,
    CONFIG,
    METRICS,
    HISTORY,
    REPORT,
    RESULT,
    TEACHER_LABELS,
    TRAINING,
)
"""What a run directory, also as a cell of ``reproduce``, holds beside its checkpoints."""
