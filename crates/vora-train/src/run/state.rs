//! Where a run stands.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use vora_files::write_bytes;
use vora_run::checkpoint::TRAINER_STATE;

use crate::run::best::Best;
use crate::step::loss_scale::LossScale;

/// Where a run stands: what a checkpoint holds beside its tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    /// Optimizer steps done.
    pub step: u64,
    /// Samples drawn from the training data: where the data goes on.
    pub samples_seen: u64,
    /// Samples from before that place that no step has had yet, as they wait for a batch of theirs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub samples_held: Vec<u64>,
    /// Of the steps done, those that were skipped: the schedule waits for as many steps.
    #[serde(default)]
    pub skipped_steps: u64,
    /// How many of the last steps were skipped in a row.
    #[serde(default)]
    pub skipped_in_a_row: u64,
    /// The best checkpoint before this one, where the run looks for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best: Option<Best>,
    /// Seconds of work so far.
    pub seconds: f64,
    /// How far the loss is scaled, in f16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<LossScale>,
    /// What the data's order and contents are drawn from.
    pub seed: u64,
    /// The algorithm that draws them.
    pub random: String,
    /// SHA-256 of the first samples, where a program brings its data along.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_sha256: Option<String>,
    /// SHA-256 of the run's configuration.
    pub config_sha256: String,
    /// The version of this library.
    pub version: String,
}

impl TrainerState {
    /// Writes `trainer_state.json` into a checkpoint.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        write_bytes(&folder.join(TRAINER_STATE), text.as_bytes())
    }

    /// Reads `trainer_state.json` of a checkpoint.
    ///
    /// # Errors
    /// Where the file cannot be read or is not what a trainer writes.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(TRAINER_STATE);
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("{} is not a trainer's state", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_comes_back() {
        let state = TrainerState {
            step: 7,
            samples_seen: 42,
            samples_held: vec![7],
            skipped_steps: 0,
            skipped_in_a_row: 0,
            best: None,
            seconds: 1.5,
            loss_scale: Some(LossScale::default()),
            seed: 1,
            random: "chacha".into(),
            source_sha256: None,
            config_sha256: "0".into(),
            version: "0.1.0".into(),
        };
        let folder = tempfile::tempdir().unwrap();
        let error = format!("{:#}", TrainerState::open(folder.path()).unwrap_err());
        assert!(error.contains("cannot read") && error.contains(TRAINER_STATE), "{error}");
        state.save(folder.path()).unwrap();
        assert_eq!(TrainerState::open(folder.path()).unwrap(), state);
    }
}
