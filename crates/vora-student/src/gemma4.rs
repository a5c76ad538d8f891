//! A Gemma 4 Unified to teach: adapters on its frozen decoder, and what it sees through, frozen or trained.

use anyhow::{Context, Result};
use vora_model::{Gemma4Unified, Gemma4UnifiedConfig};

use crate::fitted::FittedTeacher;
use crate::opening::Opening;
use crate::{Student, StudentParts};

/// Opens the folder, and the teacher where there is one; makes what is new: adapters and heads.
pub(crate) fn student(opening: Opening<'_>) -> Result<Student> {
    let Opening { config, ref llm_folder, ref pictures, device, kind, resolve, .. } = opening;
    let section = &config.model;
    let teacher_folder = section.aux_vision.as_deref().map(resolve).transpose().context("model.aux_vision")?;
    let is_outline = opening.is_outline(&teacher_folder);
    let new = opening.new_weights(is_outline);
    let base = opening.frozen(&opening.llm(is_outline)?)?;
    let gemma = Gemma4UnifiedConfig::open(llm_folder).context("model.llm")?;
    let (lora, trains_embedder) = (section.adapters(), section.trains_vision_embedder());
    let model = Gemma4Unified::teach(gemma, &base, &section.llm, lora, trains_embedder, &new)
        .with_context(|| format!("loading {}", llm_folder.display()))?;

    let teacher = teacher_folder.as_ref().map(|folder| opening.teacher(folder, is_outline)).transpose()?;
    let teacher = teacher.map(|encoder| FittedTeacher::new(encoder, pictures, device));
    let Opening { llm_folder, pictures, .. } = opening;
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
