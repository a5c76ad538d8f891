//! The run file's `distill`: the teacher's part in the loss.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use crate::schedule::Ramp;

/// The teacher's part in the loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DistillConfig {
    /// What the distillation loss is multiplied with; the language loss counts 1.
    pub weight: f64,
    /// How that weight changes; absent: it does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_schedule: Option<WeightSchedule>,
    /// Which blocks of the student meet which of the teacher's, both counted from 0: `{3: 5, 7: 11}`. Absent: each
    /// adapted block, or each of an LLM that is trained whole, meets the teacher's of the same number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocks: Option<BTreeMap<usize, usize>>,
    /// Which hidden states of student and teacher meet; absent: `output`, and `input` in a published recipe.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pairing: Option<Pairing>,
    /// Whether each position's mean is taken out of the teacher's features.
    pub center: bool,
    /// Pictures over which that mean, and the baseline of the loss, are measured before the first step.
    pub mean_over: usize,
    /// Folder where the teacher's features of each picture are kept, in the dtype that they were computed in, so that
    /// the teacher looks at each picture of the data once. Several runs may share it. It grows with the data: `vora
    /// train --plan` says how large.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<PathBuf>,
}

impl Default for DistillConfig {
    fn default() -> Self {
        Self {
            weight: 1.0,
            weight_schedule: None,
            blocks: None,
            pairing: None,
            center: false,
            mean_over: 128,
            cache: None,
        }
    }
}

/// A way of the distillation loss's weight from `distill.weight` to another.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeightSchedule {
    /// Its shape.
    #[serde(rename = "type")]
    pub ramp: Ramp,
    /// The weight at its end, and from there on.
    pub end: f64,
    /// Its steps; absent: the whole run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
}

impl DistillConfig {
    /// Checks what the types leave open.
    ///
    /// # Errors
    /// Names the key.
    pub(crate) fn validate(&self) -> Result<()> {
        let end = self.weight_schedule.as_ref().map_or(0.0, |schedule| schedule.end);
        for (key, value) in [("distill.weight", self.weight), ("distill.weight_schedule.end", end)] {
            ensure!(value >= 0.0 && value.is_finite(), "{key} is {value}, it must be 0 or more");
        }
        ensure!(
            self.blocks.as_ref().is_none_or(|blocks| !blocks.is_empty()),
            "distill.blocks is empty; leave it out, or leave model.aux_vision out to train without a teacher"
        );
        ensure!(self.mean_over >= 2, "distill.mean_over is {}, it must be at least 2", self.mean_over);
        Ok(())
    }

    /// The weight for the step that follows `steps_done` steps, in a run of `max_steps`.
    pub fn weight_at(&self, steps_done: u64, max_steps: u64) -> f64 {
        self.weight_schedule.as_ref().map_or(self.weight, |WeightSchedule { ramp, end, steps }| {
            let progress = steps_done as f64 / steps.unwrap_or(max_steps).max(1) as f64;
            end + (self.weight - end) * ramp.down(progress.min(1.0))
        })
    }
}

/// Which hidden states of student and teacher meet in the head of block `i`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pairing {
    /// The outputs of both blocks `i`, as the VoRA paper has it: every adapted block is supervised.
    #[default]
    Output,
    /// Number `i` of what either class calls its hidden states, as the released code has it: of the student what goes
    /// into block `i`, so that the first head reads the patch embedding; of the teacher the same, or the output of its
    /// block `i` for AIMv2 in Apple's own layout, whose hidden states begin there.
    Input,
}
