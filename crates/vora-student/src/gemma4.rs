//! A Gemma 4 Unified to teach: adapters on its frozen decoder, and what it sees through, frozen or trained.

use std::path::PathBuf;

use anyhow::{Context, Result};
use tch::{Device, Kind};
use vora_model::{Gemma4Unified, Gemma4UnifiedConfig, Resolve, trained};
use vora_recipe::TrainConfig;
use vora_torch::weights::Weights;
use vora_vision::Encoder;

use crate::few_bits::in_few_bits;
use crate::fitted::FittedTeacher;
use crate::pictures::Pictures;
use crate::{Student, StudentParts};

/// Opens the folder, and the teacher where there is one; makes what is new: adapters and heads. Where the folder
/// `may_lack_weights` and does, its decoder has shapes alone.
pub(crate) fn student(
    config: &TrainConfig,
    llm_folder: PathBuf,
    pictures: Pictures,
    device: Device,
    kind: Kind,
    resolve: &Resolve<'_>,
    may_lack_weights: bool,
) -> Result<Student> {
    let section = &config.model;
    let new = Weights::random(config.seed, device, kind);
    let base = if may_lack_weights && !trained::is_whole(&llm_folder) {
        Weights::shapes(kind)
    } else {
        Weights::open(&llm_folder, device, kind)?
    };
    let (base, is_outline) = (in_few_bits(&base, section)?, !base.has_numbers());
    let gemma = Gemma4UnifiedConfig::open(&llm_folder).context("model.llm")?;
    let (lora, trains_embedder) = (section.adapters(), section.trains_vision_embedder());
    let model = Gemma4Unified::teach(gemma, &base, &section.llm, lora, trains_embedder, &new)
        .with_context(|| format!("loading {}", llm_folder.display()))?;

    let teacher_folder = section.aux_vision.as_deref().map(resolve).transpose().context("model.aux_vision")?;
    let open_teacher = |folder: &PathBuf| {
        let encoder = Encoder::open(folder, device, kind).context("model.aux_vision")?;
        anyhow::Ok(FittedTeacher::new(encoder, &pictures, device))
    };
    let teacher = teacher_folder.as_ref().map(open_teacher).transpose()?;
    let parts = StudentParts { model: Box::new(model), trained: new, llm: None, llm_folder, pictures };
    let mut student = Student { is_outline, ..Student::from_parts(parts, config)? };
    if let (Some(teacher), Some(folder)) = (teacher, teacher_folder) {
        let view = teacher.view();
        student = student.taught(Box::new(teacher), config)?;
        if let (Some(distill), Some(cache)) = (&mut student.distill, config.teacher_cache()) {
            distill.keep_features(cache, &folder, &view, device, kind).context("distill.cache")?;
        }
    }
    Ok(student)
}
