//! A LLaVA to train: a new projection from a frozen encoder into an LLM that is frozen, adapted or trained whole.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind};
use vora_llm::LlmConfig;
use vora_model::{Llava, LlavaConfig, VisionLanguageModel};
use vora_recipe::TrainConfig;
use vora_torch::weights::Weights;
use vora_vision::Encoder;

use vora_model::Resolve;

use super::{Student, StudentParts, parts};
use crate::data::Pictures;

/// Opens LLM and encoder and puts a new projection, and adapters where asked for, between and on them.
pub(super) fn student(
    config: &TrainConfig,
    tower: &str,
    llm_folder: PathBuf,
    pictures: Pictures,
    device: Device,
    kind: Kind,
    resolve: &Resolve<'_>,
) -> Result<Student> {
    let section = &config.model;
    let tower_folder = resolve(tower).context("model.vision_tower")?;
    let encoder = Encoder::open(&tower_folder, device, kind).context("model.vision_tower")?;
    let patch_size = pictures.patch_size;

    let mut llava = LlavaConfig::new(LlmConfig::open(&llm_folder)?, &tower_folder)?;
    llava.llm_name.clone_from(&section.llm);
    tower.clone_into(&mut llava.mm_vision_tower);
    llava.mm_projector_type = section.mm_projector_type.unwrap_or_default();
    if let Some(layer) = &section.vision_feature_layer {
        llava.features.vision_feature_layer = layer.clone();
    }
    llava.lora = section.lora.as_ref().map(|lora| lora.over(llava.llm.num_hidden_layers));

    let llm = Weights::open(&llm_folder, device, kind)?;
    let source = if section.freezes_llm() { llm.clone() } else { llm.trained() };
    let trained = Weights::random(config.seed, device, kind);
    let model = Llava::assemble(llava, &source, encoder, &trained)?;
    llm.finish().with_context(|| format!("loading the LLM in {}", llm_folder.display()))?;
    let image_size = section.image_size;
    let (rows, cols) = model.image_grid(image_size, image_size).context("model.image_size")?;
    ensure!(
        (rows * patch_size, cols * patch_size) == (image_size, image_size),
        "model.image_size is {image_size}, it must be a multiple of the encoder's patch size, {patch_size}"
    );

    let parts = StudentParts { model: Box::new(model), trained, llm: Some(llm), llm_folder, pictures };
    let student = Student::from_parts(parts, config)?;
    if let Some(name) = &section.pretrained {
        resolve(name).and_then(|folder| parts::start_from(&student, &folder)).context("model.pretrained")?;
    }
    Ok(student)
}
