//! From the run file to a student.

use std::sync::Arc;

use anyhow::{Result, ensure};
use tch::{Device, Kind};
use vora_model::Resolve;
use vora_recipe::{TrainConfig, Way};
use vora_torch::dist::ProcessGroup;

use crate::opening::Opening;
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
        Self::open(config, device, kind, resolve, Weights::All)
    }

    /// The same to be counted: the models' folders may lack the weights, whose shapes their configs give. It lies on the CPU
    /// then, takes no memory, and nothing can be computed with it ([`Student::is_outline`]).
    ///
    /// # Errors
    /// As [`Student::new`].
    pub fn outline(config: &TrainConfig, device: Device, kind: Kind, resolve: &Resolve<'_>) -> Result<Self> {
        Self::open(config, device, kind, resolve, Weights::MayLack)
    }

    /// The same in one of several processes, each of which keeps a share of the frozen weights of the LLM's blocks: `zero_stage:
    /// 3`. What one of them computes, all compute, or all say that they may not: [`Student::apart`].
    ///
    /// # Errors
    /// As [`Student::new`], and where the LLM cannot be shared.
    pub fn sharded(
        config: &TrainConfig,
        device: Device,
        kind: Kind,
        resolve: &Resolve<'_>,
        group: &Arc<ProcessGroup>,
    ) -> Result<Self> {
        let student = Self::open(config, device, kind, resolve, Weights::Shared(group))?;
        ensure!(
            !student.model.llm().decoder().shares_keys(),
            "zero_stage is 3, and some layers of {} attend to keys of others, so that none is computed anew by itself: take 1",
            config.model.llm
        );
        Ok(student)
    }

    fn open(
        config: &TrainConfig,
        device: Device,
        kind: Kind,
        resolve: &Resolve<'_>,
        weights: Weights<'_>,
    ) -> Result<Self> {
        config.model.validate()?;
        let llm_folder = llm_folder(config, resolve)?;
        let pictures = Pictures::open(config, &llm_folder, resolve)?;
        let (may_lack_weights, group) = match weights {
            Weights::All => (false, None),
            Weights::MayLack => (true, None),
            Weights::Shared(group) => (false, Some(group)),
        };
        let opening = Opening { config, llm_folder, pictures, device, kind, resolve, may_lack_weights, group };
        match config.model.way()? {
            Way::Vora { .. } => vora::student(opening),
            Way::Llava { vision_tower } => llava::student(opening, vision_tower),
            Way::Chameleon { vqmodel } => chameleon::student(opening, vqmodel),
            Way::Gemma4Unified => gemma4::student(opening),
        }
    }
}

/// What is there of the weights on disk, and in this process.
enum Weights<'a> {
    All,
    MayLack,
    Shared(&'a Arc<ProcessGroup>),
}
