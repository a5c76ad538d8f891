//! Trainings of one run file with several seeds, all into one folder.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::cmd;
use crate::train::Run;

/// What is trained.
#[derive(Debug)]
pub struct Plan {
    /// What all trainings share: run file, settings, device.
    pub base: Run,
    /// How many of each kind: seeds 0, 1, 2, ...
    pub seeds: u64,
    /// Where the trainings go.
    pub out: PathBuf,
}

impl Plan {
    /// The training of a seed into `dir`: `before` are settings that those of the plan may change, `after` those that they may
    /// not.
    pub fn training(&self, before: &[&str], after: &[&str], seed: u64, dir: &Path) -> Run {
        let owned = |set: &[&str]| set.iter().map(|&set| set.to_owned()).collect::<Vec<_>>();
        let mut set = owned(before);
        set.extend(self.base.set.iter().cloned().chain(owned(after)));
        set.extend([format!("seed={seed}"), format!("output_dir={}", dir.display())]);
        Run { config: self.base.config.clone(), set, device: self.base.device.clone() }
    }

    /// Notes the settings in a new folder, and compares them with those of one that is gone on with.
    ///
    /// # Errors
    /// Where `out` has trainings of other settings.
    pub fn settle(&self) -> Result<()> {
        fs::create_dir_all(&self.out).with_context(|| format!("cannot make {}", self.out.display()))?;
        let file = &self.base.config;
        let config = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        let settings = format!("# --set {}\n{config}", self.base.set.join(" --set "));
        let path = self.out.join("settings.yaml");
        match fs::read_to_string(&path) {
            Ok(noted) => ensure!(
                noted == settings,
                "{} has trainings of another run file or other settings, as its settings.yaml says: choose another --dir",
                cmd::shown(&self.out)
            ),
            Err(_) => fs::write(&path, settings).with_context(|| format!("cannot write {}", path.display()))?,
        }
        Ok(())
    }
}
