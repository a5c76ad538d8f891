//! What a run came to, beside its accuracy: `train_results.json`, with HF `Trainer`'s keys where it has them.

use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use vora_files::write_bytes;

/// The sums of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainResults {
    /// Steps done.
    pub steps: u64,
    /// Seconds that they took, evaluations and pauses between runs left out.
    pub train_runtime: f64,
    /// Steps a second.
    pub train_steps_per_second: f64,
    /// Elements of everything trained, what only training needs (distillation heads) included.
    pub trained_parameters: u64,
    /// The most memory that the last process of the run held at once, in bytes: on the CPU all of it, mapped weights
    /// included; on a GPU that of its tensors there. Absent where the system does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_memory: Option<u64>,
    /// The machine of that process, in words; absent in runs of an older version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<String>,
    /// The version of this library in that process; absent in runs of an older one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
}

impl TrainResults {
    /// Reads the file of a run folder.
    ///
    /// # Errors
    /// Where it is missing (the run has not ended) or does not hold these keys.
    pub fn open(run: &Path) -> Result<Self> {
        let path = run.join("train_results.json");
        let text = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("{} is not what a run writes there", path.display()))
    }

    /// Writes the file into a run folder.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub fn save(&self, run: &Path) -> Result<()> {
        write_bytes(&run.join("train_results.json"), serde_json::to_string_pretty(self)?.as_bytes())
    }
}
