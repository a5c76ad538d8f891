//! Combined loss, distillation heads, optimizer, schedule, trainer, checkpoints, evaluation.
