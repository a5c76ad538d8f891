//! From the run file to a student.

use anyhow::Result;
use tch::{Device, Kind};
use vora_model::Resolve;
use vora_recipe::{TrainConfig, Way};

use crate::pictures::Pictures;
use crate::preparation::llm_folder;
use crate::student::Student;
use crate::{chameleon, gemma4, llava, vora};

impl Student {
    /// Opens what `config.model` names and makes what it trains.
    ///
    /// # Errors
    /// Names the key, and the file, that does not fit.
    pub fn new(config: &TrainConfig, device: Device, kind: Kind, resolve: &Resolve<'_>) -> Result<Self> {
        Self::open(config, device, kind, resolve, false)
    }

    /// The same to be counted: a Gemma 4 Unified may be a folder without weights, whose config gives their shapes; it lies on
    /// the CPU then, takes no memory, and nothing can be computed with it ([`Student::is_outline`]).
    ///
    /// # Errors
    /// As [`Student::new`].
    pub fn outline(config: &TrainConfig, device: Device, kind: Kind, resolve: &Resolve<'_>) -> Result<Self> {
        Self::open(config, device, kind, resolve, true)
    }

    fn open(
        config: &TrainConfig,
        device: Device,
        kind: Kind,
        resolve: &Resolve<'_>,
        may_lack_weights: bool,
    ) -> Result<Self> {
        config.model.validate()?;
        let llm_folder = llm_folder(config, resolve)?;
        let pictures = Pictures::open(config, &llm_folder, resolve)?;
        match config.model.way()? {
            Way::Vora { .. } => vora::student(config, llm_folder, pictures, device, kind, resolve),
            Way::Llava { vision_tower } => {
                llava::student(config, vision_tower, llm_folder, pictures, device, kind, resolve)
            }
            Way::Chameleon { vqmodel } => chameleon::student(config, vqmodel, llm_folder, pictures, device, kind),
            Way::Gemma4Unified => {
                gemma4::student(config, llm_folder, pictures, device, kind, resolve, may_lack_weights)
            }
        }
    }
}
